"""Digests of values, the same for tensors in files and for live ones.

A tensor is written as its dtype, shape and 128 bits of SHA-256 over its row-major bytes: `float32[8, 4] 3fa9...`.
Numbers and tensors of no dimension are written as they are, so that a report can say both sides.
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
"""What stands for a value in a certificate."""

_BITS = 128


def digests(value: Any, path: tuple[str, ...] = ()) -> dict[str, Digest]:
    """Every leaf of nested dicts and lists, by the keys that lead to it, joined with dots."""
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
    """Whether a list is one of a few numbers, as `betas` are, and reads best as it is."""
    return len(value) <= 4 and all(isinstance(item, int | float) for item in value)


def digest(value: Any) -> Digest:
    """What stands for a value; a text in parentheses where its content cannot be told."""
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
    """A number as JSON can have it: what is not finite, or complex, as text."""
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else describe(value)


def _of_live(value: Any) -> Digest:
    value = value.detach()
    if hasattr(value, "full_tensor"):  # spread over processes, all of which are here
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
