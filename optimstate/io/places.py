"""Opening, reading and writing files by name, on this machine or in a store; all reading and writing goes through here.

A name that contains `://` is in a store; modules for stores are imported only for such names, and modules for writing
only by functions that write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from optimstate.describe import describe
from optimstate.errors import UsageError
from optimstate.io.extents import FileSource, StoredSource
from optimstate.io.location import InStore, Location, Place

if TYPE_CHECKING:
    from optimstate.io.output import AtomicGroup, Output
    from optimstate.io.remote.path import RemotePath

__all__ = ["beginning", "is_remote", "located", "new_file", "new_folder", "new_group", "open_source", "prefetch"]


_LOST_SLASH = re.compile(r"(s3|gs|az|hf|https?):/[^/]")


def is_remote(place: object) -> bool:
    """Whether a file or folder is in a store: `s3://`, `gs://`, `az://`, `hf://`, `https://`."""
    return not isinstance(place, Path) and "://" in str(place)


def located(place: Place) -> Location:
    """The location with a name.

    Raises:
        UsageError: It is not a name, or the name is empty, of an unknown kind of store, or contains credentials.
    """
    if place == "":
        raise UsageError("a path is empty", hint="Give the name of a file or folder; `.` is the current folder.")
    if isinstance(place, str) and "://" in place:
        from optimstate.io.remote.path import remote

        return remote(place)
    if isinstance(place, str | PathLike):
        path = Path(place)
        if _LOST_SLASH.match(str(path)) and not os.path.lexists(path):
            raise UsageError(
                f"{path}: a name in a store has two slashes after the colon",
                hint="Give it as text, s3://BUCKET/NAME, because a Path does not keep both; plans and pages are files.",
            )
        return path
    if not isinstance(place, InStore):
        raise UsageError(
            f"a checkpoint is given by its path or address, not as {describe(type(place).__name__)}",
            hint="Save what is in memory to a file first, or load it by optimstate.hooks.",
        )
    return place


def open_source(place: Place) -> StoredSource:
    """A file or object opened for reading at any offset.

    Raises:
        CheckpointNotFoundError: It does not exist.
        CheckpointError: It exists but cannot be opened as a file.
    """
    where = located(place)
    return FileSource(where) if isinstance(where, Path) else _far(where).open_source()


def prefetch(places: Iterable[Location]) -> None:
    """Announce that files will be opened soon; of those in a store the beginnings are fetched together."""
    far = [_far(place) for place in places if not isinstance(place, Path)]
    if far:
        from optimstate.io.remote.path import opened_together

        opened_together(far)


def _far(place: Location) -> RemotePath:
    from optimstate.io.remote.path import RemotePath

    assert isinstance(place, RemotePath)
    return place


def beginning(place: Place, length: int) -> bytes:
    """The first `length` bytes of a file or object, or all if it has fewer.

    Raises:
        CheckpointError: It cannot be opened or read.
    """
    source = open_source(place)
    return source.read(0, min(source.size, length))


def new_file(
    place: Location,
    *,
    expected_size: int = 0,
    sync: bool = True,
    replace: bool = True,
    group: AtomicGroup | None = None,
) -> AbstractContextManager[Output]:
    """A file or object that appears whole or not at all; see `AtomicFile`.

    Args:
        place: The file.
        expected_size: Its approximate number of bytes; 0 if unknown.
        sync: Flush it to the disk.
        replace: Whether an existing object in a store may be replaced; for files the caller has checked this already.
        group: The files that appear together with it.
    """
    if isinstance(place, Path):
        from optimstate.io.output import AtomicFile

        return AtomicFile(place, expected_size=expected_size, sync=sync, group=group)
    from optimstate.io.remote.output import RemoteFile, RemoteGroup

    made = group.made if isinstance(group, RemoteGroup) else None
    return RemoteFile(_far(place), expected_size=expected_size, replace=replace, made=made)


def new_folder(place: Location, *, sync: bool = True) -> AbstractContextManager[Location]:
    """A folder that appears whole or not at all; see `AtomicDirectory` and, for stores, `RemoteFolder`."""
    if isinstance(place, Path):
        from optimstate.io.directory import AtomicDirectory

        return AtomicDirectory(place, sync=sync)
    from optimstate.io.remote.output import RemoteFolder

    return RemoteFolder(_far(place))


def new_group(place: Location, *, replaced: Sequence[Location] = (), sync: bool = True) -> AtomicGroup:
    """Files beside `place` that appear together; see `AtomicGroup` and, for stores, `RemoteGroup`."""
    if isinstance(place, Path):
        from optimstate.io.output import AtomicGroup

        return AtomicGroup(place, replaced=[path for path in replaced if isinstance(path, Path)], sync=sync)
    from optimstate.io.remote.output import RemoteGroup

    return RemoteGroup(_far(place))
