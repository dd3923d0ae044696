"""Names matched and produced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.template import Template


@pytest.mark.parametrize(
    ("template", "name", "captures"),
    [
        ("a.{i}.w", "a.0.w", {"i": "0"}),
        ("a.{i}.w", "a.0.1.w", None),
        ("a.{i:int}.w", "a.x.w", None),
        ("{rest**}.w", "a.b.c.w", {"rest": "a.b.c"}),
        ("{x=q|k}_proj", "k_proj", {"x": "k"}),
        ("{x=q|k}_proj", "v_proj", None),
        ("e.{n=0..7}", "e.8", None),
        ("e.{n=0..7}", "e.07", None),
        ("experts.{i}", "shared_experts.0", None),
        ("{i}.{i}", "3.3", {"i": "3"}),
        ("{i}.{i}", "3.4", None),
        ("h.{2*i+1}.w", "h.7.w", {"i": "3"}),
        ("h.{2*i+1}.w", "h.8.w", None),
        ("h.{i+1}.w", "h.0.w", None),
        ("**.bias", "a.b.bias", {}),
        ("*.bias", "a.b.bias", None),
        (r"re:(?P<a>.+)_old\.(?P<p>\w+)", "m.x_old.w", {"a": "m.x", "p": "w"}),
        ("a+b.(c)", "a+b.(c)", {}),
    ],
)
def test_matching(template: str, name: str, captures: dict[str, str] | None) -> None:
    assert Template(template).match(name) == captures


def test_producing_all_combinations() -> None:
    made = list(Template("{i}.{x=a|b}.{e=0..1}").produce({"i": "5"}))
    assert made == ["5.a.0", "5.a.1", "5.b.0", "5.b.1"]


@pytest.mark.parametrize("text", ["", "{", "a}", "{1x}", "{x=a|a}", "{x=a||b}", "{e=3..1}", "re:(", "{0*i}"])
def test_mistakes(text: str) -> None:
    with pytest.raises(PlanSyntaxError):
        Template(text)


def test_indices_that_are_no_integers_or_negative() -> None:
    with pytest.raises(PlanSyntaxError, match="not an integer to compute with"):
        list(Template("{i+1}").produce({"i": "x"}))
    with pytest.raises(PlanSyntaxError, match="gives the index -1"):
        list(Template("{i-1}").produce({"i": "0"}))


@given(st.integers(-3, 3).filter(bool), st.integers(-5, 20), st.integers(0, 50))
def test_affine_indices_are_undone(scale: int, shift: int, value: int) -> None:
    template = Template(f"h.{{{scale}*i{shift:+d}}}.w")
    if scale * value + shift < 0:
        return
    (name,) = template.produce({"i": str(value)})
    assert template.match(name) == {"i": str(value)}


@given(st.text(min_size=1, max_size=20))
def test_any_name_can_be_meant_literally(name: str) -> None:
    template = Template.literal(name)
    assert template.match(name) == {}
    assert template.match(name + "x") is None
    assert list(template.produce({})) == [name]
