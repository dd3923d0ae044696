"""After each kind of change ten more steps, against the run that it must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from tests.hooks.models import MODULES, Net, adam, one_group, register, seeded, train, two_groups

pytestmark = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


def grown(model: nn.Module) -> nn.Module:
    """Two more tokens, which the data does not have."""
    made = seeded(lambda: Net(rows=8), 1)
    weights = model.state_dict()
    with torch.no_grad():
        made.embed.weight[:6] = weights["embed.weight"]
    rest = {name: value for name, value in weights.items() if name not in ("embed.weight", "head.weight")}
    made.load_state_dict(rest, strict=False)
    return made


def with_another_part(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    made.side = nn.Linear(4, 4)  # takes no part in the loss
    return made


def without_a_part(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    del made.unused
    return made


def several_groups(model: nn.Module) -> Any:
    """By dimension, with the same options for both."""
    return [{"params": group["params"]} for group in two_groups(model)]


def wrapped(model: nn.Module) -> Any:
    return [(f"_orig_mod.module.{name}", p) for name, p in model.named_parameters()]


Change = Callable[[nn.Module], Any]
CHANGES: dict[str, tuple[Change, Change, list[Callable[[], Any]]]] = {
    "grown": (grown, one_group, [lambda: hooks.resize("embed.weight")]),
    "new, fresh": (with_another_part, one_group, [hooks.fill_missing]),
    "new, zeros": (with_another_part, one_group, [lambda: hooks.fill_missing("zeros")]),
    "new, like": (with_another_part, one_group, [lambda: hooks.fill_missing({"side": "block.q"})]),
    "removed": (without_a_part, one_group, [hooks.drop_unexpected]),
    "regrouped": (copy.deepcopy, several_groups, [hooks.match_names]),
    "options of the file": (
        copy.deepcopy,
        lambda model: [{"params": one_group(model), "lr": 7.0}],
        [hooks.match_names],
    ),
    "wrapped": (copy.deepcopy, wrapped, [hooks.strip_prefix]),
    "moved and moved back": (
        copy.deepcopy,
        one_group,
        [lambda: hooks.rename({"block": "body"}), lambda: hooks.rename({"body": "block"})],
    ),
    "same dtype": (copy.deepcopy, one_group, [lambda: hooks.cast_state("float32")]),
}


@pytest.mark.parametrize(("change", "layout", "given"), CHANGES.values(), ids=CHANGES)
def test_ten_more_steps(module: Any, change: Change, layout: Change, given: Any) -> None:
    model = seeded(Net)
    optimizer = adam(module, model.named_parameters())
    train(model, optimizer)
    changed = change(model)
    resumed = adam(module, layout(changed))
    register(resumed, *(make() for make in given))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = train(model, optimizer, 10, start=3)
    found = train(changed, resumed, 10, start=3)
    if change is grown:  # products over eight rows round in another order
        assert found == pytest.approx(losses, rel=1e-4)
    else:
        assert found == losses


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
