"""The verbs on checkpoint files: inspect, remap, convert. The command line only renders what these return.

None of them imports torch unless elements of a tensor must be rearranged, and none executes anything from a file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from optimstate.errors import DestinationError, LimitExceededError, RepresentationError
from optimstate.files import Progress, check_destination
from optimstate.formats import torch_zip
from optimstate.formats._globals import dangerous
from optimstate.formats._protocol import Document, WriteOptions
from optimstate.formats.registry import format_for_destination, get_format, open_document
from optimstate.plan.execute import apply_plan
from optimstate.plan.planner import Migration
from optimstate.plan.rules import Plan
from optimstate.state.model import Group, OptimizerState
from optimstate.state.schema import recognise
from optimstate.state.sections import Section, find_sections, scheduler_name
from optimstate.tensors import LazyTensor
from optimstate.tree import GlobalName, Opaque, format_path, no_garbage_collection, walk

__all__ = ["ConvertReport", "Inspection", "RemapReport", "convert", "inspect", "remap"]

SCHEMA = 1
"""Version of the JSON that `to_json` of the reports gives."""


# --- inspect --------------------------------------------------------------------------------------------------------


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
    """A model or EMA section: tensors by name as (dtype, shape), those that share memory, and their size."""

    kind: str
    path: str
    parameters: int
    elements: int
    dtypes: Mapping[str, int]
    nbytes: int
    tied: tuple[tuple[str, ...], ...]
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
        return _to_json("inspect", asdict(self))


def _to_json(verb: str, fields: dict[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, "command": verb, **fields}, indent=2, default=str, ensure_ascii=False)


def inspect(path: str | Path) -> Inspection:
    """What is in a checkpoint.

    Raises:
        CheckpointError: It cannot be read.
    """
    with _nesting_limit(path), no_garbage_collection():
        document = open_document(path)
        sections = find_sections(document.tree)
        tensors = 0
        opaque: Counter[str] = Counter()
        known = {id(section.node) for section in sections}
        for _, node in walk(document.tree):
            if type(node) is LazyTensor:
                tensors += 1
            elif isinstance(node, Opaque) and id(node) not in known:
                opaque[node.type.path] += 1
        return Inspection(
            str(path),
            document.format,
            _size(Path(path)),
            tensors,
            tuple(_section_info(section) for section in sections),
            dict(opaque.most_common()),
            tuple(dangerous(document.globals)),
            tuple(document.notes),
        )


@contextmanager
def _nesting_limit(path: str | Path) -> Iterator[None]:
    """Trees nested beyond what Python can walk are a limit of ours, not a crash."""
    try:
        yield
    except RecursionError:
        raise LimitExceededError("nested too deeply", path=path) from None


def _size(path: Path) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


def _section_info(section: Section) -> OptimizerInfo | ModelInfo | SchedulerInfo:
    if section.kind == "optimizer":
        return _optimizer_info(section.label, section.optimizer())
    if section.kind == "scheduler":
        fields = section.node if isinstance(section.node, Mapping) else section.node.state
        return SchedulerInfo(
            section.label, scheduler_name(section.node), fields.get("last_epoch"), plain(fields.get("_last_lr"))
        )
    return _model_info(section)


def _model_info(section: Section) -> ModelInfo:
    found = section.tensors()
    lazy = {name: tensor for name, tensor in found.items() if isinstance(tensor, LazyTensor)}
    users: dict[int, list[str]] = {}
    for name, tensor in lazy.items():
        if tensor.nbytes:
            users.setdefault(id(tensor.storage), []).append(name)
    return ModelInfo(
        section.kind,
        section.label,
        len(found),
        sum(tensor.numel for tensor in lazy.values()),
        dict(Counter(tensor.dtype for tensor in lazy.values())),
        sum(tensor.nbytes for tensor in lazy.values()),
        tuple(tuple(names) for names in users.values() if len(names) > 1),
        {name: describe(tensor) for name, tensor in found.items()},
    )


def describe(value: Any) -> str:
    """A leaf in few words: `float32[12, 8]`, a number, or the class of a record."""
    if isinstance(value, LazyTensor):
        return f"{value.dtype}{list(value.shape)}"
    return str(plain(value))


def plain(value: Any) -> Any:
    """A leaf as JSON can hold it; tensors of one element become numbers."""
    if isinstance(value, LazyTensor):
        return value.item() if value.numel == 1 and value.dtype in _SHOWN_AS_NUMBER else describe(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Opaque | GlobalName):
        return repr(value)
    return value


_SHOWN_AS_NUMBER = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def _optimizer_info(path: str, state: OptimizerState) -> OptimizerInfo:
    slots: dict[str, tuple[int, set[str], int]] = {}
    steps: Counter[str] = Counter()
    parameters: list[ParameterInfo] = []
    scalars = _ScalarReader()
    group_of = [index for index, group in enumerate(state.groups) for _ in group.params]
    fresh = 0
    for (key, name, found), group in zip(state.parameters(), group_of, strict=True):
        shown: dict[str, Any] = {}
        for slot, value in (found or {}).items():
            count, dtypes, nbytes = slots.get(slot, (0, set(), 0))
            if type(value) is LazyTensor:
                dtypes.add(value.dtype)
                nbytes += value.nbytes
                shown[slot] = scalars.read(value) if not value.shape else describe(value)
            else:
                dtypes.add(type(value).__name__ if not isinstance(value, Opaque) else value.type.qualname)
                shown[slot] = plain(value)
            slots[slot] = (count + 1, dtypes, nbytes)
            if slot == "step":
                steps[_step_text(shown[slot])] += 1
        fresh += not found
        parameters.append(ParameterInfo(name, _key_text(key, len(parameters)), group, shown))
    if not steps:  # some algorithms count per group
        steps.update(_step_text(plain(group.options["step"])) for group in state.groups if "step" in group.options)
    algorithm = recognise(slots, state.groups[0].options) if state.groups else None
    return OptimizerInfo(
        path,
        algorithm.name if algorithm else None,
        state.is_named,
        tuple(_group_info(group) for group in state.groups),
        tuple(SlotInfo(str(n), c, tuple(sorted(d)), b) for n, (c, d, b) in slots.items()),
        dict(sorted(steps.items())),
        fresh,
        len(state.orphans()),
        sum(nbytes for _, _, nbytes in slots.values()),
        tuple(parameters),
    )


class _ScalarReader:
    """Values of the many one-element tensors of a file, each storage read once."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}

    def read(self, tensor: LazyTensor) -> Any:
        key = id(tensor.storage)
        if key not in self._known:
            self._known[key] = plain(tensor)
        return self._known[key]


def _step_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _key_text(key: Any, position: int) -> str:
    return str(key) if isinstance(key, int | str) else f"#{position}"


def _group_info(group: Group) -> GroupInfo:
    return GroupInfo(len(group.params), {str(key): plain(value) for key, value in group.options.items()})


# --- remap ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemapReport:
    """What a plan did to a checkpoint, or would do.

    Attributes:
        rules: Each rule with the number of parameters it matched, over all sections.
        moves: Per section, the parameters whose name changed or that were duplicated: (source, target).
        dropped: Per section, the parameters that were dropped.
        kept: Per section, how many parameters kept their name.
        notes: Sections that could not be moved, and why.
    """

    source: str
    destination: str
    written: bool
    rules: tuple[tuple[str, int], ...]
    moves: Mapping[str, tuple[tuple[str, str], ...]]
    dropped: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return _to_json("remap", asdict(self))


def remap(
    source: str | Path,
    destination: str | Path | None,
    plan: Plan,
    *,
    in_place: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> RemapReport:
    """Write a checkpoint whose parameters are renamed, duplicated or dropped by a plan: model and optimizer together.

    Args:
        source: A file or folder; never changed unless `in_place`.
        destination: Where to write, in the same container format; None with `in_place` or `dry_run`.
        plan: What to do.
        in_place: Rename inside the file, by appending to it.
        dry_run: Only report.
        force: Replace an existing destination.
        progress: Called with the bytes written since the last call.

    Raises:
        CheckpointError: The source cannot be read.
        MigrationError: The plan does not fit.
        DestinationError: The destination exists, is the source, or cannot be written.
    """
    source = Path(source)
    if destination is not None and not dry_run:
        check_destination(Path(destination), [source], force=force)
    with _nesting_limit(source), no_garbage_collection():
        document = open_document(source)
        tree, migration, notes = apply_plan(plan, document.tree)
        if not dry_run:
            if in_place:
                _rename_in_place(document, tree)
            elif destination is None:
                raise DestinationError("no destination", hint="Give one, or ask for in_place.")
            else:
                target = _check_suffix(document, Path(destination))
                notes += get_format(document.format).write(
                    tree, target, like=document, options=WriteOptions(progress=progress)
                )
        return _remap_report(source, source if in_place else destination, not dry_run, migration, notes)


def _check_suffix(document: Document, destination: Path) -> Path:
    """A suffix that belongs to another container is a mistake worth stopping for."""
    suffixes = get_format(document.format).SUFFIXES
    if destination.suffix and suffixes and not destination.name.endswith(suffixes):
        try:
            other = format_for_destination(destination, None).NAME
        except RepresentationError:
            return destination
        raise RepresentationError(
            f"{destination.name}: the source is a {document.format} file, the suffix is that of {other}",
            hint="`optimstate convert` changes the container.",
        )
    return destination


def _rename_in_place(document: Document, tree: Any) -> None:
    if document.format != torch_zip.NAME:
        raise DestinationError(
            f"{document.path}: only files of torch.save can be renamed in place", hint="Write to a new path instead."
        )
    torch_zip.rewrite_in_place(document, tree)


def _remap_report(
    source: Path, destination: str | Path | None, written: bool, migration: Migration, notes: list[str]
) -> RemapReport:
    sections = migration.sections.items()
    return RemapReport(
        str(source),
        str(destination or ""),
        written,
        tuple((str(rule), count) for rule, count in migration.counts),
        {key: tuple((m.source, m.target) for m in found.moves if m.source != m.target) for key, found in sections},
        {key: tuple(name for name, _ in found.dropped) for key, found in sections},
        {key: sum(m.source == m.target for m in found.moves) for key, found in sections},
        tuple(notes),
    )


# --- convert --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertReport:
    """What was written, and what the container could not hold."""

    source: str
    destination: str
    source_format: str
    format: str
    written: bool
    tensors: int
    nbytes: int
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return _to_json("convert", asdict(self))


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    force: bool = False,
    options: WriteOptions | None = None,
) -> ConvertReport:
    """Write the same checkpoint in another container.

    Args:
        source: A file or folder.
        destination: Where to write; its suffix chooses the container unless `to` does.
        to: The name of a container format.
        verify: Check every checksum the source has before anything is written.
        dry_run: Only check that it can be done.
        force: Replace an existing destination.
        options: What to do with what the container cannot hold, checksums, shards.

    Raises:
        CheckpointError: The source cannot be read, or `verify` finds damage.
        RepresentationError: The container cannot hold something; the message names it and the option that helps.
        DestinationError: The destination exists, is the source, or cannot be written.
    """
    source, destination = Path(source), Path(destination)
    options = options or WriteOptions()
    target = _target_format(destination, to, options)
    if not dry_run:
        check_destination(destination, [source], force=force)
    with _nesting_limit(source), no_garbage_collection():
        document = open_document(source)
        if verify:
            verify_checksums(document)
        tree, notes = _without_files(document)
        written = get_format(target)
        if dry_run:
            options = replace(options, progress=None)
        else:
            notes += written.write(tree, destination, like=document, options=options)
        found = [node for _, node in walk(tree) if type(node) is LazyTensor]
        nbytes = sum(tensor.nbytes for tensor in found)
        return ConvertReport(
            str(source), str(destination), document.format, target, not dry_run, len(found), nbytes, tuple(notes)
        )


def _target_format(destination: Path, to: str | None, options: WriteOptions) -> str:
    if to is None and options.shard_size is not None and not destination.suffix:
        return "safetensors"
    return format_for_destination(destination, to).NAME


def _without_files(document: Document) -> tuple[Any, list[str]]:
    """A folder's tree without the files that are no checkpoints, which a single container cannot hold."""
    if document.format != "folder":
        return document.tree, []
    notes: list[str] = []

    def strip(node: dict[str, Any], like: Document, prefix: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in node.items():
            part = like.parts.get(name)
            if part is None:
                notes.append(f"left out: {prefix}{name} is no checkpoint")
            else:
                made[name] = strip(value, part, f"{prefix}{name}/") if part.format == "folder" else value
        return made

    return strip(document.tree, document, ""), notes


def verify_checksums(document: Document) -> int:
    """Read every storage whose container recorded a checksum and compare.

    Returns:
        The number of storages compared.

    Raises:
        CorruptCheckpointError: One differs; the message names the tensor.
    """
    import zlib

    from optimstate.errors import CorruptCheckpointError
    from optimstate.files import chunks

    seen: set[int] = set()
    compared = 0
    for path, node in walk(document.tree):
        if type(node) is not LazyTensor or node.storage.crc is None or id(node.storage) in seen:
            continue
        seen.add(id(node.storage))
        value = 0
        for block in chunks(node.storage.pieces):
            value = zlib.crc32(block, value)
        if value != node.storage.crc:
            raise CorruptCheckpointError(
                f"the bytes of {format_path(path)} do not match their checksum",
                path=document.path,
                place=f"record data/{node.storage.key}",
                hint="The file is damaged; copy it again from its source.",
            )
        compared += 1
    return compared
