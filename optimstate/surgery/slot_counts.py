"""What is counted of an optimizer's state: its slots, steps and the algorithm that these tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optimstate.io.extents import InMemory, is_far, trips
from optimstate.record import Record
from optimstate.state.algorithms.registry import recognise
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.optimizer import OptimizerState
from optimstate.state.records import tensor_record
from optimstate.surgery.shown import plain
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage, announced, read_numbers
from optimstate.tree import Opaque

FAR_STEPS = 3
"""How many steps are read of a store that needs more requests than that for all of them."""

__all__ = ["Counts", "algorithm_of", "counted", "flat_slots", "is_flat"]


def algorithm_of(slots: Iterable[Any], state: OptimizerState) -> Algorithm | None:
    """The algorithm that a state is of, told by its slots: without fp32 masters, and of nested ones the outermost.

    The options are those of the first group in which nothing is missing.
    """
    names = sorted({str(slot).partition(".")[0] for slot in slots})
    return next(filter(None, (recognise(names, group.options) for group in state.groups)), None)


class _SlotCount:
    """What is counted of one slot."""

    def __init__(self) -> None:
        self.parameters = 0
        self.dtypes: set[str] = set()
        self.nbytes = 0

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


class Counts(Record):
    """What is counted of an optimizer.

    Attributes:
        slots: By name.
        steps: How many parameters are at each step.
        unread: Of how many the step was not read, because it takes a request for each.
        fresh: How many have no state.
    """

    slots: dict[str, _SlotCount]
    steps: Counter[str]
    unread: int
    fresh: int


def counted(state: OptimizerState) -> Counts:
    """What there is of each slot, how many parameters are at each step, and how many have no state."""
    # Checkpoints have few kinds of slots and many tensors: what costs something is done once for each kind.
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    slots: dict[str, _SlotCount] = {}
    steps: list[str] = []
    scalars = _ScalarReader()
    fresh = 0
    unread = _announced_steps(state)
    for _, _, found in state.parameters():
        if not found:
            fresh += 1
            continue
        for slot, value in found.items():
            if type(value) is LazyTensor:
                tensors.append((slot, value.dtype, value.shape))
                if slot == "step" and id(value) not in unread:
                    steps.append(scalars.text(value))
                continue
            for path, inner in flat_slots({slot: value}):
                slots.setdefault(path, _SlotCount()).add(inner)
                if _is_step(path) and id(inner) not in unread:
                    steps.append(scalars.text(inner))
    for (slot, dtype, shape), times in Counter(tensors).items():
        slots.setdefault(slot, _SlotCount()).add_tensors(dtype, shape, times)
    if not steps:  # some algorithms count per group
        steps += [scalars.text(group.options["step"]) for group in state.groups if "step" in group.options]
    return Counts(slots, Counter(steps), len(unread), fresh)


def _announced_steps(state: OptimizerState) -> set[int]:
    """Announce the steps that are read; the identities of those that are not, where a store has each by itself."""
    unknown = list(_unknown_steps(state))
    if len(unknown) > FAR_STEPS and trips(extent for step in unknown for extent in step.storage.reach()) > FAR_STEPS:
        chosen = [unknown[place * (len(unknown) - 1) // (FAR_STEPS - 1)] for place in range(FAR_STEPS)]
        announced(chosen)
        return {id(step) for step in unknown} - {id(step) for step in chosen}
    announced(unknown)
    read_numbers(step for step in unknown if step.numel == 1)
    return set()


def _unknown_steps(state: OptimizerState) -> Iterator[LazyTensor]:
    """The steps that have to be read one by one: not those of few bytes whose checksums tell them or equal ones."""
    for _, _, found in state.parameters():
        for slot, value in (found or {}).items():
            nested = flat_slots({slot: value}) if isinstance(value, Mapping) else ((slot, value),)
            for path, step in nested:
                if isinstance(step, LazyTensor) and _is_step(path) and not _is_told(step.storage):
                    yield step


def _is_step(path: str) -> bool:
    return path == "step" or str(path).endswith(".step")  # str, because some programs use numbers as keys


def _is_told(storage: Storage) -> bool:
    """Whether a checksum tells the bytes of a storage: CRC-32 tells any two messages of up to four bytes apart."""
    return storage.crc is not None and storage.nbytes <= 4


def flat_slots(found: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every slot; of slots that an optimizer nests (bitsandbytes, heavyball, Shampoo) each by its dotted path."""
    for slot, value in found.items():
        if isinstance(value, Mapping) and value and len(prefix) < 100:
            yield from flat_slots(value, f"{prefix}{slot}.")
        else:
            yield f"{prefix}{slot}", value


def is_flat(state: OptimizerState) -> bool:
    """Whether every tensor of an anonymous optimizer is a vector, as FSDP1's flat parameters are."""
    if state.is_named:
        return False
    found_vector = False
    for _, _, found in state.parameters():
        for _, value in flat_slots(found or {}):
            if isinstance(value, LazyTensor) and value.shape:
                if len(value.shape) > 1:
                    return False
                found_vector = True
    return found_vector


class _ScalarReader:
    """The many step counters of a file as text, equal ones read once."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}

    def text(self, value: Any) -> str:
        if not isinstance(value, LazyTensor):
            return _step_text(plain(value))
        storage = value.storage
        key = (value.dtype, value.offset, storage.nbytes, storage.crc) if _is_told(storage) else id(storage)
        if key not in self._known:
            self._known[key] = _step_text(plain(_without_request(value)))
        return self._known[key]


def _without_request(value: LazyTensor) -> LazyTensor:
    """A tensor of four bytes in a store whose checksum tells them, in memory; any other tensor as it is."""
    storage = value.storage
    if not _is_told(storage) or storage.nbytes != 4 or not any(map(is_far, storage.reach())):
        return value
    from optimstate.io.checksums import bytes_of_crc  # of files, nothing needs it

    data = InMemory(bytes_of_crc(storage.crc or 0))
    return LazyTensor(Storage(data.extents(), 4, storage.kind), value.dtype, value.shape, value.stride, value.offset)


def _step_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
