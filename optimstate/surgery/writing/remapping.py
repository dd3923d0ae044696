"""Remap: move a checkpoint's parameters by a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from optimstate.errors import DestinationError, RepresentationError, UsageError
from optimstate.formats.checksums import UNCOMPARED, compares, verified, verify_checksums
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.formats.registry import format_for_destination, get_format, open_checkpoint
from optimstate.io.destination import check_destination
from optimstate.io.extents import Progress
from optimstate.io.location import Location, Place
from optimstate.io.places import located
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Migration, SectionMoves
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import families, plural, shown, table
from optimstate.surgery.writing.ordering import order_notes, read_like
from optimstate.surgery.writing.outcomes import Group, Outcome, outcomes, regrouped

if TYPE_CHECKING:
    from optimstate.io.together import Stage

__all__ = ["RemapReport", "check_distributed", "remap"]

DISTRIBUTED = "dcp"
"""The container that several processes write together."""
_FOLDER = "folder"


class RemapReport(VerbReport):
    """What a plan did to a checkpoint, or would do.

    Attributes:
        rules: Each rule with the number of parameters it matched, over all sections.
        moves: Per section, the parameters whose name changed or that were duplicated: (source, target).
        dropped: Per section, the parameters that were dropped.
        kept: Per section, how many parameters kept their name.
        notes: Sections that could not be moved, and why.
        outcomes: Per section, how many parameters have each slot exact, approximate, fresh or dropped, and why.
        groups: Per optimizer whose param groups or options change, all its groups.
        plan: The plan as a file.
    """

    source: str
    destination: str
    written: bool
    rules: tuple[tuple[str, int], ...]
    moves: Mapping[str, tuple[tuple[str, str], ...]]
    dropped: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, int]
    notes: tuple[str, ...]
    outcomes: Mapping[str, tuple[Outcome, ...]]
    groups: Mapping[str, tuple[Group, ...]]
    plan: str

    VERB = "remap"

    def _lines(self) -> Iterator[str]:
        for rule, count in self.rules:
            yield f"{rule}: {plural(count, 'match')}"
        for section, moves in self.moves.items():
            dropped = self.dropped[section]
            counts = [f"{len(moves)} moved", f"{len(dropped)} dropped", f"{self.kept[section]} kept"]
            yield f"{section}: {', '.join(counts)}"
            if any(outcome.outcome != "exact" or outcome.reason for outcome in self.outcomes[section]):
                yield from _outcomes(self.outcomes[section], "all" if section.startswith("optimizer") else "value")
            for group in self.groups.get(section, ()):
                yield f"  {_regrouped(group)}"
            if not self.written:
                yield from _cut([f"  {line}" for line in families(f"{source} -> {target}" for source, target in moves)])
                yield from _cut([f"  {line} dropped" for line in families(dropped)])
        for note in self.notes:
            yield f"note: {note}"
        yield "plan:"
        for line in self.plan.splitlines():
            yield f"  {line}".rstrip()
        yield f"wrote {self.destination}" if self.written else "dry run: nothing was written"


def remap(
    source: Place,
    destination: Place | None,
    plan: Plan | str | PathLike[str],
    *,
    like: Place | None = None,
    in_place: bool = False,
    dry_run: bool = False,
    force: bool = False,
    verify: bool | None = None,
    sync: bool = True,
    progress: Progress | None = None,
    copy: bool = False,
    ranks: int | None = None,
    stage: Stage | None = None,
) -> RemapReport:
    """Write a checkpoint whose parameters are renamed, duplicated or dropped by a plan: model and optimizer together.

    Args:
        source: A file or folder; never changed unless `in_place`.
        destination: Where to write, in the same container format; None with `in_place` or `dry_run`.
        plan: What to do: a plan, or the path of a plan file.
        like: A checkpoint of the new model, or a text file of its parameters' names: optimizers are written in its
            order, and in its param groups where it has an optimizer with names. Without, they keep that of the source.
        in_place: Rename inside the file, by appending to it.
        dry_run: Only report.
        force: Replace an existing destination.
        verify: Compare every checksum of the source beside the copying, so that no damage is copied. None: unless the
            source is in a store, where it would be read twice, or data files are linked, or several processes share the
            work, of which one would read everything.
        sync: Flush the result to the disk before it takes its name.
        progress: Called with the bytes written since the last call.
        copy: Of a folder of `torch.distributed.checkpoint`, copy data files that are unchanged instead of linking them.
        ranks: Cut the tensors of such a folder for so many processes instead of leaving them in their pieces.
        stage: Such a folder that several processes fill together, of which this is one.

    Raises:
        CheckpointError: The source cannot be read, or `verify` finds damage.
        UsageError: `copy` or `ranks` is given and the source is not such a folder.
        MigrationError: The plan does not fit.
        DestinationError: The destination exists, is the source, or cannot be written.
    """
    plan, source = Plan.of(plan), located(source)
    if in_place and destination is not None:
        raise UsageError("in_place writes into the source, and a destination is given too", hint="Give one of them.")
    destination = None if destination is None else located(destination)
    if destination is not None and not dry_run:
        check_destination(destination, [source], force=force or (stage is not None and stage.in_store))
    with opening(source):
        document = open_checkpoint(source)
        check_distributed(document.format, copy=copy, ranks=ranks, stage=stage)
        model = None if like is None else read_like(like)
        tree, migration, notes = apply_plan(plan, document.tree, like=model)
        notes += order_notes(migration, document.tree, model)
        groups = regrouped(migration, document.tree)
        if verify and (dry_run or in_place):
            verify_checksums(document)
        if not dry_run:
            if in_place:
                _rename_in_place(document, tree)
            elif destination is None:
                raise DestinationError("no destination", hint="Give one, or ask for in_place.")
            else:
                target = _check_suffix(document, destination)
                options = WriteOptions(sync=sync, progress=progress, copy=copy, ranks=ranks, replace=force, stage=stage)
                moved = document.format != DISTRIBUTED or copy or ranks is not None  # what is linked is not read
                if verify is None and not moved:
                    verify = False
                if verify is None and not compares(document, verify, stage):
                    notes.append(UNCOMPARED)
                with verified(document, options, verify=verify) as options:
                    notes += get_format(document.format).write(tree, target, like=document, options=options)
        return _remap_report(source, source if in_place else destination, not dry_run, migration, groups, notes)


def check_distributed(
    target: str, *, copy: bool, ranks: int | None, stage: Stage | None = None, sharded: bool = False
) -> None:
    """Refuse options that only `torch.distributed.checkpoint` folders have, and several processes for one file.

    Raises:
        UsageError: It is asked for and another container is written, or it makes no sense.
    """
    if stage is not None and target not in (DISTRIBUTED, _FOLDER) and not sharded:
        raise UsageError(
            f"several processes write a folder of distributed checkpoints or of shards together, not {target}",
            hint="Run it without torchrun, or write a folder (convert --to dcp, or --to safetensors --shard-size 5GB).",
        )
    asked = "copy" if copy else "ranks" if ranks is not None else ""
    if asked and target != DISTRIBUTED:
        raise UsageError(
            f"{asked} is for folders of torch.distributed.checkpoint; what is written is {target}",
            hint=f"Leave it out{', or write a folder (--to dcp)' if asked == 'ranks' else ''}.",
        )
    if ranks is not None:
        from optimstate.formats.dcp.folder import MAX_RANKS  # a room of fifteen modules, which this alone asks for

        if not 1 <= ranks <= MAX_RANKS:
            raise UsageError(f"ranks is {ranks}, it must be between 1 and {MAX_RANKS}")


def _check_suffix(document: Document, destination: Location) -> Location:
    """A suffix that belongs to another container is a mistake worth stopping for."""
    suffixes = get_format(document.format).SUFFIXES
    if destination.suffix and suffixes and not destination.name.endswith(suffixes):
        try:
            other = format_for_destination(destination, None).NAME
        except (RepresentationError, UsageError):  # of no container
            return destination
        raise RepresentationError(
            f"{destination.name}: the source is a {document.format} file, the suffix is that of {other}",
            hint="`optimstate convert` changes the container.",
        )
    return destination


def _rename_in_place(document: Document, tree: Any) -> None:
    if document.format != "torch":
        raise DestinationError(
            f"{document.path}: only files of torch.save can be renamed in place", hint="Write to a new path instead."
        )
    from optimstate.formats.torch import zip_writer

    zip_writer.rewrite_in_place(document, tree)


def _remap_report(
    source: Location,
    destination: Location | None,
    written: bool,
    migration: Migration,
    groups: Mapping[str, tuple[Group, ...]],
    notes: list[str],
) -> RemapReport:
    sections = migration.sections.items()
    return RemapReport(
        str(source),
        str(destination or ""),
        written,
        tuple((str(rule), count) for rule, count in migration.counts),
        {key: tuple((s, m.target) for m in found.moves for s in m.sources if m.changes) for key, found in sections},
        {key: tuple(name for name, _ in found.dropped) for key, found in sections},
        {key: _kept(found) for key, found in sections},
        tuple(notes),
        outcomes(migration),
        groups,
        migration.plan.to_toml(),
    )


def _kept(section: SectionMoves) -> int:
    """How many parameters kept their name, or their position where they have none."""
    members = sum(len(group.members) for group in section.groups)
    return sum(not move.changes for move in section.moves) if section.moves or section.dropped else members


OUTCOMES_SHOWN = 20
MOVES_SHOWN = 50


def _cut(lines: Sequence[str]) -> Iterator[str]:
    """The first few lines, and how many more there are."""
    yield from lines[:MOVES_SHOWN]
    if len(lines) > MOVES_SHOWN:
        yield f"  ... and {len(lines) - MOVES_SHOWN:,} more kinds (--json lists all)"


def _outcomes(found: Sequence[Outcome], whole: str) -> Iterator[str]:
    """What became of each slot; of the parameters as a whole where no slot is named."""
    rows = [(o.slot or f"({whole})", f"{o.parameters:,}", o.outcome, o.reason) for o in found[:OUTCOMES_SHOWN]]
    yield table(("slot", "parameters", "outcome", "why"), rows)
    if len(found) > OUTCOMES_SHOWN:
        yield f"  ... and {len(found) - OUTCOMES_SHOWN} more (--json lists all)"


def _regrouped(group: Group) -> str:
    origin = " and ".join(map(str, group.sources))
    changes = [f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in group.changed.items()]
    counted = plural(group.parameters, "parameter") + (f" of group {origin}" if origin else ", all new")
    return f"group {group.group}: " + ", ".join([counted, *changes])
