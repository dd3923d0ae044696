"""Rows by an index, backwards, averages and shifts: what becomes of every kind of slot, and what undoes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optimstate
from optimstate.errors import MigrationError, PlanError, PlanSyntaxError
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rows import digest_of
from optimstate.plan.solve.inverse import inverse
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState
from tests.plan.test_values import moved, rule, slots, state

SHAPE = (12, 3)


def weights(plan: Plan, **tensors: torch.Tensor) -> dict[str, Any]:
    return execute_model(plan_model(plan, tensors).sections["model"], tensors)


@given(st.permutations(range(12)), st.sampled_from(["gather", "select"]))
def test_any_order_of_rows_and_its_inverse(index: list[int], key: str) -> None:
    plan = rule(f"{key} = {{ dim = 0, index = {index} }}")
    old = state(w=torch.randn(SHAPE))
    made, section = moved(plan, old)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(made["w"][slot], slots(old)["w"][slot][torch.tensor(index)])
    assert {outcome.level for move in section.moves for outcome in move.slots.values()} == {"exact"}
    weight = torch.randn(SHAPE)
    assert torch.equal(weights(inverse(plan, {"w": SHAPE}), **weights(plan, w=weight))["w"], weight)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=40))
def test_rows_that_come_several_times_or_never(index: list[int]) -> None:
    plan = rule(f"gather = {{ dim = 0, index = {index} }}")
    old = state(w=torch.randn(SHAPE))
    made, section = moved(plan, old)
    assert torch.equal(made["w"]["exp_avg"], slots(old)["w"]["exp_avg"][torch.tensor(index)])
    level = "exact" if len(set(index)) == 12 else "approximate"
    (move,) = section.moves
    assert move.slots["exp_avg",].level == level


def test_an_index_file_has_a_digest(tmp_path: Path) -> None:
    index = [5, 3, 3, 0]
    (tmp_path / "rows.json").write_text(json.dumps(index))
    text = '[[rule]]\nfrom = "w"\nto = "w"\ngather = { dim = 0, index = "rows.json", digest = "%s" }\n'
    (tmp_path / "plan.toml").write_text(text % digest_of(index))
    plan = Plan.from_file(tmp_path / "plan.toml")
    assert f'index = "rows.json", digest = "{digest_of(index)}"' in plan.to_toml()
    weight = torch.randn(SHAPE)
    assert torch.equal(weights(plan, w=weight)["w"], weight[index])
    (tmp_path / "rows.json").write_text("[5, 3, 0, 3]")
    with pytest.raises(PlanSyntaxError, match=r"plan\.toml:4: rule 1: gather: the index in rows\.json has the digest"):
        Plan.from_file(tmp_path / "plan.toml")
    with pytest.raises(MigrationError, match="does not have the index 12"):
        weights(rule("gather = { dim = 0, index = [12] }"), w=weight)


@pytest.mark.parametrize("dims", ["0", "1", "-1", "[0, 1]"])
def test_flip_is_what_torch_flips(dims: str) -> None:
    plan = rule(f"flip = {dims}")
    old = state(w=torch.randn(SHAPE))
    made, section = moved(plan, old)
    asked = json.loads(dims) if "[" in dims else [int(dims)]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(made["w"][slot], slots(old)["w"][slot].flip(asked))
    assert {outcome.level for move in section.moves for outcome in move.slots.values()} == {"exact"}
    weight = torch.randn(SHAPE)
    assert torch.equal(weights(inverse(plan, {"w": SHAPE}), **weights(plan, w=weight))["w"], weight)


def test_long_rows_are_not_read_and_short_ones_in_every_dimension(tmp_path: Path) -> None:
    wide, cube = torch.randn(20, 20_000), torch.randn(3, 11, 5)
    index = [10, 0, 7, 7, 2, 9, 1, 8, 3, 5, 4]
    torch.save({"model": {"wide.weight": wide, "cube.weight": cube}}, tmp_path / "old.pt")
    plan = Plan.from_toml(
        f'[[rule]]\nfrom = "wide.weight"\nto = "wide.weight"\ngather = {{ dim = 0, index = {index} }}\n'
        f'[[rule]]\nfrom = "cube.weight"\nto = "cube.weight"\ngather = {{ dim = 1, index = {index} }}\n'
    )
    optimstate.remap(tmp_path / "old.pt", tmp_path / "new.pt", plan)
    found = torch.load(tmp_path / "new.pt")["model"]
    assert torch.equal(found["wide.weight"], wide[index])
    assert torch.equal(found["cube.weight"], cube[:, index])


def test_averages_of_weights_and_of_every_slot() -> None:
    old = state(a=torch.randn(SHAPE), b=torch.randn(SHAPE), c=torch.randn(SHAPE))
    text = '[[rule]]\nfrom = ["a", "b", "c"]\nto = "m"\naverage = [0.5, 0.25, 0.25]\n'
    made, section = moved(Plan.from_toml(text), old)
    for slot in ("exp_avg", "exp_avg_sq"):
        parts = [slots(old)[name][slot] for name in "abc"]
        torch.testing.assert_close(made["m"][slot], parts[0] * 0.5 + parts[1] * 0.25 + parts[2] * 0.25)
    assert made["m"]["step"] == 3
    (move,) = section.moves
    assert move.slots["exp_avg",].level == "approximate"
    assert "the average of 3 states: no run has had it" in move.slots["exp_avg",].reason
    first = (made["m"]["exp_avg"] / made["m"]["exp_avg_sq"].sqrt()).abs()
    largest = torch.stack([(s["exp_avg"] / s["exp_avg_sq"].sqrt()).abs() for s in slots(old).values()]).amax(0)
    assert bool((first <= largest + 1e-5).all())  # what the weights of a whole promise
    with pytest.raises(PlanError, match="an average does not keep what it is made of"):
        inverse(Plan.from_toml(text), dict.fromkeys("abc", SHAPE))


def test_other_weights_leave_no_state() -> None:
    old = state(a=torch.randn(SHAPE), b=torch.randn(SHAPE))
    plan = Plan.from_toml('[[rule]]\nfrom = ["a", "b"]\nto = "m"\naverage = [1.0, -0.5]\n')
    made, section = moved(plan, old)
    assert made["m"] == {}
    (move,) = section.moves
    assert {outcome.level for outcome in move.slots.values()} == {"fresh"}
    a, b = torch.randn(SHAPE), torch.randn(SHAPE)
    torch.testing.assert_close(weights(plan, a=a, b=b)["m"], a - b / 2)
    with pytest.raises(MigrationError, match="average has 2 weights for 3 tensors"):
        weights(Plan.from_toml('[[rule]]\nfrom = "{x=a|b|c}"\nto = "m"\naverage = [0.5, 0.5]\n'), a=a, b=b, c=a)
    with pytest.raises(MigrationError, match="average: the shapes"):
        weights(plan, a=a, b=b[:3])


def test_factored_state_is_averaged_flipped_and_gathered() -> None:
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(SHAPE)) for name in "ab"})
    optimizer = torch.optim.Adafactor(model.named_parameters())
    sum((p**3).sum() for p in model.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    old = OptimizerState.from_node(optimizer.state_dict())
    average = Plan.from_toml('[[rule]]\nfrom = "{x=a|b}"\nto = "m"\naverage = [0.5, 0.5]\n')
    made = slots(execute_optimizer(plan_optimizer(average, old).sections["optimizer"], old))
    for slot in ("row_var", "col_var"):
        torch.testing.assert_close(made["m"][slot], (slots(old)["a"][slot] + slots(old)["b"][slot]) / 2)
    index = [3, 0, 1, 2, 11, 10, 9, 8, 7, 6, 5, 4]
    for text, rows in ((f"gather = {{ dim = 0, index = {index} }}", index), ("flip = 0", list(range(11, -1, -1)))):
        made = slots(execute_optimizer(plan_optimizer(rule(text, "a"), old).sections["optimizer"], old))
        torch.testing.assert_close(made["a"]["row_var"], slots(old)["a"]["row_var"][rows])
        torch.testing.assert_close(made["a"]["col_var"], slots(old)["a"]["col_var"])


def test_a_shift_moves_weights_and_slots_that_hold_weights() -> None:
    old = state(w=torch.randn(SHAPE))
    plan = rule("shift = 1.0")
    made, _ = moved(plan, old)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(made["w"][slot], slots(old)["w"][slot])
    weight = torch.randn(SHAPE)
    assert torch.equal(weights(plan, w=weight)["w"], weight + 1)
    assert inverse(plan, {"w": SHAPE}) == rule("shift = { param = -1.0 }")
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.ASGD([("w", parameter)])
    parameter.grad = torch.randn(SHAPE)
    optimizer.step()
    averaged = OptimizerState.from_node(optimizer.state_dict())
    made, _ = moved(plan, averaged)
    assert torch.equal(made["w"]["ax"], slots(averaged)["w"]["ax"] + 1)


def test_a_rule_for_one_section_alone(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    text = '[[rule]]\nfrom = "weight"\nto = "kernel"\nonly = "%s"\ntranspose = true\n'
    for only in ("model", "optimizer"):
        plan = Plan.from_toml(text % only)
        optimstate.remap(tmp_path / "old.pt", tmp_path / f"{only}.pt", plan)
        found = torch.load(tmp_path / f"{only}.pt")
        assert ("kernel" in found["model"]) == (only == "model")
        assert ("kernel" in found["optimizer"]["param_groups"][0]["param_names"]) == (only == "optimizer")
        assert Plan.from_toml(plan.to_toml()) == plan
        optimstate.remap(tmp_path / f"{only}.pt", tmp_path / f"{only}-back.pt", inverse(plan, {"weight": (3, 3)}))
        assert optimstate.diff(tmp_path / "old.pt", tmp_path / f"{only}-back.pt").equal
    with pytest.raises(MigrationError, match="`only` names no section: there are 'model model'"):
        optimstate.remap(tmp_path / "old.pt", tmp_path / "no.pt", Plan.from_toml(text % "ema"))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    report = optimstate.remap(tmp_path / "optimizer.pt", tmp_path / "kept.pt", Plan.from_toml(text % "model"))
    assert "is for another section" in str(report)
