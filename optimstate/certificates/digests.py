"""Digests of values, the same for tensors in files and in memory.

The digest of a tensor is its dtype, its shape and 128 bits of SHA-256 over its row-major bytes, as in
`float32[8, 4] 3fa9...`.
Numbers and 0-d tensors are their own digests, so that a report can show both values.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.state.records import tensor_record
from optimstate.tensors.compute import bytes_of
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque

__all__ = ["Digest", "digest", "digests", "plain"]

Digest = str | int | float | bool | None
"""The representation of a value in a certificate."""

_BITS = 128


def digests(value: Any, path: tuple[str, ...] = ()) -> dict[str, Digest]:
    """The digest of every leaf of nested dicts and lists, by its keys joined with dots."""
    if isinstance(value, Mapping):
        found: dict[str, Digest] = {}
        for key, item in value.items():
            found.update(digests(item, (*path, str(key))))
        return found
    if isinstance(value, list | tuple) and not _is_short(value):
        found = {}
        for index, item in enumerate(value):
            found.update(digests(item, (*path, str(index))))
        return found
    return {".".join(path): digest(value)}


def _is_short(value: Any) -> bool:
    """Whether a list has only a few numbers, as `betas`, and is kept as one value."""
    return len(value) <= 4 and all(isinstance(item, int | float) for item in value)


def digest(value: Any) -> Digest:
    """The digest of a value; its class in parentheses if its contents are not known."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(digest(item)) for item in value)}]"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return plain(value)
    if isinstance(value, LazyTensor):
        return plain(value.item()) if value.shape == () and value.numel else _of_bytes(value.dtype, value.shape, value)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_live(value)
    record = tensor_record(value)
    if record is not None and record.parts and record.kind != "DTensor":
        return _of_parts(record.dtype, record.shape, {name: digest(part) for name, part in record.parts.items()})
    if isinstance(value, Opaque):
        return f"({value.type.qualname})"
    return f"({getattr(value, '__qualname__', type(value).__qualname__)})"


def plain(value: Any) -> Digest:
    """A value that JSON can represent: numbers that are complex or not finite as text."""
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else describe(value)


def _of_live(value: Any) -> Digest:
    value = value.detach()
    if hasattr(value, "full_tensor"):  # sharded over processes, all of which call this function
        value = value.full_tensor()
    dtype = str(value.dtype).removeprefix("torch.")
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return _of_parts(dtype, tuple(value.shape), {name: digest(getattr(value, name)) for name in names})
    if value.is_sparse:
        value = value.to_dense()
    if not value.dim():
        return plain(value.item())
    return _of_bytes(dtype, tuple(value.shape), value)


def _of_bytes(dtype: str, shape: tuple[int, ...], tensor: Any) -> str:
    found = hashlib.sha256()
    if isinstance(tensor, LazyTensor):
        for chunk in tensor.contiguous().chunks():
            found.update(chunk)
    else:
        found.update(bytes_of(tensor.resolve_conj().resolve_neg().cpu()))
    return _written(dtype, shape, found)


def _of_parts(dtype: str, shape: tuple[int, ...], parts: Mapping[str, Digest]) -> str:
    return _written(dtype, shape, hashlib.sha256(repr(sorted(parts.items())).encode()))


def _written(dtype: str, shape: tuple[int, ...], found: Any) -> str:
    return f"{dtype}{list(shape)} {found.hexdigest()[: _BITS // 4]}"
