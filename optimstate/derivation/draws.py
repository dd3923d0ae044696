"""Random values for the sources of a function, and checking an explanation of an output with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import log2, prod
from typing import TYPE_CHECKING

from optimstate.derivation.origins import Combined, Moved, New, Origin, Source

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["BASE", "drawn", "holds", "magnitudes", "rounding"]

BASE = 128
_HALF = 65504  # the largest number of the narrowest dtype to which a function may cast temporarily


def drawn(sources: Mapping[str, Source], base: int, seed: int, *, signed: bool) -> torch.Tensor:
    """Random integers below a base for all elements of all sources, in order, as float64.

    Args:
        sources: The sources of the function.
        base: At most 128; floating dtypes of more than eight bits hold such integers exactly.
        seed: The seed.
        signed: Whether to draw both signs, for sources that can have them; they reveal an absolute value.
    """
    from optimstate.installed_torch import torch

    total = sum(prod(source.shape) for source in sources.values())
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(1, max(base, 8), (total,), generator=generator).double()
    signs = torch.randint(0, 2, (total,), generator=generator).double() * 2 - 1
    for mine, source in _places(sources):
        if source.dtype == "bool":
            made[mine] %= 2
        elif signed and not source.dtype.startswith("uint"):
            made[mine] *= signs[mine]
    return made


def magnitudes(sources: Mapping[str, Source], base: int) -> Iterator[torch.Tensor]:
    """Draws of both signs that are large (beyond 1000), huge and tiny, as far as the sources hold them exactly.

    All are integers times a power of two, so that a cast to another floating dtype is exact within its range.
    """
    from optimstate.installed_torch import dtype_of, torch

    for exponent, sign, seed in ((8, 1, 3), (40, -1, 3), (-24, 1, 4)):
        values = drawn(sources, base, seed, signed=True)
        for mine, source in _places(sources):
            dtype = dtype_of(source.dtype)
            if dtype.is_floating_point or dtype.is_complex:
                limits = torch.finfo(dtype)
                highest = int(log2(limits.max)) - int(log2(base))
                lowest = int(log2(limits.smallest_normal * limits.eps))
                values[mine] *= sign * 2.0 ** max(min(exponent, highest), lowest)
            elif source.dtype in ("int16", "int32", "int64"):
                values[mine] *= sign * 2.0 ** min(max(exponent, 0), 8)
        yield values


def holds(origin: Origin, dtype: str, zeros: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether an explanation of an output is right for further values; elements that overflow are not compared.

    Args:
        origin: The explanation.
        dtype: The dtype of the output.
        zeros: The output, flat, for sources that are all zero.
        values: The values of all elements of the sources.
        seen: The output for these values, flat.
    """
    from optimstate.installed_torch import torch

    expected, there, reach = zeros.clone(), torch.ones_like(zeros, dtype=torch.bool), 0.0
    plain = isinstance(origin, Moved) and origin.factors is None and origin.scale == 1 and not origin.shift
    if isinstance(origin, New):
        return origin.random or bool(((seen == zeros) | (seen.isnan() & zeros.isnan())).all())
    if isinstance(origin, Combined):
        for ids, factor in origin.parts:
            expected += values[ids.reshape(-1)] * factor
            reach += abs(factor) * 1.5
    elif isinstance(origin, Moved):
        ids = origin.ids.reshape(-1)
        taken = ids >= 0
        factors = origin.scale if origin.factors is None else origin.factors.reshape(-1)[taken]
        expected[taken] = values[ids[taken]] * factors + origin.shift
        reach = origin.scale if origin.factors is None else float(origin.factors.abs().max()) * 1.5
        there = taken if isinstance(origin.fill, str) else there
        if plain:
            expected[taken] = values[ids[taken]]
    overflown = ~seen.isfinite() & (expected.abs() > _HALF)
    if plain:
        return bool(((expected == seen) | overflown)[there].all())
    shift = origin.shift if isinstance(origin, Moved | Combined) else 0.0
    largest = float(values.abs().max()) / BASE if values.numel() else 0.0
    room = rounding(dtype, reach * max(largest, 1.0), shift)
    room += 2.0**-23 * (1 + abs(reach))  # for values that a narrow dtype rounds to zero
    good = (expected == seen) | ((expected - seen).abs() <= room) | overflown
    return bool(good[there].all())


def rounding(dtype: str, scale: float, shift: float) -> float:
    """The largest error of an element by rounding alone; 0 for a factor that is a power of two, without a shift.

    Args:
        dtype: The dtype of the output.
        scale: The factor of elements of up to 128.
        shift: The number added.
    """
    digits = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}.get(dtype, 52)
    mantissa = abs(scale)
    while mantissa and mantissa != int(mantissa) and mantissa < 2**20:
        mantissa *= 2
    exact = mantissa == int(mantissa) and int(mantissa).bit_count() == 1
    if exact and shift == 0:
        return 0.0
    return float((abs(scale) * BASE + abs(shift)) * 2.0 ** (2 - digits))


def _places(sources: Mapping[str, Source]) -> Iterator[tuple[slice, Source]]:
    """The position of each source's elements among those of all sources."""
    start = 0
    for source in sources.values():
        stop = start + prod(source.shape)
        yield slice(start, stop), source
        start = stop
