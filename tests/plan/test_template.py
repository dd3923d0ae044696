"""Templates: what they match, what they produce, what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.template import Template

MATCHES: list[tuple[str, str, dict[str, str] | None]] = [
    ("fc.weight", "fc.weight", {}),
    ("fc.weight", "fc.weights", None),
    ("fc.weight", "fcxweight", None),
    ("fc.{p}", "fc.weight", {"p": "weight"}),
    ("fc.{p}", "fc.sub.weight", None),
    ("fc.{p**}", "fc.sub.weight", {"p": "sub.weight"}),
    ("fc.{p**}", "fc", None),
    ("{p**}", "a.b.c", {"p": "a.b.c"}),
    ("blocks.{i:int}.w", "blocks.12.w", {"i": "12"}),
    ("blocks.{i:int}.w", "blocks.x.w", None),
    ("{x=q|k|v}_proj.w", "k_proj.w", {"x": "k"}),
    ("{x=q|k|v}_proj.w", "o_proj.w", None),
    ("e.{e=0..3}.w", "e.3.w", {"e": "3"}),
    ("e.{e=0..3}.w", "e.4.w", None),
    ("{a}.{b}.{a}", "x.y.x", {"a": "x", "b": "y"}),
    ("{a}.{b}.{a}", "x.y.z", None),
    ("experts.{p**}", "shared_experts.w", None),
    ("*.weight", "fc.weight", {}),
    ("*.weight", "a.fc.weight", None),
    ("**.weight", "a.fc.weight", {}),
    ("a.{i}.w", "a.0.1.w", None),
    ("e.{n=0..7}", "e.07", None),
    ("h.{2*i+1}.w", "h.7.w", {"i": "3"}),
    ("h.{2*i+1}.w", "h.8.w", None),
    ("h.{i+1}.w", "h.0.w", None),
    (r"re:(?P<a>.+)_old\.(?P<p>\w+)", "m.x_old.w", {"a": "m.x", "p": "w"}),
    ("a+b.(c)", "a+b.(c)", {}),
]


@pytest.mark.parametrize(("template", "name", "captures"), MATCHES)
def test_a_template_matches_whole_names_by_component(template: str, name: str, captures: dict[str, str] | None) -> None:
    assert Template(template).match(name) == captures


@pytest.mark.parametrize(
    ("template", "captures", "names"),
    [
        ("b.{i}.w", {"i": "3"}, ["b.3.w"]),
        ("b.{2*i+1}.w", {"i": "3"}, ["b.7.w"]),
        ("b.{i-1}.w", {"i": "3"}, ["b.2.w"]),
        ("e.{e=0..2}.{p}", {"p": "w"}, ["e.0.w", "e.1.w", "e.2.w"]),
        ("{x=a|b}.{e=0..1}", {}, ["a.0", "a.1", "b.0", "b.1"]),
        ("{x=a|b}.w", {"x": "b"}, ["b.w"]),
    ],
)
def test_a_template_produces_names(template: str, captures: dict[str, str], names: list[str]) -> None:
    assert list(Template(template).produce(captures)) == names


@pytest.mark.parametrize(
    "text",
    ["", "{", "a}", "{1x}", "{x=}", "{x=a|a}", "{x=a||b}", "{e=3..1}", "{e=0..999999999}", "{x y}", "re:(", "{0*i}"],
)
def test_a_template_that_cannot_be_read_is_refused_when_it_is_written(text: str) -> None:
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
