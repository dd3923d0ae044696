"""What `inspect` reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.record import Record, field
from optimstate.state.unread import Unread
from optimstate.surgery.inspection.rest import Entry
from optimstate.surgery.inspection.text import View, inspection_lines
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import joined

if TYPE_CHECKING:
    from optimstate.surgery.statistics import Statistics

__all__ = [
    "GroupInfo",
    "Inspection",
    "ModelInfo",
    "OptimizerInfo",
    "ParameterInfo",
    "SchedulerInfo",
    "SlotInfo",
    "missing_for_resume",
]


class SlotInfo(Record):
    """One slot over all parameters: how many have it, with which dtypes, and how large it is altogether."""

    name: str
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int


class ParameterInfo(Record):
    """One parameter of an optimizer.

    Attributes:
        name: None where the file has none.
        key: What the state is keyed by.
        group: The index of its param group.
        slots: Each slot's dtype and shape, or its value.
        statistics: Of each slot of numbers, when asked for; of nested slots by their dotted path.
    """

    name: str | None
    key: str
    group: int
    slots: Mapping[str, Any]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)


class GroupInfo(Record):
    """One param group."""

    parameters: int
    options: Mapping[str, Any]


class OptimizerInfo(Record):
    """An optimizer section.

    Attributes:
        algorithm: The class its state and options are those of, or None.
        named: Whether parameters have names.
        steps: Each step count found, with how many parameters (or groups) have it.
        unread_steps: Parameters whose steps were not read: in a store each takes a request, so that some stand for all.
        fresh: Parameters without state.
        orphans: Entries of state that belong to no parameter.
        names: Of an optimizer in a checkpoint without a model: as in `ModelInfo`, with the parameters' shapes.
    """

    path: str
    algorithm: str | None
    named: bool
    groups: tuple[GroupInfo, ...]
    slots: tuple[SlotInfo, ...]
    steps: Mapping[str, int]
    fresh: int
    orphans: int
    nbytes: int
    names: Mapping[str, tuple[int, str]]
    parameters: tuple[ParameterInfo, ...]
    unread_steps: int = 0
    kind: str = "optimizer"


class ModelInfo(Record):
    """A model or EMA section.

    Attributes:
        tied: Names that share memory.
        names: Names with their layer indices collapsed to `*`: how many there are, and what the first of them is.
        tensors: Every name with dtype and shape, when asked for.
        statistics: Of every tensor of numbers, when asked for.
    """

    kind: str
    path: str
    parameters: int
    elements: int
    dtypes: Mapping[str, int]
    nbytes: int
    tied: tuple[tuple[str, ...], ...]
    names: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, str]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)


class SchedulerInfo(Record):
    """A scheduler section: its class as far as it can be told, and its scalar entries."""

    path: str
    algorithm: str
    last_epoch: Any
    last_lr: Any
    kind: str = "scheduler"


class Inspection(VerbReport):
    """What a checkpoint holds.

    Attributes:
        opaque: Objects of unknown classes, kept as records: class -> number.
        dangerous: Names in its pickles that would run code if the file were loaded without care.
        resume: What a run that resumes from it would miss, as far as names, sizes and steps show it.
        notes: Oddities.
        entries: What is in no section, as far as it is listed: values by path.
        hidden: How many entries more there are at least.
        others: Mappings of names to tensors that were not taken for a model: path to the reason.
        statistics: Of every tensor that is in no section, by path, when asked for.
        section: The kind or path of what alone was looked at; empty where it was everything.
    """

    path: str
    format: str
    nbytes: int
    tensors: int
    sections: tuple[OptimizerInfo | ModelInfo | SchedulerInfo, ...]
    opaque: Mapping[str, int]
    dangerous: tuple[str, ...]
    resume: tuple[str, ...]
    notes: tuple[str, ...]
    entries: tuple[Entry, ...] = ()
    hidden: int = 0
    others: Mapping[str, str] = field(default_factory=dict)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    section: str = ""

    VERB = "inspect"

    def __str__(self) -> str:
        return self.text()

    def text(self, view: View | None = None) -> str:
        """The report for people: layers together unless the view says otherwise."""
        return joined(inspection_lines(self, view or View()))


def missing_for_resume(
    found: Sequence[OptimizerInfo | ModelInfo | SchedulerInfo],
    *,
    has_weights: bool = False,
    unread: Unread | None = None,
) -> Iterator[str]:
    """What a resumed run would miss or needs to know.

    Args:
        found: The sections.
        has_weights: Whether there are weights outside of them.
        unread: Optimizer state in no section.
    """
    optimizers = [section for section in found if isinstance(section, OptimizerInfo)]
    if not has_weights and not any(isinstance(section, ModelInfo) for section in found):
        yield "no weights: they must come from another file"
    if unread is not None:
        yield f"{unread}, of a form that is not known: whether a run can resume from it is unknown"
    elif not optimizers:
        yield "no optimizer: its state would start fresh"
    for section in optimizers:
        where = f"optimizer at {section.path}"
        count = sum(group.parameters for group in section.groups)
        if section.fresh:
            which = "no parameter has" if section.fresh == count else f"{section.fresh} of {count} parameters have no"
            yield f"{where}: {which} state: they would start fresh"
        if section.orphans:
            yield f"{where}: state under {section.orphans} keys belongs to no parameter of any group"
        if len(section.steps) > 1:
            steps = ", ".join(f"{step} (x{times})" for step, times in section.steps.items())
            yield f"{where}: parameters are at different steps: {steps}"
        if count and not section.named:
            yield f"{where}: no names, so the model must list its parameters in the same order"
    groups = {len(section.groups) for section in optimizers}
    for other in found:
        if isinstance(other, SchedulerInfo) and groups and isinstance(other.last_lr, list):
            rates = len(other.last_lr)
            if rates not in groups:
                counts = ", ".join(map(str, sorted(groups)))
                yield f"scheduler at {other.path}: learning rates for {rates} groups, the optimizer has {counts}"
