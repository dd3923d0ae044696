"""Checkpoints opened for the verbs: what goes wrong is an error of ours, and the garbage collector keeps out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optimstate.errors import CheckpointError, LimitExceededError, OptimStateError
from optimstate.formats.protocol import Document
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.tensors.lazy import LazyTensor, announced
from optimstate.tree import no_garbage_collection, nodes

__all__ = ["open_to_read", "opening"]


def open_to_read(place: Place) -> Document:
    """A checkpoint whose tensors will be read; from a store, they are fetched together.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    document = open_checkpoint(place)
    announced(node for node in nodes(document.tree) if isinstance(node, LazyTensor))
    return document


@contextmanager
def opening(*paths: Place) -> Iterator[None]:
    """Work on opened checkpoints without garbage collection; every error of theirs names the file.

    Args:
        paths: The checkpoint; or all of them, where an error need not say which it is about.

    Raises:
        CheckpointError: One cannot be read, or is nested too deeply.
    """
    path = " or ".join(map(str, paths))
    try:
        with no_garbage_collection():
            yield
    except RecursionError:
        raise LimitExceededError("nested too deeply", path=path) from None
    except OverflowError:
        raise LimitExceededError("has a whole number that is too large to compute with", path=path) from None
    except CheckpointError as error:
        if error.path:
            raise
        raise error.within(path=path) from error.__cause__
    except OSError as error:
        if isinstance(error, OptimStateError):
            raise
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot be read: {reason}", path=error.filename or path) from error
