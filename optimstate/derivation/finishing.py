"""The operations of an output besides its layout: fill, scale, shift, cast."""

from __future__ import annotations

from optimstate.derivation.origins import Moved
from optimstate.derivation.programs import Program, Wanted
from optimstate.plan.expressions.tree import Fill, Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.operations import OPERATIONS

__all__ = ["extras", "finished", "one_factor", "scaling"]

Resize = OPERATIONS["resize"]


def finished(program: Program, origin: Moved, dtypes: set[str]) -> Program:
    """A layout with fill values, a factor, a shift and a cast.

    Args:
        program: The layout.
        origin: The explanation of the output.
        dtypes: The dtypes of its sources.
    """
    extra = extras(origin, dtypes)
    if isinstance(origin.fill, str):  # values that must not be scaled
        fill = Fill("live") if origin.fill == "live" else Fill(None, {"param": "mean"})
        return (*extra, *_filled(program, fill))
    value = shortest((origin.fill - origin.shift) / origin.scale)
    return (*_filled(program, Fill(None, {"param": value}) if value else Fill(0.0)), *extra)


def extras(origin: Moved, dtypes: set[str]) -> tuple[Operation, ...]:
    """The operations besides the layout: a factor, a shift, a cast."""
    extra: list[Operation] = []
    extra += scaling(origin.scale)
    if origin.shift:
        extra.append(OPERATIONS["shift"](shortest(origin.shift)))
    if dtypes != {origin.dtype}:
        extra.append(OPERATIONS["cast"]({"param": origin.dtype}))
    return tuple(extra)


def _filled(program: Program, fill: Fill) -> Program:
    return tuple(step._replace(fill=fill) if isinstance(step, Resize) else step for step in program)


def shortest(number: float) -> float:
    """A number with few digits, if the others can be due to rounding."""
    return float(f"{number:.7g}") if abs(float(f"{number:.4g}") - number) <= 1e-6 * abs(number) else number


def scaling(scale: float) -> tuple[Operation, ...]:
    """The operation that multiplies by a number; none for 1."""
    return () if scale == 1 else (OPERATIONS["scale"](shortest(scale), 1 / shortest(scale)),)


def one_factor(origin: Moved, shape: Shape, block: tuple[slice, ...], wanted: Wanted) -> float | None:
    """The factor of all elements of a block; None if they have different factors."""
    if origin.factors is None:
        return 1.0
    factors = origin.factors.reshape(shape)[block].reshape(-1)[wanted.ids >= 0]
    close = bool(((factors - factors[0]).abs() <= factors[0].abs() * 1e-6).all())
    return float(factors[0]) if close else None
