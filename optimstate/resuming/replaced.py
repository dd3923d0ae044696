"""Options of a live optimizer that a load replaces by those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.plan.solve.groups import same_value
from optimstate.plan.solve.migration import SectionMoves
from optimstate.state.algorithms.options import comparable

__all__ = ["replaced_options"]


def replaced_options(
    key: str, live: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]], moves: SectionMoves | None
) -> Iterator[str]:
    """Notes on options that the live optimizer was built with and that the checkpoint's replace.

    Args:
        key: The name of the optimizer in reports.
        live: Its param groups.
        made: The param groups that it is about to load.
        moves: The migration of the optimizer, whose plan may set options.
    """
    asked = {option for group in (moves.groups if moves else ()) if group.rule for option in group.rule.set}
    found: dict[str, None] = {}
    for own, new in zip(live, made, strict=True):
        for option in comparable(own, new):
            if option not in asked and not same_value(own[option], new[option]):
                found[f"{option} is {describe(new[option])} in the checkpoint and {describe(own[option])} here"] = None
    for what in sorted(found):
        yield f'{key}: {what}: the checkpoint\'s is used (hyperparameters = "live" in [policy] keeps the live one)'
