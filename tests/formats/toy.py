"""A container made up for the tests: magic, header length, header checksum, a JSON header, then every storage whole.

This file and one entry in the registry are all that a new container takes.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.safetensors import json_tree
from optimstate.io.extents import Extent, FileSource
from optimstate.io.output import AtomicFile
from optimstate.tensors.lazy import LazyTensor, Storage

NAME = "toy"
SUFFIXES = (".toy",)
_HEAD = struct.Struct("<4sQLQ")  # magic, bytes of the header, their CRC-32, bytes of the whole file


def sniff(path: Path, head: bytes) -> Claim:
    """Whether the magic is there."""
    return Claim.CERTAIN if head[:4] == b"TOY1" and path.is_file() else Claim.NO


def read(path: Path) -> Document:
    """Open it."""
    source = FileSource(path)
    magic, length, crc, total = _HEAD.unpack(source.read(0, _HEAD.size))
    header = source.read(_HEAD.size, length)
    if magic != b"TOY1" or zlib.crc32(header) != crc or total != source.size:
        raise CorruptCheckpointError("the header does not match its checksum", path=path, place="offset 0")
    document = json.loads(header)
    storages, at = [], _HEAD.size + length
    for nbytes, kind, location in document["storages"]:
        storages.append(Storage((Extent(source, at, nbytes),), nbytes, kind, location))
        at += nbytes

    def tensor(node: dict[str, Any]) -> LazyTensor:
        storage, dtype, shape, stride, *rest = node["$tensor"]
        return LazyTensor(storages[storage], dtype, tuple(shape), tuple(stride), *rest)

    return Document(path, NAME, json_tree.decode(document["tree"], tensor))


def write(tree: Any, path: Path, *, like: Document | None, options: WriteOptions) -> list[str]:
    """Write it."""
    storages: dict[int, tuple[int, Storage]] = {}

    def tensor(_: Any, t: LazyTensor) -> Any:
        index, _ = storages.setdefault(id(t.storage), (len(storages), t.storage))
        flags = (t.requires_grad, t.is_parameter, t.metadata)
        return {"$tensor": [index, t.dtype, t.shape, t.stride, t.offset, *flags]}

    encoded = json_tree.encode(tree, tensor)
    kept = [storage for _, storage in storages.values()]
    described = [[s.nbytes, s.kind, s.location] for s in kept]
    header = json.dumps({"tree": encoded, "storages": described}).encode()
    total = _HEAD.size + len(header) + sum(s.nbytes for s in kept)
    with AtomicFile(path, sync=options.sync) as out:
        out.write(_HEAD.pack(b"TOY1", len(header), zlib.crc32(header), total) + header)
        out.copy((piece for s in kept for piece in s.pieces), options.progress)
    return []
