"""Conversion functions in the wild style: derived, refused or approximated rightly; see `wild` and `wild_refused`."""

from __future__ import annotations

import pytest
import torch

from optimstate.derivation.derive import Derived, derive
from optimstate.errors import DerivationError
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState
from tests.derivation.wild import EXACT
from tests.derivation.wild_refused import REFUSED

RULES = {
    "renaming_loop": 6, "rotary_then_fused": 3, "rotary_then_grouped": 4, "layers_stacked": 1, "vocabulary_padded": 2,
    "checkpoints_averaged": 1, "read_in_q_k_v": 1, "fix_query_key_value_ordering": 2, "gate_and_up_exchanged": 1,
    "latent_attention": 10,
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
    arithmetic = {
        "checkpoints_averaged",
        "task_vector",
        "scale_folded_into_queries",
        "inflated",
        "pairs_of_layers_averaged",
    }
    for key, value in expected.items():
        if name in arithmetic:
            torch.testing.assert_close(made[key], value)
        else:
            assert torch.equal(made[key], value), key


LAYOUTS = {
    "transpose",
    "permute",
    "reshape",
    "slice",
    "select",
    "flip",
    "concat",
    "stack",
    "split",
    "unstack",
    "repeat",
}


@pytest.mark.parametrize("slot", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("name", EXACT)
def test_a_layout_moves_the_moments_as_it_moves_the_weights(name: str, slot: str) -> None:
    function, shapes = EXACT[name]
    plan = derived(name).plan
    if not {step.KEY for rule in plan.all_rules() for step in rule.operations} <= LAYOUTS:
        return  # of new rows, factors and casts the slots have meanings of their own
    generator = torch.Generator().manual_seed(4)
    moments = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    numbers = range(len(shapes))
    node = {
        "state": {
            number: {"step": torch.tensor(3.0), slot: moments[key]} for number, key in zip(numbers, shapes, strict=True)
        },
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(numbers), "param_names": list(shapes)}],
    }
    found = OptimizerState.from_node(node)
    moved = execute_optimizer(plan_optimizer(plan, found, shapes=shapes).sections["optimizer"], found)
    made = {key: slots[slot] for _, key, slots in moved.parameters() if slots}
    expected = function({key: value.clone() for key, value in moments.items()})
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(made[key], value), key


def test_rows_that_go_nowhere_are_told() -> None:
    found = derive(
        lambda state: {"w": state["w"][:4], "rest": state["w"][6:], "b": state["b"]}, {"w": (8, 8), "b": (3,)}
    )
    assert found.notes == ("a part of 'w' goes nowhere",)
    large = derive(lambda state: {"w": state["w"][:, : 64 * 8]}, {"w": (96, 64 * 9)}, scaled=True)
    assert large.notes[0] == "a part of 'w' goes nowhere"


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
