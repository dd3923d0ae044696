"""The zip archives of `torch.save`: every storage is a record, and the tree a pickle in the record `data.pkl`.

The modules that write archives (`zip_writer`) and read damaged ones (`salvage`) are imported only when needed.
"""

from __future__ import annotations

from typing import Any

from optimstate.errors import CorruptCheckpointError, UnrecognizedFormatError, UnsupportedCheckpointError
from optimstate.formats.protocol import HEAD_BYTES, Claim, Document, WriteOptions
from optimstate.formats.torch import script
from optimstate.formats.torch.zip_directory import Archive
from optimstate.formats.torch.zip_end import LOCAL
from optimstate.formats.torch.zip_reader import read_pickle
from optimstate.io.extents import FileSlice, StoredSource
from optimstate.io.location import Location
from optimstate.io.places import open_source

NAME = "torch"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th")
OPTIONS = frozenset({"checksums"})

_FIRST_RECORDS = (b"data.pkl", b"version", b"constants.pkl", b".format_version", b".data/version")


def sniff(path: Location, head: bytes) -> Claim:
    """Certain if the first record of a zip archive is one of torch's, likely if it is any record in a folder."""
    if head[:4] != b"PK\x03\x04" or path.suffix in (".distcp", ".safetensors"):  # other things follow
        return Claim.LIKELY if head[:4] == b"PK\x05\x06" else Claim.NO
    first = LOCAL.size
    name = head[first : first + int.from_bytes(head[first - 4 : first - 2], "little")]
    _, folder, record = name.partition(b"/")
    if not folder:
        return Claim.NO
    return Claim.CERTAIN if record in _FIRST_RECORDS or record.startswith(b"data/") else Claim.LIKELY


def read(path: Location) -> Document:
    """Open a checkpoint of `torch.save`, or an archive of TorchScript (see `script`).

    Raises:
        CheckpointError: It is damaged, hostile, compressed or big-endian.
    """
    source = open_source(path)
    try:
        archive = Archive(source)
    except UnrecognizedFormatError as error:
        if sniff(path, source.read(0, min(source.size, HEAD_BYTES))) is not Claim.CERTAIN:
            raise
        raise CorruptCheckpointError(
            "the first record is one of torch.save, but the records have no common folder", path=path
        ) from error
    if script.is_script(archive):
        return script.read_script(path, archive)
    tree, names = _read_checkpoint(archive)
    notes = [] if "version" in archive.records else ["the record 'version' is missing: torch.load refuses this file"]
    return Document(path, NAME, tree, names, notes, checksums=[archive.recorded], handle=archive)


def salvage(path: Location) -> Document:
    """The complete records of a truncated archive (see the module `salvage`).

    Raises:
        CorruptCheckpointError: There are none.
    """
    from optimstate.formats.torch import salvage as salvaging

    return salvaging.salvage(path, NAME)


def read_archive(source: StoredSource | FileSlice) -> tuple[Any, list[tuple[str, str]], Archive]:
    """The tree of an archive, the globals its pickle mentions, and its directory.

    Raises:
        CheckpointError: As `read`, or it is of TorchScript.
    """
    archive = Archive(source)
    if script.is_script(archive):
        raise UnsupportedCheckpointError(
            "an archive of TorchScript inside another file", path=source.path, hint="Extract it and read it alone."
        )
    return *_read_checkpoint(archive), archive


def _read_checkpoint(archive: Archive) -> tuple[Any, list[tuple[str, str]]]:
    archive.refuse_compressed()
    if "data.pkl" not in archive.records:
        what = script.other_archive(archive) or "a zip file, but not one of torch.save: no data.pkl"
        raise UnrecognizedFormatError(what, path=archive.source.path)
    return read_pickle(archive, "data.pkl", "data/")


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a tree as `torch.save` would; see `zip_writer.write`."""
    from optimstate.formats.torch import zip_writer

    return zip_writer.write(tree, path, like=like, options=options)
