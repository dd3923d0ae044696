"""Outputs that are larger than the part they take from the source: its block, and the growth around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimstate.derivation.programs import Program, Wanted, divisors, reshapes
from optimstate.plan.expressions.tree import Fill
from optimstate.plan.language.base import Operation
from optimstate.plan.language.operations import OPERATIONS

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["core"]

Resize, Flip = (OPERATIONS[key] for key in ("resize", "flip"))


def core(wanted: Wanted) -> tuple[Wanted, Program]:
    """The block of an output that comes from the source, and the operations that add the rest.

    Growth is at the ends of dimensions, at their beginnings (between two flips), or at the ends or beginnings of equal
    parts of a dimension, as in padded heads.
    """
    ids = wanted.ids.reshape(wanted.shape)
    there = ids >= 0
    if bool(there.all()) or not bool(there.any()):
        return wanted, ()
    shape: list[int] = []
    for dim, size in enumerate(wanted.shape):
        others = [d for d in range(ids.dim()) if d != dim]
        period = _period(there.any(dim=others) if others else there)
        shape += [size // period, period] if period < size else [size]
    ids, there = ids.reshape(shape), there.reshape(shape)
    box = []
    growth: list[Operation] = []
    for dim, new in enumerate(shape):
        others = [d for d in range(ids.dim()) if d != dim]
        along = (there.any(dim=others) if others else there).nonzero()
        start, stop = int(along.min()), int(along.max()) + 1
        box.append(slice(start, stop))
        if stop < new:
            growth.append(Resize(dim, new - start, Fill(0.0)))
        if start:
            growth += [Flip((dim,)), Resize(dim, new, Fill(0.0)), Flip((dim,))]
    closing = next(reshapes(tuple(shape), wanted.shape))
    block = ids[tuple(box)]
    return Wanted(tuple(block.shape), block.reshape(-1)), (*growth, *closing)


def _period(there: torch.Tensor) -> int:
    """The length of equal parts of a dimension that have elements from the source at the same consecutive positions."""
    size = there.numel()
    for period in reversed(divisors(size)):
        part = there[:period].nonzero()
        alike = part.numel() and bool((there.view(-1, period) == there[:period]).all())
        if alike and int(part.max()) - int(part.min()) + 1 == part.numel():
            return size if part.numel() == period else period
    return size
