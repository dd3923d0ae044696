"""The one-line options of the command line: the rules they become, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.plan import Plan


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
