"""Optimizers of other libraries, resumed after names, order and groups have changed: as if nothing had."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.errors import MigrationError
from tests import oracle
from tests.hooks.models import refused, register
from tests.hooks.optimizers import OTHERS, OTHERS_WARN, Make, runs_hooks


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


@pytest.mark.filterwarnings(*OTHERS_WARN)
@pytest.mark.parametrize("count", [1, 2], ids=["one group", "two groups"])
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_it_goes_on_as_if_nothing_had_changed(make: Make, count: int) -> None:
    torch.manual_seed(0)
    model = Old()
    optimizer = make(groups(model, count), lr=1e-2)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    changed = New(model)
    resumed = make(groups(changed, count, flipped=True), lr=1e-2)
    if runs_hooks(resumed):
        assert "nothing fills 'tail.weight'" in refused(
            make(groups(changed, count), lr=1e-2), saved, hooks.match_names()
        )
        register(resumed, hooks.rename(NAMES))
        resumed.load_state_dict(saved)
    else:
        with pytest.raises(MigrationError, match=r"nothing fills 'tail\.weight'"):
            hooks.adapt(resumed, saved)
        before = copy.deepcopy(saved)
        resumed.load_state_dict(hooks.adapt(resumed, saved, hooks.rename(NAMES)))
        assert oracle.differences(before, saved) == []
    assert train(changed, resumed, 3, 10) == train(model, optimizer, 3, 10)


class Wide(nn.Module):
    """With a matrix large enough for torchao to keep its moments in blocks of few bits."""

    def __init__(self, first: str, rows: int = 64) -> None:
        super().__init__()
        setattr(self, first, nn.Linear(6, 64))
        self.matrix, self.last = nn.Linear(64, rows), nn.Linear(64, 4)
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(getattr(self, self.first)(x))
        return self.last(torch.tanh(self.matrix(hidden)[:, :64]))


@pytest.fixture(scope="module")
def torchao() -> Any:
    logging.disable(logging.WARNING)  # it tells of kernels that it cannot load
    try:
        return pytest.importorskip("torchao.optim")
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("count", [1, 2], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_moments_that_are_tensor_subclasses_follow_whole(torchao: Any, name: str, count: int) -> None:
    with torch.compiler.set_stance("force_eager"):  # no compiler is needed to see where state goes
        make = getattr(torchao, name)
        torch.manual_seed(0)
        model = Wide("inner")
        optimizer = make(groups(model, count), lr=1e-2)
        train(model, optimizer, 0, 3)
        stream = io.BytesIO()
        torch.save(optimizer.state_dict(), stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=False)
        changed = Wide("outer")
        renamed = {key.replace("inner", "outer"): value for key, value in model.state_dict().items()}
        changed.load_state_dict(renamed)
        resumed = make(groups(changed, count, flipped=True), lr=1e-2)
        register(resumed, hooks.rename({"inner": "outer"}), hooks.verify_resume())
        resumed.load_state_dict(saved)
        moments = resumed.state[changed.matrix.weight]["exp_avg"]
        assert type(moments) is type(optimizer.state[model.matrix.weight]["exp_avg"]) is not torch.Tensor
        losses = train(model, optimizer, 3, 10)
        assert train(changed, resumed, 3, 10) == losses
        twins = nn.ModuleDict({name: Wide("inner") for name in ("a", "b")})
        doubled = make(groups(twins, count), lr=1e-2)
        stream.seek(0)
        register(doubled, hooks.duplicate({"{rest**}": ["a.{rest**}", "b.{rest**}"]}))
        doubled.load_state_dict(torch.load(stream, weights_only=False))
        for slot, moment in doubled.state[twins["a"].matrix.weight].items():
            other = doubled.state[twins["b"].matrix.weight][slot]
            assert type(moment) is type(other)
            first, second = (
                [getattr(t, part) for part in t.__tensor_flatten__()[0]] if hasattr(t, "codes") else [t]
                for t in (moment, other)
            )
            assert all(torch.equal(x, y) and x.data_ptr() != y.data_ptr() for x, y in zip(first, second, strict=True))
        stream.seek(0)
        larger = make(groups(Wide("inner", rows=72), count), lr=1e-2)
        register(larger, hooks.resize("matrix"))
        with pytest.raises(MigrationError, match=r"exp_avg of 'matrix\.weight' cannot follow: .* of a subclass"):
            larger.load_state_dict(torch.load(stream, weights_only=False))
        assert not larger.state
