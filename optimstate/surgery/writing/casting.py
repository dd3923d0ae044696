"""Other dtypes for the tensors of a checkpoint: what may be cast, and what the cast rounded.

Nothing is computed before the result is written: a cast tensor is read, cast and counted a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, UsageError
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.algorithms.slots import MASTERS
from optimstate.state.sections import KINDS, Section
from optimstate.surgery.slot_counts import algorithm_of
from optimstate.surgery.statistics import second_moments
from optimstate.tensors.compute import mapped
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import AttributedTensor, Opaque, nodes, rebuilt_mapping

__all__ = ["DTYPES", "Cast", "Casting", "parse_dtypes"]

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (*_FLOATS, "bf16", "fp16", "fp32", "fp64")
"""What can be cast to, with the short names that people use most."""
_COUNTERS = ("float32", "float64")  # what can count steps for long


class Cast(Record):
    """What became of the tensors of one dtype of a section or slot.

    Attributes:
        what: The section, and for optimizers the slot.
        source: The dtype they had.
        target: The dtype they have.
        tensors: How many there are; tensors that share memory are cast once and go on sharing it.
        elements: Of these; None where nothing was written.
        rounded: How many have another value now, the next two included.
        overflowed: How many were finite and are not any more.
        flushed: How many were not zero and are.
    """

    what: str
    source: str
    target: str
    tensors: int
    elements: int | None = None
    rounded: int | None = None
    overflowed: int | None = None
    flushed: int | None = None


def parse_dtypes(texts: Iterable[str]) -> dict[str, str]:
    """Parse `model=bf16`, `exp_avg=float16`: section or slot to dtype, by torch's name.

    Raises:
        UsageError: One is not of this form, or asks for something twice.
    """
    made: dict[str, str] = {}
    for text in texts:
        key, separator, name = text.rpartition("=")
        if not separator or not key or not name:
            raise UsageError(
                f"dtype {describe(text)}: expected SECTION=DTYPE or SLOT=DTYPE", hint="For example: model=bfloat16."
            )
        if key in made:
            raise UsageError(f"dtype {describe(text)}: {key} has one already, {made[key]}")
        made[key] = _dtype_of(key, name)
    return made


def _dtype_of(key: str, name: str) -> str:
    dtype = _ALIASES.get(name.lower(), name.lower())
    if dtype not in _FLOATS:
        raise UsageError.unknown(f"dtype {key}={name}: {describe(name)} is not a dtype to cast to", name, DTYPES)
    return dtype


class _Tally:
    """Counts of one kind of cast, filled while the result is written."""

    def __init__(self, what: str, source: str, target: str) -> None:
        self.what, self.source, self.target = what, source, target
        self.tensors = self.elements = self.rounded = self.overflowed = self.flushed = 0

    def report(self, written: bool) -> Cast:
        """What was counted."""
        cast = Cast(self.what, self.source, self.target, self.tensors)
        if not written:
            return cast
        counts = {name: getattr(self, name) for name in ("elements", "rounded", "overflowed", "flushed")}
        return cast._replace(**counts)

    def count(self, old: Any, new: Any) -> None:
        """Count a block before and after."""
        from optimstate.installed_torch import torch

        self.elements += old.numel()
        back = new.to(old.dtype)
        if old.itemsize < 2:  # few operations take numbers of eight bits
            old, back = old.float(), back.float()
        low, high = (float(end) for end in torch.aminmax(back))
        if low - low or high - high:  # not finite: NaN and infinities that were there already are not counted
            finite = old.isfinite()
            self.overflowed += int((finite & ~back.isfinite()).sum())
            old, back = old[finite], back[finite]
        self.flushed += int(torch.count_nonzero(old)) - int(torch.count_nonzero(back))
        self.rounded += int(torch.count_nonzero(back != old))


_Place = tuple[int, str, str]


class Casting:
    """Casts tensors of sections, and counts what was cast.

    Args:
        dtypes: By the name of a slot, else by the path, else by the kind of a section. A slot that is named is cast
            whatever it is, but for step counts, which floats of fewer bits cannot count; a section that is named keeps
            its numbers that are no tensors and fp32 masters as they are.
        sections: All that will be cast: tensors that share memory are to share it afterwards too.
    """

    def __init__(self, dtypes: Mapping[str, str], sections: Sequence[tuple[Section, Any]]) -> None:
        self._dtypes = {key: _dtype_of(key, name) for key, name in dtypes.items()}
        self._used: set[str] = set()
        self._tallies: dict[tuple[str, str, str], _Tally] = {}
        self._storages: dict[_Place | tuple[Any, ...], Storage] = {}
        self._cast_from: set[int] = set()
        self._squares: set[str] = set()
        self.notes: list[str] = []
        self._views: dict[int, set[Any]] = {}
        for section, node in sections:
            for _, value in _leaves(section, node):
                if isinstance(value, LazyTensor):
                    self._views.setdefault(id(value.storage), set()).add(_view(value))
        self._sections = sections

    def cast(self) -> list[Any]:
        """The sections' new nodes.

        Raises:
            MigrationError: A key names nothing, or something that cannot be cast.
        """
        made = [self._node(section, node) for section, node in self._sections]
        unused = [key for key in self._dtypes if key not in self._used]
        if unused:
            known = dict.fromkeys(
                name
                for section, node in self._sections
                for name in (section.kind, section.label, *(slot for slot, _ in _leaves(section, node) if slot))
            )
            if set(unused) <= set(KINDS):
                problems = [
                    Problem("unmatched", "no section or slot has this name", f"dtype {k}={self._dtypes[k]}")
                    for k in unused
                ]
                raise MigrationError(problems, hint=f"There are: {', '.join(known)}.")
            first = f"dtype {unused[0]}={self._dtypes[unused[0]]}: no section or slot has this name"
            raise UsageError.unknown(first, unused[0], known)
        return made

    def note_partings(self, tree: Any) -> None:
        """Note how many tensors of the result no longer share memory because the others were cast."""
        left = {id(node.storage) for node in nodes(tree) if isinstance(node, LazyTensor)} & self._cast_from
        if left:
            count = f"{len(left)} storage{'' if len(left) == 1 else 's'} no longer shared"
            self.notes.append(f"{count}, because only some of the tensors in them were cast")

    def reports(self, *, written: bool) -> tuple[Cast, ...]:
        """What was cast; with counts once it is written."""
        return tuple(tally.report(written) for tally in self._tallies.values())

    def lost_squares(self) -> list[str]:
        """Notes on second moments that became zero, once the result is written."""
        tallies = ((what, tally) for (what, *_), tally in self._tallies.items() if what in self._squares)
        return [
            f"{what}: {tally.flushed:,} averages of squares became zero: updates there are divided by epsilon alone"
            for what, tally in tallies
            if tally.flushed
        ]

    def _node(self, section: Section, node: Any) -> Any:
        by_section = self._target(section.label) or self._target(section.kind)
        if section.kind == "optimizer":
            return self._optimizer(section, node, by_section)
        if by_section is None or section.kind == "scheduler":
            return node
        where = f"{section.kind} at {section.label}"
        if section.positional:
            items = [self._floating(where, value, by_section, f"{i}") for i, value in enumerate(node["shadow_params"])]
            return rebuilt_mapping(node, {**node, "shadow_params": items})
        if not isinstance(node, Mapping):
            raise _refused(where, "a pickled object, not a state dict", "Convert it alone: --section model.")
        return rebuilt_mapping(
            node, {name: self._floating(where, value, by_section, name) for name, value in node.items()}
        )

    def _target(self, key: str) -> str | None:
        if key not in self._dtypes:
            return None
        self._used.add(key)
        return self._dtypes[key]

    def _floating(self, what: str, value: Any, target: str, name: str) -> Any:
        """The value cast where it is a tensor of real floats; complex ones and integers stay, as in torch's modules."""
        if isinstance(value, Opaque):
            raise _refused(f"{what}, {name}", f"a {describe(value)}, which has no plain elements", "")
        if not isinstance(value, LazyTensor) or not value.dtype.startswith(("float", "bfloat")):
            return value
        return value if value.dtype == target else self._tensor(what, value, target)

    def _optimizer(self, section: Section, node: Any, by_section: str | None) -> Any:
        state = Section("optimizer", section.path, node).optimizer()
        targets: dict[Any, str] = {}
        kept: list[str] = []
        where = f"optimizer at {section.label}"
        for slot, values in _by_slot(state.state.values()).items():
            named = self._target(str(slot))
            target = named or by_section
            if target is None:
                continue
            if named is None and (problem := _reason_to_keep(slot, values)):
                kept.append(f"{slot} ({problem})")
                continue
            if named is not None:
                _check_named(f"{where}, {slot}", slot, values, target)
                if slot in MASTERS and target != "float32":
                    self.notes.append(
                        f"{where}: the fp32 masters, {slot}, are {target} now: the next step starts there"
                    )
            targets[slot] = target
        squares = second_moments(algorithm_of(_by_slot(state.state.values()), state))
        self._squares |= {f"{where}, {slot}" for slot in squares}
        if kept and by_section is not None:
            self.notes.append(f"{where}: not cast to {by_section}: {', '.join(kept)}")
        if not targets:
            return node
        if section.positional or isinstance(node, Opaque):
            raise _refused(where, "not in the form of a state dict", "Load it in its framework and save a state dict.")
        made = {}
        for key, slots in state.state.items():
            cast = {
                slot: self._floating(f"{where}, {slot}", value, targets[slot], str(key)) if slot in targets else value
                for slot, value in slots.items()
            }
            made[key] = rebuilt_mapping(slots, cast)
        return state._replace(state=made).to_node()

    def _tensor(self, what: str, value: LazyTensor, target: str) -> LazyTensor:
        tally = self._tallies.setdefault((what, value.dtype, target), _Tally(what, value.dtype, target))
        tally.tensors += 1
        self._cast_from.add(id(value.storage))
        # What several views look into is cast whole, so that they go on sharing it; of others, the part that is seen.
        alone = len(self._views.get(id(value.storage), ())) < 2 or value.storage.nbytes % value.itemsize
        place = (*_view(value), target) if alone else (id(value.storage), value.dtype, target)
        if place not in self._storages:
            storage = value.clone().storage if alone else value.storage
            self._storages[place] = _cast_storage(storage, value.dtype, target, tally)
        made = LazyTensor(
            self._storages[place],
            target,
            value.shape,
            value.stride,
            0 if alone else value.offset,
            value.requires_grad,
            value.is_parameter,
            value.metadata,
        )
        return AttributedTensor.of(made, value.attributes) if isinstance(value, AttributedTensor) else made


def _view(value: LazyTensor) -> tuple[Any, ...]:
    return id(value.storage), value.offset, value.shape, value.stride, value.dtype


def _cast_storage(storage: Storage, source: str, target: str, tally: _Tally) -> Storage:
    count = storage.nbytes // LazyTensor(storage, source, ()).itemsize
    like = LazyTensor(storage, source, (count,))
    seen = 0

    def function(block: Any) -> Any:
        from optimstate.installed_torch import dtype_of

        nonlocal seen
        made = block.to(dtype_of(target))
        if seen < count:  # a container that reads twice is counted once
            tally.count(block, made)
        seen += block.numel()
        return made

    return mapped(like, target, function).storage


def _leaves(section: Section, node: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a section with their slots, which are empty outside optimizers."""
    if section.kind == "optimizer":
        for slots in Section("optimizer", section.path, node).optimizer().state.values():
            yield from ((str(slot), value) for slot, value in slots.items())
    elif section.kind != "scheduler":
        inner = node["shadow_params"] if section.positional else node.values() if isinstance(node, Mapping) else ()
        yield from (("", value) for value in inner)


def _by_slot(state: Iterable[Mapping[Any, Any]]) -> dict[Any, list[Any]]:
    made: dict[Any, list[Any]] = {}
    for slots in state:
        for slot, value in slots.items():
            made.setdefault(slot, []).append(value)
    return made


def _is_scalar(slot: Any, values: Sequence[Any]) -> bool:
    shapes = {value.shape for value in values if isinstance(value, LazyTensor)}
    return slot == "step" or shapes == {()}


def _reason_to_keep(slot: Any, values: Sequence[Any]) -> str:
    """Why a slot of a section that is cast stays as it is; empty where it does not."""
    if _is_scalar(slot, values):
        return "counts and numbers"
    if slot in MASTERS:
        return "fp32 masters"
    if not any(isinstance(value, LazyTensor) and value.dtype.startswith(("float", "bfloat")) for value in values):
        return "no tensors of floats"
    return ""


def _check_named(where: str, slot: Any, values: Sequence[Any], target: str) -> None:
    for value in values:
        if not isinstance(value, LazyTensor) or not value.dtype.startswith(("float", "bfloat")):
            what = (
                f"{value.dtype} tensors" if isinstance(value, LazyTensor) else f"values such as {describe(value)}"[:80]
            )
            raise _refused(where, f"it holds {what}", "Only tensors of floats can be cast.")
    if _is_scalar(slot, values) and target not in _COUNTERS:
        hint = f"Use {' or '.join(_COUNTERS)}, or leave it as it is."
        raise _refused(where, f"numbers for a whole parameter, which {target} cannot hold exactly", hint)


def _refused(where: str, why: str, hint: str) -> MigrationError:
    return MigrationError.of("cast", f"cannot be cast: {why}", where, hint=hint)
