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
def opening(path: Place) -> Iterator[None]:
    """Work on an opened checkpoint without garbage collection; too deep a nesting or too large a number is an error."""
    try:
        with no_garbage_collection():
            yield
    except RecursionError:
        raise LimitExceededError("nested too deeply", path=path) from None
    except OverflowError:
        raise LimitExceededError("has a whole number that is too large to compute with", path=path) from None
    except OSError as error:
        if isinstance(error, OptimStateError):
            raise
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot be read: {reason}", path=error.filename or path) from error
