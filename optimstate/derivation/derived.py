"""The result of a derivation."""

from __future__ import annotations

from typing import Any

from optimstate.derivation.origins import Source
from optimstate.plan.language.plan import Plan
from optimstate.record import Record

__all__ = ["Derived", "source_of"]


class Derived(Record):
    """A plan that was derived from a function.

    Attributes:
        plan: The equivalent of the function in the plan language.
        dropped: Sources that are in no output.
        new: Outputs that depend on no source; they start without state.
        notes: Remarks that deserve attention although nothing is wrong.
        calls: The number of calls of the function.
        untouched: Those of `new` that a copying script does not change in the new model.
    """

    plan: Plan
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...]
    calls: int
    untouched: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.plan.to_toml()


def source_of(value: Any) -> Source:
    """The source for a tensor, a shape, or a source."""
    if isinstance(value, Source):
        return value
    if hasattr(value, "shape"):
        return Source(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return Source(tuple(value))
