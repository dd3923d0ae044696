"""The order in which an optimizer is written: torch loads its state by position, whatever the names are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optimstate.errors import CheckpointError
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Like, Migration, SectionMoves, Target
from optimstate.state.sections import find_sections
from optimstate.surgery.naming import read_names
from optimstate.surgery.reports import opening

__all__ = ["order_notes", "read_like"]

_TEXT = (".txt", ".names", ".list")
_SHOWN = 3


def read_like(path: str | Path) -> Like:
    """The order of a new model.

    Args:
        path: A checkpoint of it, whose weights are enough, or a text file of its parameters' names, one a line. Where
            the checkpoint has an optimizer with names, its param groups count too.

    Raises:
        CheckpointError: It cannot be read, or names no parameters.
    """
    if Path(path).suffix in _TEXT and Path(path).is_file():
        names = read_names(path, [str(path)])
        assert isinstance(names, list)
        return Like(tuple(names))
    with opening(path):
        _, migration, _ = apply_plan(Plan(), open_checkpoint(path).tree)
    order: dict[str, None] = {}
    targets = {}
    for key, section in migration.sections.items():
        kind, _, label = key.partition(" ")
        if kind == "optimizer" and section.groups:
            shapes = {move.target: move.expression.shape if move.expression else None for move in section.moves}
            groups = tuple(group.members for group in section.groups)
            targets[label] = Target(groups, tuple(group.options for group in section.groups), shapes)
        elif kind == "model":
            order.update(dict.fromkeys(move.target for move in section.moves))
    if not order and not targets:
        raise CheckpointError(
            "it names no parameters, whose order is asked for",
            path=path,
            hint="Give a checkpoint with the new model's weights, or a .txt file of names, one a line.",
        )
    return Like(tuple(order), targets)


def order_notes(migration: Migration, tree: Any, like: Like | None) -> Iterator[str]:
    """What is to be said about the order of the result.

    Args:
        migration: What was done.
        tree: The checkpoint that it was planned for.
        like: The new model that gave the order, if one did.
    """
    for found in find_sections(tree):
        section = migration.sections.get(f"{found.kind} {found.label}")
        if found.kind != "optimizer" or section is None or not section.moves:
            continue
        if all(isinstance(key, str) for group in found.optimizer().groups for key in group.params):
            continue  # state by name is not loaded by position
        said = list(_changed_order(section))
        if like is None and said:
            yield (
                f"optimizer {found.label}: torch loads it by position, in the order of the file: {'; '.join(said)}. "
                "Where the new model has another order, say --like MODEL"
            )
        elif like is not None:
            missing = _missing(migration, section, like)
            if missing:
                yield (
                    f"optimizer {found.label}: the new model has {_listed(missing)}, and the result does not: declare "
                    "what is trained anew (--fresh NAME), because torch refuses another number of parameters"
                )
            yield f"optimizer {found.label}: in the order of the new model, which the plan alone does not say"


def _changed_order(section: SectionMoves) -> Iterator[str]:
    """What was put between parameters that keep their order, and after which one it stands."""
    order = [name for group in section.groups for name in group.members]
    before = dict(zip(order[1:], order, strict=False))
    uses = Counter(source for move in section.moves for source in move.sources)
    kinds: dict[str, list[str]] = {"new": [], "copied or cut": [], "joined": []}
    for move in section.moves:
        if move.expression is None:
            kinds["new"].append(move.target)
        elif len(move.sources) > 1:
            kinds["joined"].append(move.target)
        elif move.clone or uses[move.sources[0]] > 1:
            kinds["copied or cut"].append(move.target)
    for kind, names in kinds.items():
        if names:
            shown = [f"{name!r} after {before[name]!r}" if name in before else f"{name!r} first" for name in names]
            yield f"{_listed(shown)} ({kind})"
    if section.reordered:
        yield "the plan changes the order"


def _missing(migration: Migration, section: SectionMoves, like: Like) -> list[str]:
    made = {move.target for found in (*migration.sections.values(), section) for move in found.moves}
    return [name for name in like.names if name not in made]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
