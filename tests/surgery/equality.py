"""Whether two trees that torch loaded are equal, judged without anything of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["equal"]


def equal(a: Any, b: Any, _seen: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Whether two trees are equal: in types, keys, values, dtypes, shapes and bytes, not in the order of keys."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _same(a, b)
    if (id(a), id(b)) in _seen:  # what contains itself
        return True
    seen = _seen | {(id(a), id(b))}
    if hasattr(a, "parts") and hasattr(b, "parts"):  # stand-ins for objects, see `tests.sweep`
        return type(a) is type(b) and equal(list(a.parts), list(b.parts), seen)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if any(isinstance(key, torch.Tensor) for key in a):  # whole optimizers are keyed by their parameters
            return equal([*a.items()], [*b.items()], seen)
        one, other = ({(type(key), key): value for key, value in side.items()} for side in (a, b))
        return one.keys() == other.keys() and all(equal(value, other[key], seen) for key, value in one.items())
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y, seen) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if hasattr(a, "_local_tensor") and hasattr(b, "_local_tensor"):
        return a.shape == b.shape and _same(a._local_tensor, b._local_tensor)
    if (a.dtype, a.shape, a.layout, a.device, a.is_quantized, type(a)) != (
        b.dtype,
        b.shape,
        b.layout,
        b.device,
        b.is_quantized,
        type(b),
    ):
        return False
    if a.layout is not torch.strided or a.is_quantized or a.device.type == "meta" or a.is_nested:
        return a.device.type == "meta" or (not a.is_nested and torch.equal(a, b))
    one, other = (side.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for side in (a, b))
    return not one.numel() or bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
