"""Small models before and after a change, and what compares a resumed run with one that never changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import optimstate.optim
from optimstate.errors import OptimStateError
from tests import oracle
from tests.support import seeded

MODULES = [torch.optim, optimstate.optim]


class Attention(nn.Module):
    """With separate projections, or one for all three."""

    def __init__(self, *, fused: bool = False, width: int = 4) -> None:
        super().__init__()
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        return torch.softmax(q @ k.T, -1) @ v


class Net(nn.Module):
    """An embedding, attention, a tied head, a frozen layer and one that never gets a gradient."""

    def __init__(self, *, fused: bool = False, rows: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.block = Attention(fused=fused)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 2)
        self.head = nn.Linear(4, rows, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.block(self.embed(tokens))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, *, start: int = 0) -> list[float]:
    """Losses of some steps; step n always sees the same data."""
    losses = []
    for step in range(start, start + steps):
        tokens = torch.randint(6, (9,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :6], tokens.roll(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_group(model: nn.Module) -> Any:
    return model.named_parameters()


def two_groups(model: nn.Module) -> Any:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-2},
        {"params": [(n, p) for n, p in named if p.dim() > 1]},
    ]


def adam(module: Any, params: Any, **options: Any) -> torch.optim.Optimizer:
    return module.AdamW(params, lr=1e-2, **options)


def trained(module: Any, layout: Any = one_group, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A net and its AdamW after three steps."""
    model = seeded(Net)
    optimizer = adam(module, layout(model), **options)
    train(model, optimizer)
    return model, optimizer


def unnamed(groups: Any) -> Any:
    """Parameters or groups of a layout without names."""
    groups = list(groups)
    if not isinstance(groups[0], dict):
        return [p for _, p in groups]
    return [{**group, "params": [p for _, p in group["params"]]} for group in groups]


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def register(optimizer: torch.optim.Optimizer, *hooks: Any) -> None:
    for hook in hooks:
        optimizer.register_load_state_dict_pre_hook(hook)


def loaded(optimizer: torch.optim.Optimizer, state_dict: Any, *hooks: Any) -> list[str]:
    """Load through hooks; the lines logged, after checking that the dict that was given is as before."""
    register(optimizer, *hooks)
    before, identities = copy.deepcopy(state_dict), [id(v) for v in leaves(state_dict)]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("optimstate")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        optimizer.load_state_dict(state_dict)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert oracle.differences(before, state_dict) == []
    assert identities == [id(v) for v in leaves(state_dict)]
    return lines


def refused(optimizer: torch.optim.Optimizer, state_dict: Any, *hooks: Any) -> str:
    """Load through hooks what must be refused; the message, after checking that nothing has changed."""
    before, held = copy.deepcopy(optimizer.state_dict()), [id(v) for v in leaves(optimizer.state_dict()["state"])]
    given = copy.deepcopy(state_dict)
    register(optimizer, *hooks)
    with pytest.raises(OptimStateError) as raised:
        optimizer.load_state_dict(state_dict)
    assert oracle.differences(before, optimizer.state_dict()) == []
    assert held == [id(v) for v in leaves(optimizer.state_dict()["state"])]
    assert oracle.differences(given, state_dict) == []
    return str(raised.value)


def leaves(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        for value in node.values():
            yield from leaves(value)
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value)
    elif isinstance(node, torch.Tensor):
        yield node
