"""The reference's three hooks, and the plans that do the same; then with several groups, where the hooks fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimstate.plan.language.plan import Plan
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
from tests.plan.training import batches, migrate, slots_by_name, train


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(3, 3)
        self.a = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


DUPLICATE = Plan.from_toml(
    """
    [[rule]]
    from = "fc.{p}"
    to = "{m=fc1|fc2}.{p}"
    """
)
BYPASS = Plan.from_toml(
    """
    [[rule]]
    fresh = "bypass.weight"
    """
)
NAMES = Plan()


CASES = {
    "fc to fc1 and fc2": (OneLayerModel, TwoLayerModel, DUPLICATE, DUPLICATED, 3),
    "a bypass added": (Model1, ModelBypass, BYPASS, WITH_BYPASS, 5),
    "names matched": (Ordered, Reordered, NAMES, {}, 3),
}


def trained(make: type[nn.Module], width: int, kind: Any, groups: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = make()
    optimizer = kind(groups(model) if groups else model.named_parameters(), lr=0.01)
    train(model, optimizer, batches(5, width))
    return model, optimizer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), torch.optim.Adam])
def test_a_plan_of_at_most_six_lines_equals_the_reference_bit_for_bit(case: str, kind: Any) -> None:
    old_type, new_type, plan, lookup, width = CASES[case]
    assert len(plan.to_toml().splitlines()) <= 6
    old, optimizer = trained(old_type, width, kind)
    new, reference = new_type(), new_type()
    ours, copying = kind(new.named_parameters(), lr=0.5), kind(reference.named_parameters(), lr=0.5)
    copying.register_load_state_dict_pre_hook(theirs(lookup) if lookup else names_matching)
    copying.load_state_dict(optimizer.state_dict())
    migrate(plan, old, optimizer, new, ours)
    mine, expected = slots_by_name(new, ours), slots_by_name(reference, copying)
    assert mine.keys() == expected.keys()
    for name, slots in expected.items():
        assert mine[name].keys() == slots.keys()
        for slot, value in slots.items():
            assert torch.equal(mine[name][slot], value), (name, slot)
    assert ours.state_dict()["param_groups"] == copying.state_dict()["param_groups"]


def weights_and_biases(model: nn.Module) -> list[dict[str, Any]]:
    weights = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


@pytest.mark.parametrize("case", CASES)
def test_several_groups_where_the_reference_fails(case: str) -> None:
    old_type, new_type, plan, lookup, width = CASES[case]
    old, optimizer = trained(old_type, width, torch.optim.AdamW, weights_and_biases)
    before = slots_by_name(old, optimizer)
    new = new_type()
    ours = torch.optim.AdamW(weights_and_biases(new), lr=0.5)
    migrate(plan, old, optimizer, new, ours)
    after = slots_by_name(new, ours)
    for name, _ in new.named_parameters():
        source = lookup.get(name, name)
        if source is None:
            assert name not in after
            continue
        for slot, value in before[source].items():
            assert torch.equal(after[name][slot], value)
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in ours.param_groups] == [0.01, 0.01]
    train(new, ours, batches(2, width))
