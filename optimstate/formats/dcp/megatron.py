"""Megatron's distributed checkpoints: names without paths, and the options of the optimizer in `common.pt`.

Weights stand at the root under their names. The optimizer's slots are `optimizer.state.<slot>.<parameter>`, or in the
layouts whose names begin `optimizer.distributed.` flat buckets that do not say whose they are. The groups' options, and
the step, are in `common.pt` beside the folder's items: which parameter is in which group is nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.errors import RepresentationError
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import difference

__all__ = ["flat_names", "tree_of_names"]

_SLOTS = "optimizer.state."
_BUCKETS = "optimizer.distributed."
_COMMON = "common.pt"


def tree_of_names(values: Mapping[str, Any], beside: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tree of a checkpoint without paths, and notes for people.

    Args:
        values: By name.
        beside: The checkpoint files of the folder.
    """
    model: dict[str, Any] = {}
    state: dict[str, dict[str, Any]] = {}
    buckets: dict[str, Any] = {}
    for name, value in values.items():
        if name.startswith(_SLOTS):
            slot, _, parameter = name.removeprefix(_SLOTS).partition(".")
            state.setdefault(parameter, {})[slot] = value
        elif name.startswith(_BUCKETS):
            buckets[name.removeprefix("optimizer.")] = value
        else:
            model[name] = value
    if buckets and not state:
        note = "the optimizer's state is in flat buckets that do not say whose it is: it is carried along, not read"
        return {"model": model, "optimizer": buckets}, [note]
    if not state or not all(name in model for name in state):
        return dict(values), []
    options, step, notes = _options(beside.get(_COMMON))
    if step is not None:
        for slots in state.values():
            slots.setdefault("step", step.clone() if isinstance(step, LazyTensor) else step)
    group = {**options, "params": [name for name in model if name in state]}
    return {"model": model, "optimizer": {"state": state, "param_groups": [group]}}, notes


def _options(common: Any) -> tuple[dict[str, Any], Any, list[str]]:
    """What all groups of `common.pt` have alike, the step, and notes."""
    node = common.get("optimizer") if isinstance(common, Mapping) else None
    step = node.get("common_step") if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and "param_groups" not in node:
        node = node.get("optimizer")
    groups = node.get("param_groups") if isinstance(node, Mapping) else None
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
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
    """The names of a tree that `tree_of_names` made; None for another one.

    What came from `common.pt` is not an item.

    Args:
        tree: What is to be written.
        like: The tree that was read.

    Raises:
        RepresentationError: The options or the step are others than those of `common.pt`.
    """
    if not isinstance(tree.get("model"), Mapping) or not isinstance(tree.get("optimizer"), Mapping):
        return None
    optimizer = tree["optimizer"]
    made = dict(tree["model"])
    if "param_groups" not in optimizer:
        return made | {f"optimizer.{name}": value for name, value in optimizer.items()}
    if difference(_from_common(optimizer), _from_common(like["optimizer"]), aliases=False) is not None:
        raise RepresentationError(
            "the options or the step of the optimizer were changed, which stand in Megatron's common.pt",
            hint="Change common.pt, or write a torch or safetensors file.",
        )
    for parameter, slots in optimizer["state"].items():
        made.update({f"{_SLOTS}{slot}.{parameter}": value for slot, value in slots.items() if slot != "step"})
    return made


def _from_common(optimizer: Mapping[str, Any]) -> list[Any]:
    """The options of every group, and the first step."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer["param_groups"]]
    steps = [slots["step"] for slots in optimizer["state"].values() if "step" in slots]
    return [options, steps[:1]]
