"""The ways a plan reaches a checkpoint: a file, hooks, `resume`, and `resume` of sharded parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

import optimstate
from optimstate import hooks
from optimstate.errors import OptimStateError
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor
from tests.plan.lazy import lazy_tree


class Net(nn.Module):
    """A module with parameters of these names and shapes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(torch.zeros(shape)))


class Live:
    """A run that could have written a checkpoint: with its names, shapes, param groups, and one scheduler."""

    def __init__(self, tree: Any, *, sharded: bool = False) -> None:
        groups = next(node["param_groups"] for node in tree.values() if "param_groups" in node)
        shapes = {name: (2,) for group in groups for name in group["param_names"]}
        self.model = Net({**shapes, **{name: tuple(value.shape) for name, value in tree["model"].items()}})
        if sharded:
            _shard(self.model)
        own = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            [{"params": [(n, own[n]) for n in group["param_names"]], "lr": 1.0} for group in groups]
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7)

    def image(self) -> Any:
        """All that it has, with its tensors whole and in memory."""
        state = self.optimizer.state_dict()
        return _whole({"model": self.model.state_dict(), "optimizer": state, "scheduler": self.scheduler.state_dict()})


def _shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))


def _whole(node: Any) -> Any:
    if isinstance(node, LazyTensor):
        return to_torch(node)
    if isinstance(node, torch.Tensor):
        full = getattr(node, "full_tensor", None)
        return (full() if callable(full) else node).detach().clone()
    if isinstance(node, Mapping):
        return {key: _whole(value) for key, value in node.items()}
    return type(node)(map(_whole, node)) if type(node) in (list, tuple) else node


def in_file(plan: Plan, tree: Any) -> Any:
    """What a plan makes of a file."""
    return _whole(apply_plan(plan, lazy_tree(tree))[0])


def by_hooks(plan: Plan, tree: Any, live: Live) -> Any:
    """What a run has whose model and optimizer load by hooks with a plan."""
    live.model.register_load_state_dict_pre_hook(hooks.migrate_model(plan))
    live.optimizer.register_load_state_dict_pre_hook(hooks.migrate(plan))
    live.model.load_state_dict(copy.deepcopy(tree["model"]))
    live.optimizer.load_state_dict(copy.deepcopy(tree["optimizer"]))
    return live.image()


def by_resume(plan: Plan, tree: Any, live: Live) -> Any:
    """What a run has that resumes with a plan."""
    optimstate.resume(
        copy.deepcopy(tree), model=live.model, optimizer=live.optimizer, scheduler=live.scheduler, plan=plan
    )
    return live.image()


DOORS: Mapping[str, Callable[[Plan, Any, Live], Any]] = {
    "file": lambda plan, tree, _: in_file(plan, tree),
    "hooks": by_hooks,
    "resume": by_resume,
    "sharded": by_resume,
}


def outcome(door: str, text: str, tree: Any, wanted: str) -> Any:
    """What a plan makes of a checkpoint, or why it is refused.

    Args:
        door: How it gets there.
        text: The plan.
        tree: The checkpoint.
        wanted: The plan whose result, in a file, the live run looks like; where that is refused, like the checkpoint.
    """
    like = tree
    if door != "file":
        with suppress(OptimStateError):
            like = in_file(Plan.from_toml(wanted), tree)
    live = Live(like, sharded=door == "sharded")
    before = live.image()
    try:
        return DOORS[door](Plan.from_toml(text), tree, live)
    except OptimStateError as error:
        refusal = f"refused: {error}"
    assert door == "hooks" or _same(live.image(), before), f"changed, though {refusal}"
    return refusal


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def differs(one: Any, other: Any) -> bool:
    """Whether two outcomes are not the same."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) != isinstance(other, str) or one != other
    return not _same(one, other)
