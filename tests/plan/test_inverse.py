"""Plans that undo plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimstate.errors import PlanError
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.groups import same_value
from optimstate.plan.solve.inverse import inverse
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.state.optimizer import Group, OptimizerState

NAMES = {
    **{f"layers.{i}.{x}.weight": (4, 8) for i in range(3) for x in "qkv"},
    **{f"layers.{i}.{x}.bias": (4,) for i in range(3) for x in "qkv"},
    "head.weight": (10, 8),
}


def toml(text: str) -> str:
    return Plan.from_toml(text).to_toml()


@pytest.mark.parametrize(
    ("plan", "undone"),
    [
        (
            '[[rule]]\nfrom = "layers.{i:int}.{p**}"\nto = "blocks.{i+1}.{p}"',
            '[[rule]]\nfrom = "blocks.{i+1}.{p**}"\nto = "layers.{i:int}.{p**}"',
        ),
        (
            '[[rule]]\nfrom = "layers.{i}.{x=q|k|v}.{p}"\nto = "layers.{i}.qkv.{p}"\nconcat = 0',
            '[[rule]]\nfrom = "layers.{i}.qkv.{p}"\nto = "layers.{i}.{x=q|k|v}.{p}"\nsplit = 0',
        ),
        (
            '[[rule]]\nfrom = "layers.{i}.{x=q|k|v}.{p}"\nto = "layers.{i}.{x=query|key|value}.{p}"',
            '[[rule]]\nfrom = "layers.{i}.{x=query|key|value}.{p}"\nto = "layers.{i}.{x=q|k|v}.{p}"',
        ),
        (
            '[[rule]]\nfrom = "head.weight"\nto = "out"\n'
            "ops = [{ transpose = true }, { reshape = { dim = 0, to = [2, 4] } }]",
            '[[rule]]\nfrom = "out"\nto = "head.weight"\n'
            "ops = [{ reshape = { dim = 0, from = [2, 4], to = [8] } }, { transpose = true }]",
        ),
        (
            '[[rule]]\nfrom = "head.weight"\nto = "x"\n[[stage]]\n[[stage.rule]]\nfrom = "x"\nto = "y"',
            '[[rule]]\nfrom = "y"\nto = "x"\n[[stage]]\n[[stage.rule]]\nfrom = "x"\nto = "head.weight"',
        ),
    ],
)
def test_a_plan_is_undone_by_the_plan_turned_round(plan: str, undone: str) -> None:
    assert inverse(Plan.from_toml(plan)).to_toml() == toml(undone)
    assert inverse(Plan.from_toml(plan), NAMES).to_toml() == toml(undone)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ('drop = "head.**"', "rule 2 drops 'head.**'"),
        ('fresh = "head.**"', "rule 2 leaves the optimizer state of 'head.**' behind"),
        ('from = "head.{p}"\nto = "head{e=0..1}.{p}"', "rule 2 copies 'head.{p}'"),
        ('from = "head.{p}"\nto = "head.{p}"\nslice = { dim = 0, stop = 3 }', "rule 2: slice loses what it leaves out"),
        ('from = "head.{p}"\nto = "head.{p}"\ncast = "bfloat16"', "rule 2: cast does not keep what it rounds off"),
    ],
)
def test_a_plan_that_loses_something_says_what(rule: str, reason: str) -> None:
    plan = Plan.from_toml(f'[[rule]]\nfrom = "layers.{{p**}}"\nto = "h.{{p}}"\n[[rule]]\n{rule}\n')
    with pytest.raises(PlanError, match="cannot invert") as raised:
        inverse(plan)
    assert reason in str(raised.value)


def test_sizes_come_from_the_shapes() -> None:
    names = {"q": (8, 4), "k": (2, 4), "v": (2, 4)}
    plan = Plan.from_toml('[[rule]]\nfrom = "{x=q|k|v}"\nto = "qkv"\nconcat = 0')
    assert "sizes = [8, 2, 2]" in inverse(plan, names).to_toml()


def test_names_that_one_rule_cannot_tell_apart_are_spelled_out() -> None:
    # b.1 was there already: a plan that takes every b.{i} back to a.{i} would take it too.
    names = {"a.0": (2,), "b.1": (2,)}
    plan = Plan.from_toml('[[rule]]\nfrom = "a.{i}"\nto = "b.{i}"')
    assert inverse(plan, names).to_toml() == toml('[[rule]]\nfrom = "b.0"\nto = "a.0"')


LAYERS = [f"layers.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
SPLIT = (
    '[[rule]]\nfrom = "layers.{i}.{p}"\nto = "blocks.{i}.{p}"\n'
    '[[group]]\nmatch = "**.bias"\nset = { weight_decay = 0.0 }\n[[group]]\nmatch = "**"\nset = { lr = 0.5 }\n'
)


def optimizer(*groups: list[str], **options: Any) -> OptimizerState:
    """A trained AdamW over these names; `options` has a value for each group."""
    tensors = {name: torch.nn.Parameter(torch.ones(4, 2)) for group in groups for name in group}
    made = torch.optim.AdamW(
        [
            {"params": [(name, tensors[name]) for name in group]} | {key: value[n] for key, value in options.items()}
            for n, group in enumerate(groups)
        ]
    )
    for number, parameter in enumerate(tensors.values()):
        parameter.grad = torch.full((4, 2), float(number + 1))
    made.step()
    return OptimizerState.from_node(made.state_dict())


@pytest.mark.parametrize(
    "state",
    [
        optimizer(LAYERS, lr=[0.1]),
        optimizer(LAYERS[::2], LAYERS[1::2], weight_decay=[0.3, 0.1]),
        optimizer(LAYERS[1::2], LAYERS[::2], lr=[0.1, 0.2], betas=[(0.9, 0.99), (0.8, 0.9)]),
        optimizer([LAYERS[1], LAYERS[0]], LAYERS[2:], lr=[0.1, 0.1]),
    ],
    ids=["one group", "two by kind", "two that differ", "two by layer, in another order"],
)
def test_regrouping_is_undone_with_the_checkpoints_groups(state: OptimizerState) -> None:
    plan = Plan.from_toml(SPLIT).with_policy(merge="first")
    there = execute_optimizer(plan_optimizer(plan, state).sections["optimizer"], state)
    undo = inverse(plan, dict.fromkeys(LAYERS, (4, 2)), groups=state.groups)
    again = Plan.from_toml(undo.to_toml())
    back = execute_optimizer(plan_optimizer(again, there).sections["optimizer"], there)
    assert [group.names for group in back.groups] == [group.names for group in state.groups]
    for one, other in zip(back.groups, state.groups, strict=True):
        assert one.options.keys() == other.options.keys()
        assert all(same_value(value, other.options[key]) for key, value in one.options.items())
    expected = {name: slots for _, name, slots in state.parameters()}
    for _, name, slots in back.parameters():
        assert all(torch.equal(value, expected[name][slot]) for slot, value in slots.items())


def test_few_patterns_stand_for_many_names() -> None:
    plan = Plan.from_toml(SPLIT)
    text = inverse(plan, groups=optimizer(LAYERS[::2], LAYERS[1::2]).groups).to_toml()
    assert 'match = "layers.*.weight"' in text
    assert 'match = "layers.*.bias"' in text


def both_set(option: str) -> Plan:
    return Plan.from_toml(SPLIT.replace("lr = 0.5", option).replace("weight_decay = 0.0", option))


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (None, "give the checkpoint"),
        (optimizer(LAYERS).groups, "option 'note', which none takes away"),
        ((*optimizer(LAYERS).groups, Group({"lr": 0.1}, (), ())), "param group 1 has no parameters"),
    ],
)
def test_what_a_table_cannot_undo_is_said(groups: Any, reason: str) -> None:
    plan = both_set('note = "x"')
    with pytest.raises(PlanError, match=reason):
        inverse(plan, groups=groups)


def test_an_option_no_plan_file_can_say_is_named() -> None:
    plan = both_set("foreach = true")
    with pytest.raises(PlanError, match="option 'foreach' of param group 0 was None"):
        inverse(plan, groups=optimizer(LAYERS).groups)
