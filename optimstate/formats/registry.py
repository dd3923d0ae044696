"""The container formats by name; each module is imported when a file asks for it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from optimstate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    LimitExceededError,
    RepresentationError,
    UnrecognizedFormatError,
)
from optimstate.formats.protocol import HEAD_BYTES, Document, Format
from optimstate.tree import no_garbage_collection

__all__ = ["FORMATS", "format_for_destination", "get_format", "open_checkpoint"]

# Name -> module, in the order they are asked whether a file is theirs.
FORMATS: dict[str, str] = {
    "torch": "optimstate.formats.torch.zip",
    "zip": "optimstate.formats.archive",
    "safetensors": "optimstate.formats.safetensors.container",
    "dcp": "optimstate.formats.dcp.folder",
    "deepspeed": "optimstate.formats.deepspeed.zero",
    "deepspeed-universal": "optimstate.formats.deepspeed.universal",
    "torch-legacy": "optimstate.formats.torch.legacy",
    "pickle": "optimstate.formats.torch.pickle_file",
    "ranks": "optimstate.formats.ranks.files",
    "folder": "optimstate.formats.folder",
}


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        RepresentationError: There is none.
    """
    if name not in FORMATS:
        raise RepresentationError(f"no container format is called {name!r}", hint=f"Known: {', '.join(FORMATS)}.")
    return cast("Format", import_module(FORMATS[name]))


def detect(path: Path) -> Format | None:
    """The format a file or folder is of, or None.

    Raises:
        CheckpointNotFoundError: There is nothing at `path`.
    """
    if not path.exists():
        raise CheckpointNotFoundError("no such file or folder", path=path, hint="Check the path for a typing mistake.")
    head = b""
    if path.is_file():
        try:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
    return next((found for found in map(get_format, FORMATS) if found.sniff(path, head)), None)


def open_checkpoint(path: str | Path) -> Document:
    """Open a checkpoint of any known container format.

    Raises:
        CheckpointError: It does not exist, is of no known format, or is damaged.
    """
    path = Path(path)
    found = detect(path)
    if found is None:
        what = "an empty file" if path.is_file() and not path.stat().st_size else "not a checkpoint of a known format"
        raise UnrecognizedFormatError(
            what,
            path=path,
            hint="Known are files of torch.save, old and new, pickles of state dicts, safetensors, single or sharded, "
            "folders of torch.distributed.checkpoint and of DeepSpeed, zip archives and folders of these.",
        )
    try:
        with no_garbage_collection():
            return found.read(path)
    except RecursionError:
        raise LimitExceededError("nested too deeply", path=path) from None


def format_for_destination(path: Path, name: str | None) -> Format:
    """The format to write: by name, else by the suffix of the destination.

    Raises:
        RepresentationError: Neither says which.
    """
    if name is not None:
        return get_format(name)
    for key in FORMATS:
        found = get_format(key)
        if path.name.endswith(found.SUFFIXES):
            return found
    raise RepresentationError(
        f"{path.name!r}: the suffix does not say which container to write",
        hint="Use .pt, .pth, .bin, .ckpt or .safetensors, or give --to.",
    )
