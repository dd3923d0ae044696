"""Digests in the metadata of a safetensors file, because the format has no checksums.

The entry `optimstate.digest` is a JSON document `{"algorithm": NAME, "header": DIGEST, "tensors": {NAME: DIGEST}}` with
the digest of each tensor's bytes, and that of the header with zeros in place of all digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from optimstate.describe import describe
from optimstate.errors import UnsupportedCheckpointError
from optimstate.formats.protocol import malformed
from optimstate.formats.pruning import LostStorage
from optimstate.io.checksums import ALGORITHMS, Recorded, recorded
from optimstate.io.location import Location
from optimstate.tensors.lazy import LazyTensor

__all__ = ["DIGEST", "algorithm_of", "described", "recorded_digests"]

DIGEST = "optimstate.digest"


def described(algorithm: str, digests: Mapping[str, str], header: str | None = None) -> str:
    """The metadata entry; without the digest of the header all digests are replaced by zeros of the same length."""
    if header is None:
        header = "0" * ALGORITHMS[algorithm]
        digests = dict.fromkeys(digests, header)
    return json.dumps({"algorithm": algorithm, "header": header, "tensors": digests}, ensure_ascii=False)


def algorithm_of(metadata: Mapping[str, str]) -> str | None:
    """The algorithm of a file's digests, or None if it has none."""
    if DIGEST not in metadata:
        return None
    found = json.loads(metadata[DIGEST])["algorithm"]
    return str(found)


def recorded_digests(
    path: Location, header: bytes, metadata: Mapping[str, str], tensors: Mapping[str, LazyTensor]
) -> list[Recorded]:
    """The recorded digests of a file, to be compared with its bytes; empty if it has none.

    Args:
        path: The file.
        header: The bytes of its header.
        metadata: The metadata in the header.
        tensors: The tensors of the file by name.

    Raises:
        CorruptCheckpointError: The entry is malformed, or lacks a tensor.
        UnsupportedCheckpointError: The algorithm is unknown.
    """
    if DIGEST not in metadata:
        return []
    with malformed(f"the entry {DIGEST} is malformed", path=path, place="header"):
        about: Any = json.loads(metadata[DIGEST])
        algorithm, own, digests = about["algorithm"], about["header"], about["tensors"]
        if algorithm not in ALGORITHMS:
            raise UnsupportedCheckpointError(
                f"digests of the algorithm {describe(algorithm)}", path=path, hint="A newer version may know it."
            )
        if digests.keys() != tensors.keys():
            raise ValueError("its tensors are not those of the file")
    bare = partial(_without_digests, header, metadata[DIGEST], described(algorithm, digests))
    found = [Recorded(path, "header", bare, own, algorithm)]
    for name, tensor in tensors.items():
        if isinstance(tensor.storage, LostStorage):
            continue
        found.append(recorded(path, f"tensor {describe(name)}", tensor.storage.pieces, digests[name], algorithm))
    return found


def _without_digests(header: bytes, written: str, zeros: str, buffer: memoryview) -> Iterator[bytes]:  # noqa: ARG001
    yield header.replace(_in_header(written), _in_header(zeros), 1)


def _in_header(entry: str) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")
