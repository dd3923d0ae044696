"""A small model, the four changes that resumed runs are made for, and the same change made by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimstate.plan.language.plan import Plan

CHANGES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "a layer inserted": (
        {"blocks": 3},
        '[[rule]]\nfrom = "blocks.1.{p**}"\nto = "blocks.2.{p}"\n[[rule]]\nfresh = "blocks.1.**"\n',
    ),
    "heads added": (
        {"heads": 3},
        '[[rule]]\nfrom = "blocks.{i}.up.{p}"\nto = "blocks.{i}.up.{p}"\nresize = { dim = 0, size = 6, fill = 0.0 }\n'
        '[[rule]]\nfrom = "blocks.{i}.down.weight"\nto = "blocks.{i}.down.weight"\n'
        "resize = { dim = 1, size = 6, fill = 0.0 }\n",
    ),
    "vocabulary grown": (
        {"words": 9},
        '[[rule]]\nfrom = "emb.weight"\nto = "emb.weight"\nresize = { dim = 0, size = 9, fill = 0.0 }\n',
    ),
    "a rename": ({"out": "readout"}, '[[rule]]\nfrom = "out.{p}"\nto = "readout.{p}"\n'),
}
TOKENS = torch.tensor([[0, 1, 2], [3, 4, 5]])


class Block(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 2 * heads), nn.Linear(2 * heads, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Keeps the loss of every step in `losses`."""

    def __init__(self, blocks: int = 2, heads: int = 2, words: int = 6, out: str = "out") -> None:
        super().__init__()
        torch.manual_seed(blocks + heads + words)
        self.emb = nn.Embedding(words, 4)
        self.blocks = nn.ModuleList(Block(heads) for _ in range(blocks))
        self.add_module(out, nn.Linear(4, 1))
        self.out_name, self.losses = out, list[float]()

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        loss = (getattr(self, self.out_name)(x) - 1).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss}


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    for _ in range(steps):
        optimizer.zero_grad()
        net(TOKENS)["loss"].backward()
        optimizer.step()
    return net.losses[-steps:]


def plan(change: str) -> Plan:
    return Plan.from_toml(CHANGES[change][1])


def changed(change: str) -> Net:
    return Net(**CHANGES[change][0])


def expected_losses(change: str, old: int, more: int, *, new_step: int | None = None, **options: Any) -> list[float]:
    """What a changed run goes on with where the state was moved by hand after `old` steps.

    Args:
        change: A key of `CHANGES`.
        old: Steps before it.
        more: Steps after it.
        new_step: New parameters have moments of zero at this step; None where they have no state.
        options: Of AdamW.
    """
    was, new = Net(), changed(change)
    before, after = (torch.optim.AdamW(net.parameters(), **options) for net in (was, new))
    train(was, before, old)
    move_by_hand(change, (was, before.state), (new, after.state))
    for name, parameter in new.named_parameters():
        if new_step is not None and is_new(change, name):
            moments = {slot: torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}
            after.state[parameter] = {"step": torch.tensor(float(new_step)), **moments}
    return train(new, after, more)


def is_new(change: str, name: str) -> bool:
    return change == "a layer inserted" and "blocks.1." in name


def move_by_hand(change: str, before: tuple[nn.Module, Any], after: tuple[nn.Module, Any]) -> None:
    """Give a changed model and the state of its optimizer what another has.

    Args:
        change: A key of `CHANGES`.
        before: A model with a `Net` somewhere, and the slots by parameter.
        after: The same of the changed one.
    """
    sources = dict(before[0].named_parameters())
    for name, parameter in after[0].named_parameters():
        if is_new(change, name):
            continue
        source = sources[name.replace("blocks.2.", "blocks.1.").replace("readout", "out")]
        parameter.data.copy_(_padded(source.data, parameter.shape))
        after[1][parameter] = {
            slot: _padded(value, parameter.shape) if getattr(value, "shape", ()) else copy.copy(value)
            for slot, value in before[1][source].items()
        }


def _padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    made = tensor.new_zeros(shape)
    made[tuple(map(slice, tensor.shape))] = tensor
    return made
