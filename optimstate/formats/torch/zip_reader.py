"""Reading the pickles in torch's zip archives: trees whose storages are other records of the archive."""

from __future__ import annotations

from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.pickles.unpickle import StorageLoader, errors_in, load
from optimstate.formats.torch.zip_directory import Archive, RecordStorage
from optimstate.tensors.lazy import Storage

__all__ = ["read_pickle", "storages_of"]


def read_pickle(archive: Archive, record: str, folder: str) -> tuple[Any, list[tuple[str, str]]]:
    """The tree of a pickled record, and the globals it mentions.

    Args:
        archive: The archive.
        record: The name of the pickle's record.
        folder: The folder of the records of its storages, with a slash.

    Raises:
        CheckpointError: It is damaged, hostile or from a big-endian machine.
    """
    path = archive.source.path
    if "byteorder" in archive.records and archive.read(archive.records["byteorder"], 16).strip() == b"big":
        raise UnsupportedCheckpointError(
            "written on a big-endian machine", path=path, hint="Load it with torch, which swaps the bytes, and save it."
        )
    pickled = archive.read(archive.records[record], MAX_PICKLE_BYTES)
    with errors_in(path, record):
        return load(pickled, storages_of(archive, folder))


def storages_of(archive: Archive, folder: str, missing: StorageLoader | None = None) -> StorageLoader:
    """A function that gives an unpickler the storages of an archive.

    Args:
        archive: The archive.
        folder: The folder of their records, with a slash.
        missing: Called for a storage without a record of its size; None raises an error.
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
        # Most are mentioned in the order of the records; comparing a name is faster than looking it up.
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
            # Calling __init__ would double the time of this function, which is called for every tensor.
            found = made[position] = new(RecordStorage)
            found.archive = archive
            found.position = position
            found.nbytes = nbytes
            found.kind = kind
            found.location = location
            found.key = key
        return found

    return storage
