"""Inspect: what a checkpoint holds."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optimstate.formats._globals import dangerous
from optimstate.formats.registry import open_document
from optimstate.state.model import Group, OptimizerState
from optimstate.state.records import tensor_record
from optimstate.state.schema import recognise
from optimstate.state.sections import Section, find_sections, scheduler_name, tied_names
from optimstate.surgery._common import opening, to_json
from optimstate.tensors import DTYPES, LazyTensor
from optimstate.tree import GlobalName, Opaque, census

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class SlotInfo:
    """One slot over all parameters: how many have it, with which dtypes, and how large it is altogether."""

    name: str
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter: name (None where the file has none), group, shape where known, and slot -> shape or value."""

    name: str | None
    key: str
    group: int
    slots: Mapping[str, Any]


@dataclass(frozen=True)
class GroupInfo:
    """One param group."""

    parameters: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer section.

    Attributes:
        algorithm: The class its state and options are those of, or None.
        named: Whether parameters have names.
        steps: Each step count found, with how many parameters (or groups) have it.
        fresh: Parameters without state.
        orphans: Entries of state that belong to no parameter.
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
    parameters: tuple[ParameterInfo, ...] = field(repr=False)
    kind: str = "optimizer"


@dataclass(frozen=True)
class ModelInfo:
    """A model or EMA section.

    Attributes:
        tied: Names that share memory.
        names: Names with their layer indices collapsed to `*`: how many there are, and what the first of them is.
        tensors: Every name with dtype and shape, when asked for.
    """

    kind: str
    path: str
    parameters: int
    elements: int
    dtypes: Mapping[str, int]
    nbytes: int
    tied: tuple[tuple[str, ...], ...]
    names: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class SchedulerInfo:
    """A scheduler section: its class as far as it can be told, and its scalar entries."""

    path: str
    algorithm: str
    last_epoch: Any
    last_lr: Any
    kind: str = "scheduler"


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        opaque: Objects of unknown classes, kept as records: class -> number.
        dangerous: Names in its pickles that would run code if the file were loaded without care.
        notes: Oddities.
    """

    path: str
    format: str
    nbytes: int
    tensors: int
    sections: tuple[OptimizerInfo | ModelInfo | SchedulerInfo, ...]
    opaque: Mapping[str, int]
    dangerous: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("inspect", asdict(self))


def inspect(path: str | Path, *, parameters: bool = False) -> Inspection:
    """What is in a checkpoint.

    Args:
        path: A file or folder.
        parameters: List every parameter and tensor too.

    Raises:
        CheckpointError: It cannot be read.
    """
    with opening(path):
        document = open_document(path)
        sections = find_sections(document.tree)
        tensors, opaque = census(document.tree)
        for section in sections:  # what is shown as a section is not counted as an unknown object
            if isinstance(section.node, Opaque):
                opaque[section.node.type.path] -= 1
        return Inspection(
            str(path),
            document.format,
            _size(Path(path)),
            tensors,
            tuple(_section_info(section, listed=parameters) for section in sections),
            {name: count for name, count in opaque.most_common() if count > 0},
            tuple(dangerous(document.globals)),
            (*document.notes, *_notes(sections)),
        )


def _notes(sections: Sequence[Section]) -> Iterator[str]:
    for section in sections:
        if section.kind == "optimizer" and _is_flat(section.optimizer()):
            yield (
                f"optimizer {section.label}: all state is vectors; if these are FSDP1's flat parameters, they cannot "
                "be named without the model: save FSDP.optim_state_dict() instead"
            )


def _size(path: Path) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


def _section_info(section: Section, *, listed: bool) -> OptimizerInfo | ModelInfo | SchedulerInfo:
    if section.kind == "optimizer":
        return _optimizer_info(section.label, section.optimizer(), listed=listed)
    if section.kind == "scheduler":
        fields = section.node if isinstance(section.node, Mapping) else section.node.state
        return SchedulerInfo(
            section.label,
            scheduler_name(section.node),
            plain(fields.get("last_epoch", fields.get("last_step"))),
            plain(fields.get("_last_lr")),
        )
    return _model_info(section, listed=listed)


def _model_info(section: Section, *, listed: bool) -> ModelInfo:
    found = section.tensors()
    lazy = {name: tensor for name, tensor in found.items() if isinstance(tensor, LazyTensor)}
    return ModelInfo(
        section.kind,
        section.label,
        len(found),
        sum(tensor.numel for tensor in lazy.values()),
        dict(Counter(tensor.dtype for tensor in lazy.values())),
        sum(tensor.nbytes for tensor in lazy.values()),
        tuple(tuple(names) for names in tied_names(lazy)),
        _kinds_of_names(found),
        {name: describe(tensor) for name, tensor in found.items()} if listed else {},
    )


_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def _kinds_of_names(found: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    kinds: dict[str, tuple[int, str]] = {}
    for name, tensor in found.items():
        pattern = _INDEX.sub("*", name)
        known = kinds.get(pattern)
        kinds[pattern] = (known[0] + 1, known[1]) if known else (1, describe(tensor))
    return kinds


def describe(value: Any) -> str:
    """A leaf in few words: `float32[12, 8]`, a number, or the class of a record."""
    if isinstance(value, LazyTensor):
        return f"{value.dtype}{list(value.shape)}"
    record = tensor_record(value)
    return str(record) if record is not None else str(plain(value))


MAX_SHOWN = 4096
"""Items of one value that are shown; of what is larger, the size. Shared lists can make a small file endless."""


def plain(value: Any) -> Any:
    """A leaf as JSON can hold it; tensors of one element become numbers."""
    return _plain(value, [MAX_SHOWN])


def _plain(value: Any, room: list[int]) -> Any:
    if isinstance(value, LazyTensor):
        shown = value.numel == 1 and value.dtype in _SHOWN_AS_NUMBER
        return _plain(value.item(), room) if shown else describe(value)
    if isinstance(value, list | tuple | Mapping):
        room[0] -= len(value)
        if room[0] < 0:
            return f"{type(value).__name__} of {len(value)}"
        if isinstance(value, Mapping):
            return {str(key): _plain(item, room) for key, item in value.items()}
        return [_plain(item, room) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Opaque | GlobalName):
        record = tensor_record(value)
        return repr(value) if record is None else str(record)
    return str(value)


_SHOWN_AS_NUMBER = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


@dataclass
class _SlotCount:
    """What is counted of one slot."""

    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)
    nbytes: int = 0

    def add(self, value: Any) -> None:
        """Count one value."""
        self.parameters += 1
        record = tensor_record(value)
        if isinstance(value, LazyTensor):
            self.nbytes += value.nbytes
            self.dtypes.add(value.dtype)
        elif record is not None:
            self.nbytes += sum(part.nbytes for part in record.parts.values())
            self.dtypes.add(f"{record.kind} {record.dtype}")
        else:
            self.dtypes.add(value.type.qualname if isinstance(value, Opaque) else type(value).__name__)

    def add_tensors(self, dtype: str, shape: tuple[int, ...], times: int) -> None:
        """Count equal tensors."""
        self.parameters += times
        self.dtypes.add(dtype)
        self.nbytes += times * DTYPES[dtype].itemsize * math.prod(shape)


def _optimizer_info(path: str, state: OptimizerState, *, listed: bool) -> OptimizerInfo:
    # Checkpoints have few kinds of slots and many tensors: what costs something is done once for each kind.
    tensors: dict[tuple[str, str, tuple[int, ...]], int] = {}
    slots: dict[str, _SlotCount] = {}
    steps: Counter[str] = Counter()
    scalars = _ScalarReader()
    fresh = 0
    for _, _, found in state.parameters():
        if not found:
            fresh += 1
            continue
        for slot, value in found.items():
            if type(value) is LazyTensor:
                kind = (slot, value.dtype, value.shape)
                tensors[kind] = tensors.get(kind, 0) + 1
                if slot == "step":
                    steps[scalars.text(value)] += 1
                continue
            for path, inner in _slots({slot: value}):
                slots.setdefault(path, _SlotCount()).add(inner)
                if path == "step" or path.endswith(".step"):
                    steps[scalars.text(inner)] += 1
    for (slot, dtype, shape), times in tensors.items():
        slots.setdefault(slot, _SlotCount()).add_tensors(dtype, shape, times)
    if not steps:  # some algorithms count per group
        steps.update(scalars.text(group.options["step"]) for group in state.groups if "step" in group.options)
    algorithm = recognise(slots, state.groups[0].options) if state.groups else None
    return OptimizerInfo(
        path,
        algorithm.name if algorithm else None,
        state.is_named,
        tuple(_group_info(group) for group in state.groups),
        tuple(SlotInfo(str(n), c.parameters, tuple(sorted(c.dtypes)), c.nbytes) for n, c in slots.items()),
        dict(sorted(steps.items())),
        fresh,
        len(state.orphans()),
        sum(count.nbytes for count in slots.values()),
        tuple(_parameter_infos(state)) if listed else (),
    )


def _slots(found: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every slot; of slots that an optimizer nests (bitsandbytes, heavyball, Shampoo) each by its dotted path."""
    for slot, value in found.items():
        if isinstance(value, Mapping) and value and len(prefix) < 100:
            yield from _slots(value, f"{prefix}{slot}.")
        else:
            yield f"{prefix}{slot}", value


def _is_flat(state: OptimizerState) -> bool:
    """Whether every tensor of an anonymous optimizer is a vector, as FSDP1's flat parameters are."""
    if state.is_named:
        return False
    found_vector = False
    for _, _, found in state.parameters():
        for _, value in _slots(found or {}):
            if isinstance(value, LazyTensor) and value.shape:
                if len(value.shape) > 1:
                    return False
                found_vector = True
    return found_vector


def _parameter_infos(state: OptimizerState) -> Iterator[ParameterInfo]:
    group_of = [index for index, group in enumerate(state.groups) for _ in group.params]
    for position, ((key, name, found), group) in enumerate(zip(state.parameters(), group_of, strict=True)):
        shown = str(key) if isinstance(key, int | str) else f"#{position}"
        yield ParameterInfo(name, shown, group, {str(slot): plain(value) for slot, value in (found or {}).items()})


class _ScalarReader:
    """The many step counters of a file as text, equal ones read once."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def text(self, value: Any) -> str:
        if not isinstance(value, LazyTensor):
            return _step_text(plain(value))
        storage = value.storage
        # CRC-32 tells any two messages of up to four bytes apart, so equal checksums are equal numbers.
        crc = storage.crc if storage.nbytes <= 4 else None
        key = (value.dtype, value.offset, storage.nbytes, crc) if crc is not None else id(storage)
        if key not in self._known:
            self._known[key] = _step_text(plain(value))
        return self._known[key]


def _step_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _group_info(group: Group) -> GroupInfo:
    return GroupInfo(len(group.params), {str(key): plain(value) for key, value in group.options.items()})
