"""What differs between two checkpoints besides the names, shapes, order and groups of their parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.plan.slots.converted_options import TARGETS
from optimstate.plan.solve.groups import same_value
from optimstate.problems import Problem
from optimstate.state.algorithms.options import comparable
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, scheduler_name
from optimstate.surgery.slot_counts import algorithm_of
from optimstate.surgery.text import plural
from optimstate.tensors.lazy import LazyTensor

__all__ = ["also_different", "other_optimizers"]


def other_optimizers(source: Sequence[Section], target: Sequence[Section]) -> Iterator[Problem]:
    """Find optimizers of the target whose algorithm, options or number a plan of names does not make.

    Args:
        source: The sections of the checkpoint to be moved.
        target: The sections of a checkpoint of the new model.
    """
    mine, theirs = ([s for s in sections if s.kind == "optimizer"] for sections in (source, target))
    if not mine or not theirs:
        return
    if len(mine) != len(theirs):
        message = f"{plural(len(mine), 'optimizer')} here, {len(theirs)} there"
        yield Problem("group", message, remedy="divide or join them with [[optimizer]] tables")
        return
    for one, other in zip(mine, theirs, strict=True):
        key, old, new = f"optimizer {one.label}", one.optimizer(), other.optimizer()
        if (names := _algorithms(old, new)) is not None:
            remedy = (
                f'say optimizer = "{names[1]}" in the plan'
                if names[1] in TARGETS
                else 'no conversion is known: start without state (fresh = "**")'
            )
            yield Problem("algorithm", f"{names[0]} here, {names[1]} there", key, remedy=remedy)
        elif len(old.groups) == len(new.groups):
            for number, (a, b) in enumerate(zip(old.groups, new.groups, strict=True)):
                if found := _options(a.options, b.options):
                    remedy = "set it in a [[group]] table, if the result is to have it"
                    message = ", ".join(found.values())
                    yield Problem("setting", message, f"{key}, group {number}", tuple(found), remedy)


def _algorithms(old: OptimizerState, new: OptimizerState) -> tuple[str, str] | None:
    """The algorithms of two optimizers if they are known and differ; one without state fits any with its options."""
    names = []
    for state in (old, new):
        slots = {slot for found in state.state.values() for slot in found}
        known = algorithm_of(slots, state)
        if known is None:
            return None
        names.append(known)
    one, other = names
    if one.name == other.name or not all(group.options for group in (*old.groups, *new.groups)):
        return None
    if not new.state and one.matches((), new.groups[0].options):
        return None
    return one.name, other.name


def _options(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: f"{key} is {describe(old[key])} here and {describe(new[key])} there"
        for key in comparable(old, new)
        if not same_value(old[key], new[key])
    }


def also_different(source: Sequence[Section], target: Sequence[Section]) -> Iterator[str]:
    """Notes on dtypes of weights and on schedulers and averages that only one side has.

    Args:
        source: The sections of the checkpoint to be moved.
        target: The sections of a checkpoint of the new model.
    """
    dtypes = [_dtypes(sections) for sections in (source, target)]
    changed = Counter(
        (dtype, dtypes[1][name]) for name, dtype in dtypes[0].items() if dtypes[1].get(name, dtype) != dtype
    )
    for (old, new), count in changed.items():
        yield f"{plural(count, 'weight')} of dtype {old} here, {new} there: torch casts them when it loads"
    for kind, word in (("scheduler", "scheduler"), ("ema", "average")):
        here, there = (sorted(_called(s) for s in side if s.kind == kind) for side in (source, target))
        if here != there and there:
            yield f"{word}s: {', '.join(here) or 'none'} here, {', '.join(there)} there"


def _dtypes(sections: Sequence[Section]) -> dict[str, str]:
    models = (section.tensors() for section in sections if section.kind == "model")
    return {name: v.dtype for tensors in models for name, v in tensors.items() if isinstance(v, LazyTensor)}


def _called(section: Section) -> str:
    return scheduler_name(section.node) if section.kind == "scheduler" else section.label
