"""What comes of a derivation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimstate.derivation.origins import Source
from optimstate.plan.language.plan import Plan
from optimstate.record import Record

if TYPE_CHECKING:
    pass

__all__ = ["Derived", "source_of"]


class Derived(Record):
    """A plan that was read off a function.

    Attributes:
        plan: What the function does, in the plan language.
        dropped: Sources that no output takes.
        new: Outputs that depend on no source: they start fresh.
        notes: What deserves attention though nothing is wrong.
        calls: How often the function was called.
        untouched: Those of `new` that a copying script leaves as the new model has them.
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
    """What a function is given for a tensor, a shape, or a source."""
    if isinstance(value, Source):
        return value
    if hasattr(value, "shape"):
        return Source(tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return Source(tuple(value))
