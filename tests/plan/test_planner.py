"""What the planner refuses, all at once, and what the policies allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.apply.explain import explained, summary
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.plan.solve.migration import Target
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "fused": None}
OPTIONS |= {"decoupled_weight_decay": True}


def adamw(shapes: dict[str, tuple[int, ...]], steps: dict[str, float] | None = None, **more: Any) -> OptimizerState:
    state = {
        index: {
            "step": torch.tensor((steps or {}).get(name, 5.0)),
            "exp_avg": torch.randn(shape),
            "exp_avg_sq": torch.rand(shape),
            **{slot: make(shape) for slot, make in more.items()},
        }
        for index, (name, shape) in enumerate(shapes.items())
    }
    group = {**OPTIONS, "params": list(range(len(shapes))), "param_names": list(shapes)}
    return OptimizerState.from_node({"state": state, "param_groups": [group]})


def planned(text: str, state: OptimizerState, **known: Any) -> Any:
    return plan_optimizer(Plan.from_toml(text), state, **known).sections["optimizer"]


def refused(text: str, state: OptimizerState, **known: Any) -> str:
    with pytest.raises(MigrationError) as raised:
        planned(text, state, **known)
    return str(raised.value)


def test_every_problem_is_reported_at_once() -> None:
    state = adamw({"a.weight": (2, 3), "b.weight": (2, 3), "old": (4,)})
    target = Target.of_names({"x.weight": (2, 3), "a.weight": (3, 2), "olds": (4,), "new": (1,)})
    said = refused('[[rule]]\nfrom = "c.{p}"\nto = "d.{p}"\n', state, target=target)
    for part in (
        "rule 1 (c.{p} -> d.{p}): 'c.{p}' matches none of 3 names",
        "nothing fills 'x.weight' (is it 'b.weight' of its shape [2, 3]?)",
        "nothing fills 'olds' (is it 'old' of its shape [4]?)",
        "nothing fills 'new'",
        "'b.weight' is not in the target (is it 'x.weight' of its shape [2, 3]?)",
        "'a.weight': the checkpoint gives the shape [2, 3], the target has [3, 2]: permute it",
    ):
        assert part in said


@pytest.mark.parametrize(("pattern", "wider"), [("*", "**"), ("{p}", "{p**}"), ("block.*.{q}", "block.**.{q**}")])
def test_a_wildcard_that_is_too_narrow_says_what_would_match(pattern: str, wider: str) -> None:
    state = adamw({"block.0.fc.weight": (2,)})
    assert f"'{wider}' stands for any number of them" in refused(f'[[rule]]\ndrop = "{pattern}"\n', state)
    assert "stands for" not in refused('[[rule]]\ndrop = "z.*"\n', state)


def test_policies_relax_what_they_name() -> None:
    state = adamw({"a": (2,), "b": (2,)})
    target = Target.of_names({"a": (2,), "c": (3,)})
    text = '[policy]\nmissing = "fresh"\nunexpected = "drop"\nunused = "ignore"\n[[rule]]\nfrom = "z"\nto = "y"\n'
    section = planned(text, state, target=target)
    assert [(move.target, move.sources) for move in section.moves] == [("a", ("a",)), ("c", ())]
    assert section.dropped == (("b", None),)
    assert list(execute_optimizer(section, state).state) == [0]


def test_two_producers_of_one_name() -> None:
    state = adamw({"a": (2,), "b": (2,), "c": (2,)})
    said = refused('[[rule]]\nfrom = "a"\nto = "c"\n[[rule]]\nfrom = "b"\nto = "c"\n', state)
    assert "'a' (by a -> c) and 'b' (by b -> c) would both become 'c'" in said
    assert "'a' (by a -> c) and 'c' (kept) would both become 'c'" in said


def test_a_missing_part_is_named() -> None:
    said = refused(
        '[[rule]]\nfrom = "l.{i}.{x=q|k|v}"\nto = "l.{i}.qkv"\nconcat = 0\n', adamw({"l.0.q": (2,), "l.0.v": (2,)})
    )
    assert "joins 'l.0.q', 'l.0.v' into 'l.0.qkv', but there is no 'l.0.k'" in said
    said = refused('[[rule]]\nfrom = "e.{n:int}"\nto = "e"\nstack = 0\n', adamw({"e.0": (2,), "e.2": (2,)}))
    assert "there is no 'e.1'" in said


def test_steps_must_agree_before_joining() -> None:
    state = adamw({"q": (2,), "k": (2,)}, steps={"q": 5.0, "k": 9.0})
    text = '[[rule]]\nfrom = "{x=q|k}"\nto = "qk"\nconcat = 0\n'
    assert "step of 'q', 'k' cannot follow: it differs (5.0 for 'q', 9.0 for 'k')" in refused(text, state)
    for policy, step in (("min", 5.0), ("max", 9.0), ("keep", 5.0)):
        section = planned(f'[policy]\nstep = "{policy}"\n{text}', state)
        assert execute_optimizer(section, state).state[0]["step"].item() == step
        assert section.moves[0].slots[("step",)].level == "approximate"


def test_state_and_no_state_do_not_mix() -> None:
    state = adamw({"q": (2,), "k": (2,)})
    bare = OptimizerState.from_node({"state": {0: state.state[0]}, "param_groups": [state.groups[0].to_node()]})
    text = '[[rule]]\nfrom = "{x=q|k}"\nto = "qk"\nconcat = 0\n'
    assert "'q' has optimizer state and 'k' has none" in refused(text, bare)
    assert execute_optimizer(planned(text + "fresh = true\n", bare), bare).state == {}


def test_opaque_slots_can_be_moved_and_copied_but_not_cut() -> None:
    state = adamw({"w": (4, 2)}, precond=lambda shape: [torch.eye(4), torch.eye(2)])
    copies = planned('[[rule]]\nfrom = "w"\nto = ["a", "b"]\n', state)
    made = execute_optimizer(copies, state).state
    assert made[0]["precond"][0] is state.state[0]["precond"][0]
    assert torch.equal(made[1]["precond"][0], made[0]["precond"][0])
    assert made[1]["precond"][0].data_ptr() != made[0]["precond"][0].data_ptr()
    said = refused('[[rule]]\nfrom = "w"\nto = "w{n=0..1}"\nsplit = 0\n', state)
    assert "precond of 'w' cannot follow: it has a layout of its own" in said


def test_slots_of_unknown_optimizers_are_inferred_or_declared() -> None:
    state = adamw({"w": (4, 2)}, hidden=torch.rand)
    text = '[[rule]]\nfrom = "w"\nto = "v"\nscale = { param = 2.0, grad = 0.5 }\n'
    section = planned('[[rule]]\nfrom = "w"\nto = "v"\ntranspose = true\n', state)
    outcome = section.moves[0].slots[("hidden",)]
    assert (outcome.level, outcome.kind, outcome.inferred) == ("exact", "like_param", True)
    assert 'say so in the plan, [slots] hidden = { kind = "like_param", degree = 1 }' in refused(text, state)
    declared = planned('[slots]\nhidden = { kind = "like_param", degree = 3 }\n' + text, state)
    made = execute_optimizer(declared, state).state[0]
    assert torch.equal(made["hidden"], state.state[0]["hidden"] / 8)
    assert torch.equal(made["exp_avg"], state.state[0]["exp_avg"] / 2)
    assert torch.equal(made["exp_avg_sq"], state.state[0]["exp_avg_sq"] / 4)


def test_the_guard() -> None:
    state = adamw({"a": (2,), "b": (2,)})
    assert "the guard asks for 'c'" in refused('[guard]\nhas = "c"\n', state)
    assert "the guard excludes '{x=a|z}', and there is 'a'" in refused('[guard]\nlacks = "{x=a|z}"\n', state)
    planned('[guard]\nhas = ["a", "b"]\nlacks = "c"\n', state)


def test_stages_see_the_names_before_them() -> None:
    state = adamw({f"e.{e}.{x}": (2, 3) for e in range(2) for x in ("w1", "w3")})
    section = planned(
        '[[rule]]\nfrom = "e.{e}.{x=w1|w3}"\nto = "e.{e}.both"\nconcat = 0\n'
        '[[stage]]\n[[stage.rule]]\nfrom = "e.{e=0..1}.both"\nto = "experts"\nstack = 0\n',
        state,
    )
    made = execute_optimizer(section, state).state[0]["exp_avg"]
    old = [state.state[n]["exp_avg"] for n in range(4)]
    assert torch.equal(made, torch.stack([torch.cat(old[:2]), torch.cat(old[2:])]))


def test_swaps_need_no_stage() -> None:
    state = adamw({"a": (2,), "b": (2,)})
    section = planned('[[rule]]\nfrom = "a"\nto = "b"\n[[rule]]\nfrom = "b"\nto = "a"\n', state)
    made = execute_optimizer(section, state)
    assert made.groups[0].names == ("b", "a")
    assert made.state[0]["exp_avg"] is state.state[0]["exp_avg"]


def test_new_parameters_join_a_group() -> None:
    state = adamw({"a": (2,)})
    made = execute_optimizer(planned('[[rule]]\nfresh = "b.{x=w|v}"\n', state), state)
    assert made.groups[0].names == ("a", "b.w", "b.v")
    assert list(made.state) == [0]


def test_reports_have_a_row_for_everything() -> None:
    state = adamw({"a": (4,), "b": (2,)})
    migration = plan_optimizer(
        Plan.from_toml('[[rule]]\ndrop = "b"\n[[rule]]\nfrom = "a"\nto = "c"\nresize = { dim = 0, size = 6 }\n'), state
    )
    rows = {(row.target, row.slot): row for row in explained(migration)}
    assert rows["c", "exp_avg_sq"].outcome == "approximate"
    assert rows["c", "exp_avg_sq"].how == "grow(a; 2 of 0)"
    assert rows["", ""].sources == ("b",)
    assert summary(migration) == {"optimizer": {"exact": 1, "approximate": 2, "dropped": 1}}


def test_models_of_other_shapes_are_refused_with_the_remedy() -> None:
    with pytest.raises(MigrationError, match=r"resize = \{ dim = 0, size = 5 \}"):
        plan_model(Plan(), {"w": torch.zeros(4, 2)}, target=Target.of_names({"w": (5, 2)}))


def test_python_rules_are_the_same_as_toml() -> None:
    made = Plan((Rule.of("{x=q|k}.{p}", "qk.{p}", concat=0), Rule.of("old.**"), Rule.of("a", "b", fresh=True)))
    assert Plan.from_toml(made.to_toml()) == made
    assert made.digest == Plan.from_toml(made.to_toml()).digest


def test_tied_weights_stay_tied_and_copies_do_not() -> None:
    shared = torch.randn(3, 2)
    weights = {"embed": shared, "head": shared}
    tied = plan_model(Plan.from_toml('[[rule]]\nfrom = "{x=embed|head}"\nto = "{x}.w"\ntranspose = true\n'), weights)
    moved = execute_model(tied.sections["model"], weights)
    assert moved["embed.w"] is moved["head.w"]
    copies = plan_model(Plan.from_toml('[[rule]]\nfrom = "embed"\nto = ["embed", "copy"]\n'), weights)
    moved = execute_model(copies.sections["model"], weights)
    assert moved["embed"].data_ptr() == moved["head"].data_ptr() != moved["copy"].data_ptr()
