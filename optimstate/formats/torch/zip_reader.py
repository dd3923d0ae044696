"""The pickles of torch's zip archives: trees whose storages are records beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, LimitExceededError, UnsupportedCheckpointError
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.pickles.unpickle import load
from optimstate.formats.torch.zip_directory import Archive, RecordStorage
from optimstate.tensors.lazy import Storage

__all__ = ["read_pickle", "storages_of"]

Missing = Callable[[str, str, str, int], Storage]
"""(class, key, location, number of bytes) -> what stands for a storage without a whole record."""


def read_pickle(archive: Archive, record: str, folder: str) -> tuple[Any, list[tuple[str, str]]]:
    """The tree of a pickled record, and the globals it mentions.

    Args:
        archive: Where it is.
        record: The name of the pickle.
        folder: Where the records of its storages are, with a slash.

    Raises:
        CheckpointError: It is damaged, hostile or from a big-endian machine.
    """
    path = archive.source.path
    if "byteorder" in archive.records and archive.read(archive.records["byteorder"], 16).strip() == b"big":
        raise UnsupportedCheckpointError(
            "written on a big-endian machine", path=path, hint="Load it with torch, which swaps the bytes, and save it."
        )
    pickled = archive.read(archive.records[record], MAX_PICKLE_BYTES)
    try:
        return load(pickled, storages_of(archive, folder))
    except (CorruptCheckpointError, UnsupportedCheckpointError, LimitExceededError) as error:
        if error.path:
            raise
        raise error.within(path=path, place=f"{record} {error.place}".strip()) from error


def storages_of(archive: Archive, folder: str, missing: Missing | None = None) -> Missing:
    """What gives an unpickler the storages of an archive.

    Args:
        archive: Where their records are.
        folder: Where in it, with a slash.
        missing: What to do for one without a record of its size; by default an error.
    """
    path, records = archive.source.path, archive.records
    positions, sizes = records.positions, records.sizes
    order = [*positions, ""]
    new = object.__new__
    made: list[RecordStorage | None] = [None] * len(records)
    following = 0

    def storage(kind: str, key: str, location: str, nbytes: int) -> Storage:
        nonlocal following
        name = folder + key
        # Most are mentioned in the order of the records, where comparing a name is quicker than looking it up.
        position = following if order[following] == name else positions.get(name, -1)
        following = position + 1
        if position < 0 or sizes[position] != nbytes:
            if missing is not None:
                return missing(kind, key, location, nbytes)
            if position < 0:
                raise CorruptCheckpointError(f"storage {describe(key)} has no record", path=path)
            raise CorruptCheckpointError(
                f"storage {describe(key)} is declared with {nbytes} bytes, its record has {sizes[position]}",
                path=path,
                place=f"offset {records.headers[position]}",
            )
        found = made[position]
        if found is None:
            # A call of __init__ would take as long as all of this, once for each tensor.
            found = made[position] = new(RecordStorage)
            found.archive = archive
            found.position = position
            found.nbytes = nbytes
            found.kind = kind
            found.location = location
            found.key = key
        return found

    return storage
