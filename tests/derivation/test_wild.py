"""Conversion functions in the wild style: derived, refused or approximated rightly; see `wild` and `wild_refused`."""

from __future__ import annotations

import pytest
import torch

from optimstate.derivation.derive import Derived, derive
from optimstate.errors import DerivationError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.solve.planner import plan_model
from tests.derivation.wild import EXACT
from tests.derivation.wild_refused import REFUSED

RULES = {
    "renaming_loop": 6, "rotary_then_fused": 3, "rotary_then_grouped": 4, "layers_stacked": 1, "vocabulary_padded": 2,
    "checkpoints_averaged": 1, "read_in_q_k_v": 1, "fix_query_key_value_ordering": 2, "gate_and_up_exchanged": 1,
}  # fmt: skip
"""No more than these, whose functions are what `plan derive` is for."""


def derived(name: str) -> Derived:
    function, shapes = EXACT[name]
    return derive(function, shapes)


@pytest.mark.parametrize("name", EXACT)
def test_the_plan_gives_the_functions_weights(name: str) -> None:
    function, shapes = EXACT[name]
    found = derived(name)
    assert len(list(found.plan.all_rules())) <= RULES.get(name, 9)
    generator = torch.Generator().manual_seed(3)
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    expected = function({key: value.clone() for key, value in weights.items()})
    made = execute_model(plan_model(found.plan, weights).sections["model"], weights)
    assert made.keys() == expected.keys()
    arithmetic = {"checkpoints_averaged", "task_vector", "scale_folded_into_queries", "inflated"}
    for key, value in expected.items():
        if name in arithmetic:
            torch.testing.assert_close(made[key], value)
        else:
            assert torch.equal(made[key], value), key


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_layout_is_refused_by_name(name: str) -> None:
    function, shapes, message = REFUSED[name]
    with pytest.raises(DerivationError, match=message):
        derive(function, shapes)


def test_an_average_is_said_to_be_approximate() -> None:
    (note,) = derived("checkpoints_averaged").notes
    assert note == "means of tensors: 'l.0.w', 'l.1.w', 'l.2.w'; weights are exact, optimizer state is approximate"


def test_a_vocabulary_padded_at_random_keeps_its_old_rows_and_says_so() -> None:
    def padded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([value, torch.randn(14, 8) * 0.02]) for name, value in state.items()}

    found = derive(padded, {"wte": (50, 8), "head": (50, 8)})
    assert found.notes == ("a part of 'wte', 'head' is drawn at random; the plan fills it with the mean of the rest",)
    assert not found.new
    weights = {name: torch.randn(50, 8) for name in ("wte", "head")}
    made = execute_model(plan_model(found.plan, weights).sections["model"], weights)
    assert all(torch.equal(made[name][:50], value) for name, value in weights.items())
    assert made["wte"].shape == (64, 8)


def test_a_buffer_that_holds_truth_values_is_carried() -> None:
    found = derive(
        lambda state: {f"attn.{name}": value for name, value in state.items()},
        {"mask": torch.ones(4, 4, dtype=torch.bool), "ids": torch.arange(4), "w": torch.zeros(4, 4)},
    )
    assert [str(rule) for rule in found.plan.all_rules()] == ["{p**} -> attn.{p**}"]
