"""Convert: the same checkpoint in another container, or parts of it, in other dtypes, for another optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, UsageError
from optimstate.formats.checksums import UNCOMPARED, compares, verified, verify_checksums
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.formats.registry import format_for_destination, get_format, open_checkpoint
from optimstate.io.destination import check_destination
from optimstate.io.location import Location, Place
from optimstate.io.places import located
from optimstate.problems import Problem
from optimstate.record import field
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import plural, size, table
from optimstate.surgery.writing.remapping import DISTRIBUTED, check_distributed
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, OpaqueFile, nodes, replaced

if TYPE_CHECKING:
    from optimstate.state.sections import Section
    from optimstate.surgery.writing.casting import Cast, Casting
    from optimstate.surgery.writing.optimizer_conversion import OptimizerChange

__all__ = ["ConvertReport", "convert"]


class ConvertReport(VerbReport):
    """What was written, and what the container could not hold.

    Attributes:
        section: The sections that were written alone, by kind and path; empty for all of them.
        without: The sections that were left out, by kind and path.
        casts: What was cast, and what that rounded.
        optimizers: By section: the algorithm its state was and is of, and what became of each slot.
        lost: What a damaged source held and could not be read, by name.
    """

    source: str
    destination: str
    source_format: str
    format: str
    written: bool
    tensors: int
    nbytes: int
    notes: tuple[str, ...]
    section: str = ""
    without: tuple[str, ...] = ()
    casts: tuple[Cast, ...] = ()
    optimizers: Mapping[str, OptimizerChange] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    VERB = "convert"

    def _lines(self) -> Iterator[str]:
        for where in self.without:
            yield f"left out: {where}"
        for where, change in self.optimizers.items():
            yield f"{where}: {change.source} -> {change.target}"
            yield table(("slot", "outcome", "why"), ((line.slot, line.outcome, line.reason) for line in change.slots))
        for cast in self.casts:
            counts = "" if cast.elements is None else f", {cast.rounded:,} of {cast.elements:,} elements rounded"
            lost = ((cast.overflowed, "no longer finite"), (cast.flushed, "became zero"))
            counts += "".join(f", {count:,} {what}" for count, what in lost if count)
            yield f"{cast.what}: {cast.source} -> {cast.target}, {plural(cast.tensors, 'tensor')}{counts}"
        for name in self.lost:
            yield f"lost: {name}"
        for note in self.notes:
            yield f"note: {note}"
        what = f"{plural(self.tensors, 'tensor')}, {size(self.nbytes)}"
        what = f"{self.section}, {what}" if self.section else what
        if self.written:
            yield f"{self.source_format} -> {self.format}: {what}, wrote {self.destination}"
        else:
            yield f"{self.source_format} -> {self.format}: {what}; dry run: nothing was written"


def convert(
    source: Place,
    destination: Place,
    *,
    to: str | None = None,
    section: str | Sequence[str] | None = None,
    without: Sequence[str] = (),
    dtypes: Mapping[str, str] | None = None,
    optimizer: str | None = None,
    drop_opaque: bool = False,
    salvage: bool = False,
    verify: bool | None = None,
    dry_run: bool = False,
    force: bool = False,
    options: WriteOptions | None = None,
) -> ConvertReport:
    """Write the same checkpoint in another container; or some of its sections, in other dtypes, for another optimizer.

    Args:
        source: A file or folder.
        destination: Where to write; its suffix chooses the container unless `to` does. A folder of checkpoints may
            become another folder.
        to: The name of a container format.
        section: Write this one alone: its kind (`model`, `ema`, `optimizer`, `scheduler`) or its path. A model becomes
            a plain mapping of names to tensors. Several are written where they stand, and nothing else.
        without: Leave these sections out, by kind (all of a kind) or path, and keep everything else where it is.
        dtypes: Floating-point dtypes by torch's names, for a slot (`exp_avg`) or a section, by kind or path. Elements
            are cast as torch casts them, a block at a time. Step counts and fp32 masters are not cast with a section.
        optimizer: The algorithm whose state the optimizers are to have: `Adam`, `Adafactor`, `Lion`, ...
        drop_opaque: Leave out objects of classes that the container does not hold, or, for a torch file, that
            `torch.load(weights_only=True)` refuses. Containers that are nothing but their entries become dicts and
            lists. Every loss is noted.
        salvage: Of a damaged source, write what is whole. What is lost is named in the report.
        verify: Whether every checksum of the source is compared, so that nothing is written of a damaged one. None:
            where something is written, beside the copying; not of a source in a store, which would be read twice.
        dry_run: Only check that it can be done.
        force: Replace an existing destination.
        options: What to do with what the container cannot hold, checksums, shards.

    Raises:
        CheckpointError: The source cannot be read, or `verify` finds damage.
        UsageError: There is no such format, dtype, section, slot or optimizer.
        MigrationError: This checkpoint has no such section, it cannot be cast, or the state has no meaning in
            `optimizer`.
        RepresentationError: The container cannot hold something; the message names it and the option that helps.
        DestinationError: The destination exists, is the source, or cannot be written.
        UsageError: Both `section` and `without` are given.
    """
    source, destination = located(source), located(destination)
    options = (options or WriteOptions())._replace(replace=force)
    sections = [section] if isinstance(section, str) else list(section or ())
    if sections and without:
        raise UsageError("section and without exclude each other: what is not chosen is left out")
    if optimizer is not None:
        from optimstate.plan.slots.converted_options import TARGETS

        if optimizer not in TARGETS:
            raise UsageError.unknown(f"no conversion to an optimizer {describe(optimizer)}", optimizer, TARGETS)
    if not dry_run:
        stage = options.stage
        check_destination(destination, [source], force=force or (stage is not None and stage.in_store))
    with opening(source), ExitStack() as stack:
        document = open_checkpoint(source, salvage=salvage)
        target = _target_format(destination, to, options, document)
        _refuse_in_vain(target, options)
        sharded = target == "safetensors" and options.shard_size is not None
        check_distributed(target, copy=options.copy, ranks=options.ranks, stage=options.stage, sharded=sharded)
        if options.copy and document.format != DISTRIBUTED:
            raise UsageError(
                f"copy is for the data files of a distributed checkpoint; the source is {document.format}",
                hint="Leave it out: whatever is written of another container is a copy.",
            )
        if verify and dry_run:
            verify_checksums(document)
        elif not dry_run:
            options = stack.enter_context(verified(document, options, verify=verify))
        changes = _Changes(document, target, sections, without, dtypes or {}, optimizer)
        if verify is None and not dry_run and not compares(document, verify, options.stage):
            changes.notes.append(UNCOMPARED)
        if target == "safetensors" and not options.clone_views:
            changes.notes += [_stored_once(names) for names in changes.tied]
        if drop_opaque:
            changes.drop_opaque(target)
        if not dry_run:
            like = None if sections else document
            changes.notes += get_format(target).write(changes.tree, destination, like=like, options=options)
        return changes.report(document, destination, target, written=not dry_run)


class _Changes:
    """The tree that is written: another optimizer's state, other dtypes, some sections alone or left out.

    Raises:
        MigrationError: There is no such section or slot, or it cannot be changed so.
    """

    def __init__(
        self,
        document: Document,
        target: str,
        names: Sequence[str],
        without: Sequence[str],
        dtypes: Mapping[str, str],
        optimizer: str | None,
    ) -> None:
        self.notes: list[str] = []
        self.tied: list[list[str]] = []
        self.alone: list[Section] = []
        self.left_out: list[str] = []
        self.optimizers: dict[str, OptimizerChange] = {}
        self._casting: Casting | None = None
        self.tree = document.tree
        if not names and target not in _HOLD_FILES:
            self.tree, self.notes = _without_files(document)
        if names or without or dtypes or optimizer is not None:
            self._change(names, without, dtypes, optimizer)

    def _change(
        self, names: Sequence[str], without: Sequence[str], dtypes: Mapping[str, str], optimizer: str | None
    ) -> None:
        from optimstate.state.sections import find_sections, section_called, with_hosts
        from optimstate.surgery.writing import selection

        sections = find_sections(self.tree)
        if without:
            self.tree, self.left_out, notes = selection.without(self.tree, without, sections)
            self.notes += notes
            sections = find_sections(self.tree)
        if names:
            chosen = [section_called(name, self.tree, sections) for name in names]
            ids = {id(section.node): section for section in chosen}
            sections = [ids.pop(id(section.node)) for section in sections if id(section.node) in ids]
            sections = self.alone = [*sections, *ids.values()]
        nodes = [self._plain(found) if names else found.node for found in sections]
        if optimizer is not None:
            nodes = self._converted(sections, nodes, optimizer)
        if dtypes:
            self._casting = _casting(dtypes, sections, nodes)
            nodes = self._casting.cast()
        if len(self.alone) == 1:
            self.tree = nodes[0]
        else:
            if self.alone:
                self.tree = selection.only(self.tree, {id(found.in_tree) for found in sections})
            made = {id(found.node): node for found, node in zip(sections, nodes, strict=True) if node is not found.node}
            self.tree = replaced(self.tree, with_hosts(sections, made, alone=bool(self.alone)))
        if self._casting is not None:
            self._casting.note_partings(self.tree)
            self.notes += self._casting.notes

    def drop_opaque(self, target: str) -> None:
        """Leave out what the container cannot hold."""
        from optimstate.surgery.writing import dropping

        holds = dropping.held_by_json if target == "safetensors" else dropping.held_by_weights_only
        copy = dropping.plain_copy(self.tree, holds)
        self.tree = copy.tree
        self.notes += copy.notes

    def report(self, document: Document, destination: Location, target: str, *, written: bool) -> ConvertReport:
        """What was done."""
        found = [node for node in nodes(self.tree) if isinstance(node, LazyTensor)]
        notes = self.notes if self._casting is None else [*self.notes, *self._casting.lost_squares()]
        return ConvertReport(
            str(document.path),
            str(destination),
            document.format,
            target,
            written,
            len(found),
            sum(tensor.nbytes for tensor in found),
            tuple(notes),
            ", ".join(f"{section.kind} at {section.label}" for section in self.alone),
            tuple(self.left_out),
            () if self._casting is None else self._casting.reports(written=written),
            self.optimizers,
            tuple(document.lost),
        )

    def _plain(self, section: Section) -> Any:
        """The node of a section that is written alone; of a pickled module its tensors, and arrays as tensors."""
        if section.kind != "model":
            return section.node
        from optimstate.formats.pickles.tensors import numpy_array
        from optimstate.state.arrays import is_array
        from optimstate.state.tied import tied_names

        if not isinstance(section.node, Opaque) and any(map(is_array, section.node.values())):
            return {name: numpy_array(value) or value for name, value in section.node.items()}
        tensors = section.tensors()
        self.tied = [*self.tied, *tied_names(tensors)]
        return tensors if isinstance(section.node, Opaque) else section.node

    def _converted(self, sections: Sequence[Section], nodes: Sequence[Any], target: str) -> list[Any]:
        from optimstate.surgery.writing.optimizer_conversion import convert_optimizer

        made = list(nodes)
        problems: list[Problem] = []
        for place, section in enumerate(sections):
            if section.kind == "optimizer":
                state, change = convert_optimizer(section, target, problems, self.notes)
                if change is not None:
                    self.optimizers[f"optimizer at {section.label}"] = change
                    made[place] = state.to_node()
        if not any(section.kind == "optimizer" for section in sections):
            problems.append(Problem("section", f"there is no optimizer whose state could become that of {target}"))
        if problems:
            raise MigrationError(problems)
        return made


def _casting(dtypes: Mapping[str, str], sections: Sequence[Section], nodes: Sequence[Any]) -> Casting:
    from optimstate.surgery.writing.casting import Casting

    return Casting(dtypes, list(zip(sections, nodes, strict=True)))


def _stored_once(names: Sequence[str]) -> str:
    return (
        f"{', '.join(names)} share memory, which is stored once, as {names[0]}: other readers see no other name "
        "(--clone-views stores each)"
    )


def _target_format(destination: Location, to: str | None, options: WriteOptions, document: Document) -> str:
    if to is None and not destination.suffix:
        if options.shard_size is not None:
            return "safetensors"
        if document.format == "folder":
            return "folder"
    return format_for_destination(destination, to).NAME


def _refuse_in_vain(target: str, options: WriteOptions) -> None:
    """Refuse what a container does not follow.

    Raises:
        UsageError: It would have no effect.
    """
    usual = WriteOptions()
    followed: frozenset[str] = getattr(get_format(target), "OPTIONS", frozenset())
    for option, (what, remedy) in _OPTIONAL.items():
        if getattr(options, option) != getattr(usual, option) and option not in followed:
            raise UsageError(f"{what}, not of {target}", hint=f"Leave it out{remedy}.")


_OPTIONAL = {
    "shard_size": ("a size of shards is an option of safetensors", ", or write safetensors (--to safetensors)"),
    "digest": ("digests are an option of safetensors", ": torch's zip archives have checksums of their own"),
    "clone_views": ("separate copies of tensors that share memory are an option of safetensors", ""),
    "checksums": ("records without checksums are an option of zip archives", ""),
}

_FOLDERS = ("folder", "zip")
_HOLD_FILES = (*_FOLDERS, "torch-checkpointing")


def _without_files(document: Document) -> tuple[Any, list[str]]:
    """The tree without files that are not checkpoints, which a single container cannot hold."""
    tree = document.tree
    holds_files = isinstance(tree, dict) and any(map(_is_files, tree.values()))
    if not holds_files and document.format not in _FOLDERS:
        return tree, []
    notes: list[str] = []

    def strip(node: dict[str, Any], like: Document | None, prefix: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in node.items():
            part = None if like is None else like.parts.get(name)
            if _is_files(value) or (like is not None and like.format in _FOLDERS and part is None):
                notes.append(f"left out: {prefix}{name} is not a checkpoint")
            elif part is not None and part.format in _FOLDERS:
                made[name] = strip(value, part, f"{prefix}{name}/")
            else:
                made[name] = value
        return made

    return strip(tree, document, ""), notes


def _is_files(node: Any) -> bool:
    """Whether it is a file that is not a checkpoint, or a folder of such files alone."""
    inner = list(node.values()) if isinstance(node, dict) else []
    return isinstance(node, OpaqueFile) or (bool(inner) and all(map(_is_files, inner)))
