"""What an input of the readers is: a byte that says how the others become a file and how it is read, and the others.

Small inputs are fast ones, and what stands behind a checksum or a length is reached by few changes: so besides whole
files an input may be the pickle of a torch archive whose other records are given, the header of a safetensors file or
the bytes of a member of a zip file. Lengths and checksums of what is around it are then right.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["SHARD", "Input", "shard", "understood", "write_seeds"]

WHOLE = ("a.pt", "a.safetensors", "a.npz", "a.npy", "a.zip", "a.pkl", "a.safetensors.index.json", "d/.metadata")
WRAPPED = ("pickle in a.pt", "header of a.safetensors", "array in a.npz", "pickle in a.zip")
KINDS = WHOLE + WRAPPED
LOOKS = ("inspect", "scan", "salvage")
STORAGES = (24, 8, 4, 24, 24, 4, 8, 8)  # bytes of each in the archive around a pickle: a model's, its optimizer's


class Input(NamedTuple):
    """A file and what is done with it."""

    name: str
    data: bytes
    look: str


def understood(data: bytes) -> Input:
    """The input that the bytes of the fuzzer stand for."""
    first, rest = (data[0], data[1:]) if data else (0, b"")
    kind, look = KINDS[first % len(KINDS)], LOOKS[first // len(KINDS) % len(LOOKS)]
    if kind in WHOLE:
        return Input(kind, rest, look)
    part, _, name = kind.rpartition(" ")
    if part.startswith("header"):
        ends = [0, *(int(end) for end in re.findall(rb'"data_offsets": ?\[\d+, ?(\d{1,4})\]', rest))]
        return Input(name, struct.pack("<Q", len(rest)) + rest + bytes(max(ends)), look)
    if name == "a.npz":
        return Input(name, _zip((b"", b"", 0), "data.npy", rest), look)
    return Input(name, _zip(_storages(), "a/data.pkl", rest), look)


Records = tuple[bytes, bytes, int]  # of a zip file: the members, their entries of the directory, how many there are


@cache
def _storages() -> Records:
    members = directory = b""
    records = {"a/version": b"3\n", **{f"a/data/{key}": bytes(size) for key, size in enumerate(STORAGES)}}
    for name, data in records.items():
        member, entry = _record(name, data, len(members))
        members, directory = members + member, directory + entry
    return members, directory, len(records)


def _record(name: str, data: bytes, at: int) -> tuple[bytes, bytes]:
    """A stored member of a zip file and its entry of the directory."""
    called, size = name.encode(), len(data)
    same = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(data), size, size, len(called), 0)
    rest = struct.pack("<HHHII", 0, 0, 0, 0, at)
    return b"PK\3\4" + same + called + data, b"PK\1\2\x14\0" + same + rest + called


def _zip(others: Records, name: str, data: bytes) -> bytes:
    members, directory, count = others
    member, entry = _record(name, data, len(members))
    end = struct.pack("<HHHHIIH", 0, 0, count + 1, count + 1, len(directory + entry), len(members + member), 0)
    return b"".join([members, member, directory, entry, b"PK\5\6", end])


# --- seeds ----------------------------------------------------------------------------------------------------------

LONGEST = 2500
SHARD = "model-1.safetensors"  # stands beside every input


def write_seeds(folder: Path) -> None:
    """Small files of every container and the parts of files that are wrapped, each for every way to look at it."""
    for kind, data in _parts():
        for look in range(len(LOOKS) if len(data) <= LONGEST else 0):
            seed = bytes([KINDS.index(kind) + len(KINDS) * look]) + data
            (folder / hashlib.sha256(seed).hexdigest()).write_bytes(seed)


def _parts() -> Iterator[tuple[str, bytes]]:
    from tests.corpus import FILES

    for path in sorted(FILES.rglob("*")):
        if not path.is_file() or path.stat().st_size > 200_000:
            continue
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            yield "a.safetensors", data
            yield "header of a.safetensors", data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
        elif path.name.endswith(".index.json"):
            yield "a.safetensors.index.json", data
        elif zipfile.is_zipfile(path):
            yield "a.pt", data
        elif path.suffix != ".json":
            yield "a.pkl", data
            yield "pickle in a.zip", data
    with tempfile.TemporaryDirectory() as folder:
        yield from _made(Path(folder))


def _made(folder: Path) -> Iterator[tuple[str, bytes]]:
    import numpy as np
    import torch

    import optimstate

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for number, value in enumerate(
        (
            model.state_dict(),
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
            torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict(),
            {
                "extra": [
                    torch.ones(2, 3).t(),
                    torch.ones(1, dtype=torch.float64),
                    {1, (2, b"3"), 2.5, None, "\ud800", 10**30},
                ]
            },
        )
    ):
        path = folder / f"{number}.pt"
        torch.save(value, path)
        with zipfile.ZipFile(path) as archive:
            yield "pickle in a.pt", archive.read(archive.namelist()[0])
        optimstate.convert(path, folder / f"{number}.dcp")
        yield "d/.metadata", (folder / f"{number}.dcp" / ".metadata").read_bytes()
        torch.save(value, path, _use_new_zipfile_serialization=False)
        yield "a.pkl", path.read_bytes()
    for array in (np.arange(6.0).reshape(2, 3), np.array(["a", "b"]), np.zeros(2, [("x", "<i4"), ("y", ">f2", (2,))])):
        out = io.BytesIO()
        np.save(out, array)
        yield "a.npy", out.getvalue()
        yield "array in a.npz", out.getvalue()
        out = io.BytesIO()
        np.savez_compressed(out, a=array)
        yield "a.npz", out.getvalue()
    index = {"metadata": {"total_size": 12}, "weight_map": {"a.weight": SHARD}}
    yield "a.safetensors.index.json", json.dumps(index).encode()


def shard() -> bytes:
    """The file that the index of the seeds names."""
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(12)


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
