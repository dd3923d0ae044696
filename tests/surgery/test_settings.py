"""Options set by name: the groups that come of it, as torch loads them, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import MigrationError, PlanError, PlanSyntaxError
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule
from optimstate.plan.language.template import Template
from optimstate.surgery.settings import with_options
from tests import corpus
from tests.support import unlike

SOURCE = corpus.case("optimstate/moe_before_experts").entry


def groups(path: Path) -> dict[str, dict[str, Any]]:
    """For each parameter the options of its group, and its state."""
    optimizer = torch.load(path)["optimizer"]
    return {
        name: {"state": optimizer["state"][key], **{k: v for k, v in group.items() if not k.startswith("param")}}
        for group in optimizer["param_groups"]
        for name, key in zip(group["param_names"], group["params"], strict=True)
    }


def applied(tmp_path: Path, *settings: str, plan: Plan | None = None) -> dict[str, dict[str, Any]]:
    out = tmp_path / "out.pt"
    optimstate.remap(SOURCE, out, with_options(plan or Plan(), SOURCE, settings), force=True)
    return groups(out)


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("weight_decay=0.05", lambda name: True),
        ("1:weight_decay=0.05", lambda name: "weight" not in name or "norm" in name or "embed" in name),
        ("**.norm.*:weight_decay=0.05", lambda name: ".norm." in name),
        ("layers.{i=1}.**:weight_decay=0.05", lambda name: name.startswith("layers.1.")),
        ("embed.weight:weight_decay=0.05", lambda name: name == "embed.weight"),
    ],
)
def test_those_that_are_meant_get_it_and_no_others_change(setting: str, meant: Any, tmp_path: Path) -> None:
    before, after = groups(SOURCE), applied(tmp_path, setting)
    assert before.keys() == after.keys()
    for name, had in before.items():
        expected = copy.copy(had)
        if meant(name):
            expected["weight_decay"] = 0.05
        assert {k: v for k, v in expected.items() if k != "state"} == {
            k: v for k, v in after[name].items() if k != "state"
        }
        assert all(torch.equal(had["state"][slot], after[name]["state"][slot]) for slot in had["state"])


def test_groups_keep_their_number_where_nothing_splits_them(tmp_path: Path) -> None:
    applied(tmp_path, "lr=0.5")
    old, new = (torch.load(path)["optimizer"]["param_groups"] for path in (SOURCE, tmp_path / "out.pt"))
    assert [group["param_names"] for group in new] == [group["param_names"] for group in old]
    assert [group["lr"] for group in new] == [0.5, 0.5]


def test_it_is_the_result_that_is_named(tmp_path: Path) -> None:
    plan = Plan.from_options(rename=["layers.{i}.{p**}=blocks.{i}.{p**}"], drop=["embed.**"])
    after = applied(tmp_path, "blocks.*.mlp.fc1.*:lr=0.25", plan=plan)
    assert {name for name, options in after.items() if options["lr"] == 0.25} == {
        f"blocks.{i}.mlp.fc1.{leaf}" for i in range(2) for leaf in ("weight", "bias")
    }


def test_the_plan_says_it_without_the_checkpoint(tmp_path: Path) -> None:
    plan = with_options(Plan(), SOURCE, ["**.norm.*:eps=1e-6", "betas=[0.8, 0.9]"])
    read = Plan.from_toml(plan.to_toml())
    assert read == plan
    optimstate.remap(SOURCE, tmp_path / "a.pt", plan)
    optimstate.remap(SOURCE, tmp_path / "b.pt", read)
    assert unlike(torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")) is None


def test_the_report_says_what_changed_and_which_scheduler_will_set_it_again() -> None:
    plan = with_options(Plan(), SOURCE, ["0:lr=0.5"])
    report = optimstate.remap(SOURCE, None, plan, dry_run=True)
    first, second = report.groups["optimizer optimizer"]
    assert first.changed.keys() == {"lr"}
    assert first.changed["lr"][1] == 0.5
    assert not second.changed
    assert [note for note in report.notes if "scheduler" in note and "set initial_lr too" in note]
    whole = with_options(Plan(), SOURCE, ["0:lr=0.5", "0:initial_lr=0.5"])
    assert not any("scheduler" in note for note in optimstate.remap(SOURCE, None, whole, dry_run=True).notes)
    assert not optimstate.remap(SOURCE, None, Plan.from_options(drop=["embed.**"]), dry_run=True).groups


def test_whole_numbers_stay_floats(tmp_path: Path) -> None:
    assert {type(options["lr"]) for options in applied(tmp_path, "lr=1").values()} == {float}


def test_names_that_mean_something_in_templates_are_told_apart(tmp_path: Path) -> None:
    parameters = [("a{b}.w", torch.nn.Parameter(torch.ones(2))), ("a*.w", torch.nn.Parameter(torch.ones(2)))]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1, momentum=0.9)
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "odd.pt")
    plan = with_options(Plan(), tmp_path / "odd.pt", ["0:lr=0.5"])
    optimstate.remap(tmp_path / "odd.pt", tmp_path / "out.pt", plan)
    after = torch.load(tmp_path / "out.pt")["optimizer"]["param_groups"]
    assert [(group["param_names"], group["lr"]) for group in after] == [(["a{b}.w"], 0.5), (["a*.w"], 0.1)]


@pytest.mark.parametrize(
    ("setting", "error", "mention"),
    [
        ("lr", PlanSyntaxError, "KEY=VALUE"),
        ("lr=", PlanSyntaxError, "no value"),
        ("foreach=None", PlanSyntaxError, "None cannot be set"),
        ("lr=fast", PlanSyntaxError, "no value"),
        ('lr="fast"', MigrationError, "another type"),
        ("lrr=0.1", MigrationError, "is it 'lr'"),
        ("7:lr=0.1", MigrationError, "none of 2 param groups"),
        ("nowhere.**:lr=0.1", MigrationError, "applies to none"),
        ("a.{i:lr=0.1", PlanSyntaxError, "{"),
    ],
)
def test_what_cannot_be_meant_is_refused(setting: str, error: type[Exception], mention: str) -> None:
    with pytest.raises(error) as caught:
        with_options(Plan(), SOURCE, [setting])
    assert mention in str(caught.value)


def test_an_optimizer_must_be_there_named_and_alone(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="whose parameters have names"):
        with_options(Plan(), corpus.case("torch/adam_unnamed_wd").entry, ["lr=0.1"])
    tables = Plan(groups=(GroupRule((Template("**"),)),))
    with pytest.raises(PlanError, match=r"\[\[group\]\]"):
        with_options(tables, SOURCE, ["lr=0.1"])
    one = torch.load(SOURCE)
    torch.save({"a": one["optimizer"], "b": one["optimizer"] | {"extra": 1}}, tmp_path / "two.pt")
    with pytest.raises(PlanError, match="optimizer a, optimizer b"):
        with_options(Plan(), tmp_path / "two.pt", ["lr=0.1"])


def test_a_group_without_parameters_is_not_lost_silently(tmp_path: Path) -> None:
    checkpoint = torch.load(SOURCE)
    empty = {**checkpoint["optimizer"]["param_groups"][0], "params": [], "param_names": []}
    checkpoint["optimizer"]["param_groups"].append(empty)
    torch.save(checkpoint, tmp_path / "empty.pt")
    with pytest.raises(MigrationError, match="param group 2 is empty"):
        with_options(Plan(), tmp_path / "empty.pt", ["lr=0.1"])
