"""Operations on values and rows: select, mean, fill and zero, what they lose, and what undoes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimstate.errors import MigrationError, PlanError, PlanSyntaxError
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.inverse import inverse
from optimstate.plan.solve.migration import Target
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.compute import to_torch
from tests.plan.lazy import lazy_tree

SHAPE = (5, 3)


def rule(text: str, name: str = "w") -> Plan:
    return Plan.from_toml(f'[[rule]]\nfrom = "{name}"\nto = "{name}"\n{text}\n')


def state(**parameters: torch.Tensor) -> OptimizerState:
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(value.clone()) for name, value in parameters.items()})
    optimizer = torch.optim.AdamW(model.named_parameters())
    for _ in range(3):
        sum(((p + i) ** 3).sum() for i, p in enumerate(model.parameters(), 1)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return OptimizerState.from_node(optimizer.state_dict())


def slots(made: OptimizerState) -> dict[str, dict[str, Any]]:
    return {str(name): dict(found or {}) for _, name, found in made.parameters()}


def moved(plan: Plan, old: OptimizerState) -> tuple[dict[str, dict[str, Any]], Any]:
    """The slots as live tensors, having seen that lazy ones are the same; and the migration's section."""
    migration = plan_optimizer(plan, old).sections["optimizer"]
    made = slots(execute_optimizer(migration, old))
    lazy_old = OptimizerState.from_node(lazy_tree(old.to_node()))
    lazy = slots(execute_optimizer(plan_optimizer(plan, lazy_old).sections["optimizer"], lazy_old))
    for name, found in made.items():
        for slot, value in found.items():
            assert torch.equal(to_torch(lazy[name][slot]), value), (name, slot)
    return made, migration


@given(st.integers(0, 1), st.data())
def test_select_is_what_torch_selects(dim: int, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, SHAPE[dim] - 1), min_size=1, max_size=8))
    old = state(w=torch.randn(SHAPE))
    made, section = moved(rule(f"select = {{ dim = {dim}, index = {index} }}"), old)
    at = torch.tensor(index)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(made["w"][slot], slots(old)["w"][slot].index_select(dim, at))
    lost = SHAPE[dim] - len(set(index))
    (move,) = section.moves
    for path, outcome in move.slots.items():
        assert outcome.level == ("approximate" if lost and path != ("step",) else "exact")
        assert (f"{lost} of {SHAPE[dim]} rows of dimension {dim} are lost" in outcome.reason) == bool(
            lost and path != ("step",)
        )


@given(st.permutations(range(5)))
def test_a_selection_that_loses_nothing_is_undone(index: list[int]) -> None:
    plan = rule(f"select = {{ dim = 0, index = {index} }}")
    weight = torch.randn(SHAPE)
    there = execute_model(plan_model(plan, {"w": weight}).sections["model"], {"w": weight})
    back = inverse(plan, {"w": SHAPE})
    assert torch.equal(execute_model(plan_model(back, there).sections["model"], there)["w"], weight)


def test_a_selection_that_loses_rows_is_not_undone() -> None:
    with pytest.raises(PlanError, match="loses what it leaves out"):
        inverse(rule("select = { dim = 0, index = [0, 1] }"), {"w": SHAPE})


def test_an_index_is_read_from_a_file_beside_the_plan(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("4 0\n2\n")
    (tmp_path / "rows.json").write_text("[4, 0, 2]")
    plans = []
    for name in ("rows.txt", "rows.json"):
        (tmp_path / "plan.toml").write_text(
            f'[[rule]]\nfrom = "w"\nto = "w"\nselect = {{ dim = 0, index = "{name}" }}\n'
        )
        plans.append(Plan.from_file(tmp_path / "plan.toml"))
    assert plans[0] == plans[1] == rule("select = { dim = 0, index = [4, 0, 2] }")
    assert Plan.from_toml(plans[0].to_toml()) == plans[0]
    (tmp_path / "rows.txt").write_text("4 zero\n")
    (tmp_path / "plan.toml").write_text('[[rule]]\nfrom = "w"\nto = "w"\nselect = { dim = 0, index = "rows.txt" }\n')
    with pytest.raises(PlanSyntaxError, match=r"plan\.toml:4: rule 1: select: the index cannot be read"):
        Plan.from_file(tmp_path / "plan.toml")


def test_an_index_that_is_not_there_is_refused() -> None:
    with pytest.raises(MigrationError, match="does not have the index 5") as error:
        plan_model(rule("select = { dim = 0, index = [0, 5] }"), {"w": torch.zeros(SHAPE)})
    assert error.value.problems[0].kind == "operation"


def test_mean_over_a_dimension_and_over_parameters() -> None:
    old = state(a=torch.randn(SHAPE), b=torch.randn(SHAPE))
    made, section = moved(Plan.from_toml('[[rule]]\nfrom = "{x=a|b}"\nto = "m"\nmean = 0\n'), old)
    for slot in ("exp_avg", "exp_avg_sq"):
        sources = torch.stack([slots(old)[name][slot] for name in "ab"])
        assert torch.equal(made["m"][slot], sources.mean(0))
        assert section.moves[0].slots[slot,].level == "approximate"
    assert (made["m"]["exp_avg_sq"] > 0).all()
    alone, _ = moved(Plan.from_toml('[[rule]]\nfrom = "a"\nto = "a"\nmean = 1\n'), old)
    assert torch.equal(alone["a"]["exp_avg"], slots(old)["a"]["exp_avg"].mean(1))
    assert alone["b"].keys() == slots(old)["b"].keys()


@pytest.mark.parametrize("text", ["mean = 2", "mean = -3"])
def test_a_mean_over_no_dimension_is_refused(text: str) -> None:
    with pytest.raises(MigrationError, match="there is no dimension"):
        plan_model(rule(text), {"w": torch.zeros(SHAPE)})


def test_integers_have_no_mean() -> None:
    with pytest.raises(MigrationError, match="int64 has no mean"):
        plan_model(rule("mean = 0"), {"w": torch.zeros(SHAPE, dtype=torch.int64)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64])
@pytest.mark.parametrize("text", ["fill = 2", 'fill = { param = 2, exp_avg = "zeros" }'])
def test_a_value_fills_every_place_in_any_dtype(dtype: torch.dtype, text: str) -> None:
    weight = torch.arange(15).reshape(SHAPE).to(dtype)
    migration = plan_model(rule(text), {"w": weight}).sections["model"]
    assert torch.equal(execute_model(migration, {"w": weight})["w"], torch.full_like(weight, 2))
    lazy = lazy_tree({"w": weight})
    assert torch.equal(
        to_torch(execute_model(plan_model(rule(text), lazy).sections["model"], lazy)["w"]), torch.full_like(weight, 2)
    )
    assert migration.moves[0].value is not None
    assert migration.moves[0].value.level != "exact"


@pytest.mark.parametrize("text", ["fill = 0.0", "scale = 0", "scale = { param = 0 }", 'fill = { param = "zeros" }'])
def test_zero_leaves_the_state_behind(text: str) -> None:
    made, section = moved(rule(text), state(w=torch.randn(SHAPE)))
    assert made["w"] == {}
    assert {outcome.level for outcome in section.moves[0].slots.values()} == {"fresh"}
    weight = torch.randn(SHAPE)
    assert not execute_model(plan_model(rule(text), {"w": weight}).sections["model"], {"w": weight})["w"].any()


def test_a_table_with_slots_keeps_the_state_with_these_values() -> None:
    old = state(w=torch.randn(SHAPE))
    made, _ = moved(rule('fill = { param = 1.0, exp_avg = "zeros", exp_avg_sq = "mean" }'), old)
    before = slots(old)["w"]
    assert not made["w"]["exp_avg"].any()
    assert torch.allclose(made["w"]["exp_avg_sq"], before["exp_avg_sq"].mean().expand(SHAPE))
    assert torch.equal(made["w"]["step"], before["step"])


@pytest.mark.parametrize("text", ["fill = 0.0", "mean = 0", "scale = 0"])
def test_what_replaces_values_is_not_undone(text: str) -> None:
    with pytest.raises(PlanError):
        inverse(rule(text), {"w": SHAPE})


@pytest.mark.parametrize(
    "text",
    ['fill = "wrap"', "select = 3", "select = { dim = 0, index = [-1] }", "mean = true", 'fill = { exp_avg = "live" }'],
)
def test_values_of_another_form_are_told(text: str) -> None:
    with pytest.raises(PlanSyntaxError, match="For example"):
        rule(text)


def test_rows_lost_in_a_stage_are_told_and_rows_that_stay_are_not() -> None:
    old = state(w=torch.randn(SHAPE))
    cut = '[[rule]]\nfrom = "w"\nto = ["w", "rest"]\nsplit = { dim = 0, sizes = [3, 2] }\n'
    _, section = moved(Plan.from_toml(cut), old)
    assert {outcome.level for move in section.moves for outcome in move.slots.values()} == {"exact"}
    _, section = moved(Plan.from_toml(cut + '[[stage]]\n[[stage.rule]]\ndrop = "rest"\n'), old)
    assert "2 of 5 rows of dimension 0 are lost" in section.moves[0].slots["exp_avg",].reason


# --- slots that are weights -----------------------------------------------------------------------------------------


def schedule_free(weight: torch.Tensor) -> OptimizerState:
    """What schedule-free SGD keeps, with a master beside it as mixed-precision training has."""
    z = weight * 3
    group = {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_sum": 1.0,
        "r": 0.0,
        "lr_max": 0.1,
        "params": [0],
        "param_names": ["w"],
    }
    return OptimizerState.from_node({"state": {0: {"z": z, "fp32_param": weight.double()}}, "param_groups": [group]})


@pytest.mark.parametrize(
    ("fill", "rows"),
    [
        ('"mean"', lambda w: w.mean(0, keepdim=True).expand(2, -1)),
        ("0.5", lambda w: torch.full((2, 3), 0.5, dtype=w.dtype)),
        ('"wrap"', lambda w: w[:2]),
        ('{ param = "mean" }', lambda w: w.mean(0, keepdim=True).expand(2, -1)),
        ('{ param = "mean", z = "zeros", fp32_param = "zeros" }', lambda w: torch.zeros(2, 3, dtype=w.dtype)),
    ],
)
def test_slots_that_are_weights_are_filled_as_the_parameter(fill: str, rows: Any) -> None:
    weight = torch.randn(SHAPE)
    made, section = moved(rule(f"resize = {{ dim = 0, size = 7, fill = {fill} }}"), schedule_free(weight))
    assert {outcome.kind for outcome in section.moves[0].slots.values()} == {"weight"}
    for slot, old in (("z", weight * 3), ("fp32_param", weight.double())):
        assert torch.allclose(made["w"][slot], torch.cat([old, rows(old)]))


def test_weights_are_scaled_and_cast_as_the_parameter_and_masters_keep_their_precision() -> None:
    weight = torch.randn(SHAPE)
    made, _ = moved(
        rule('ops = [{ scale = { param = 0.5, grad = 2.0 } }, { cast = "bfloat16" }]'), schedule_free(weight)
    )
    assert torch.equal(made["w"]["z"], (weight * 3 * 0.5).bfloat16())
    assert torch.equal(made["w"]["fp32_param"], weight.double() * 0.5)


def test_a_cast_that_rounds_is_not_exact() -> None:
    for before, after, outcome in (
        (torch.bfloat16, "float16", "approximate"),
        (torch.float16, "bfloat16", "approximate"),
        (torch.bfloat16, "float32", "exact"),
        (torch.float32, "float64", "exact"),
        (torch.float32, "float16", "approximate"),
    ):
        migration = plan_model(rule(f'cast = "{after}"'), {"w": torch.zeros(SHAPE, dtype=before)})
        assert migration.sections["model"].moves[0].value.level == outcome, (before, after)  # type: ignore[union-attr]


@pytest.mark.parametrize(("degree", "filled"), [(0, "zeros"), (1, "zeros"), (2, "mean"), (3, "zeros"), (4, "mean")])
def test_new_rows_of_a_slot_are_filled_by_its_degree(degree: int, filled: str) -> None:
    text = f'[slots]\nhidden = {{ kind = "like_param", degree = {degree} }}\n'
    text += '[[rule]]\nfrom = "w"\nto = "w"\nresize = { dim = 0, size = 7 }\n'
    hidden = torch.randn(SHAPE)
    group = {"params": [0], "param_names": ["w"], "lr": 0.1}
    old = OptimizerState.from_node({"state": {0: {"hidden": hidden}}, "param_groups": [group]})
    made, _ = moved(Plan.from_toml(text), old)
    wanted = hidden.mean(0).expand(2, 3) if filled == "mean" else torch.zeros(2, 3)
    assert torch.allclose(made["w"]["hidden"][5:], wanted)


# --- the live model's values ------------------------------------------------------------------------------------------


def grown(old: torch.Tensor, text: str, own: torch.Tensor) -> torch.Tensor:
    target = Target.of_names({"w": tuple(own.shape)}, {"w": own})
    moves = plan_model(rule(text), {"w": old}, target=target).sections["model"]
    return execute_model(moves, {"w": old}, live={"w": own})["w"]  # type: ignore[no-any-return]


def test_new_rows_hold_the_live_values_in_every_layout() -> None:
    old, own = torch.randn(2, 3), torch.randn(5, 4)
    both = '{ resize = { dim = 0, size = 4, fill = "live" } }, { resize = { dim = 1, size = 5, fill = "live" } }'
    made = grown(old, f"ops = [{both}, {{ transpose = true }}]", own)
    wanted = own.clone()
    wanted[:3, :2] = old.t()
    assert torch.equal(made, wanted)
    half = grown(old, 'ops = [{ scale = 0.5 }, { resize = { dim = 0, size = 4, fill = "live" } }]', own[:4, :3])
    assert torch.equal(half[:2], old * 0.5)
    assert torch.equal(half[2:], own[2:4, :3])
    assert torch.equal(grown(old, 'fill = "live"', own[:2, :3]), own[:2, :3])


@pytest.mark.parametrize("text", ['resize = { dim = 0, size = 7, fill = "live" }', 'fill = "live"'])
def test_without_a_live_model_its_values_are_refused(text: str) -> None:
    with pytest.raises(MigrationError) as error:
        plan_model(rule(text), {"w": torch.zeros(SHAPE)})
    assert {problem.kind for problem in error.value.problems} == {"unreached"}


def test_slots_are_filled_as_if_nothing_were_said_and_weights_have_the_live_values() -> None:
    old = state(w=torch.randn(SHAPE))
    live = rule('resize = { dim = 0, size = 7, fill = "live" }')
    made, _ = moved(live, old)
    plain, _ = moved(rule("resize = { dim = 0, size = 7 }"), old)
    assert all(torch.equal(made["w"][slot], plain["w"][slot]) for slot in made["w"])
    free, own = schedule_free(torch.randn(SHAPE)), torch.randn(7, 3)
    target = Target((("w",),), (), {"w": (7, 3)}, {"w": own})
    moves = plan_optimizer(live, free, target=target).sections["optimizer"]
    z = slots(execute_optimizer(moves, free, live={"w": own}))["w"]["z"]
    assert torch.equal(z, torch.cat([slots(free)["w"]["z"], own[5:]]))
