"""Checking the destination of an output before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from optimstate.errors import DestinationError, DestinationExistsError
from optimstate.io.location import InStore, Location

__all__ = ["cannot_write", "check_destination", "check_kind"]


def check_destination(destination: Location, sources: Sequence[Location], *, force: bool) -> None:
    """Refuse a destination that exists, is one of the inputs, or has no parent folder.

    Raises:
        DestinationExistsError: It exists and `force` is false.
        DestinationError: It is (or contains, or is inside) an input, is neither a regular file nor a folder, or its
            parent folder does not exist.
    """
    if not isinstance(destination, Path):
        _check_remote(destination, sources, force=force)
        return
    try:
        for source in sources:
            if not isinstance(source, Path) or not _is_there(source):
                continue
            if destination.exists() and destination.samefile(source):
                raise DestinationError(
                    f"{destination}: source and destination are the same",
                    hint="Give another destination; `remap --in-place` changes a file where it is.",
                )
            resolved, inside = destination.resolve(), source.resolve()
            _refuse_nesting(
                destination,
                source,
                inside=source.is_dir() and inside in resolved.parents,
                around=destination.is_dir() and resolved in inside.parents,
            )
        check_kind(destination)
        if os.path.lexists(destination) and not force:
            raise DestinationExistsError(f"{destination}: exists already", hint="Give --force to replace it.")
        if not destination.parent.is_dir():
            raise DestinationError(
                f"{destination}: the folder {destination.parent} does not exist", hint="Create it first."
            )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, DestinationError):
            raise
        raise cannot_write(destination, error) from error


def _refuse_nesting(destination: Location, source: Location, *, inside: bool, around: bool) -> None:
    if inside:
        raise DestinationError(f"{destination}: is inside the source {source}", hint="Give a path outside of it.")
    if around:
        raise DestinationError(f"{destination}: contains the source {source}", hint="Give another destination.")


def _is_there(source: Path) -> bool:
    """Whether a source exists; if it cannot be examined, reading it will raise the error."""
    try:
        source.stat()
    except (OSError, ValueError):
        return False
    return True


def _check_remote(destination: Location, sources: Sequence[Location], *, force: bool) -> None:
    """As `check_destination`, for stores, where folders are parts of names; writing checks once more."""
    for source in sources:
        one, other = f"{str(destination).rstrip('/')}/", f"{str(source).rstrip('/')}/"
        if one == other:
            raise DestinationError(
                f"{destination}: source and destination are the same", hint="Give another destination."
            )
        _refuse_nesting(destination, source, inside=one.startswith(other), around=other.startswith(one))
    if isinstance(destination, InStore):
        destination.check_writable()
    if not force and destination.exists():
        if destination.is_dir():
            raise DestinationExistsError(
                f"{destination}: there are objects below this name; a folder of a store is not replaced",
                hint="Give another name, or remove it with the store's own tools first.",
            )
        raise DestinationExistsError(f"{destination}: exists already", hint="Give --force to replace it.")


def check_kind(path: Path) -> None:
    """Refuse to replace anything but files and folders, such as pipes, sockets and devices."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not (S_ISREG(mode) or S_ISDIR(mode)):
            raise DestinationError(
                f"{path}: is not a regular file or folder",
                hint="Give another destination; to write to a pipe, write a file and copy it.",
            )


def cannot_write(path: Path, error: BaseException) -> DestinationError:
    """The error for an output for which a system call failed."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DestinationError(f"{path}: cannot be written: {reason}")
