"""What a function is given and where the elements of its outputs come from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Combined", "Function", "Moved", "New", "Origin", "Probe", "Shape", "Source", "Unexplained"]


Function = Callable[[dict[str, Any]], Mapping[str, Any]]


Shape = tuple[int, ...]


class Source(Record):
    """A tensor that the function is given: its shape and dtype (as torch names it)."""

    shape: Shape
    dtype: str = "float32"


class Moved(Record):
    """An output whose elements are elements of the sources times one number, plus one number.

    Attributes:
        ids: int64, of the output's shape: the element of the sources, counted through from 0; -1 for one from nowhere.
        scale: What every element is multiplied by.
        shift: What is added to every element.
        fill: What the elements from nowhere hold: a number, "random" values, or those of the "live" model.
        dtype: The output's, as torch names it.
        factors: In place of one scale, of the output's shape: what every element is multiplied by.
    """

    ids: torch.Tensor
    scale: float
    shift: float
    fill: float | Literal["random", "live"]
    dtype: str
    factors: torch.Tensor | None = None


class Combined(Record):
    """An output that is a sum of several layouts, each times a number.

    Attributes:
        parts: For each term its source elements (see `Moved.ids`) and its coefficient.
        shift: What is added to every element.
    """

    parts: tuple[tuple[torch.Tensor, float], ...]
    shift: float
    dtype: str


class New(Record):
    """An output that depends on no source.

    Attributes:
        shape: Its shape.
        random: Whether two calls with the same sources gave different values.
        untouched: Whether it is a tensor of a live module that a script leaves as it is.
    """

    shape: Shape
    random: bool
    untouched: bool = False


class Unexplained(Record):
    """An output that is not a linear layout: why, and some of the sources it depends on."""

    reason: str
    sources: tuple[str, ...]


Origin = Moved | Combined | New | Unexplained


class Probe(Record):
    """What a function does.

    Attributes:
        sources: By name, in the order of the tags.
        starts: The tag of each source's first element.
        outputs: By name, in the order of the function's result.
        calls: How often the function was called.
    """

    sources: Mapping[str, Source]
    starts: Mapping[str, int]
    outputs: Mapping[str, Origin]
    calls: int

    def owner(self, tag: int) -> str:
        """The source whose element has this tag."""
        return list(self.starts)[bisect_right(list(self.starts.values()), tag) - 1]
