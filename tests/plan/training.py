"""Train, migrate by a plan, train on: what the tests of the engine share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Migration, Target
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState

torch.set_num_threads(1)

Groups = Sequence[Mapping[str, Any]]

ELEMENTWISE: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "asgd": (torch.optim.ASGD, {"lr": 0.05, "t0": 3.0}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
}


def batches(count: int, width: int, seed: int = 1) -> list[torch.Tensor]:
    """Inputs that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, width, generator=generator) for _ in range(count)]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Sequence[torch.Tensor], scheduler: Any = None
) -> list[float]:
    """One step per input towards a fixed function of it; the losses before each step."""
    losses = []
    for x in inputs:
        optimizer.zero_grad()
        out = model(x)
        loss = (out - torch.sin(x.float().sum(-1, keepdim=True))).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def target_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Target:
    """What a live optimizer needs, its parameters named by the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    groups = tuple(tuple(names[id(p)] for p in group["params"]) for group in optimizer.param_groups)
    options = tuple(
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    )
    return Target(groups, options, shapes)


def state_of(optimizer: torch.optim.Optimizer, names: Sequence[str] | None = None) -> OptimizerState:
    """The optimizer's state, named; copied, as if it had been saved and loaded."""
    state = OptimizerState.from_node(copy.deepcopy(optimizer.state_dict()))
    return state if names is None else state.named(names)


def migrate(
    plan: Plan,
    old: nn.Module,
    old_optimizer: torch.optim.Optimizer,
    new: nn.Module,
    new_optimizer: torch.optim.Optimizer,
    names: Sequence[str] | None = None,
) -> Migration:
    """Weights and optimizer state of one model to another, live, by one plan."""
    weights = old.state_dict()
    shapes = {name: tuple(value.shape) for name, value in new.state_dict().items()}
    found = plan_model(plan, weights, target=Target.of_names(shapes))
    moved = execute_model(found.sections["model"], weights)
    new.load_state_dict(moved, strict=not any(m.expression is None for m in found.sections["model"].moves))
    state = state_of(old_optimizer, names)
    known = {name: tuple(value.shape) for name, value in old.named_parameters()}
    migration = plan_optimizer(plan, state, target=target_of(new, new_optimizer), shapes=known)
    new_optimizer.load_state_dict(execute_optimizer(migration.sections["optimizer"], state).to_node())
    return migration


def slots_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The live state of every parameter."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
