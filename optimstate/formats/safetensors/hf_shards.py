"""Safetensors files in which several ranks wrote their parts of the same tensors, joined into full tensors.

`torch.distributed.checkpoint.HuggingFaceStorageWriter` with `save_distributed` writes one file for each rank and model
file, `shard-0000R-model-0000I-of-0000N.safetensors`; a metadata entry has the offset of each part. The full shapes are
not stored: they are the sums of the parts, also when torch reads such files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError
from optimstate.formats.protocol import Document, malformed
from optimstate.formats.ranks.tiles import Tile, check_tiling, tensor_of_pieces
from optimstate.io.location import Location
from optimstate.tensors.lazy import LazyTensor

__all__ = ["join_shards", "shard_files"]

_ENTRY = "DCP_SHARDING_INFO"
_NAME = re.compile(r"shard-(\d+)-(.+)-(\d+)-of-(\d+)\.safetensors")
_MAX_RANK = 1 << 20


def shard_files(parts: Mapping[str, Document]) -> dict[str, list[str]]:
    """The files of a folder that hold parts of the same tensors, by the name of the joined file."""
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        match = _NAME.fullmatch(name)
        if match and part.format == "safetensors" and isinstance(part.handle, dict) and _ENTRY in part.handle:
            found.setdefault(f"{match[2]}.safetensors", []).append(name)
    return found


def join_shards(path: Location, files: Mapping[str, Document]) -> Document:
    """Join the documents of all ranks into one.

    Args:
        path: A name for the result; no file of this name need exist.
        files: The ranks' documents by file name, for names returned by `shard_files`.

    Raises:
        CorruptCheckpointError: A file is missing between others, or the parts of a tensor do not fill it.
    """
    _check_numbers(path, list(files))
    tiles: dict[str, dict[tuple[int, ...], tuple[str, LazyTensor]]] = {}
    for name, part in files.items():
        offsets = _offsets(part)
        for key, tensor in part.tree.items():
            at = offsets.get(key)
            if at is None or len(at) != len(tensor.shape):
                raise CorruptCheckpointError(
                    f"invalid offset {describe(at)} for {describe(key)}", path=part.path, place="header"
                )
            if tensor.numel or not tensor.shape:
                tiles.setdefault(key, {}).setdefault(at, (name, tensor))
            else:
                tiles.setdefault(key, {})
    empty = {key: part.tree[key] for part in files.values() for key in part.tree if not tiles[key]}
    tree = {key: empty[key] if key in empty else _whole(path, key, pieces) for key, pieces in tiles.items()}
    rest = {key: value for part in files.values() for key, value in part.handle.items() if key != _ENTRY}
    note = (
        f"{len(files)} files of ranks are joined; they do not store shapes, so a missing last rank would go unnoticed"
    )
    return Document(path, "safetensors", tree, notes=[note], parts=dict(files), handle=rest)


def _check_numbers(path: Location, names: list[str]) -> None:
    """Check that no rank is missing between others; ranks are counted from 1, and their number is not stored."""
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    ranks = {int(match[1]) for match in matches}
    if max(ranks) > _MAX_RANK:
        raise CorruptCheckpointError(f"rank {max(ranks)} is out of range", path=path)
    missing = set(range(1, max(ranks) + 1)) - ranks
    if missing:
        raise CorruptCheckpointError(
            f"the files of rank {min(missing)} (shard-{min(missing):05d}-...) are missing",
            path=path,
            hint="The files of all ranks must be in one folder.",
        )


def _offsets(part: Document) -> dict[str, tuple[int, ...]]:
    with malformed(f"{_ENTRY} cannot be read", path=part.path, place="header"):
        about: Any = json.loads(part.handle[_ENTRY])
        found = {str(key): tuple(value["saved_offsets"]) for key, value in about.items()}
        if not all(type(n) is int and n >= 0 for offsets in found.values() for n in offsets):
            raise ValueError("an offset is not a natural number")
    return found


def _whole(path: Location, key: str, pieces: Mapping[tuple[int, ...], tuple[str, LazyTensor]]) -> LazyTensor:
    _, first = next(iter(pieces.values()))
    ends = [[start + size for start, size in zip(at, tensor.shape, strict=True)] for at, (_, tensor) in pieces.items()]
    shape = tuple(map(max, zip(*ends, strict=True)))
    for name, tensor in pieces.values():
        if tensor.dtype != first.dtype:
            raise CorruptCheckpointError(
                f"{describe(key)} is {first.dtype} in one file and {tensor.dtype} in {name}", path=path
            )
    try:
        check_tiling(shape, [(at, tensor.shape) for at, (_, tensor) in pieces.items()])
    except CheckpointError as error:
        files = ", ".join(name for name, _ in pieces.values())
        raise type(error)(
            f"tensor {describe(key)} in {files}: {error.reason}",
            path=path,
            hint="A file is missing or of another run.",
        ) from error
    tiles = [Tile(at, tensor.shape, tensor.storage) for at, (_, tensor) in pieces.items()]
    return tensor_of_pieces(first.dtype, shape, lambda: tiles)
