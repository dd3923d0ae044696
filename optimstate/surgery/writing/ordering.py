"""The order in which an optimizer is written: torch loads its state by position, whatever the names are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

from optimstate.describe import describe, few
from optimstate.errors import CheckpointError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Like, Migration, SectionMoves, Target
from optimstate.problems import Problem
from optimstate.state.sections import find_sections
from optimstate.surgery.opening import opening

__all__ = ["order_notes", "read_like", "wrong_positions"]

_TEXT = (".txt", ".names", ".list")


def read_like(path: Place) -> Like:
    """The order of a new model.

    Args:
        path: A checkpoint of it, whose weights are enough, or a text file of its parameters' names, one a line. Where
            the checkpoint has an optimizer with names, its param groups count too.

    Raises:
        CheckpointError: It cannot be read, or names no parameters.
    """
    path = located(path)
    if path.suffix in _TEXT and path.is_file():
        from optimstate.surgery.writing.naming import (
            read_names,  # no other file of names needs the engine that finds them
        )

        names = read_names(path, [str(path)])
        assert isinstance(names, list)
        return Like(tuple(names))
    with opening(path):
        like = _like(open_checkpoint(path).tree)
    if not like.names and not like.targets:
        raise CheckpointError(
            "it names no parameters, whose order is asked for",
            path=path,
            hint="Give a checkpoint with the new model's weights, or a .txt file of names, one a line.",
        )
    return like


def _like(tree: Any) -> Like:
    """The order of the models of a checkpoint, and the param groups of its optimizers with names."""
    _, migration, _ = apply_plan(Plan(), tree)
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
    return Like(tuple(order), targets)


def order_notes(migration: Migration, tree: Any, like: Like | None) -> Iterator[str]:
    """Notes on the order of the result.

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
        messages = list(_changed_order(section))
        if like is None and messages:
            yield (
                f"optimizer {found.label}: torch loads it by position, in the order of the file: "
                f"{'; '.join(messages)}. Where the new model has another order, say --like MODEL"
            )
        elif like is not None:
            missing = _missing(migration, section, like)
            if missing:
                yield (
                    f"optimizer {found.label}: the new model has {few(missing)}, and the result does not: declare "
                    "what is trained anew (--fresh NAME), because torch refuses another number of parameters"
                )
            yield f"optimizer {found.label}: in the order of the new model, which the plan alone does not say"


def _changed_order(section: SectionMoves) -> Iterator[str]:
    """What was inserted between parameters that keep their order, and after which one."""
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
            shown = [
                f"{describe(name)} after {describe(before[name])}" if name in before else f"{describe(name)} first"
                for name in names
            ]
            yield f"{few(shown)} ({kind})"
    if section.reordered:
        yield "the plan changes the order"


def _missing(migration: Migration, section: SectionMoves, like: Like) -> list[str]:
    made = {move.target for found in (*migration.sections.values(), section) for move in found.moves}
    return [name for name in like.names if name not in made]


def wrong_positions(
    migration: Migration, tree: Any, target: Any, missing: Collection[str] = (), unused: Sequence[str] = ()
) -> Iterator[Problem]:
    """Optimizers of a result that torch would load by position into other parameters, or refuse.

    Args:
        migration: How the result is made.
        tree: The checkpoint it is made of.
        target: One of the new model.
        missing: Names of the target that the result does not have, which is said elsewhere.
        unused: Names of the checkpoint that the target does not have.
    """
    like = _like(target)
    theirs = [found.optimizer() for found in find_sections(target) if found.kind == "optimizer"]
    optimizers = [found for found in find_sections(tree) if found.kind == "optimizer"]
    order = [move.target for key, found in migration.sections.items() if key[:6] == "model " for move in found.moves]
    for found in optimizers:
        state = found.optimizer()
        if any(isinstance(key, str) for group in state.groups for key in group.params):
            continue  # state by name is not loaded by position
        key = f"optimizer {found.label}"
        section = migration.sections.get(key)
        named = section is not None and bool(section.moves)
        mine = [group.members for group in section.groups] if named and section is not None else []
        if extra := [name for name in unused if not named or any(name in members for members in mine)]:
            yield _extra(key, extra, named=named)
            continue
        wanted = like.target(found.label, len(optimizers))
        if wanted is not None and named:
            yield from _against(key, mine, [[n for n in names if n not in missing] for names in wanted.groups])
            continue
        sizes = [len(members) for members in mine] if named else [len(group.params) for group in state.groups]
        if (
            not missing
            and len(theirs) == len(optimizers) == 1
            and sizes != [len(group.params) for group in theirs[0].groups]
        ):
            message = f"{_groups_of(sizes)} here, {_groups_of([len(group.params) for group in theirs[0].groups])} there"
            yield Problem("group", message, key, remedy="divide them with [[group]] tables, or remap --like")
        elif misplaced := _misplaced([name for members in mine for name in members] or order, like.names):
            why = "" if named else "it has no names, and "
            remedy = "remap --like TARGET" if named else "name it first (optimstate name), then remap --like TARGET"
            message = f"{why}the order of the parameters is another: {' before '.join(map(describe, misplaced))} there"
            yield Problem("order", message, key, misplaced, remedy)


def _extra(key: str, extra: Sequence[str], *, named: bool) -> Problem:
    """An optimizer with parameters that the target does not have."""
    message = f"the target does not have {few([describe(name) for name in extra])}"
    remedy = "drop them, in a rule or with --drop NAME"
    if not named:
        message = f"it has no names, and {message}, which may be among its parameters"
        remedy = f"name it first (optimstate name), then {remedy}"
    return Problem("unexpected", message, key, tuple(extra), remedy)


def _against(key: str, mine: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> Iterator[Problem]:
    """Param groups of a result that are not those of the target."""
    if [set(members) for members in mine] != [set(members) for members in wanted]:
        sizes = [_groups_of([len(members) for members in side]) for side in (mine, wanted)]
        what = (
            f"{sizes[0]} here, {sizes[1]} there" if sizes[0] != sizes[1] else "other parameters are in the param groups"
        )
        remedy = "divide them with [[group]] tables, or remap --like TARGET"
        yield Problem("group", what, key, remedy=remedy)
    elif any(list(a) != list(b) for a, b in zip(mine, wanted, strict=True)):
        a, b = next((a, b) for a, b in zip(mine, wanted, strict=True) if list(a) != list(b))
        names = next((y, x) for x, y in zip(a, b, strict=True) if x != y)
        message = f"the order of the parameters is another: {' before '.join(map(describe, names))} there"
        yield Problem("order", message, key, names, "remap --like TARGET")


def _groups_of(sizes: Sequence[int]) -> str:
    counts = ", ".join(map(str, sizes))
    return f"{len(sizes)} param group{'' if len(sizes) == 1 else 's'} of {counts} parameters"


def _misplaced(mine: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Two names whose order is the other way round in the target; empty where all are in order."""
    place = {name: number for number, name in enumerate(wanted)}
    known = [name for name in mine if name in place]
    return next(((later, earlier) for earlier, later in pairwise(known) if place[later] < place[earlier]), ())
