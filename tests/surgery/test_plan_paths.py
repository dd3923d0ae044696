"""A path is a plan wherever a plan is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import hooks
from optimstate.errors import PlanSyntaxError
from optimstate.surgery.plans.checking import check_plan
from optimstate.surgery.plans.inverting import invert_plan
from optimstate.surgery.plans.showing import show_plan
from optimstate.surgery.verification.verifying import verify_against
from optimstate.surgery.writing.settings import with_options


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    (tmp_path / "plan.toml").write_text('[[rule]]\nfrom = "0.{p}"\nto = "a.{p}"\n')
    (tmp_path / "wrong.toml").write_text("[[rule]\n")
    return tmp_path


def renamed() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 2)})


TAKERS: dict[str, Any] = {
    "remap": lambda here, plan: optimstate.remap(here / "c.pt", None, plan, dry_run=True),
    "verify_against": lambda here, plan: verify_against(here / "c.pt", here / "c.pt", plan),
    "check_plan": lambda here, plan: check_plan(plan, here / "c.pt"),
    "invert_plan": lambda here, plan: invert_plan(plan, here / "c.pt"),
    "show_plan": lambda here, plan: show_plan(plan, here / "c.pt"),
    "with_options": lambda here, plan: with_options(plan, here / "c.pt", ["lr=1.0"]),
    "migrate": lambda here, plan: hooks.migrate(plan),
    "migrate_model": lambda here, plan: hooks.migrate_model(plan),
    "resume": lambda here, plan: optimstate.resume(
        here / "c.pt", model=nn.ModuleDict({"a": nn.Linear(2, 2)}), plan=plan
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_a_path_is_a_plan(checkpoint: Path, taker: str) -> None:
    take = TAKERS[taker]
    by_plan = take(checkpoint, optimstate.Plan.from_file(checkpoint / "plan.toml"))
    for path in (checkpoint / "plan.toml", str(checkpoint / "plan.toml")):
        found = take(checkpoint, path)
        assert str(found) == str(by_plan) or type(found) is type(by_plan)
    for name in ("missing.toml", "wrong.toml"):
        with pytest.raises(PlanSyntaxError, match=name):
            take(checkpoint, checkpoint / name)


def test_a_path_makes_the_file_that_the_plan_makes(checkpoint: Path) -> None:
    optimstate.remap(checkpoint / "c.pt", checkpoint / "path.pt", str(checkpoint / "plan.toml"))
    plan = optimstate.Plan.from_file(checkpoint / "plan.toml")
    optimstate.remap(checkpoint / "c.pt", checkpoint / "plan.pt", plan)
    made = [torch.load(checkpoint / f"{name}.pt")["model"] for name in ("path", "plan")]
    assert list(made[0]) == list(made[1]) == ["a.weight", "a.bias"]
