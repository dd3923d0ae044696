"""Inspect: what a checkpoint holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from optimstate.describe import describe
from optimstate.errors import UsageError
from optimstate.formats.pickles.globals import dangerous
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.formats.protocol import Document
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Progress
from optimstate.io.location import Location, Place
from optimstate.io.places import located
from optimstate.io.temporary import is_leftover
from optimstate.record import Record
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.loose import loose_weights
from optimstate.state.optimizer import Group, OptimizerState
from optimstate.state.records import is_tensor
from optimstate.state.sections import Judgement, Section, judged, scheduler_name, section_called
from optimstate.state.tied import tied_names
from optimstate.state.unread import unread_state
from optimstate.surgery.inspection.kinds import kinds_of_names
from optimstate.surgery.inspection.repeated import repeated
from optimstate.surgery.inspection.report import (
    GroupInfo,
    Inspection,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    SchedulerInfo,
    SlotInfo,
    missing_for_resume,
)
from optimstate.surgery.inspection.rest import rest_of
from optimstate.surgery.inspection.text import Sort
from optimstate.surgery.opening import opening
from optimstate.surgery.shown import form_of, plain
from optimstate.surgery.slot_counts import algorithm_of, counted, flat_slots, is_flat
from optimstate.surgery.viewing import template_of, viewed
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, census, format_path, nodes
from optimstate.tree import tensors as walked_tensors

if TYPE_CHECKING:
    from optimstate.plan.language.plan import Plan
    from optimstate.plan.language.template import Template
    from optimstate.surgery.statistics import Statistics

__all__ = ["Inspection", "inspect"]

T = TypeVar("T")


def inspect(
    checkpoint: Place | Document,
    *,
    parameters: bool = False,
    statistics: bool = False,
    name: str | None = None,
    section: str | None = None,
    sort: Sort | None = None,
    top: int | None = None,
    everything: bool = False,
    view: Plan | str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """What is in a checkpoint.

    Args:
        checkpoint: A file or folder, or what `open_checkpoint` made of it.
        parameters: List every parameter and tensor too.
        statistics: Read every tensor, which imports torch: norms, ranges, counts of NaN, infinities, zeros and negative
            numbers. In constant memory. The parameters are then listed too.
        name: List, and read, only parameters and tensors whose names this template of the plan language matches.
        section: Only sections of this kind, or the part at this path.
        sort: List by name, or the largest size or norm first; a norm is read.
        top: List only so many parameters and tensors of each section.
        everything: List every other entry, without limits.
        view: The plan from the layout in which the weights are stored to the one to show them in.
        progress: Called with the bytes read for the statistics since the last call.

    Raises:
        CheckpointError: It cannot be read.
        PlanSyntaxError: The template cannot be parsed.
        MigrationError: There is no such section.
        UsageError: No name matches the template, or `sort` or `top` is none of what they can be.
    """
    if sort not in (None, *get_args(Sort)):
        UsageError.refuse_other("sort", sort, get_args(Sort))
    if top is not None and not top >= 1:
        raise UsageError(f"top is {top}, it must be a number from 1 up")
    path = checkpoint.path if isinstance(checkpoint, Document) else located(checkpoint)
    with opening(path):
        document = viewed(checkpoint if isinstance(checkpoint, Document) else open_checkpoint(path), view)
        judgement = judged(document.tree)
        sections = list(judgement.sections) if section is None else _chosen(section, document.tree, judgement.sections)
        tensors, opaque = census(document.tree, is_tensor)
        for found in sections:  # what is shown as a section is not counted as an unknown object
            if isinstance(found.node, Opaque):
                opaque[found.node.type.path] -= 1
        alone = not any(found.kind in ("model", "ema") for found in judgement.sections)
        listed = parameters or statistics or sort is not None or top is not None
        choice = _Choice(template_of(name), sort, top)
        look = _Look(listed, statistics or sort == "norm", alone, choice, progress)
        states = {id(section): section.optimizer() for section in sections if section.kind == "optimizer"}
        infos = tuple(look.section_info(section, states.get(id(section))) for section in sections)
        if choice.template is not None:
            _refuse_unmatched(choice.template, sections, states)
        inside = {id(one.in_tree) for one in judgement.sections}
        entries, hidden = (
            rest_of(document.tree, inside, plain, everything=everything)
            if section is None and name is None
            else ((), 0)
        )
        return Inspection(
            str(path),
            document.format,
            _size(path),
            tensors,
            infos,
            {kind: count for kind, count in opaque.most_common() if count > 0},
            tuple(dangerous(document.globals)),
            tuple(_missing(document.tree, judgement, infos)) if section is None else (),
            (
                *document.notes,
                *_notes(document, sections, states),
                *look.oddities(),
                *(_unmeasured(document.tree) if statistics and section is None and name is None else ()),
            ),
            entries,
            hidden,
            {format_path(place): reason for place, reason in judgement.others.items()} if section is None else {},
            look.rest(document.tree, judgement.sections) if section is None and name is None else {},
            section or "",
        )


def _missing(
    tree: Any, judgement: Judgement, infos: Sequence[OptimizerInfo | ModelInfo | SchedulerInfo]
) -> Iterator[str]:
    return missing_for_resume(infos, has_weights=bool(loose_weights(tree)), unread=unread_state(tree, judgement))


def _refuse_unmatched(template: Template, sections: Sequence[Section], states: Mapping[int, OptimizerState]) -> None:
    """Refuse a template that matches no name of a parameter or tensor."""
    names = [name for section in sections if section.kind in ("model", "ema") for name in section.tensors()]
    for state in states.values():
        for position, (key, name, _) in enumerate(state.parameters()):
            names.append(name or (str(key) if isinstance(key, int | str) else f"#{position}"))
    if all(template.match(name) is None for name in names):
        raise UsageError(f"no name matches {describe(template.text)}", hint="`--params` lists all names.")


def _unmeasured(tree: Any) -> Iterator[str]:
    """Which tensors have no statistics."""
    from optimstate.surgery.statistics import is_measurable

    found = Counter(
        node.dtype if isinstance(node, LazyTensor) else tensor_kind(node) or "a record"
        for node in nodes(tree)
        if is_tensor(node) and not is_measurable(node)
    )
    if found:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
        yield f"without statistics, as they are not floating-point numbers with elements: {kinds}"


def _chosen(name: str, tree: Any, sections: Sequence[Section]) -> list[Section]:
    """All sections of a kind, or the one part at a path."""
    return [found for found in sections if found.kind == name] or [section_called(name, tree, sections)]


class _Choice(Record):
    """Which parameters are listed, and in which order.

    Attributes:
        template: Their names match it.
        sort: The order; None for that of the file.
        top: How many.
    """

    template: Template | None
    sort: Sort | None
    top: int | None

    def matching(self, named: Iterable[tuple[str, T]]) -> Iterable[tuple[str, T]]:
        """The names that were asked for."""
        template = self.template
        return named if template is None else [item for item in named if template.match(item[0]) is not None]

    def first(self, items: Sequence[T], name: Callable[[T], str], size: Callable[[T], float | None]) -> list[T]:
        """The first items in the order that was asked for.

        Args:
            items: Parameters or tensors.
            name: Of one.
            size: Its bytes, or its norm.
        """
        made = list(items)
        if self.sort == "name":
            made.sort(key=name)
        elif self.sort is not None:
            made.sort(key=lambda item: -(size(item) or 0.0))
        return made[: self.top]


def _notes(document: Document, sections: Sequence[Section], states: Mapping[int, OptimizerState]) -> Iterator[str]:
    for where, message in repeated(document, sections):
        yield f"{where} {message}"
    for section in sections:
        if section.kind == "optimizer" and is_flat(states[id(section)]):
            yield (
                f"optimizer {section.label}: all state is vectors; if these are FSDP1's flat parameters, they cannot "
                "be named without the model: save FSDP.optim_state_dict() instead"
            )


def _size(path: Location) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not is_leftover(file.name))
    )


class _Look:
    """How closely to look at sections.

    Args:
        listed: List every parameter and tensor.
        measured: Read them.
        alone: Whether the checkpoint has no model whose names would be shown.
        choice: Which of them.
        progress: Called with the bytes read.
    """

    def __init__(self, listed: bool, measured: bool, alone: bool, choice: _Choice, progress: Progress | None) -> None:
        self.listed, self.measured, self.alone, self.progress = listed, measured, alone, progress
        self.choice = choice
        self._odd: list[str] = []

    def section_info(self, section: Section, state: OptimizerState | None) -> OptimizerInfo | ModelInfo | SchedulerInfo:
        """The description of a section, given its state where it is an optimizer."""
        if state is not None:
            return self._optimizer_info(section.label, state)
        if section.kind == "scheduler":
            fields = section.node if isinstance(section.node, Mapping) else section.node.state
            return SchedulerInfo(
                section.label,
                scheduler_name(section.node),
                plain(fields.get("last_epoch", fields.get("last_step"))),
                plain(fields.get("_last_lr")),
            )
        return self._model_info(section)

    def rest(self, tree: Any, sections: Iterable[Section]) -> dict[str, Statistics]:
        """The statistics of the tensors that are in no section, by path, where they are asked for."""
        if not self.measured:
            return {}
        from optimstate.surgery.statistics import measured

        inside = {id(node) for section in sections for node in nodes(section.in_tree)}
        found = ((format_path(path), tensor) for path, tensor in walked_tensors(tree) if id(tensor) not in inside)
        return measured(found, self.progress)

    def oddities(self) -> Iterator[str]:
        """What is odd about the numbers that were read, in a limited number of lines."""
        yield from self._odd[:MAX_ODDITIES]
        if len(self._odd) > MAX_ODDITIES:
            yield f"{len(self._odd) - MAX_ODDITIES} more oddities of numbers; `optimstate verify` lists all of them"

    def _model_info(self, section: Section) -> ModelInfo:
        found = section.tensors()
        lazy = {name: tensor for name, tensor in found.items() if isinstance(tensor, LazyTensor)}
        dtypes: Counter[str] = Counter()
        elements: Counter[str] = Counter()
        for (dtype, shape), times in Counter([(tensor.dtype, tensor.shape) for tensor in lazy.values()]).items():
            dtypes[dtype] += times
            elements[dtype] += times * math.prod(shape)
        asked = dict(self.choice.matching(found.items()))
        statistics = self._weights(f"{section.kind} at {section.label}", asked) if self.measured else {}

        def size(item: tuple[str, Any]) -> float | None:
            if self.choice.sort == "norm":
                return statistics[item[0]].norm if item[0] in statistics else None
            return float(getattr(item[1], "nbytes", 0))

        listing = self.choice.first(list(asked.items()), itemgetter(0), size) if self.listed else []
        return ModelInfo(
            section.kind,
            section.label,
            len(found),
            elements.total(),
            dict(dtypes),
            sum(count * DTYPES[dtype].itemsize for dtype, count in elements.items()),
            tuple(tuple(names) for names in tied_names(lazy)),
            kinds_of_names(asked.items()),
            {name: form_of(tensor) for name, tensor in listing},
            {name: statistics[name] for name, _ in listing if name in statistics},
        )

    def _weights(self, where: str, tensors: Mapping[str, Any]) -> dict[str, Statistics]:
        from optimstate.surgery.statistics import measured, oddities

        found = measured(tensors.items(), self.progress)
        self._odd += [f"{where}: {message}" for _, message in oddities(found, None, ())]
        return found

    def _optimizer_info(self, path: str, state: OptimizerState) -> OptimizerInfo:
        counts = counted(state)
        slots = counts.slots
        algorithm = algorithm_of(slots, state)
        return OptimizerInfo(
            path,
            algorithm.name if algorithm else None,
            state.is_named,
            tuple(_group_info(group) for group in state.groups),
            tuple(SlotInfo(str(n), c.parameters, tuple(sorted(c.dtypes)), c.nbytes) for n, c in slots.items()),
            dict(sorted(counts.steps.items())),
            counts.fresh,
            len(state.of_no_parameter()),
            sum(count.nbytes for count in slots.values()),
            self._names_of(state, algorithm) if self.alone and state.is_named else {},
            self._listing(path, state, algorithm) if self.listed else (),
            unread_steps=counts.unread,
        )

    def _names_of(self, state: OptimizerState, algorithm: Algorithm | None) -> dict[str, tuple[int, str]]:
        return kinds_of_names(list(self.choice.matching(_named_slots(state))), algorithm)

    def _listing(self, path: str, state: OptimizerState, algorithm: Algorithm | None) -> tuple[ParameterInfo, ...]:
        sizes = [float(sum(getattr(v, "nbytes", 0) for _, v in flat_slots(s or {}))) for _, _, s in state.parameters()]
        made = [
            (info, size)
            for info, size in zip(self._parameter_infos(path, state, algorithm), sizes, strict=True)
            if info is not None
        ]

        def size(item: tuple[ParameterInfo, float]) -> float:
            norms = [found.norm for found in item[0].statistics.values() if found.norm is not None]
            return math.hypot(*norms) if self.choice.sort == "norm" else item[1]

        return tuple(info for info, _ in self.choice.first(made, lambda item: item[0].name or item[0].key, size))

    def _parameter_infos(
        self, path: str, state: OptimizerState, algorithm: Algorithm | None
    ) -> Iterator[ParameterInfo | None]:
        """Every parameter in order; None for those that are not asked for."""
        group_of = [index for index, group in enumerate(state.groups) for _ in group.params]
        for position, ((key, name, found), group) in enumerate(zip(state.parameters(), group_of, strict=True)):
            shown = str(key) if isinstance(key, int | str) else f"#{position}"
            if not list(self.choice.matching([(name or shown, None)])):
                yield None
                continue
            slots = {str(slot): plain(value) for slot, value in (found or {}).items()}
            if not self.measured:
                yield ParameterInfo(name, shown, group, slots)
                continue
            from optimstate.surgery.statistics import measured, oddities, second_moments

            numbers = measured(flat_slots(found or {}), self.progress)
            where = f"optimizer at {path}, {f'parameter {shown}' if name is None else name}"
            odd = oddities(numbers, slots.get("step"), second_moments(algorithm))
            self._odd += [f"{where}: {message}" for _, message in odd]
            yield ParameterInfo(name, shown, group, slots, numbers)


MAX_ODDITIES = 20


def _named_slots(state: OptimizerState) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((str(name), dict(slots or {})) for _, name, slots in state.parameters())


def _group_info(group: Group) -> GroupInfo:
    return GroupInfo(len(group.params), {str(key): plain(value) for key, value in group.options.items()})
