"""The sources of a function, and the origins of the elements of its outputs."""

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
    """A tensor that the function gets: its shape and dtype (as named in torch)."""

    shape: Shape
    dtype: str = "float32"


class Moved(Record):
    """An output whose elements are elements of the sources, times one number, plus one number.

    Attributes:
        ids: int64, of the output's shape: the index of the element among those of all sources; -1 for an element
            without source.
        scale: The factor of every element.
        shift: The number added to every element.
        fill: The value of elements without source: a number, "random" values, or those of the "live" model.
        dtype: The dtype of the output, as named in torch.
        factors: In place of one scale, of the output's shape: the factor of each element.
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
        shift: The number added to every element.
        dtype: The dtype of the output, as named in torch.
    """

    parts: tuple[tuple[torch.Tensor, float], ...]
    shift: float
    dtype: str


class New(Record):
    """An output that depends on no source.

    Attributes:
        shape: Its shape.
        random: Whether two calls with the same sources gave different values.
        untouched: Whether it is a tensor of a live module that a script does not change.
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
    """The origins of all outputs of a function.

    Attributes:
        sources: The sources by name, in the order of the tags.
        starts: The tag of each source's first element.
        outputs: The origins of the outputs by name, in the order of the function's result.
        calls: The number of calls of the function.
    """

    sources: Mapping[str, Source]
    starts: Mapping[str, int]
    outputs: Mapping[str, Origin]
    calls: int

    def owner(self, tag: int) -> str:
        """The source whose element has this tag."""
        return list(self.starts)[bisect_right(list(self.starts.values()), tag) - 1]
