"""Templates and the one-line options of the command line: what they match, what they produce, what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.plan import Plan
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


@pytest.mark.parametrize("text", ["", "{", "a}", "{1x}", "{x=}", "{x=a|a}", "{e=3..1}", "{e=0..999999999}", "{x y}"])
def test_a_template_that_cannot_be_read_is_refused_when_it_is_written(text: str) -> None:
    with pytest.raises(PlanSyntaxError):
        Template(text)


@pytest.mark.parametrize(
    "options",
    [
        {"rename": ["a"]},
        {"rename": ["=b"]},
        {"rename": ["a="]},
        {"rename": ["a=b=c"]},
        {"rename": ["a=b,c"]},
        {"rename": ["a=b.{e=0..3}"]},
        {"rename": ["a.{i}=b.{j}"]},
        {"rename": ["a.{i}=b"]},
        {"rename": ["a.*=b.*"]},
        {"duplicate": ["a"]},
    ],
    ids=str,
)
def test_one_liners_that_make_no_sense_are_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(PlanSyntaxError):
        Plan.from_options(**options)


def test_options_become_rules_in_their_order_and_survive_a_file(tmp_path: Path) -> None:
    plan = Plan.from_options(
        rename=["a.{p}=b.{p}", "c=d"], duplicate=["fc.{p}=fc1.{p},fc2.{p}", "m.{p}=e.{e=0..3}.{p}"], drop=["head.**"]
    )
    assert len(plan.rules) == 5
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml())
    again = Plan.from_file(path)
    assert [str(rule) for rule in again.rules] == [str(rule) for rule in plan.rules]
