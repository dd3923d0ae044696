"""Folders into which a browser or download tool unpacked an archive of `torch.save`: read only."""

from __future__ import annotations

from pathlib import Path

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.pickles.unpickle import load_file
from optimstate.formats.protocol import Claim, Document, read_only
from optimstate.io.location import Location
from optimstate.io.places import beginning, open_source
from optimstate.tensors.lazy import Storage

__all__ = ["NAME", "SUFFIXES", "read", "sniff", "write"]

NAME = "torch-unpacked"
SUFFIXES: tuple[str, ...] = ()


def sniff(path: Location, head: bytes) -> Claim:
    """Whether a folder has `data.pkl` and the folder `data` or the file `version` beside it."""
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
    storages: dict[str, Storage] = {}

    def storage(kind: str, key: str, location: str, nbytes: int) -> Storage:
        if key not in storages:
            storages[key] = _storage(path / "data", kind, key, location, nbytes)
        return storages[key]

    tree, names = load_file(open_source(path / "data.pkl"), storage)
    return Document(path, NAME, tree, names, ["an unpacked archive: torch.load reads it when it is packed again"])


def _storage(folder: Location, kind: str, key: str, location: str, nbytes: int) -> Storage:
    if Path(key).name != key:
        raise CorruptCheckpointError(f"storage {describe(key)} is outside the folder")
    file = open_source(folder / key)
    if file.size != nbytes:
        raise CorruptCheckpointError(
            f"storage {describe(key)} is declared with {nbytes} bytes, its file has {file.size}", path=file.path
        )
    return Storage((file.extent(0, nbytes),) if nbytes else (), nbytes, kind, location, key)


write = read_only("an unpacked archive is read, but not written", hint="`optimstate convert` writes a .pt file.")
