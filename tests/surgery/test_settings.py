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
from optimstate.surgery.writing.settings import with_options
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


def test_the_number_of_a_group_needs_no_look_at_its_parameters(tmp_path: Path) -> None:
    source = corpus.case("torch/adam_unnamed_wd").entry
    optimstate.remap(source, tmp_path / "out.pt", with_options(Plan(), source, ["0:weight_decay=0.25", "eps=1e-6"]))
    old, new = torch.load(source), torch.load(tmp_path / "out.pt")
    groups = next(value for value in (old, *old.values()) if isinstance(value, dict) and "param_groups" in value)
    for number, group in enumerate(groups["param_groups"]):
        group["eps"] = 1e-6
        group["weight_decay"] = group["weight_decay"] if number else 0.25
    assert unlike(old, new) is None


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


def test_the_report_says_what_changed_and_what_the_scheduler_makes_of_it() -> None:
    plan = with_options(Plan(), SOURCE, ["0:lr=0.5"])
    report = optimstate.remap(SOURCE, None, plan, dry_run=True)
    first, second = report.groups["optimizer optimizer"]
    assert first.changed.keys() == {"lr"}  # LinearLR goes on from it
    assert first.changed["lr"][1] == 0.5
    assert not second.changed
    assert not report.notes
    changed = optimstate.remap(SOURCE, None, with_options(Plan(), SOURCE, ["0:initial_lr=0.5"]), dry_run=True)
    assert changed.groups["optimizer optimizer"][0].changed["lr"][1] == pytest.approx(0.5 * 7 / 15)
    assert [note for note in changed.notes if "param group 0 has lr = 0.2333" in note and "LinearLR" in note]
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
        ("lr=", PlanSyntaxError, "not a value"),
        ("foreach=None", PlanSyntaxError, "None cannot be set"),
        ("lr=fast", PlanSyntaxError, "not a value"),
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


def test_tables_and_settings_do_not_mix_and_an_optimizer_must_be_there(tmp_path: Path) -> None:
    tables = Plan(groups=(GroupRule((Template("**"),)),))
    with pytest.raises(PlanError, match=r"\[\[group\]\]"):
        with_options(tables, SOURCE, ["lr=0.1"])
    torch.save({"model": {"w": torch.ones(2, 2)}}, tmp_path / "weights.pt")
    with pytest.raises(MigrationError, match="the checkpoint has none"):
        with_options(Plan(), tmp_path / "weights.pt", ["lr=0.1"])
    with pytest.raises(MigrationError, match="lr is set twice for the same groups"):
        with_options(Plan(), SOURCE, ["lr=0.1", "lr=0.2"])


def two_optimizers(folder: Path, *, named: bool) -> Path:
    """Two of two groups each."""
    made = {}
    for key in ("gen", "dis"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        pairs = [(f"{key}.{name}", parameter) for name, parameter in model.named_parameters()]
        groups = [{"params": part if named else [p for _, p in part]} for part in (pairs[:2], pairs[2:])]
        made[key] = torch.optim.AdamW(groups, lr=1e-4).state_dict()
    torch.save(made, folder / "two.pt")
    return folder / "two.pt"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("lr=0.5", {("gen", 0), ("gen", 1), ("dis", 0), ("dis", 1)}),
        ("1:lr=0.5", {("gen", 1), ("dis", 1)}),
        ("dis:lr=0.5", {("dis", 0), ("dis", 1)}),
        ("dis:0:lr=0.5", {("dis", 0)}),
        ("dis.**:lr=0.5", {("dis", 0), ("dis", 1)}),
        ("gen:**.0.*:lr=0.5", {("gen", 0)}),
    ],
)
def test_of_two_optimizers_those_that_are_meant_get_it(
    setting: str, meant: set[tuple[str, int]], named: bool, tmp_path: Path
) -> None:
    source = two_optimizers(tmp_path, named=named)
    if "*" in setting and not named:
        with pytest.raises(MigrationError, match="have no names to match: `optimstate name` gives them names"):
            with_options(Plan(), source, [setting])
        return
    plan = with_options(Plan(), source, [setting])
    assert Plan.from_toml(plan.to_toml()) == plan
    optimstate.remap(source, tmp_path / "out.pt", plan)
    old, new = torch.load(source), torch.load(tmp_path / "out.pt")
    for key in old:
        for number, group in enumerate(old[key]["param_groups"]):
            group["lr"] = 0.5 if (key, number) in meant else 1e-4
    assert unlike(old, new) is None


def test_an_empty_group_is_kept_unless_a_template_would_lose_it(tmp_path: Path) -> None:
    checkpoint = torch.load(SOURCE)
    empty = {**checkpoint["optimizer"]["param_groups"][0], "params": [], "param_names": []}
    checkpoint["optimizer"]["param_groups"].append(empty)
    for key in ("base_lrs", "_last_lr"):
        checkpoint["scheduler"][key].append(checkpoint["scheduler"][key][0])
    torch.save(checkpoint, tmp_path / "empty.pt")
    optimstate.remap(tmp_path / "empty.pt", tmp_path / "out.pt", with_options(Plan(), tmp_path / "empty.pt", ["lr=1"]))
    assert [group["lr"] for group in torch.load(tmp_path / "out.pt")["optimizer"]["param_groups"]] == [1.0] * 3
    with pytest.raises(MigrationError, match="param group 2 is empty"):
        with_options(Plan(), tmp_path / "empty.pt", ["**.bias:lr=0.1"])
