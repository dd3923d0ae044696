"""Every optimizer of torch and ours: the state follows names into another order, and the run goes on as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.installed_torch import HAS_MUON
from tests.hooks.models import MODULES, refused, register

OPTIONS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    **({"Muon": {}} if HAS_MUON else {}),
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"lr": 0.01, "momentum": 0.9},
}


class Stack(nn.Module):
    """Three square maps, registered in some order; without biases, as Muon wants only matrices."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4, bias=False, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, steps: int) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())  # type: ignore[arg-type,attr-defined]
    return losses


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", OPTIONS)
def test_in_another_order(name: str, module: Any) -> None:
    torch.manual_seed(0)
    model, changed = Stack("abc"), Stack("cab")
    make = getattr(module, name)
    optimizer = make(model.named_parameters(), **OPTIONS[name])
    train(model, optimizer, 0, 4)
    changed.load_state_dict(model.state_dict())
    resumed = make(changed.named_parameters(), **OPTIONS[name])
    register(resumed, hooks.match_names())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses, found = train(model, optimizer, 4, 10), train(changed, resumed, 4, 10)
    # LBFGS sums over all parameters, which rounds in another order; NAdam's mu_product is a float32 to which loading
    # itself, with or without a hook, gives the parameter's dtype.
    if name in ("LBFGS", "NAdam"):
        assert found == pytest.approx(losses, rel=1e-9)
    else:
        assert found == losses


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_vectors_over_all_parameters_need_their_shapes(module: Any) -> None:
    torch.manual_seed(0)
    model = Stack("abc")
    optimizer = module.LBFGS(model.named_parameters(), lr=0.1, max_iter=3)
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    other = Stack("xyz")
    resumed = module.LBFGS(other.named_parameters(), lr=0.1, max_iter=3)
    rules = {"a": "z", "b": "x", "c": "y"}
    assert "add_metadata()" in refused(resumed, saved, hooks.rename(rules))
    optimizer.register_state_dict_post_hook(hooks.add_metadata())
    resumed = module.LBFGS(other.named_parameters(), lr=0.1, max_iter=3)
    register(resumed, hooks.rename(rules))
    resumed.load_state_dict(optimizer.state_dict())
    old, new = optimizer.state[model.a.weight], resumed.state[other.x.weight]
    a, b, c = old["prev_flat_grad"].split(16)
    assert torch.equal(new["prev_flat_grad"], torch.cat([b, c, a]))  # x, y, z
