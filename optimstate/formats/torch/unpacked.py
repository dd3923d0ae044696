"""Folders that an archive of `torch.save` was unpacked to, as browsers and download tools do: read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.pickles.unpickle import load
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.io.extents import Extent
from optimstate.io.location import Location
from optimstate.io.places import beginning, open_source
from optimstate.tensors.lazy import Storage

__all__ = ["NAME", "SUFFIXES", "read", "sniff", "write"]

NAME = "torch-unpacked"
SUFFIXES: tuple[str, ...] = ()


def sniff(path: Location, head: bytes) -> Claim:
    """Whether it is a folder with `data.pkl` and what stands beside it in an archive."""
    if head or not (path / "data.pkl").is_file():
        return Claim.NO
    whole = (path / "data").is_dir() or (path / "version").is_file()
    return Claim.CERTAIN if whole else Claim.NO


def read(path: Location) -> Document:
    """Open the folder.

    Raises:
        CheckpointError: A file is missing or damaged, or it was TorchScript.
    """
    if (path / "constants.pkl").exists():
        raise UnsupportedCheckpointError(
            "an unpacked archive of TorchScript",
            path=path,
            hint=f"Pack it again (cd {path.parent} && zip -0 -r {path.name}.pt {path.name}) and give that file.",
        )
    if (path / "byteorder").is_file() and beginning(path / "byteorder", 16).strip() == b"big":
        raise UnsupportedCheckpointError("written on a big-endian machine", path=path)
    source = open_source(path / "data.pkl")
    if source.size > MAX_PICKLE_BYTES:
        raise LimitExceededError(f"a pickle of {source.size} bytes, over the limit", path=source.path)
    made: dict[str, Storage] = {}

    def storage(kind: str, key: str, location: str, nbytes: int) -> Storage:
        if key not in made:
            made[key] = _storage(path / "data", kind, key, location, nbytes)
        return made[key]

    try:
        tree, names = load(source.read(0, source.size), storage)
    except (CorruptCheckpointError, UnsupportedCheckpointError, LimitExceededError) as error:
        if error.path:
            raise
        raise error.within(path=source.path) from error
    return Document(path, NAME, tree, names, ["an unpacked archive: torch.load reads it when it is packed again"])


def _storage(folder: Location, kind: str, key: str, location: str, nbytes: int) -> Storage:
    if Path(key).name != key:
        raise CorruptCheckpointError(f"storage {describe(key)} is outside of the folder")
    file = open_source(folder / key)
    if file.size != nbytes:
        raise CorruptCheckpointError(
            f"storage {describe(key)} is declared with {nbytes} bytes, its file has {file.size}", path=file.path
        )
    return Storage((Extent(file, 0, nbytes),) if nbytes else (), nbytes, kind, location, key)


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:  # noqa: ARG001
    """Refused: the archive is one file.

    Raises:
        RepresentationError: Always.
    """
    raise RepresentationError(
        f"{path.name}: an unpacked archive is read, but not written", hint="`optimstate convert` writes a .pt file."
    )
