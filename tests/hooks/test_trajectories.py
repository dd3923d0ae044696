"""After each kind of change ten more steps, against the run that never changed, for optimizers of every origin.

The model has tied weights, a frozen part and one that never gets a gradient; the optimizer has one group or several,
and was built with names or without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.errors import PlanError
from optimstate.plan.language.plan import Plan
from tests import oracle
from tests.hooks.models import MODULES, Net, adam, loaded, one_group, register, train, two_groups, unnamed
from tests.hooks.optimizers import ELEMENTWISE, OTHERS_WARN, Make, runs_hooks
from tests.support import seeded

PROJECTIONS = ["block.q", "block.k", "block.v"]


def grown(model: nn.Module) -> nn.Module:
    """Two more tokens, which the data does not have."""
    made = seeded(lambda: Net(rows=8), 1)
    weights = model.state_dict()
    with torch.no_grad():
        made.embed.weight[:6] = weights["embed.weight"]
    rest = {name: value for name, value in weights.items() if name not in ("embed.weight", "head.weight")}
    made.load_state_dict(rest, strict=False)
    return made


def fused(model: nn.Module) -> nn.Module:
    made = seeded(lambda: Net(fused=True), 1)
    weights = model.state_dict()
    for kind in ("weight", "bias"):
        weights[f"block.qkv.{kind}"] = torch.cat([weights.pop(f"{name}.{kind}") for name in PROJECTIONS])
    made.load_state_dict(weights)
    return made


def with_another_part(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    made.side = nn.Linear(4, 4)  # takes no part in the loss
    return made


def without_a_part(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    del made.unused
    return made


class Moved(Net):
    """Net with another name for a part, which stands in another place."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        parts = copy.deepcopy(model)
        self.unused, self.attention, self.frozen = parts.unused, parts.block, parts.frozen
        self.embed, self.head = parts.embed, parts.head

    @property
    def block(self) -> Any:
        return self.attention


class Twice(nn.Module):
    """The model two times, side by side: each copy has the gradients that the one had."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.a, self.b = copy.deepcopy(model), copy.deepcopy(model)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        one, other = self.a(tokens), self.b(tokens)
        assert torch.equal(one, other)
        return one + other - other.detach()  # the value of one, the gradients of both


def alike(model: nn.Module) -> Any:
    """The groups of `two_groups`, with the same options for both."""
    return [{"params": group["params"]} for group in two_groups(model)]


def with_other_options(model: nn.Module) -> Any:
    return [{"params": one_group(model), "lr": 7.0, "weight_decay": 0.25}]


def wrapped(model: nn.Module) -> Any:
    return [(f"_orig_mod.module.{name}", p) for name, p in model.named_parameters()]


@dataclass
class Change:
    """What becomes of the model, the hooks that say so, and how the new optimizer's groups are laid out.

    Attributes:
        layout: None for that of the old one.
        names: Whether it is about the names that the optimizer was built with.
        rounds: Whether the same arithmetic is done in another order.
    """

    model: Callable[[nn.Module], nn.Module]
    hooks: Callable[[], list[Any]]
    layout: Callable[[nn.Module], Any] | None = None
    names: bool = False
    rounds: bool = False


PLAN = '[[rule]]\nfrom = "block.{rest**}"\nto = "attention.{rest}"\n'
CHANGES: dict[str, Change] = {
    "match_names": Change(copy.deepcopy, lambda: [hooks.match_names()]),
    "rename": Change(Moved, lambda: [hooks.rename({"block": "attention"})]),
    "rename and back": Change(
        copy.deepcopy, lambda: [hooks.rename({"block": "body"}), hooks.rename({"body": "block"})]
    ),
    "migrate": Change(Moved, lambda: [hooks.migrate(Plan.from_toml(PLAN))]),
    "strip_prefix": Change(copy.deepcopy, lambda: [hooks.strip_prefix()], wrapped, names=True),
    "duplicate": Change(Twice, lambda: [hooks.duplicate({"{rest**}": ["a.{rest}", "b.{rest}"]})]),
    "fuse": Change(fused, lambda: [hooks.fuse({"block.qkv": PROJECTIONS})], rounds=True),
    "fuse and split": Change(
        copy.deepcopy, lambda: [hooks.fuse({"block.x": PROJECTIONS}), hooks.split({"block.x": PROJECTIONS})]
    ),
    "resize": Change(grown, lambda: [hooks.resize("embed.weight")], rounds=True),
    "fill_missing, fresh": Change(with_another_part, lambda: [hooks.fill_missing()]),
    "fill_missing, zeros": Change(with_another_part, lambda: [hooks.fill_missing("zeros")]),
    "fill_missing, like": Change(with_another_part, lambda: [hooks.fill_missing({"side": "block.q"})]),
    "drop_unexpected": Change(without_a_part, lambda: [hooks.drop_unexpected()]),
    "drop_unexpected, named": Change(without_a_part, lambda: [hooks.drop_unexpected("unused")]),
    "regroup": Change(copy.deepcopy, lambda: [hooks.regroup(merge="first")], alike),
    "hyperparameters": Change(copy.deepcopy, lambda: [hooks.hyperparameters("file")], with_other_options),
    "cast_state": Change(copy.deepcopy, lambda: [hooks.cast_state("float32")]),
    "reset": Change(copy.deepcopy, lambda: [hooks.reset("unused", "frozen")]),
}


def steps(model: nn.Module, optimizer: Any, count: int, start: int = 0) -> list[float]:
    if hasattr(optimizer, "train"):
        optimizer.train()
    return train(model, optimizer, count, start=start)


@pytest.mark.filterwarnings(*OTHERS_WARN)
@pytest.mark.parametrize(
    ("layout", "named"), [(one_group, True), (alike, False)], ids=["one group", "two groups without names"]
)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_ten_more_steps(make: Make, change: Change, layout: Any, named: bool) -> None:
    named = named or change.names
    model = seeded(Net)
    groups = layout(model)
    names = [name for group in (groups if layout is alike else [{"params": groups}]) for name, _ in group["params"]]
    optimizer = make(layout(model) if named else unnamed(layout(model)), lr=1e-2)
    steps(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    changed = change.model(model)
    groups = (change.layout or layout)(changed)
    resumed = make(groups if named else unnamed(groups), lr=1e-2)
    given = change.hooks() + ([] if named else [hooks.match_names(changed, saved=names)])
    if runs_hooks(resumed):
        assert len(loaded(resumed, saved, *given)) == 1
    elif any(str(hook) == "cast_state" for hook in given):
        with pytest.raises(PlanError, match="works after loading"):
            hooks.adapt(resumed, saved, *given)
        return
    else:
        before = copy.deepcopy(saved)
        resumed.load_state_dict(hooks.adapt(resumed, saved, *given))
        assert oracle.differences(before, saved) == []
    losses, found = steps(model, optimizer, 10, 3), steps(changed, resumed, 10, 3)
    if change.rounds:  # one product for three, or over more rows, rounds in another order
        assert found == pytest.approx(losses, rel=1e-3)
    else:
        assert found == losses


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_without_its_state_a_run_goes_elsewhere(module: Any) -> None:
    model = seeded(Net)
    optimizer = adam(module, model.named_parameters())
    train(model, optimizer)
    reset, fresh = copy.deepcopy(model), copy.deepcopy(model)
    resumed = adam(module, reset.named_parameters())
    register(resumed, hooks.reset("all"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    afresh = train(fresh, adam(module, fresh.named_parameters()), 10, start=3)
    assert train(reset, resumed, 10, start=3) == afresh
    assert afresh != train(model, optimizer, 10, start=3)
