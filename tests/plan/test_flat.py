"""LBFGS: vectors over all parameters follow names, order and layout, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.compute import to_torch
from tests.plan.lazy import lazy_tree
from tests.plan.models import WIDTH, Attention
from tests.plan.training import batches, target_of
from tests.support import seeded


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[torch.Tensor]) -> list[float]:
    losses = []
    for x in inputs:

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - torch.sin(x.sum(-1, keepdim=True))).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def setting(form: str, seed: int = 0) -> tuple[nn.Module, Any]:
    model = seeded(lambda: Attention(form), seed).double()
    return model, torch.optim.LBFGS(model.named_parameters(), lr=0.05, max_iter=2, history_size=4)


SPLIT = Plan.from_toml('[[rule]]\nfrom = "qkv.{p}"\nto = "{x=q|k|v}.{p}"\nsplit = 0\n')


def test_training_goes_on_in_the_new_order() -> None:
    inputs = [batches(1, WIDTH)[0].double()] * 5
    old, before = setting("fused")
    steps(old, before, inputs)
    new, after = setting("separate", seed=3)
    weights = old.state_dict()
    parts = {
        f"{x}.{p}": part
        for p in ("weight", "bias")
        for x, part in zip("qkv", weights[f"qkv.{p}"].chunk(3), strict=True)
    }
    new.load_state_dict({name: parts.get(name, weights.get(name)) for name in new.state_dict()})
    state = OptimizerState.from_node(copy.deepcopy(before.state_dict()))
    shapes = {name: tuple(p.shape) for name, p in old.named_parameters()}
    migration = plan_optimizer(SPLIT, state, target=target_of(new, after), shapes=shapes)
    section = migration.sections["optimizer"]
    after.load_state_dict(execute_optimizer(section, state).to_node())
    assert steps(new, after, inputs) == pytest.approx(steps(old, before, inputs), rel=1e-6)
    node = lazy_tree(before.state_dict())
    late_state = OptimizerState.from_node(node)
    late = execute_optimizer(plan_optimizer(SPLIT, late_state, shapes=shapes).sections["optimizer"], late_state)
    assert late.state[0]["old_dirs"][0].shape == (sum(p.numel() for p in old.parameters()),)
    assert to_torch(late.state[0]["d"]).norm().item() == pytest.approx(
        before.state_dict()["state"][0]["d"].norm().item()
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('drop = "out.**"', "something is dropped or duplicated"),
        ('from = "norm.{p}"\nto = ["a.{p}", "b.{p}"]', "something is dropped or duplicated"),
        ('from = "norm.{p}"\nto = "n.{p}"\nscale = 2.0', "made by more than moving elements"),
    ],
)
def test_what_would_change_its_products_is_refused(text: str, reason: str) -> None:
    model, optimizer = setting("fused")
    steps(model, optimizer, [batches(1, WIDTH)[0].double()])
    state = OptimizerState.from_node(optimizer.state_dict())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(MigrationError, match=reason):
        plan_optimizer(Plan.from_toml(f"[[rule]]\n{text}\n"), state, shapes=shapes)
    anew = plan_optimizer(Plan.from_toml('[[rule]]\nfresh = "**"\n'), state, shapes=shapes)
    assert execute_optimizer(anew.sections["optimizer"], state).state == {}


def test_names_alone_need_no_shapes() -> None:
    model, optimizer = setting("fused")
    steps(model, optimizer, [batches(1, WIDTH)[0].double()])
    state = OptimizerState.from_node(optimizer.state_dict())
    plan = Plan.from_toml('[[rule]]\nfrom = "norm.{p}"\nto = "layernorm.{p}"\n')
    made_state = execute_optimizer(plan_optimizer(plan, state).sections["optimizer"], state)
    assert made_state.state[0]["d"] is state.state[0]["d"]
    with pytest.raises(MigrationError, match=r"of 'qkv\.weight' is not known"):
        plan_optimizer(SPLIT, state)
