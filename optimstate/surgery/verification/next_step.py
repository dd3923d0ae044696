"""Whether an optimizer can take its next step from its state in a file: the options and slots that this step reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.describe import describe, few
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.state.algorithms.options import unread, unusable
from optimstate.state.algorithms.registry import nearest
from optimstate.state.algorithms.slots import Algorithm, Slot
from optimstate.state.arrays import is_array
from optimstate.state.optimizer import OptimizerState
from optimstate.state.records import is_tensor
from optimstate.surgery.shown import as_numbers
from optimstate.surgery.slot_counts import algorithm_of
from optimstate.surgery.verification.findings import Finding, fault, note
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque

__all__ = ["check_next_step", "labelled"]


def labelled(state: OptimizerState) -> list[tuple[str, Mapping[str, Any] | None]]:
    """What findings call each parameter, in order, with its slots."""
    return [
        (f"parameter {position}" if name is None else name, slots)
        for position, (_, name, slots) in enumerate(state.parameters())
    ]


def check_next_step(where: str, state: OptimizerState, algorithm: Algorithm | None) -> Iterator[Finding]:
    """Options and slots with which torch's optimizer of that algorithm cannot take a step.

    Args:
        where: What findings call the optimizer.
        state: Its state.
        algorithm: Its algorithm; None if it is not recognised.
    """
    yield from _options(where, state, algorithm)
    yield from _absent_slots(where, state, algorithm)
    if algorithm is None:
        yield from _odd_slots(where, state)
    if algorithm is not None and algorithm.reads:
        yield from _wrong_slots(where, state, algorithm)


def _options(where: str, state: OptimizerState, algorithm: Algorithm | None) -> Iterator[Finding]:
    """Values that torch's optimizers do not take; the betas of one that is not known may mean something else."""
    slots = {str(slot) for found in state.state.values() for slot in found}
    for number, group in enumerate(state.groups):
        place, options = f"{where}, group {number}", as_numbers(group.options)
        told = set[str]()
        for option, value in options.items():
            if why := unusable(option, value):
                told.add(option)
                level = note if option == "betas" and algorithm is None and state.state else fault
                yield level("setting", place, why)
        if algorithm is not None:
            level = fault if algorithm.could_be((), group.options) else note  # else it may be read by another
            left = {option: form for option, form in algorithm.reads.items() if option not in told}
            yield from (level("setting", place, f"{why} of {algorithm.name}") for why in unread(left, options))
        if algorithm is None and (near := nearest(slots, group.options)) is not None:
            absent = ", ".join(sorted(near.options - group.options.keys()))
            yield note(
                "setting", place, f"there is no {absent}, which {near.name} reads: state and options are its own"
            )


def _absent_slots(where: str, state: OptimizerState, algorithm: Algorithm | None) -> Iterator[Finding]:
    """Parameters whose state lacks slots that the next step reads."""
    options = [group.options for group in state.groups for _ in group.params]
    lacking: dict[tuple[str, str], list[str]] = {}
    for (label, slots), chosen in zip(labelled(state), options, strict=True):
        for found in algorithm.missing(slots, chosen) if algorithm is not None and slots else ():
            lacking.setdefault(found, []).append(label)
    for (slot, option), labels in lacking.items():
        assert algorithm is not None
        why = f" because {option} is on" if option and option not in algorithm.slots else ""
        message = f"no {slot}, which {algorithm.name} reads at its next step{why}"
        yield fault("coverage", f"{where}, {few(labels)}", message, labels)


def _odd_slots(where: str, state: OptimizerState) -> Iterator[Finding]:
    """Slots of few parameters for which the state is not that of the algorithm that the others show."""
    counts = Counter(slot for slots in state.state.values() for slot in slots)
    usual = {slot for slot, count in counts.items() if 2 * count > len(state.state)}
    algorithm = algorithm_of(usual, state) if usual else None
    for slot in counts:
        if algorithm is not None and slot not in usual:
            labels = [label for label, slots in labelled(state) if slots and slot in slots]
            message = f"has a slot {describe(slot)}, for which {algorithm.name}, as the others show it, has no use"
            yield note("slot", f"{where}, {few(labels)}", message, labels)


def _wrong_slots(where: str, state: OptimizerState, algorithm: Algorithm) -> Iterator[Finding]:
    """Slots that are not what the algorithm keeps there."""
    found: dict[tuple[str, str], list[str]] = {}
    options = [group.options for group in state.groups for _ in group.params]
    for (label, slots), chosen in zip(labelled(state), options, strict=True):
        there = {slot: value for slot, value in (slots or {}).items() if value is not None}
        needed = {slot for slot, _ in algorithm.missing(there, chosen)} if slots else set[str]()
        for slot, value in (slots or {}).items():
            known = algorithm.slot(slot)
            if known is not None and (why := _wrong(str(slot), known, value, needed=slot in needed)):
                found.setdefault((str(slot), why), []).append(label)
    if algorithm.is_flat:
        found |= {("state", why): [] for _, slots in labelled(state) for why in _unequal(slots or {}, algorithm)}
    for (slot, why), labels in found.items():
        yield fault("slot", ", ".join(filter(None, (where, few(labels)))), f"{slot} {why}", labels)


_NOT_DENSE = {"_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_nested_tensor"}
_LISTED = {"old_dirs", "old_stps"}


def _unequal(slots: Mapping[str, Any], algorithm: Algorithm) -> Iterator[str]:
    """How the vectors over all parameters differ in length, and the lists of them in number."""
    known = {name: algorithm.slot(name) for name in slots}
    flat = [value for name, value in slots.items() if (slot := known[name]) is not None and slot.kind == "flat"]
    vectors = [item for value in flat for item in (value if isinstance(value, list | tuple) else [value])]
    lengths = sorted({vector.numel for vector in vectors if isinstance(vector, LazyTensor)})
    if lengths[1:]:
        yield f"has vectors over all parameters of the lengths {', '.join(map(str, lengths))}, which must be one"
    counts = {slot: len(value) for slot, value in slots.items() if slot in (*_LISTED, "ro") and isinstance(value, list)}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} in {slot}" for slot, count in counts.items())
        yield f"has {shown}: there must be as many in each"


def _wrong(slot: str, known: Slot, value: Any, *, needed: bool) -> str:
    """Why a value is not that of a slot; empty if it is, or if it is of a class that may be one."""
    if known.kind == "opaque":
        return ""
    if isinstance(value, Opaque) and value.type.qualname in _NOT_DENSE:
        return f"must be a dense tensor, not {tensor_kind(value) or describe(value)}"
    if known.kind == "flat":
        listed = slot in _LISTED
        usable = isinstance(value, list) and all(map(is_tensor, value)) if listed else is_tensor(value)
        form = "a list of tensors" if listed else "a tensor"
        return "" if usable or (value is None and not needed) else f"must be {form}, not {describe(value)}"
    if known.kind == "scalar":
        number = as_numbers(value)
        if isinstance(number, LazyTensor):
            return f"must be one number, and is a tensor of the shape {list(number.shape)}" if number.numel != 1 else ""
        if is_tensor(number):
            return ""
        if not isinstance(number, int | float):
            return f"must be a number, not {describe(value)}"
        if slot == "step" and not number >= 0:
            return f"must be a number from 0 up, not {describe(number)}"
        return ""
    if is_tensor(value) or is_array(value) or (value is None and not needed):
        return ""
    return f"must be a tensor, not {describe(value)}"
