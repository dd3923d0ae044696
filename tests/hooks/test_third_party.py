"""Optimizers of other libraries, resumed after names, order and groups have changed: as if nothing had."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.errors import MigrationError
from tests import oracle
from tests.hooks.models import refused, register

lion_pytorch = pytest.importorskip("lion_pytorch")
schedulefree = pytest.importorskip("schedulefree")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    bitsandbytes = pytest.importorskip("bitsandbytes")

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "Lion": lambda params: lion_pytorch.Lion(params, lr=1e-2),
    "AdamWScheduleFree": lambda params: schedulefree.AdamWScheduleFree(params, lr=1e-2),
    "SGDScheduleFree": lambda params: schedulefree.SGDScheduleFree(params, lr=1e-2),
    "bnb.AdamW": lambda params: bitsandbytes.optim.AdamW(params, lr=1e-2),
    "bnb.AdamW8bit": lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1),
    **{
        name: lambda params, name=name: getattr(pytorch_optimizer, name)(params, lr=1e-2)  # type: ignore[misc]
        for name in ("AdaBelief", "AdEMAMix", "Adan", "CAME", "Lamb", "Prodigy", "SOAP", "Shampoo", "StableAdamW")
    },
}


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.second(torch.tanh(self.first(x))))


class New(nn.Module):
    """Old with other names, in another order."""

    def __init__(self, old: Old) -> None:
        super().__init__()
        copied = copy.deepcopy(old)
        self.tail, self.head, self.body = copied.frozen, copied.second, copied.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.head(torch.tanh(self.body(x))))


NAMES = {"first": "body", "second": "head", "frozen": "tail"}


def groups(model: nn.Module, count: int, *, flipped: bool = False) -> Any:
    named = list(model.named_parameters())
    if count == 1:
        return named
    made = [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return made[::-1] if flipped else made


def train(model: nn.Module, optimizer: Any, start: int, steps: int) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        if hasattr(optimizer, "train"):
            optimizer.train()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def registers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it loads as torch does: bitsandbytes runs no hooks, pytorch_optimizer returns to the unadapted dict."""
    return not type(optimizer).__module__.startswith(("bitsandbytes", "pytorch_optimizer"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("count", [1, 2], ids=["one group", "two groups"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_goes_on_as_if_nothing_had_changed(make: Make, count: int) -> None:
    torch.manual_seed(0)
    model = Old()
    optimizer = make(groups(model, count))
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    changed = New(model)
    resumed = make(groups(changed, count, flipped=True))
    if registers(resumed):
        assert "nothing fills 'tail.weight'" in refused(make(groups(changed, count)), saved, hooks.match_names())
        register(resumed, hooks.rename(NAMES))
        resumed.load_state_dict(saved)
    else:
        with pytest.raises(MigrationError, match=r"nothing fills 'tail\.weight'"):
            hooks.adapt(resumed, saved)
        before = copy.deepcopy(saved)
        resumed.load_state_dict(hooks.adapt(resumed, saved, hooks.rename(NAMES)))
        assert oracle.differences(before, saved) == []
    assert train(changed, resumed, 3, 10) == train(model, optimizer, 3, 10)
