"""Places opened and written by name, be they on this machine or in a store: whoever reads or writes comes through here.

A name with `://` in it is in a store, and only then is anything that knows stores imported.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path

from optimstate.io.directory import AtomicDirectory
from optimstate.io.extents import FileSource, StoredSource
from optimstate.io.location import Location, Place
from optimstate.io.output import AtomicFile, AtomicGroup, Output

__all__ = ["beginning", "is_remote", "located", "new_file", "new_folder", "new_group", "open_source"]


def is_remote(place: object) -> bool:
    """Whether a place is in a store: `s3://`, `gs://`, `az://`, `hf://`, `https://`."""
    return not isinstance(place, Path) and "://" in str(place)


def located(place: Place) -> Location:
    """A place by its name."""
    if isinstance(place, str | PathLike):
        return Path(place)
    return place


def open_source(place: Place) -> StoredSource:
    """A file or object opened for reading at any offset.

    Raises:
        CheckpointNotFoundError: It does not exist.
        CheckpointError: It exists but cannot be opened as a file.
    """
    return FileSource(str(place))


def beginning(place: Place, length: int) -> bytes:
    """The first bytes of a file or object, `length` of them where it has as many.

    Raises:
        CheckpointError: It cannot be opened or read.
    """
    source = open_source(place)
    return source.read(0, min(source.size, length))


def new_file(
    place: Location, *, expected_size: int = 0, sync: bool = True, group: AtomicGroup | None = None
) -> AbstractContextManager[Output]:
    """A file or object that appears whole or not at all; see `AtomicFile`."""
    return AtomicFile(str(place), expected_size=expected_size, sync=sync, group=group)


def new_folder(place: Location, *, sync: bool = True) -> AbstractContextManager[Location]:
    """A folder that appears whole or not at all; see `AtomicDirectory`."""
    return AtomicDirectory(str(place), sync=sync)


def new_group(place: Location, *, sync: bool = True) -> AtomicGroup:  # noqa: ARG001
    """Files beside `place` that appear together; see `AtomicGroup`."""
    return AtomicGroup(sync=sync)
