"""Megatron's distributed checkpoints: names without paths, and the options of the optimizer in `common.pt`.

Weights are at the root under their names. The optimizer's slots are `optimizer.state.<slot>.<parameter>`, or, if names
begin with `optimizer.distributed.`, flat buckets that do not record their parameters: these are carried along and never
treated as known state. If a run has several optimizers (such as one for experts), names may begin with
`chained_<number>.`. Values of the run (`rng_state/shard_0_1`) are beside the model. The groups' options and the step
are in `common.pt` in the folder; the groups of parameters are not stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.errors import RepresentationError
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import difference

__all__ = ["flat_names", "tree_of_names"]

_NAME = re.compile(r"((?:chained_\d+\.)?)optimizer\.(?:state\.([^.]+)\.(.+)|(distributed\..+))", re.DOTALL)
_OPTIMIZER = re.compile(r"(?:chained_(\d+)\.)?optimizer")
_VALUE = re.compile(r"(?!.*_extra_state)[^.]+/shard_[\d._]+", re.DOTALL)
_COMMON = "common.pt"


def tree_of_names(values: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tree of a checkpoint without paths, and notes for people.

    Args:
        values: The items by name.
        beside: The trees of other checkpoint files in the folder.
    """
    model: dict[str, Any] = {}
    others: dict[str, Any] = {}
    states: dict[str, dict[str, dict[str, Any]]] = {}
    buckets: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        match = _NAME.fullmatch(name)
        if match is None:
            (others if _VALUE.fullmatch(name) else model)[name] = value
        elif match[4] is None:
            states.setdefault(f"{match[1]}optimizer", {}).setdefault(match[3], {})[match[2]] = value
        else:
            buckets.setdefault(f"{match[1]}optimizer", {})[match[4]] = value
    if not (states or buckets) or states.keys() & buckets.keys() or {"model", *states, *buckets} & others.keys():
        return dict(values), []
    notes = []
    tree: dict[str, Any] = {"model": model}
    for place, state in states.items():
        tree[place], more = _named(place, state, model, beside.get(_COMMON))
        notes += more
    tree.update(buckets)
    if buckets:
        notes.append(
            "the optimizer's state is in flat buckets that do not record their parameters: it is carried along, not "
            "read; save it with Megatron's --dist-ckpt-optim-fully-reshardable to have it by name"
        )
    return {**tree, **others}, list(dict.fromkeys(notes))


def _named(
    place: str, state: dict[str, dict[str, Any]], model: Mapping[str, Any], common: Any
) -> tuple[dict[str, Any], list[str]]:
    """An optimizer with names, made of its slots and the groups in `common.pt`, and notes."""
    options, step, notes = _options(list(_common_nodes(place, common)))
    if step is not None:
        for slots in state.values():
            slots.setdefault("step", step.clone() if isinstance(step, LazyTensor) else step)
    names = dict.fromkeys([*(name for name in model if name in state), *state])
    return {"state": state, "param_groups": [{**options, "params": list(names)}]}, notes


def _common_nodes(place: str, common: Any) -> Iterator[Mapping[Any, Any]]:
    """The optimizer's node in `common.pt`; all nodes, if names do not distinguish several optimizers."""
    node = common.get("optimizer") if isinstance(common, Mapping) else None
    if not isinstance(node, Mapping):
        return
    match = _OPTIMIZER.fullmatch(place)
    number = match[1] if match is not None else None
    chained = bool(node) and all(type(key) is int for key in node)
    found = [node] if not chained else list(node.values()) if number is None else [node.get(int(number))]
    yield from (one for one in found if isinstance(one, Mapping))


def _options(nodes: list[Mapping[Any, Any]]) -> tuple[dict[str, Any], Any, list[str]]:
    """The options that are equal in all groups of `common.pt`, the step, and notes."""
    groups: list[Mapping[str, Any]] = []
    step = None
    for node in nodes:
        step = node.get("common_step", step)
        inner = node if "param_groups" in node else node.get("optimizer")
        found = inner.get("param_groups") if isinstance(inner, Mapping) else None
        groups += [group for group in found if isinstance(group, Mapping)] if isinstance(found, list) else []
    if not groups:
        return {}, step, ["the optimizer's options and step are not in the folder: no common.pt has them"]
    first = {key: value for key, value in groups[0].items() if key not in ("params", "step")}
    alike = {key: value for key, value in first.items() if all(_same(group, key, value) for group in groups)}
    if step is None and all(_same(group, "step", groups[0].get("step")) for group in groups):
        step = groups[0].get("step")
    notes = ["param groups are not stored by parameter: all are listed in one, with the options of common.pt"]
    if len(groups) > 1:
        differing = ", ".join(
            sorted({str(key) for group in groups for key in group} - alike.keys() - {"params", "step"})
        )
        notes[0] += f"; its {len(groups)} groups differ in {differing or 'nothing'}"
    return alike, step, notes


def _same(group: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in group and difference(group[key], value, aliases=False) is None


def flat_names(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any] | None:
    """The items by name of a tree that `tree_of_names` made, without those from `common.pt`; None for another tree.

    Args:
        tree: The tree to write.
        like: The tree that was read.

    Raises:
        RepresentationError: The options or the step differ from those in `common.pt`.
    """
    made: dict[str, Any] = {}
    model = tree.get("model")
    if not isinstance(model, Mapping) or not any(map(_OPTIMIZER.fullmatch, like)):
        return None
    made.update(model)
    for place, node in tree.items():
        if not _OPTIMIZER.fullmatch(place):
            made.update({place: node} if place != "model" else {})
        elif "param_groups" not in node:
            made.update({f"{place}.{name}": value for name, value in node.items()})
        elif place not in like or difference(_from_common(node), _from_common(like[place]), aliases=False) is not None:
            raise RepresentationError(
                "the options or the step of the optimizer, which are in Megatron's common.pt, were changed",
                hint="Change common.pt, or write a torch or safetensors file.",
            )
        else:
            for parameter, slots in node["state"].items():
                made.update(
                    {f"{place}.state.{slot}.{parameter}": value for slot, value in slots.items() if slot != "step"}
                )
    return made


def _from_common(optimizer: Mapping[str, Any]) -> list[Any]:
    """The options of every group, and the first step."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer["param_groups"]]
    steps = [slots["step"] for slots in optimizer["state"].values() if "step" in slots]
    return [options, steps[:1]]
