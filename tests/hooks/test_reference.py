"""The three recipes of torch.optim's documentation, ours in place of theirs: the same bits, without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import Plan, hooks
from tests import oracle
from tests.hooks.recipes import (
    DUPLICATED,
    WITH_BYPASS,
    Model1,
    ModelBypass,
    OneLayerModel,
    TwoLayerModel,
    names_matching,
    theirs,
)


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Reordered(Ordered):
    """Its parameters in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self._modules.pop("a")


DUPLICATE = Plan.from_options(duplicate=["fc.{p}=fc1.{p},fc2.{p}"])
BYPASS = Plan.from_options(fresh=["bypass.weight"])
# What each recipe is for, and what does the same: a hook for it, and a plan.
RECIPES = {
    "duplicate": (OneLayerModel, TwoLayerModel, theirs(DUPLICATED), [hooks.duplicate({"fc": ["fc1", "fc2"]})]),
    "duplicate by a plan": (OneLayerModel, TwoLayerModel, theirs(DUPLICATED), [hooks.migrate(DUPLICATE)]),
    "missing": (Model1, ModelBypass, theirs(WITH_BYPASS), [hooks.match_names(), hooks.fill_missing()]),
    "missing by a plan": (Model1, ModelBypass, theirs(WITH_BYPASS), [hooks.migrate(BYPASS)]),
    "names": (Ordered, Reordered, names_matching, [hooks.match_names()]),
    "names by a plan": (Ordered, Reordered, names_matching, [hooks.migrate(Plan())]),
}
OPTIMIZERS = {
    "SGD": lambda module, params: module.SGD(params, lr=0.01, momentum=0.9),
    "AdamW": lambda module, params: module.AdamW(params, lr=0.01),
}


def modules() -> list[Any]:
    import optimstate.optim

    return [torch.optim, optimstate.optim]


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """Losses of some steps on the same data."""
    generator = torch.Generator().manual_seed(3)
    losses = []
    width = next(p for n, p in module.named_parameters() if n.endswith("weight")).shape[1]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(torch.randn(8, width, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("old", "new", "recipe", "ours"), RECIPES.values(), ids=RECIPES)
def test_the_recipes_of_the_documentation(
    old: Any, new: Any, recipe: Any, ours: Any, make: Any, module: Any, tmp_path: Path
) -> None:
    model = old()
    optimizer = make(module, model.named_parameters())
    trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    model2, twin = new(), new()
    twin.load_state_dict(model2.state_dict())
    optimizer2, reference = make(module, model2.named_parameters()), make(module, twin.named_parameters())
    for hook in ours:
        optimizer2.register_load_state_dict_pre_hook(hook)
    optimizer2.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    reference.register_load_state_dict_pre_hook(recipe)
    reference.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert oracle.differences(reference.state_dict(), optimizer2.state_dict()) == []
    assert optimizer2.state_dict()["state"]
    assert trained(model2, optimizer2, 10) == trained(twin, reference, 10)


def two_groups(model: nn.Module, *, flipped: bool = False) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    decay = [(name, p) for name, p in named.items() if p.dim() > 1]
    rest = [(name, p) for name, p in named.items() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1, "lr": 0.5}, {"params": rest, "weight_decay": 0.0, "lr": 0.25}]
    return torch.optim.SGD(groups[::-1] if flipped else groups, momentum=0.9)


@pytest.mark.parametrize("hook", [hooks.duplicate({"fc": ["fc1", "fc2"]}), hooks.migrate(DUPLICATE)])
def test_two_groups_where_the_first_recipe_loses_one(hook: Any) -> None:
    model = OneLayerModel()
    optimizer = two_groups(model)
    trained(model, optimizer)
    broken, ours = two_groups(TwoLayerModel()), two_groups(TwoLayerModel())
    broken.register_load_state_dict_pre_hook(theirs(DUPLICATED))
    broken.load_state_dict(optimizer.state_dict())
    assert len(broken.state_dict()["state"]) == 2  # the biases' momentum is gone, without a word
    ours.register_load_state_dict_pre_hook(hook)
    ours.load_state_dict(optimizer.state_dict())
    made = ours.state_dict()
    saved = optimizer.state_dict()
    assert made["param_groups"][0]["param_names"] == ["fc1.weight", "fc2.weight"]
    assert made["param_groups"][1]["param_names"] == ["fc1.bias", "fc2.bias"]
    for key, source in {0: 0, 1: 0, 2: 1, 3: 1}.items():
        assert torch.equal(made["state"][key]["momentum_buffer"], saved["state"][source]["momentum_buffer"])
    assert [group["lr"] for group in made["param_groups"]] == [0.5, 0.25]


@pytest.mark.parametrize("added", [[hooks.match_names(), hooks.fill_missing()], [hooks.migrate(BYPASS)]])
def test_a_new_parameter_in_one_of_two_groups_is_fresh(added: list[Any]) -> None:
    model, grown = Model1(), ModelBypass()
    optimizer, ours = two_groups(model), two_groups(grown)
    trained(model, optimizer)
    for hook in added:
        ours.register_load_state_dict_pre_hook(hook)
    ours.load_state_dict(optimizer.state_dict())
    assert grown.bypass.weight not in ours.state
    for name, p in model.named_parameters():
        assert torch.equal(
            ours.state[grown.get_parameter(name)]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]
        )
    assert [(group["lr"], group["weight_decay"]) for group in ours.param_groups] == [(0.5, 0.1), (0.25, 0.0)]


@pytest.mark.parametrize("hook", [hooks.match_names(), hooks.migrate(Plan())])
def test_groups_the_other_way_round_where_the_third_recipe_fails(hook: Any) -> None:
    model, model2 = OneLayerModel(), OneLayerModel()
    optimizer = two_groups(model)
    trained(model, optimizer)
    broken, ours = two_groups(model2, flipped=True), two_groups(model2, flipped=True)
    broken.register_load_state_dict_pre_hook(names_matching)
    with pytest.raises(ValueError, match="is not in list"):
        broken.load_state_dict(optimizer.state_dict())
    ours.register_load_state_dict_pre_hook(hook)
    ours.load_state_dict(optimizer.state_dict())
    by_name = {name: ours.state[p]["momentum_buffer"] for name, p in model2.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(by_name[name], optimizer.state[p]["momentum_buffer"])
    assert [group["lr"] for group in ours.param_groups] == [0.25, 0.5]
