"""Scheduler state when param groups change: every list with one entry per group is rebuilt from a group map.

A group map has, for each new group, the old groups that it came from: `[[0], [0]]` splits one group in two, `[[0, 1]]`
merges two, `[[1], [0]]` swaps them. An old group that is not in the map is dropped. Values (floats, tensors, dicts) are
compared and moved, never computed with.

A schedule also depends on values in the optimizer's param groups, which the caller moves by the same map: `lr` and
`initial_lr` for all schedulers; `max_lr`, `min_lr`, `max_momentum` and `base_momentum` for OneCycleLR; `max_momentum`
and `base_momentum` for CyclicLR; `swa_lr` for SWALR; `momentum` or `betas` where they are cycled. `representatives`
returns the old group whose values each new group gets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.problems import Problem
from optimstate.tree import Opaque

__all__ = ["PER_GROUP_KEYS", "Merge", "regroup_scheduler_state", "representatives"]

Merge = Literal["refuse", "first", "min", "max"]
GroupMap = Sequence[Sequence[int]]

# The lists in states of torch's and optimstate's schedulers that have one entry per param group.
PER_GROUP_KEYS = frozenset(
    {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"}
    | {"base_values", "_last_value"}  # of mmengine and timm
)
# Their other lists.
_SHARED_KEYS = frozenset({"milestones", "_milestones", "_schedule_phases", "_schedulers"})


def regroup_scheduler_state(
    state: Mapping[str, Any],
    group_map: GroupMap,
    *,
    merge: Merge = "refuse",
    fresh: Mapping[int, Mapping[str, Any]] | None = None,
    per_group: Collection[str] = (),
    shared: Collection[str] = (),
    groups: int | None = None,
) -> dict[str, Any]:
    """Rebuild a scheduler's state for other param groups.

    Args:
        state: The `state_dict()` of a scheduler, including nested ones; not changed.
        group_map: For each new group, the indices of the old groups that it came from; empty for a new group.
        merge: What to do if old groups with different values become one. `refuse` raises; `first` takes all values of
            the first of them, `min` and `max` those of the group with the lowest or highest initial learning rate.
        fresh: For each new group that came from no old one, its values by key: `{2: {"base_lrs": 0.1, ...}}`.
        per_group: Further keys with one entry per group, of schedulers that are not torch's.
        shared: Further keys whose lists are not per group, of schedulers that are not torch's.
        groups: The number of old groups, for a state without a per-group list.

    Returns:
        A new state. Values that go to several groups are cloned; values that are not per group are the same objects.

    Raises:
        MigrationError: With every problem found: values that differ in a merge, a group map that does not fit the
            lists, a new group without values, a list that may or may not be per group.
        ValueError: `merge` is not a policy.
    """
    keys = PER_GROUP_KEYS.union(per_group).difference(shared)
    sources = representatives(state, group_map, merge=merge, per_group=per_group, shared=shared, groups=groups)
    problems = list(_unfilled(state, keys, sources, fresh or {}))
    if problems:
        raise MigrationError(
            problems, hint='Give values to every group that comes from no old one: fresh={2: {"base_lrs": 0.1, ...}}.'
        )
    return _rebuilt(state, keys, sources, fresh or {})


def representatives(
    state: Mapping[str, Any],
    group_map: GroupMap,
    *,
    merge: Merge = "refuse",
    per_group: Collection[str] = (),
    shared: Collection[str] = (),
    groups: int | None = None,
) -> list[int | None]:
    """For each new group, the old group whose values it gets; None for a group that came from no old one.

    Args:
        state: The `state_dict()` of a scheduler.
        group_map: For each new group, the indices of the old groups that it came from.
        merge: As for `regroup_scheduler_state`.
        per_group: As for `regroup_scheduler_state`.
        shared: As for `regroup_scheduler_state`.
        groups: As for `regroup_scheduler_state`.

    Raises:
        MigrationError: Old groups with different values become one and `merge` is `refuse`, the group map does not fit
            the lists, or a list may or may not be per group.
        ValueError: `merge` is not a policy.
    """
    if merge not in get_args(Merge):
        raise ValueError(f"merge must be one of {', '.join(get_args(Merge))}, got {describe(merge)}")
    keys = PER_GROUP_KEYS.union(per_group).difference(shared)
    if problems := _misfits(state, keys, group_map, set(shared), groups):
        raise MigrationError(problems)
    if merge == "refuse":
        problems = list(_ambiguities(state, keys, group_map))
        if problems:
            raise MigrationError(
                problems,
                hint="Keep the groups separate, or choose: merge='first', or merge='min' or 'max' for the group with "
                "the lowest or highest initial learning rate.",
            )
    if merge in ("refuse", "first"):
        return [sources[0] if sources else None for sources in group_map]
    lrs = _initial_lrs(state)
    choose = min if merge == "min" else max
    return [choose(sources, key=lambda old: lrs[old]) if sources else None for sources in group_map]


def _lists(
    state: Mapping[str, Any], keys: Collection[str], shared: Collection[str] | None = None, path: str = ""
) -> Iterator[tuple[str, Sequence[Any]]]:
    """Every per-group list and its path, including those of nested schedulers; given `shared`, the unknown lists."""
    for key, value in state.items():
        wanted = key in keys if shared is None else key not in keys and key not in shared
        if wanted and isinstance(value, (list, tuple)):
            yield f"{path}{key}", value
    for inner, nested in _nested(state, keys):
        yield from _lists(nested, keys, shared, f"{path}{inner}.")


def _nested(state: Mapping[str, Any], keys: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schedulers and other mappings within a scheduler's state, each with its path."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield str(key), value
        elif isinstance(value, list | tuple) and key not in keys:
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield f"{key}[{index}]", item


def _misfits(
    state: Mapping[str, Any], keys: Collection[str], group_map: GroupMap, shared: set[str], known: int | None
) -> list[Problem]:
    """Problems that prevent any regrouping: inconsistent lengths, and lists of unknown meaning."""
    lengths = {path: len(values) for path, values in _lists(state, keys) if not _refills(state, path)}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{path}: {length}" for path, length in lengths.items())
        message = (
            f"the scheduler state's lists disagree on the number of param groups ({found}), as after a group was added "
            "to a running optimizer"
        )
        return [Problem("scheduler", message, remedy="complete the shorter ones first")]
    groups = next(iter(lengths.values()), known)
    problems = [
        Problem("scheduler", f"new group {new} comes from old group {old}, but the scheduler state has {groups} groups")
        for new, sources in enumerate(group_map)
        for old in sources
        if groups is not None and not 0 <= old < groups
    ]
    for path, value in _lists(state, keys, _SHARED_KEYS | shared):
        if len(value) == groups:
            message = f"{path} is unknown and has {groups} entries, as many as there are param groups"
            last = describe(path.rpartition(".")[2])
            remedy = (
                f"give per_group=[{last}] or shared=[{last}] to optimstate.state.scheduler.regroup_scheduler_state, or "
                "leave the scheduler out (optimstate convert --without scheduler) and build it anew"
            )
            problems.append(Problem("scheduler", message, remedy=remedy))
    return [*problems, *_pickled(state, keys)]


def _pickled(state: Mapping[str, Any], keys: Collection[str], path: str = "") -> Iterator[Problem]:
    """Problems with schedulers that are pickled objects, whose lists cannot be rebuilt."""
    for key, value in state.items():
        fields = value.state if isinstance(value, Opaque) else None
        if isinstance(fields, Mapping) and any(True for _ in _lists(fields, keys)):
            message = f"{path}{key} is a pickled object with lists of its own for the param groups"
            remedy = "leave the scheduler out (optimstate convert --without scheduler) and build it anew"
            yield Problem("scheduler", message, remedy=remedy)
    for inner, nested in _nested(state, keys):
        yield from _pickled(nested, keys, f"{path}{inner}.")


def _refills(state: Mapping[str, Any], path: str) -> bool:
    # With one min_lr for all, ReduceLROnPlateau itself rebuilds min_lrs for its groups.
    return path == "min_lrs" and state.get("default_min_lr") is not None


def _ambiguities(state: Mapping[str, Any], keys: Collection[str], group_map: GroupMap) -> Iterator[Problem]:
    for path, values in _lists(state, keys):
        if _refills(state, path):
            continue
        for new, sources in enumerate(group_map):
            for old in sources[1:]:
                if not _same(values[sources[0]], values[old]):
                    message = (
                        f"new group {new} merges old group {sources[0]} ({describe(values[sources[0]])}) "
                        f"and old group {old} ({describe(values[old])})"
                    )
                    yield Problem("scheduler", message, path)


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # a comparison of tensors or arrays has no single truth value
        return False


def _initial_lrs(state: Mapping[str, Any]) -> Sequence[Any]:
    """The first list of initial learning rates in the state; else the first list of current ones."""
    for key in ("base_lrs", "_last_lr"):
        for _, values in _lists(state, {key}):
            return values
    raise MigrationError.of(
        "scheduler",
        "the scheduler state has neither base_lrs nor _last_lr, by which 'min' and 'max' choose between groups",
        hint="Use merge='first'.",
    )


def _unfilled(
    state: Mapping[str, Any],
    keys: Collection[str],
    sources: Sequence[int | None],
    fresh: Mapping[int, Mapping[str, Any]],
) -> Iterator[Problem]:
    for new in fresh:
        if not 0 <= new < len(sources):
            message = f"`fresh` gives values to new group {new}, but there are {len(sources)} new groups"
            yield Problem("scheduler", message)
        elif sources[new] is not None:
            message = f"`fresh` gives values to new group {new}, which takes them from old group {sources[new]}"
            yield Problem("scheduler", message)
    for path, _ in _lists(state, keys):
        key = path.rpartition(".")[2]
        for new, old in enumerate(sources):
            if old is None and not _refills(state, path) and key not in fresh.get(new, {}):
                yield Problem("scheduler", f"new group {new} comes from no old group and has no value", path)


def _rebuilt(
    state: Mapping[str, Any],
    keys: Collection[str],
    sources: Sequence[int | None],
    fresh: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    rebuilt = dict(state)
    for key, value in state.items():
        if isinstance(value, Mapping):
            rebuilt[key] = _rebuilt(value, keys, sources, fresh)
        elif isinstance(value, list) and key not in keys and any(isinstance(item, Mapping) for item in value):
            rebuilt[key] = [_rebuilt(i, keys, sources, fresh) if isinstance(i, Mapping) else i for i in value]
        elif key in keys and isinstance(value, (list, tuple)):
            if _refills(state, key):
                entries = [state["default_min_lr"]] * len(sources)
            else:
                entries = [
                    fresh[new][key] if old is None else _clone(value[old]) if old in sources[:new] else value[old]
                    for new, old in enumerate(sources)
                ]
            rebuilt[key] = type(value)(entries)
    return rebuilt


def _clone(value: Any) -> Any:
    """A copy that shares nothing mutable."""
    if isinstance(value, dict):
        return {key: _clone(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(entry) for entry in value)
    clone = getattr(value, "clone", None)
    return clone() if callable(clone) else value
