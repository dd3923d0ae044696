"""Whether a run could resume from an optimizer as it is in a file: verify's checks of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any

from optimstate.describe import describe, few
from optimstate.io.extents import Progress
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.names import wrapper_prefix
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section
from optimstate.surgery.shown import form_of, plain
from optimstate.surgery.slot_counts import algorithm_of, flat_slots
from optimstate.surgery.text import plural
from optimstate.surgery.verification.findings import Finding, fault, note
from optimstate.surgery.verification.layouts import stored_in_another_layout
from optimstate.surgery.verification.next_step import check_next_step, labelled
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque

__all__ = ["check_optimizer"]


def check_optimizer(
    section: Section, models: list[Section], numbers: bool, progress: Progress | None
) -> Iterator[Finding]:
    """What is wrong or odd about one optimizer, beside the models of its file.

    Args:
        section: The optimizer.
        models: The file's models.
        numbers: Whether to read the tensors.
        progress: Called with the bytes read since the last call.
    """
    state = section.optimizer()
    where = f"optimizer at {section.label}"
    algorithm = algorithm_of({slot for found in state.state.values() for slot in found}, state)
    if any(group.params for group in state.groups) and not state.state:
        yield note("coverage", where, "no parameter has state: the run would start fresh")
    if not state.groups:
        yield fault("group", where, "no param groups: torch refuses it for any optimizer")
    yield from check_next_step(where, state, algorithm)
    yield from _positions(where, state)
    yield from _coverage(where, state, algorithm)
    yield from _steps(where, state)
    yield from _dtypes(where, state, models)
    yield from _aliases(where, state)
    yield from _names(where, state, algorithm, models)
    yield from _shapes(where, state, algorithm, models)
    if numbers:
        yield from _numbers(where, state, algorithm, progress)


def _tensor_slots(slots: Mapping[str, Any]) -> frozenset[str]:
    """The slots that hold tensors; others are flags that a parameter may or may not have."""
    return frozenset(str(slot) for slot, value in slots.items() if isinstance(value, LazyTensor | Opaque))


_STARTED = {"SGD": frozenset({"momentum_buffer"})}
"""Slots that torch's optimizers begin where a parameter has none, beside others that it has."""


def _coverage(where: str, state: OptimizerState, algorithm: Algorithm | None) -> Iterator[Finding]:
    tensors = {label: _tensor_slots(slots) for label, slots in labelled(state) if slots}
    kinds = Counter(tensors.values())
    full = [kind for kind, _ in kinds.most_common()]
    for label, slots in labelled(state):
        place = f"{where}, {label}"
        if not slots:
            if kinds and not (algorithm is not None and algorithm.is_flat):
                yield note("coverage", place, "no state: it starts fresh beside the others")
            continue
        # Some algorithms keep other slots for matrices than for vectors: only a proper part of another's is suspicious.
        mine = tensors[label]
        larger = next((kind for kind in full if kind > mine and kinds[kind] >= kinds[mine]), None)
        there = {*map(str, slots), *(algorithm.needs if algorithm is not None else ())}  # None stands for fresh
        absent = sorted(larger - there) if larger is not None else []
        if larger is not None and absent:
            message = f"has no {', '.join(absent)}, which {kinds[larger]} others have"
            certain = algorithm is not None and not set(absent) <= _STARTED.get(algorithm.name, frozenset())
            yield (fault if certain else note)("coverage", place, message, [label])
    for key in state.of_no_parameter():
        yield note("coverage", where, f"state for {describe(key)}, which is in no param group: torch carries it along")


def _positions(where: str, state: OptimizerState) -> Iterator[Finding]:
    """Torch numbers parameters in the order of the groups, and loads them in it."""
    keys = [key for key, _, _ in state.parameters()]
    numbers = [key for key in keys if type(key) is int]
    first = list(dict.fromkeys(numbers))
    if len(numbers) == len(keys) and first != sorted(first) and sorted(first) == list(range(len(first))):
        message = (
            f"parameters are listed in the order {few(list(map(str, first)), 8)}: torch numbers them from 0 up and "
            "loads them by position, so that it gives each the state of another"
        )
        yield note("order", where, message)


def _steps(where: str, state: OptimizerState) -> Iterator[Finding]:
    steps: dict[str, list[str]] = {}
    for label, slots in labelled(state):
        if slots and "step" in slots:
            steps.setdefault(str(plain(slots["step"])), []).append(label)
    if len(steps) > 1:
        usual = max(steps, key=lambda step: len(steps[step]))
        for step, labels in steps.items():
            if step != usual:
                yield note(
                    "steps",
                    f"{where}, {few(labels)}",
                    f"step {step}, but {len(steps[usual])} others have {usual}: right if it was frozen for a while",
                    labels,
                )


def _dtypes(where: str, state: OptimizerState, models: list[Section]) -> Iterator[Finding]:
    """Weights of one dtype should have state of one dtype; except for steps, torch casts what differs when it loads."""
    weights = {name: tensor for model in _model_tensors(models) for name, tensor in model.items()}
    prefix = wrapper_prefix([name for _, name, _ in state.parameters() if name is not None])
    kinds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for label, slots in labelled(state):
        weight = weights.get(label.removeprefix(prefix))
        of = weight.dtype if isinstance(weight, LazyTensor) else ""
        for slot, value in (slots or {}).items():
            if isinstance(value, LazyTensor):
                kinds.setdefault((slot, of), {}).setdefault(value.dtype, []).append(label)
    for (slot, of), dtypes in kinds.items():
        usual = max(dtypes, key=lambda dtype: len(dtypes[dtype]))
        for dtype, labels in dtypes.items():
            if dtype != usual:
                others = f"{len(dtypes[usual])} others{f' of {of} weights' if of else ''} are {usual}"
                yield note("dtypes", f"{where}, {labels[0]}", f"{slot} is {dtype}, {others}", labels)


def _aliases(where: str, state: OptimizerState) -> Iterator[Finding]:
    spans: dict[int, list[tuple[int, int, str]]] = {}
    labels: dict[Any, list[str]] = {}
    for (key, _, _), (label, slots) in zip(state.parameters(), labelled(state), strict=True):
        labels.setdefault(key, []).append(label)
        for slot, value in (slots or {}).items() if len(labels[key]) == 1 else ():
            if isinstance(value, LazyTensor) and value.nbytes:
                spans.setdefault(id(value.storage), []).append((*value.span(), f"{label} {slot}"))
                if any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride, strict=True)):
                    yield fault("aliases", where, f"elements of {label} {slot} share memory: torch cannot update it")
    for members in spans.values():
        members.sort()
        for (_, stop, first), (start, _, second) in pairwise(members):
            if start < stop:
                yield fault("aliases", where, f"{first} and {second} share memory: both would be updated twice")
    for tied in labels.values():
        if len(tied) > 1:
            message = f"{' and '.join(tied)} are one parameter, listed {len(tied)} times: each step updates it as often"
            yield note("aliases", where, message, tied)


def _model_tensors(models: Iterable[Section]) -> Iterator[dict[str, Any]]:
    for section in models:
        found = section.tensors()
        prefix = wrapper_prefix(found)
        yield {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _names(where: str, state: OptimizerState, algorithm: Algorithm | None, models: list[Section]) -> Iterator[Finding]:
    names = [name for _, name, _ in state.parameters() if name is not None]
    if not models:
        return
    if not state.is_named:
        yield from _unnamed_layout(where, state, algorithm, models)
        return
    prefix = wrapper_prefix(names)
    plain = [name.removeprefix(prefix) for name in names]
    best = max(_model_tensors(models), key=lambda model: len(model.keys() & set(plain)))
    unknown = [name for name in plain if name not in best]
    if unknown:
        known = {name: getattr(tensor, "shape", None) for name, tensor in best.items()}
        elsewhere = stored_in_another_layout(unknown, known, _parameter_shapes(state, prefix))
        if elsewhere:
            yield _another_layout(
                where, f"for {plural(len(elsewhere), 'parameter')} such as {min(elsewhere)}", elsewhere
            )
        unknown = [name for name in unknown if name not in elsewhere]
    if unknown and len(unknown) < len(names):
        shown = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        yield fault("name", where, f"{len(unknown)} parameters are not in the model of this file: {shown}", unknown)
    elif unknown:
        message = (
            f"none of its {plural(len(names), 'parameter')} is in a model of this file: it is the optimizer of another"
        )
        yield note("name", where, message, unknown)
    twice = [name for name, count in Counter(names).items() if count > 1]
    for name in twice:
        yield fault("name", where, f"{name} is named twice", [name])


def _another_layout(where: str, which: str, names: Iterable[str] = ()) -> Finding:
    message = f"the model is stored in another layout than the optimizer's, {which}"
    remedy = "`optimstate plan derive` writes a plan that says how one reads as the other, to be given as --view"
    return note("name", where, message, sorted(names), remedy)


def _unnamed_layout(
    where: str, state: OptimizerState, algorithm: Algorithm | None, models: list[Section]
) -> Iterator[Finding]:
    """Shapes that no tensor of the model has: it is in another layout, or belongs to another run."""
    like = {slot for slot, kind in algorithm.slots.items() if kind.is_elementwise} if algorithm else set()
    shapes = [
        next((v.shape for s, v in (slots or {}).items() if s in like and isinstance(v, LazyTensor) and v.shape), None)
        for _, _, slots in state.parameters()
    ]
    wanted = Counter(shape for shape in shapes if shape is not None)
    stored = [[t.shape for t in model.values() if isinstance(t, LazyTensor)] for model in _model_tensors(models)]
    best = max(map(Counter, stored), key=lambda found: (found & wanted).total())
    absent = wanted - best
    # Vectors in which FSDP and others flatten parameters are of no model's shape by their nature.
    if not absent or not (best & wanted) or all(len(shape) == 1 for shape in wanted):
        return
    sizes = ", ".join(str(list(shape)) for shape in list(absent)[:3]) + (" ..." if len(absent) > 3 else "")
    elements = sum(prod(shape) * count for shape, count in absent.items())
    left = sum(prod(shape) * count for shape, count in (best - wanted).items())
    which = f"for {plural(absent.total(), 'parameter')} of the shapes {sizes}"
    if left >= elements:
        yield _another_layout(where, which)
    else:
        message = f"the model of this file has no tensors {which}: it may be the model of another run"
        yield note("name", where, message)


def _parameter_shapes(state: OptimizerState, prefix: str) -> dict[str, tuple[int, ...] | None]:
    """The shape of the first slot that is not a single number, by parameter name."""
    return {
        str(name).removeprefix(prefix): next(
            (value.shape for value in (slots or {}).values() if isinstance(value, LazyTensor) and value.numel > 1), None
        )
        for _, name, slots in state.parameters()
    }


def _shapes(where: str, state: OptimizerState, algorithm: Algorithm | None, models: list[Section]) -> Iterator[Finding]:
    """Slots of one parameter must agree in shape with each other, and with the weight of the same name."""
    weights: dict[str, Any] = {}
    for model in _model_tensors(models):
        weights.update(model)
    prefix = wrapper_prefix([name for _, name, _ in state.parameters() if name is not None])
    like = {slot for slot, kind in algorithm.slots.items() if kind.is_elementwise} if algorithm else set()
    for label, slots in labelled(state):
        shapes = {
            slot: value.shape for slot, value in (slots or {}).items() if slot in like and isinstance(value, LazyTensor)
        }
        weight = weights.get(label.removeprefix(prefix))
        if isinstance(weight, LazyTensor):
            shapes = {"the weight": weight.shape, **shapes}
            yield from _means(f"{where}, {label}", slots or {}, algorithm, weight.shape)
        if len(set(shapes.values())) > 1:
            shown = ", ".join(f"{slot} {list(shape)}" for slot, shape in shapes.items())
            yield fault("shapes", f"{where}, {label}", f"shapes disagree: {shown}", [label])


def _means(
    place: str, slots: Mapping[str, Any], algorithm: Algorithm | None, shape: tuple[int, ...]
) -> Iterator[Finding]:
    """Means over rows and columns, as torch's algorithms keep them, must be of a weight of the shape that it has."""
    if algorithm is None or not algorithm.reads or len(shape) < 2:
        return
    expected = {"row": (*shape[:-1], 1), "col": (*shape[:-2], 1, shape[-1])}
    for slot, value in slots.items():
        known = algorithm.slot(slot)
        wanted = expected.get(known.kind) if known is not None else None
        if wanted is not None and isinstance(value, LazyTensor) and value.shape != wanted:
            message = f"{slot} {list(value.shape)} is not that of the weight {list(shape)}, which is {list(wanted)}"
            yield fault("shapes", place, message)


def _numbers(
    where: str, state: OptimizerState, algorithm: Algorithm | None, progress: Progress | None
) -> Iterator[Finding]:
    from optimstate.surgery.statistics import measured, oddities, second_moments

    second = second_moments(algorithm)
    for label, slots in labelled(state):
        slots = slots or {}
        found = measured(flat_slots(slots), progress)  # slots within slots too
        for kind, message in oddities(found, plain(slots.get("step")), second):
            yield fault(kind, f"{where}, {label}", message, [label])
        yield from _equal_moments(f"{where}, {label}", slots, found)


def _equal_moments(where: str, slots: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Finding]:
    first, second = slots.get("exp_avg"), slots.get("exp_avg_sq")
    if not isinstance(first, LazyTensor) or not isinstance(second, LazyTensor) or first.numel < 2:
        return
    alike = first.dtype == second.dtype and first.shape == second.shape and "exp_avg" in found and found["exp_avg"].norm
    if alike and first.tobytes() == second.tobytes():
        yield fault("moments", where, f"exp_avg and exp_avg_sq are equal bit for bit: {form_of(first)}")
