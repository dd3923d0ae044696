"""Writing archives of `torch.save`, in torch's own layout, or as a new pickle and directory after the old records.

Sizes and checksums are in the directory at the end, so a new pickle and directory after the old records make a complete
new checkpoint. Renames are written in this way, to a new file (the records are copied unchanged) and in place (the
records are not touched).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from optimstate.errors import DestinationError
from optimstate.formats.pickles.pickle import dump
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.formats.torch.zip_directory import Archive, RecordStorage
from optimstate.formats.torch.zip_in_place import append_directory
from optimstate.formats.torch.zip_records import records_behind, write_records
from optimstate.io.extents import Extent
from optimstate.io.location import Location
from optimstate.io.output import Output
from optimstate.tensors.lazy import LazyTensor, Storage, announced
from optimstate.tree import nodes, walk

__all__ = ["rewrite_in_place", "write", "write_archive"]


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a tree as `torch.save` would.

    If the tree has exactly the storages of `like`, its records are copied in one piece, and only the pickle and the
    directory are new; otherwise every record is written in torch's own order and alignment.
    """
    options = options or WriteOptions()
    if like is not None and isinstance(like.handle, Archive) and _same_storages(tree, like.handle):
        _write_redescribed(tree, path, like.handle, options)
    else:
        _write_new(tree, path, like, options)
    return []


def _same_storages(tree: Any, archive: Archive) -> bool:
    """Whether the tree has exactly the archive's storages in its order, from which torch computes their offsets."""
    found = (node.storage if isinstance(node, LazyTensor) else node for _, node in walk(tree))
    used = {id(storage): storage for storage in found if isinstance(storage, Storage)}.values()
    if not all(isinstance(storage, RecordStorage) and storage.archive is archive for storage in used):
        return False
    kept = ["data/" + storage.key for storage in used]
    return kept == [name for name in archive.records if name.startswith("data/")]


def _write_new(tree: Any, path: Location, like: Document | None, options: WriteOptions) -> None:
    announced(node for node in nodes(tree) if isinstance(node, LazyTensor))
    pickled, storages = _pickled(tree)
    root = (path.stem if path.stem.isascii() and path.stem else "archive") + "/"
    expected = len(pickled) + sum(storage.nbytes + 256 for storage in storages)
    with options.new_file(path, expected_size=expected) as out:
        write_records(out, root, pickled, storages, _other_records(like), options)
        options.confirmed()


def write_archive(out: Output, tree: Any, options: WriteOptions) -> int:
    """Append a whole archive to an output, as `torch.save` writes it to a stream, and return its number of bytes."""
    return write_records(out, "archive/", *_pickled(tree), [], options)


def _pickled(tree: Any) -> tuple[bytes, list[Storage]]:
    """The pickle of a tree, and the storages to which it refers in the order of their keys."""
    order: dict[int, tuple[str, Storage]] = {}
    pickled = dump(tree, lambda storage: order.setdefault(id(storage), (str(len(order)), storage))[0])
    return pickled, [storage for _, storage in order.values()]


_OWN_RECORDS = {"data.pkl", ".format_version", ".storage_alignment", "byteorder", "version", ".data/serialization_id"}


def _other_records(like: Document | None) -> list[tuple[str, Extent]]:
    """The records of `like` that are neither torch's own nor storages; they are kept."""
    if like is None or not isinstance(like.handle, Archive):
        return []
    archive = like.handle
    return [
        (name, archive.extent(record))
        for name, record in archive.records.items()
        if name not in _OWN_RECORDS and not name.startswith("data/")
    ]


def _kept_entries(archive: Archive) -> list[bytes]:
    return [entry for name, entry in archive.entries() if name != "data.pkl"]


def _write_redescribed(tree: Any, path: Location, archive: Archive, options: WriteOptions) -> None:
    """Write everything but the pickle at its old offset, so that torch can still predict the storages' offsets."""
    pickled = dump(tree)
    old = archive.records["data.pkl"]
    start = archive.data_offset(old)
    others = [record for name, record in archive.records.items() if name != "data.pkl"]
    stop = archive.directory_offset if any(other.header > old.header for other in others) else old.header
    pieces = [Extent(archive.source, 0, min(start, stop))]
    if stop > start:  # the names in the old pickle must not remain in the file
        pieces += [Extent(None, 0, old.size), Extent(archive.source, start + old.size, stop - start - old.size)]
    size = stop + len(pickled) + sum(map(len, _kept_entries(archive)))
    with options.new_file(path, expected_size=size) as out:
        position = out.copy(pieces, options.progress)
        for part in _redescription(archive, pickled, position):
            out.write(part)
        options.confirmed()


def _redescription(archive: Archive, pickled: bytes, position: int) -> tuple[bytes, bytes, bytes]:
    """The new pickle, the directory and its end records, to be written after the old records."""
    return records_behind(archive.root, position, ("data.pkl", pickled), _kept_entries(archive))


def rewrite_in_place(document: Document, tree: Any) -> None:
    """Give the file a new tree over the same storages by appending to it.

    No existing byte is overwritten, and at every moment torch and this library load the old or the new checkpoint (see
    `zip_in_place`). On an error the file is truncated to its old size.

    Raises:
        DestinationError: The tree does not have exactly the file's storages, or the file cannot be written.
    """
    archive = document.handle
    if not isinstance(document.path, Path):
        raise DestinationError(
            f"{document.path}: an object of a store cannot be changed in place", hint="Write to a new name instead."
        )
    if not isinstance(archive, Archive) or not _same_storages(tree, archive):
        raise DestinationError(
            f"{document.path}: only changes that keep every tensor can be made in place",
            hint="Write to a new file instead.",
        )
    size = archive.source.size
    pickled = dump(tree)
    try:
        fd = os.open(document.path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            if os.lseek(fd, 0, os.SEEK_END) != size:
                raise DestinationError(f"{document.path}: changed while it was read")
            new = b"".join(_redescription(archive, pickled, size))
            append_directory(fd, size, new, directory=archive.directory_offset, entries=len(archive.records))
        finally:
            os.close(fd)
    except OSError as error:
        if isinstance(error, DestinationError):
            raise
        raise DestinationError(f"{document.path}: cannot be written: {error.strerror}") from error
