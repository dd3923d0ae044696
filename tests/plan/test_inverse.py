"""Plans that undo plans."""

from __future__ import annotations

import pytest

from optimstate.errors import PlanError
from optimstate.plan.inverse import inverse
from optimstate.plan.rules import Plan

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
        ('from = "head.{p}"\nto = "head{e=0..1}.{p}"', "rule 2 makes copies of 'head.{p}'"),
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
