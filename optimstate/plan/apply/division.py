"""The optimizers that `[[optimizer]]` tables make from those of a checkpoint, at the paths that the tables name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.solve.division import Part
from optimstate.plan.solve.migration import Migration
from optimstate.state.optimizer import OptimizerState
from optimstate.state.scheduler import PER_GROUP_KEYS, regroup_scheduler_state
from optimstate.tree import Path, rebuilt_mapping

__all__ = ["joined_scheduler", "optimizers_of", "placed", "reported", "schedulers_of"]


def optimizers_of(parts: Sequence[Part], states: Mapping[str, OptimizerState]) -> dict[str, OptimizerState]:
    """The state of each optimizer of the result, by its path.

    Args:
        parts: What each has of each optimizer of the checkpoint.
        states: The checkpoint's, by key, with the names that the rules speak of.
    """
    made: dict[str, list[OptimizerState]] = {}
    for part in parts:
        own = states[part.key]
        alone = own._replace(
            state={key: slots for key, slots in own.state.items() if key not in set(own.orphans())}, shared={}
        )
        made.setdefault(part.rule.path, []).append(execute_optimizer(part.moves, alone))
    return {path: _joined(found) for path, found in made.items()}


def _joined(states: Sequence[OptimizerState]) -> OptimizerState:
    """Several optimizers as one: their groups in sequence, with the parameters renumbered."""
    if len(states) == 1:
        return states[0]
    groups, state, count = [], {}, 0
    for one in states:
        for group in one.groups:
            by_name = all(isinstance(key, str) for key in group.params) and bool(group.params)
            keys = tuple(key if by_name else count + n for n, key in enumerate(group.params))
            count += len(keys)
            state.update({new: one.state[old] for new, old in zip(keys, group.params, strict=True) if old in one.state})
            groups.append(group._replace(params=keys))
    return states[0]._replace(groups=tuple(groups), state=state)


def reported(migration: Migration, parts: Sequence[Part]) -> Migration:
    """The migration with the optimizers of the result in place of those of the checkpoint."""
    left = {part.key: migration.sections[part.key].dropped for part in parts}
    sections = {key: moves for key, moves in migration.sections.items() if key not in left}
    for part in parts:
        name = f"optimizer {part.rule.path}"
        if name in sections:
            name = f"{name} (from {part.key})"
        sections[name] = part.moves._replace(dropped=left.pop(part.key, ()))
    return migration._replace(sections=sections)


def schedulers_of(state: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """A scheduler's state for each new optimizer that has parameters of the old one, by path."""
    return {part.rule.path: regroup_scheduler_state(state, [[n] for n in part.numbers]) for part in parts}


def joined_scheduler(found: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """One scheduler from those of several optimizers that became one."""
    first = dict(found[0])
    for other in found[1:]:
        for key in {**first, **other}:
            both = first.get(key), other.get(key)
            if key in PER_GROUP_KEYS and isinstance(both[0], list) and isinstance(both[1], list):
                first[key] = [*both[0], *both[1]]
            elif key == "_schedulers" and isinstance(both[0], list) and isinstance(both[1], list):
                first[key] = [joined_scheduler(pair, path) for pair in zip(both[0], both[1], strict=True)]
            elif both[0] != both[1]:
                values = f"{describe(both[0])} and {describe(both[1])}"
                message = f"its schedulers differ in {key} ({values}), so they cannot become one"
                raise MigrationError.of("scheduler", message, f"[[optimizer]] {describe(path)}")
    return first


def placed(
    tree: Any,
    optimizers: Mapping[str, Any],
    old: Iterable[Path],
    schedulers: Mapping[Path, Mapping[str, Mapping[str, Any]]],
) -> Any:
    """A checkpoint with its new optimizers in place of the old ones.

    Args:
        tree: Not changed.
        optimizers: What stands at each path of the result.
        old: Where those of the checkpoint stand.
        schedulers: For the place of each scheduler its state for every optimizer of the result.

    Raises:
        MigrationError: Something else is at a path, or a scheduler cannot be divided or joined.
    """
    old = list(old)
    if () in old:
        tree = {}
    for place in old:
        tree = _removed(tree, place) if place else tree
    for label, node in optimizers.items():
        tree = _put(tree, tuple(label.split(".")), node, label)
    by_optimizer: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for place, states in schedulers.items():
        for label, state in states.items():
            by_optimizer.setdefault(label, []).append((place, state))
    if len(optimizers) == 1:
        for label, found in by_optimizer.items():
            tree = _replaced(tree, found[0][0], joined_scheduler([state for _, state in found], label))
            for place, _ in found[1:]:
                tree = _removed(tree, place)
        return tree
    joined = next((label for label, found in by_optimizer.items() if len(found) > 1), None)
    if joined is not None:
        message = "several schedulers would follow it beside other optimizers"
        raise MigrationError.of("scheduler", message, f"[[optimizer]] {describe(joined)}")
    for place, states in schedulers.items():
        tree = _replaced(tree, place, next(iter(states.values())) if len(states) == 1 else dict(states))
    return tree


def _refused(path: Path) -> MigrationError:
    message = f"{'.'.join(map(str, path))} is not in dicts alone, so it cannot be replaced by other optimizers"
    return MigrationError.of("unreached", message, hint="Convert the checkpoint to one file of dicts first.")


def _removed(tree: Any, path: Path) -> Any:
    if not isinstance(tree, Mapping) or path[0] not in tree:
        raise _refused(path)
    if len(path) == 1:
        return rebuilt_mapping(tree, {key: value for key, value in tree.items() if key != path[0]})
    return rebuilt_mapping(tree, {**tree, path[0]: _removed(tree[path[0]], path[1:])})


def _replaced(tree: Any, path: Path, node: Any) -> Any:
    if not path:
        return node
    if not isinstance(tree, Mapping) or path[0] not in tree:
        raise _refused(path)
    return rebuilt_mapping(tree, {**tree, path[0]: _replaced(tree[path[0]], path[1:], node)})


def _put(tree: Any, path: Path, node: Any, whole: str) -> Any:
    if not isinstance(tree, Mapping) or (len(path) == 1 and path[0] in tree):
        message = f"something else is at {describe(whole)}, where an [[optimizer]] is to stand"
        raise MigrationError.of("conflict", message, remedy="choose another path")
    inner = node if len(path) == 1 else _put(tree.get(path[0], {}), path[1:], node, whole)
    return rebuilt_mapping(tree, {**tree, path[0]: inner})
