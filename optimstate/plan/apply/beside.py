"""What belongs to the parameters and is not moved with them: a plan that would leave it wrong is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from optimstate.describe import few
from optimstate.errors import MigrationError
from optimstate.plan.solve.migration import Migration
from optimstate.problems import Problem
from optimstate.state.sections import Judgement, Section
from optimstate.state.unread import Unread, outside, positional_lists, unread_state
from optimstate.tree import Path, format_path

__all__ = ["followed_nowhere", "refuse_other_parameters"]

ALONE = "Save it with names (build the optimizer from model.named_parameters()), or convert only the weights."
_ALONE_BY_PLAN = 'With `only = "model"` in every rule, the plan changes the model alone and leaves this'


def refuse_other_parameters(key: str, migration: Migration) -> None:
    """Refuse to drop, duplicate or cut parameters beside what lists them without names; renaming is fine.

    Args:
        key: Of the list: kind and path, as reports call it.
        migration: What becomes of the sections.

    Raises:
        MigrationError: The plan would leave other parameters than are listed.
    """
    _refuse(migration, key, "has no parameter names: it cannot follow what is dropped, duplicated or cut", ALONE)


def _refuse(migration: Migration, place: str, message: str, hint: str) -> None:
    if not _is_reached(migration, place):
        return
    for key, names in _other_parameters(migration).items():
        raise MigrationError([Problem("name", f"{message} in {key}", place, names)], hint=hint)


def _is_reached(migration: Migration, place: str) -> bool:
    """Whether a rule could be for it: where all name other sections, only these are to change."""
    rules = list(migration.plan.all_rules())
    return not rules or any(rule.is_for(place) for rule in rules)


def _other_parameters(migration: Migration) -> dict[str, tuple[str, ...]]:
    """Per section, the parameters that are dropped, duplicated, cut or otherwise not moved whole."""
    found = {}
    for key, moves in migration.sections.items():
        changed = [name for name, _ in moves.dropped]
        changed += [move.target for move in moves.moves if move.clone or not move.is_moved_whole]
        if changed:
            found[key] = tuple(changed)
    return found


def followed_nowhere(
    tree: Any, judgement: Judgement, migration: Migration, prefixes: Mapping[str, str], followed: Set[Path]
) -> Iterator[str]:
    """Notes on what is in no section, belongs to parameters that a plan changes, and is left as it is.

    Args:
        tree: The checkpoint.
        judgement: What it was found to consist of.
        migration: What becomes of the sections.
        prefixes: Per section, what its names begin with in the file and not in the migration.
        followed: Where lists are that follow an optimizer.

    Raises:
        MigrationError: It would fit the parameters no longer.
    """
    if not any(True for _ in migration.plan.all_rules()):
        return
    gone = _gone(migration, prefixes)
    others = _other_parameters(migration)
    if not gone and not others:
        return
    unread = unread_state(tree, judgement)
    if unread is not None:
        yield from _unread(unread, migration, gone)
    for path, model in positional_lists(tree, judgement.sections):
        place = f"ema {format_path(path)}"
        follows = any(path[: len(one)] == one for one in followed)
        if others and not follows and _is_reached(migration, place):
            message = (
                f"has tensors in the order and shapes of model {model.label}, without names: "
                "it cannot follow what is dropped, duplicated or cut"
            )
            _refuse(migration, place, message, f"{_ALONE_BY_PLAN} as it is; or convert only the weights.")
    state = () if unread is None else unread.found
    yield from _keyed_by_names(tree, judgement.sections, gone, state)


def _unread(unread: Unread, migration: Migration, gone: Set[str]) -> Iterator[str]:
    """Refuse what state of an unknown form cannot follow; a note where it need not."""
    place = f"optimizer {format_path(next(iter(unread.found)))}"
    if _is_reached(migration, place):
        hint = f"{_ALONE_BY_PLAN} state as it is; or convert only the weights."
        message = f"{unread}, of a form that is not known: it cannot follow"
        if keyed := sorted({key for path in unread.found for key in path if isinstance(key, str)} & gone):
            raise MigrationError(
                [Problem("name", f"{message} what is renamed or dropped", names=tuple(keyed))], hint=hint
            )
        for key, names in _other_parameters(migration).items():
            message = f"{message} what is dropped, duplicated or cut in {key}"
            raise MigrationError([Problem("name", message, names=names)], hint=hint)
    yield f"{unread}, of a form that is not known: left as it is"


def _gone(migration: Migration, prefixes: Mapping[str, str]) -> set[str]:
    """The names, as the file has them, that are no longer those of the same parameter."""
    found = set()
    for key, moves in migration.sections.items():
        prefix = prefixes.get(key, "")
        found |= {prefix + name for name, _ in moves.dropped}
        renamed = (move for move in moves.moves if move.target not in move.sources)
        found |= {prefix + name for move in renamed for name in move.sources}
    return found


def _keyed_by_names(tree: Any, sections: Iterable[Section], gone: Set[str], state: Iterable[Path]) -> Iterator[str]:
    """Notes on other entries that are keyed by, or list, names that are gone."""
    containers = {found[:length] for found in state for length in range(len(found) + 1)}
    for path, node in outside(tree, sections):
        if path in containers:
            continue
        keys = node if isinstance(node, Mapping | list | tuple) else ()
        if names := [key for key in keys if isinstance(key, str) and key in gone]:
            yield (
                f"{format_path(path)}: has the names of parameters ({few(names, 3)}) that the plan changes, and is in "
                "no section: left as it is"
            )
