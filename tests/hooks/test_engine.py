"""What every load hook keeps to: whose containers it may change, what is no resumption, whose state it may load."""

from __future__ import annotations

import copy
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import nn

import optimstate
from optimstate import hooks
from optimstate.errors import StateMismatchError
from optimstate.plan.language.plan import Plan
from tests import oracle

SHIFT = '[[rule]]\nfrom = "{i:int}.{p}"\nto = "{i+1}.{p}"\n[[rule]]\nfresh = "0.*"\n'


def net(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])


def trained(model: nn.Module, make: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    optimizer = make(model.named_parameters(), lr=1e-2)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


class Meddler(hooks.LoadHook):
    """Changes everything that it is given."""

    def finish(self, optimizer: torch.optim.Optimizer, made: dict[str, Any]) -> None:
        for slots in made["state"].values():
            slots["step"] = torch.zeros(())
            slots["note"] = [1]
        for group in made["param_groups"]:
            group["lr"] = 7.0
            group["betas"] = (0.0, 0.0)
            group["tags"].append("changed")


@pytest.mark.parametrize(
    "beside", [[], [hooks.match_names], [lambda: hooks.rename({"9": "8"})]], ids=["alone", "match", "rename"]
)
def test_a_hook_of_ones_own_changes_neither_the_dict_nor_its_optimizer(beside: list[Any]) -> None:
    source = trained(net(1))
    for group in source.param_groups:
        group["tags"] = ["a"]
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    model = net(1)
    target = torch.optim.AdamW([{"params": list(model.named_parameters()), "tags": ["a"]}])
    for hook in (*(make() for make in beside), Meddler()):
        target.register_load_state_dict_pre_hook(hook)
    target.load_state_dict(saved)
    assert target.param_groups[0]["lr"] == 7.0
    assert not oracle.differences(saved, before)
    assert not oracle.differences(source.state_dict(), before)


def test_what_a_new_optimizer_has_itself_goes_through_untouched() -> None:
    model = net(4)
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.register_load_state_dict_pre_hook(hooks.migrate(Plan.from_toml(SHIFT)))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not oracle.differences(optimizer.state_dict(), before)
    source = trained(net(3))
    optimizer.load_state_dict(source.state_dict())
    moved = [optimizer.state[layer.weight]["exp_avg"] for layer in list(model)[1:]]
    for parameter, now in zip(list(source.state)[::2], moved, strict=True):
        assert torch.equal(source.state[parameter]["exp_avg"], now)
    assert model[0].weight not in optimizer.state


def test_equal_values_in_other_memory_are_a_resumption() -> None:
    model = net(1)
    optimizer = trained(model)
    optimizer.register_load_state_dict_pre_hook(hooks.reset("all"))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("target", "make"),
    [
        ("Lion", lambda p, lr: lion_pytorch.Lion(p, lr=lr)),
        ("NAdam", torch.optim.NAdam),
        ("Adafactor", torch.optim.Adafactor),
    ],
    ids=["Lion", "NAdam", "Adafactor"],
)
@pytest.mark.parametrize("by_resume", [True, False])
def test_a_plan_converts_into_the_live_optimizer(target: str, make: Any, by_resume: bool) -> None:
    old = net(1)
    source = trained(old)
    tree = copy.deepcopy({"model": old.state_dict(), "optimizer": source.state_dict()})
    model = net(1)
    optimizer = make(model.named_parameters(), lr=5.0)
    plan = Plan.from_toml(f'optimizer = "{target}"\n')
    if by_resume:
        optimstate.resume(tree, model=model, optimizer=optimizer, plan=plan)
    else:
        optimizer.register_load_state_dict_pre_hook(hooks.migrate(plan))
        optimizer.load_state_dict(tree["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-2  # both have it: the checkpoint's
    fresh = make(net(1).named_parameters(), lr=5.0).param_groups[0]
    if target != "NAdam":  # the checkpoint's means another thing here
        key = {"Lion": "betas", "Adafactor": "eps"}[target]
        assert optimizer.param_groups[0][key] == fresh[key]
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    if target == "Lion":
        found = source.state[old[0].weight]["exp_avg"]
        assert set(optimizer.state[model[0].weight]) == {"exp_avg"}
        grad = model[0].weight.grad
        assert grad is not None
        beta = optimizer.param_groups[0]["betas"][1]
        assert torch.allclose(optimizer.state[model[0].weight]["exp_avg"], found.lerp(grad, 1 - beta))


@pytest.mark.parametrize("plan", ['optimizer = "Lion"\n', ""])
@pytest.mark.parametrize("by_resume", [True, False])
def test_state_of_another_algorithm_is_refused(plan: str, by_resume: bool) -> None:
    old = net(1)
    source = trained(old)
    tree = copy.deepcopy({"model": old.state_dict(), "optimizer": source.state_dict()})
    model = net(1)
    make = torch.optim.AdamW if plan else torch.optim.SGD
    optimizer = make(model.named_parameters(), lr=5.0)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    message = "the plan makes Lion state, and the live optimizer is AdamW" if plan else "state of AdamW.*is SGD"
    if by_resume:
        with pytest.raises(StateMismatchError, match=message):
            optimstate.resume(tree, model=model, optimizer=optimizer, plan=Plan.from_toml(plan))
    else:
        optimizer.register_load_state_dict_pre_hook(hooks.migrate(Plan.from_toml(plan)))
        with pytest.raises(StateMismatchError, match=message):
            optimizer.load_state_dict(tree["optimizer"])
    assert not oracle.differences([model.state_dict(), optimizer.state_dict()], before)


def test_the_adafactor_of_transformers_is_a_target() -> None:
    """Its own run with the same gradients keeps the same means."""
    from transformers.optimization import Adafactor

    old, new = net(1), net(1)
    new.load_state_dict(old.state_dict())
    source = torch.optim.AdamW(old.named_parameters(), lr=1e-3)
    gradient = [torch.randn_like(p) for p in old.parameters()]
    for p, g in zip(old.parameters(), gradient, strict=True):
        p.grad = g.clone()
    source.step()
    options = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
    optimizer = Adafactor(new.named_parameters(), **options)
    optimizer.register_load_state_dict_pre_hook(
        hooks.migrate(Plan.from_toml('optimizer = "Adafactor (transformers)"\n'))
    )
    optimizer.load_state_dict(source.state_dict())
    square = source.state[old[0].weight]["exp_avg_sq"]
    found = optimizer.state[new[0].weight]
    assert torch.allclose(found["exp_avg_sq_row"], square.mean(-1))
    assert torch.allclose(found["exp_avg_sq_col"], square.mean(-2))
    assert torch.equal(optimizer.state[new[0].bias]["exp_avg_sq"], source.state[old[0].bias]["exp_avg_sq"])
    assert found["step"] == 1
    for p, g in zip(new.parameters(), gradient, strict=True):
        p.grad = g.clone()
    optimizer.step()
    assert optimizer.state[new[0].weight]["step"] == 2
    assert optimizer.param_groups[0]["relative_step"] is False
