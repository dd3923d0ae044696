"""Names with their layer indices collapsed, as layers are listed together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from optimstate.state.algorithms.registry import parameter_shape
from optimstate.state.algorithms.slots import Algorithm
from optimstate.surgery.shown import form_of
from optimstate.surgery.text import collapsed
from optimstate.tensors.lazy import LazyTensor

__all__ = ["kinds_of_names"]


def kinds_of_names(
    found: Collection[tuple[str, Any]], algorithm: Algorithm | None = None
) -> dict[str, tuple[int, str]]:
    """Names with their layer indices collapsed: how many there are, and what the first of them is.

    Args:
        found: Names with tensors, or with the slots of parameters, whose shape the slots tell.
        algorithm: Whose slots they are.
    """
    names, values = zip(*found, strict=True) if found else ((), ())
    patterns = list(map(collapsed, names))
    first = dict(zip(reversed(patterns), reversed(values), strict=True))
    varied = _of_several_shapes(patterns, values)
    return {
        pattern: (
            count,
            _described(first[pattern], algorithm) + (" and other shapes" if pattern in varied else ""),
        )
        for pattern, count in Counter(patterns).items()
    }


def _of_several_shapes(patterns: Sequence[str], values: Sequence[Any]) -> set[str]:
    shapes = {(pattern, _first_shape(value)) for pattern, value in zip(patterns, values, strict=True)}
    return {pattern for pattern, times in Counter(pattern for pattern, _ in shapes).items() if times > 1}


def _first_shape(value: Any) -> Any:
    """Of a tensor its shape, of a parameter's slots that of the first that has dimensions."""
    if isinstance(value, dict):
        return next((slot.shape for slot in value.values() if isinstance(slot, LazyTensor) and slot.shape), None)
    return getattr(value, "shape", None)


def _described(value: Any, algorithm: Algorithm | None) -> str:
    if not isinstance(value, dict):
        return form_of(value)
    shape = parameter_shape({s: v.shape if isinstance(v, LazyTensor) else None for s, v in value.items()}, algorithm)
    return "shape unknown" if shape is None else str(list(shape))
