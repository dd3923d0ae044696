"""The three recipes of torch.optim's documentation, ours in place of theirs: the same bits, without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
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


class Reordered(nn.Module):
    """OneLayerModel with its parameters the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Module()
        self.fc.bias = nn.Parameter(torch.zeros(4))
        self.fc.weight = nn.Parameter(torch.zeros(4, 3))


RECIPES = {
    "duplicate": (OneLayerModel, TwoLayerModel, theirs(DUPLICATED), [hooks.duplicate({"fc": ["fc1", "fc2"]})]),
    "missing": (Model1, ModelBypass, theirs(WITH_BYPASS), [hooks.match_names(), hooks.fill_missing()]),
    "names": (OneLayerModel, Reordered, names_matching, [hooks.match_names()]),
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
    if new is not Reordered:
        assert trained(model2, optimizer2, 10) == trained(twin, reference, 10)


def two_groups(model: nn.Module, *, flipped: bool = False) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    decay = [(name, p) for name, p in named.items() if p.dim() > 1]
    rest = [(name, p) for name, p in named.items() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1, "lr": 0.5}, {"params": rest, "weight_decay": 0.0, "lr": 0.25}]
    return torch.optim.SGD(groups[::-1] if flipped else groups, momentum=0.9)


def test_two_groups_where_the_first_recipe_loses_one() -> None:
    model = OneLayerModel()
    optimizer = two_groups(model)
    trained(model, optimizer)
    broken, ours = two_groups(TwoLayerModel()), two_groups(TwoLayerModel())
    broken.register_load_state_dict_pre_hook(theirs(DUPLICATED))
    broken.load_state_dict(optimizer.state_dict())
    assert len(broken.state_dict()["state"]) == 2  # the biases' momentum is gone, without a word
    ours.register_load_state_dict_pre_hook(hooks.duplicate({"fc": ["fc1", "fc2"]}))
    ours.load_state_dict(optimizer.state_dict())
    made = ours.state_dict()
    saved = optimizer.state_dict()
    assert made["param_groups"][0]["param_names"] == ["fc1.weight", "fc2.weight"]
    assert made["param_groups"][1]["param_names"] == ["fc1.bias", "fc2.bias"]
    for key, source in {0: 0, 1: 0, 2: 1, 3: 1}.items():
        assert torch.equal(made["state"][key]["momentum_buffer"], saved["state"][source]["momentum_buffer"])
    assert [group["lr"] for group in made["param_groups"]] == [0.5, 0.25]


def test_groups_the_other_way_round_where_the_third_recipe_fails() -> None:
    model, model2 = OneLayerModel(), OneLayerModel()
    optimizer = two_groups(model)
    trained(model, optimizer)
    broken, ours = two_groups(model2, flipped=True), two_groups(model2, flipped=True)
    broken.register_load_state_dict_pre_hook(names_matching)
    with pytest.raises(ValueError, match="is not in list"):
        broken.load_state_dict(optimizer.state_dict())
    ours.register_load_state_dict_pre_hook(hooks.match_names())
    ours.load_state_dict(optimizer.state_dict())
    by_name = {name: ours.state[p]["momentum_buffer"] for name, p in model2.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(by_name[name], optimizer.state[p]["momentum_buffer"])
    assert [group["lr"] for group in ours.param_groups] == [0.25, 0.5]
