"""Plans suggested, checked, undone and shown for checkpoints that torch wrote, and what torch makes of the results."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.errors import CheckpointError, DestinationExistsError, PlanError
from optimstate.plan.language.plan import Plan
from optimstate.surgery.plans import files, inverting
from tests import corpus
from tests.support import digest, unlike

EXPERTS = corpus.case("optimstate/moe_experts").entry
DENSE = corpus.case("optimstate/moe_before_experts").entry


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)


def model_of(layers: str, fused: bool = False, width: int = 5) -> nn.Module:
    model = nn.Module()
    model.add_module(layers, nn.ModuleList([Block(fused) for _ in range(3)]))
    model.add_module("head", nn.Linear(8, width))
    return model


def saved(path: Path, model: nn.Module, *, optimizer: bool = True, wrapped: str = "") -> Path:
    """Model and AdamW, after a step, as a wrapper around the model would name them."""
    named = [(wrapped + name, parameter) for name, parameter in model.named_parameters()]
    checkpoint = {"model": {wrapped + name: value for name, value in model.state_dict().items()}}
    if optimizer:
        adam = torch.optim.AdamW(named, lr=1e-3)
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        adam.step()
        checkpoint["optimizer"] = adam.state_dict()
    torch.save(checkpoint, path)
    return path


def test_a_suggested_plan_fits_and_gives_the_targets_names(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", model_of("encoder"), wrapped="module.")
    new = saved(tmp_path / "new.pt", model_of("encoder", fused=True), optimizer=False)
    report = optimstate.suggest(old, new)
    assert report.complete
    assert not report.unused
    assert all(0 < rule.confidence <= 1 and rule.reason for rule in report.rules)
    plan = Plan.from_toml(report.plan)
    assert plan.rules == tuple(rule for text in report.rules for rule in Plan.from_toml(text.toml).rules)
    assert optimstate.surgery.check_plan(plan, old, target=new).fits
    optimstate.remap(old, tmp_path / "moved.pt", plan)
    before, moved = torch.load(old), torch.load(tmp_path / "moved.pt")
    assert {name.removeprefix("module.") for name in moved["model"]} == set(torch.load(new)["model"])
    parts = [before["model"][f"module.encoder.1.{x}.weight"] for x in "qkv"]
    assert torch.equal(moved["model"]["module.encoder.1.qkv.weight"], torch.cat(parts))


REAL = [
    "accelerate/save_state_adamw",
    "dcp/single_adamw_nested",
    "deepspeed/z3_ws2_bf16_adamw",
    "lightning/adamw_named_groups",
    "optimstate/ema_averaged_model",
    "stable_baselines3/ppo",
    "torch/compile_prefixed_adamw",
    "torch/tied_adam_named",
    "transformers/llama_tied_sharded",
]


@pytest.mark.parametrize("headers", [False, True], ids=["contents", "headers"])
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_whose_modules_are_renamed(name: str, headers: bool, tmp_path: Path) -> None:
    """What renames the commonest outermost module is found again, and does to the file what the rename did."""
    source = corpus.case(name).entry
    if name.startswith("deepspeed"):  # read, but not written, as it is
        optimstate.convert(source, tmp_path / "whole.pt", drop_opaque=True)
        source = tmp_path / "whole.pt"
    names = [row.target for row in optimstate.surgery.show_plan(Plan(), source).rows if row.section.startswith("model")]
    ((top, _),) = Counter(name.split(".")[0] for name in names if "." in name).most_common(1)
    renamed, again = (tmp_path / f"{word}{source.suffix}" for word in ("renamed", "again"))
    optimstate.remap(source, renamed, Plan.from_options(rename=[f"{top}.{{p**}}=other_{top}.{{p}}"]))
    report = optimstate.suggest(source, renamed, headers=headers)
    assert report.complete
    optimstate.remap(source, again, Plan.from_toml(report.plan))
    difference = optimstate.diff(renamed, again)
    assert (difference.changes, difference.equal > 0) == ((), True)


def test_contents_settle_what_shapes_leave_open(tmp_path: Path) -> None:
    """Two layers of one shape under names that tell nothing: only the weights say which is which."""
    torch.manual_seed(0)
    one, two = torch.randn(4, 4), torch.randn(4, 4)
    torch.save({"model": {"a.weight": one, "b.weight": two}}, tmp_path / "old.pt")
    torch.save({"model": {"x.weight": two, "y.weight": one}}, tmp_path / "new.pt")
    sure = optimstate.suggest(tmp_path / "old.pt", tmp_path / "new.pt")
    assert {(rule.rule, rule.confidence) for rule in sure.rules} == {
        ("a.weight -> y.weight", 1.0),
        ("b.weight -> x.weight", 1.0),
    }
    optimstate.remap(tmp_path / "old.pt", tmp_path / "moved.pt", Plan.from_toml(sure.plan))
    moved, wanted = torch.load(tmp_path / "moved.pt")["model"], torch.load(tmp_path / "new.pt")["model"]
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted)
    unsure = optimstate.suggest(tmp_path / "old.pt", tmp_path / "new.pt", headers=True)
    assert all(rule.confidence < 0.8 for rule in unsure.rules)


def test_weights_that_were_trained_on_are_no_reason_to_rename(tmp_path: Path) -> None:
    model = model_of("encoder")
    old = saved(tmp_path / "old.pt", model)
    new = saved(tmp_path / "new.pt", model)  # a step later: every tensor differs
    report = optimstate.suggest(old, new)
    assert (report.rules, report.missing, report.unused) == ((), (), ())


def test_what_nothing_explains_is_listed_and_the_plan_says_so() -> None:
    report = optimstate.suggest(DENSE, EXPERTS)
    assert report.missing == ("layers.0.router.weight", "layers.1.router.weight")
    assert not report.complete
    assert "#   layers.0.router.weight" in report.plan
    assert Plan.from_toml(report.plan).rules


def test_names_that_no_comment_can_hold_do_not_spoil_the_plan(tmp_path: Path) -> None:
    torch.save({"model": {"w\n[[rule]]\x07": torch.zeros(3), "a.w": torch.ones(2)}}, tmp_path / "old.pt")
    torch.save({"model": {"b.w": torch.ones(2)}}, tmp_path / "new.pt")
    report = optimstate.suggest(tmp_path / "old.pt", tmp_path / "new.pt")
    assert [str(rule) for rule in Plan.from_toml(report.plan).rules] == ["a.w -> b.w"]


def test_a_checkpoint_without_names_cannot_be_compared(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"nothing\.pt.*names no parameters"):
        optimstate.suggest(tmp_path / "nothing.pt", DENSE)


# --- check ----------------------------------------------------------------------------------------------------------


def test_every_problem_is_found_at_once(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", model_of("encoder"))
    new = saved(tmp_path / "new.pt", model_of("blocks", width=7))
    plan = Plan.from_options(rename=["encoder.{i}.{p**}=blocks.{i}.{p}", "nowhere.{p}=x.{p}"])
    report = optimstate.surgery.check_plan(plan, old, target=new)
    assert not report.fits
    text = "\n".join(map(str, report.problems))
    for mention in ("'nowhere.{p}' matches none", "[5, 8], the target has [7, 8]", "[5], the target has [7]"):
        assert mention in text
    assert sum(problem.kind == "shape" for problem in report.problems) == 4  # the model's two, the optimizer's two
    assert len(set(report.problems)) == len(report.problems)


def test_a_plan_that_fits_says_what_each_rule_matches(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", model_of("encoder"))
    new = saved(tmp_path / "new.pt", model_of("blocks"), optimizer=False)
    report = optimstate.surgery.check_plan(
        Plan.from_options(rename=["encoder.{i}.{p**}=blocks.{i}.{p}"]), old, target=new
    )
    assert report.fits
    parameters, buffers = 3 * 8, 3 * 3
    assert report.rules == (("encoder.{i}.{p**} -> blocks.{i}.{p}", 2 * parameters + buffers),)
    assert report.irreversible == ""


def test_parameters_of_the_target_can_be_declared_new_by_a_pattern(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", model_of("encoder"))
    larger = model_of("encoder")
    larger.add_module("extra", nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    new = saved(tmp_path / "new.pt", larger)
    declared = Plan.from_options(fresh=["extra.**"])
    assert optimstate.surgery.check_plan(declared, old, target=new).fits
    assert not optimstate.surgery.check_plan(declared, old).fits
    undeclared = optimstate.surgery.check_plan(Plan(), old, target=new)
    assert any(p.kind == "unfilled" and p.names == ("extra.0.weight",) for p in undeclared.problems)


def test_a_target_without_anything_to_compare_is_a_problem(tmp_path: Path) -> None:
    alone = tmp_path / "nothing.pt"
    torch.save({"epoch": 3}, alone)
    report = optimstate.surgery.check_plan(Plan(), saved(tmp_path / "old.pt", model_of("encoder")), target=alone)
    assert any(problem.kind == "section" for problem in report.problems)
    with pytest.raises(ValueError, match="needs a checkpoint"):
        optimstate.surgery.check_plan(Plan(), target=alone)


def test_what_becomes_of_an_optimizer_without_names_is_a_problem() -> None:
    anonymous = corpus.case("transformers/gpt2_adamw").entry
    report = optimstate.surgery.check_plan(Plan.from_options(drop=["transformer.wpe.weight"]), anonymous)
    assert any("no parameter names" in str(problem) for problem in report.problems)


def test_neither_checking_nor_the_others_import_torch(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[rule]]\nfrom = "layers.{i}.mlp.fc1.weight"\nto = "layers.{i}.up.weight"\ntranspose = true\n')
    code = f"""
import sys
import optimstate
from optimstate.surgery.plans import inverting
from optimstate.surgery.writing.settings import with_options
from optimstate.plan.language.plan import Plan
plan = Plan.from_file({str(plan)!r})
optimstate.surgery.check_plan(plan, {str(DENSE)!r}, target={str(EXPERTS)!r})
optimstate.surgery.show_plan(plan, {str(DENSE)!r})
inverting.invert_plan(plan, {str(DENSE)!r})
optimstate.suggest({str(DENSE)!r}, {str(EXPERTS)!r})
with_options(plan, {str(DENSE)!r}, ["lr=0.5"])
print(sorted({{"torch", "numpy", "typer", "rich"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- invert and show ------------------------------------------------------------------------------------------------


def test_an_inverse_gives_back_every_byte(tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", model_of("encoder"))
    plan = Plan.from_toml(
        '[[rule]]\nfrom = "encoder.{i}.{x=q|k|v}.{p}"\nto = "blocks.{i}.qkv.{p}"\nconcat = 0\n\n'
        '[[rule]]\nfrom = "head.weight"\nto = "out.weight"\ntranspose = true\n'
    )
    before = digest(old)
    report = inverting.invert_plan(plan, old)
    optimstate.remap(old, tmp_path / "there.pt", plan)
    optimstate.remap(tmp_path / "there.pt", tmp_path / "back.pt", Plan.from_toml(report.plan))
    there, back = torch.load(old), torch.load(tmp_path / "back.pt")
    assert {name: unlike(value, back["model"][name]) for name, value in there["model"].items()} == dict.fromkeys(
        there["model"]
    )
    assert digest(old) == before


def test_what_cannot_be_undone_names_the_rules() -> None:
    plan = Plan.from_options(drop=["head.**"], duplicate=["fc=fc1,fc2"])
    with pytest.raises(PlanError, match=r"rule 1 copies 'fc'.*rule 2 drops 'head"):
        inverting.invert_plan(plan)
    assert "rule 2 drops" in optimstate.surgery.show_plan(plan).irreversible


def test_showing_has_a_row_for_every_slot_of_every_parameter() -> None:
    plan = Plan.from_options(fresh=["**.norm.*"], drop=["embed.weight"])
    report = optimstate.surgery.show_plan(plan, DENSE)
    checkpoint = torch.load(DENSE)
    named = checkpoint["optimizer"]["param_groups"]
    names = [name for group in named for name in group["param_names"] if name != "embed.weight"]
    rows = [row for row in report.rows if row.section.startswith("optimizer") and row.target]
    assert [(row.target, row.slot) for row in rows] == [
        (name, slot) for name in names for slot in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert {row.outcome for row in rows if ".norm." in row.target} == {"fresh"}
    assert {row.outcome for row in rows if ".norm." not in row.target} == {"exact"}
    assert [row.sources for row in report.rows if row.outcome == "dropped"] == [("embed.weight",)] * 2


def test_a_plan_is_never_written_over_something(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    files.check_plan_destination(path)
    files.save_plan("# a plan\n", path)
    with pytest.raises(DestinationExistsError):
        files.check_plan_destination(path)
    files.check_plan_destination(path, force=True)
    files.check_plan_destination("-")
    assert path.read_text() == "# a plan\n"


# --- what became of every slot --------------------------------------------------------------------------------------


def test_a_report_counts_every_slot_and_parameter(tmp_path: Path) -> None:
    plan = Plan.from_toml(
        '[[rule]]\nfrom = "layers.{i}.mlp.fc2.weight"\nto = "layers.{i}.mlp.fc2.weight"\n'
        "resize = { dim = 0, size = 10 }\n\n"
        '[[rule]]\nfresh = "**.norm.*"\n\n[[rule]]\ndrop = "embed.weight"\n'
    )
    report = optimstate.remap(DENSE, tmp_path / "out.pt", plan)
    found = {(row.slot, row.outcome): row.parameters for row in report.outcomes["optimizer optimizer"]}
    assert found == {
        ("step", "exact"): 6,
        ("exp_avg", "exact"): 4,
        ("exp_avg_sq", "exact"): 4,
        ("exp_avg", "approximate"): 2,
        ("exp_avg_sq", "approximate"): 2,
        **{(slot, "fresh"): 4 for slot in ("step", "exp_avg", "exp_avg_sq")},
        ("", "dropped"): 1,
    }
    assert all(row.reason for row in report.outcomes["optimizer optimizer"] if row.outcome in ("approximate", "fresh"))
    state = torch.load(tmp_path / "out.pt")["optimizer"]
    assert sum("exp_avg" in slots for slots in state["state"].values()) == 4 + 2
    assert Plan.from_toml(report.plan) == plan


def test_the_counts_are_those_of_the_rows() -> None:
    plan = Plan.from_options(duplicate=["layers.{i}.mlp.fc1.{p}=layers.{i}.e.{e=0..2}.{p}"], fresh=["**.norm.*"])
    report = optimstate.remap(DENSE, None, plan, dry_run=True)
    rows = Counter(
        (row.section, row.slot, row.outcome, row.reason) for row in optimstate.surgery.show_plan(plan, DENSE).rows
    )
    counted = {
        (section, row.slot, row.outcome, row.reason): row.parameters
        for section, found in report.outcomes.items()
        for row in found
    }
    assert counted == rows


def states(names: str, *, named: bool = True, groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """A model of parameters of one shape, and AdamW with some param groups."""
    torch.manual_seed(0)
    values = {name: torch.nn.Parameter(torch.randn(3, 3)) for name in sorted(names)}
    parameters = {name: values[name] for name in names}
    made = [[(name, parameters[name]) for name in group] for group in groups or (names,)]
    if not named:
        made = [[parameter for _, parameter in group] for group in made]
    optimizer = torch.optim.AdamW([{"params": group} for group in made], lr=0.1)
    return {"model": {n: p.detach() for n, p in parameters.items()}, "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (states("abc"), states("abc"), []),
        (states("abc", named=False), states("abc", named=False), []),
        (states("abc"), states("acb"), ["order"]),
        (states("abc", named=False), states("acb", named=False), ["order"]),
        (states("abc"), {"model": states("acb")["model"]}, ["order"]),
        (states("abc"), states("abc", groups=("ab", "c")), ["group"]),
        (states("abc", groups=("ab", "c")), states("abc", groups=("a", "bc")), ["group"]),
        (states("abc", groups=("ab", "c")), states("abc", named=False, groups=("a", "bc")), ["group"]),
        (states("abc", named=False), states("abc", named=False, groups=("ab", "c")), ["group"]),
        (states("abc", groups=("ab", "c")), states("abc", groups=("ba", "c")), ["order"]),
    ],
)
def test_what_a_load_by_position_would_get_wrong_is_said(
    old: dict[str, Any], new: dict[str, Any], kinds: list[str], tmp_path: Path
) -> None:
    torch.save(old, tmp_path / "old.pt")
    torch.save(new, tmp_path / "new.pt")
    report = optimstate.suggest(tmp_path / "old.pt", tmp_path / "new.pt")
    assert [problem.kind for problem in report.positions] == kinds
    assert report.complete == (not kinds)
    assert ("nothing to do" in str(report)) == (not kinds)
    assert all(problem.remedy for problem in report.positions)


def test_reshapes_chosen_and_interleaved_rows_are_found_in_files_and_the_plan_makes_them(tmp_path: Path) -> None:
    torch.manual_seed(1)
    old = {"patch.weight": torch.randn(4, 3, 2, 2), "embed.weight": torch.randn(9, 4), "qkv.weight": torch.randn(12, 4)}
    new = {
        "patch.linear.weight": old["patch.weight"].reshape(4, 12).clone(),
        "embed.weight": old["embed.weight"][[7, 0, 3]].clone(),
        **{f"{name}.weight": old["qkv.weight"][start::3].clone() for start, name in enumerate("qkv")},
    }
    torch.save({"model": old}, tmp_path / "old.pt")
    torch.save({"model": new}, tmp_path / "new.pt")
    report = optimstate.suggest(tmp_path / "old.pt", tmp_path / "new.pt")
    assert report.complete, str(report)
    assert {rule.confidence for rule in report.rules} == {1.0}
    optimstate.remap(tmp_path / "old.pt", tmp_path / "made.pt", Plan.from_toml(report.plan))
    made = torch.load(tmp_path / "made.pt")["model"]
    assert made.keys() == new.keys()
    assert all(torch.equal(made[name], value) for name, value in new.items())


def kept(
    folder: Path, name: str, optimizer: Any = torch.optim.AdamW, dtype: Any = torch.float32, **options: Any
) -> Path:
    """A checkpoint of a small run, without a step."""
    model = nn.Linear(2, 3, dtype=dtype)
    made = optimizer(model.named_parameters(), lr=options.pop("lr", 0.1), **options)
    torch.save({"model": model.state_dict(), "optimizer": made.state_dict()}, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("other", "complete", "mention"),
    [
        ({"optimizer": torch.optim.SGD, "momentum": 0.9}, False, 'optimizer = "SGD"'),
        ({"optimizer": torch.optim.Adam}, False, 'optimizer = "Adam"'),
        ({"weight_decay": 0.5}, False, "weight_decay is 0.01 here and 0.5 there"),
        ({"amsgrad": True}, False, "amsgrad is False here and True there"),
        ({"lr": 0.2}, False, "lr is 0.1 here and 0.2 there"),
        ({"dtype": torch.float64}, True, "dtype float32 here, float64 there"),
        ({"foreach": True}, True, "nothing to do"),
        ({}, True, "nothing to do"),
    ],
    ids=str,
)
def test_what_differs_besides_names_and_shapes_is_said(
    other: dict[str, Any], complete: bool, mention: str, tmp_path: Path
) -> None:
    report = optimstate.suggest(kept(tmp_path, "a.pt"), kept(tmp_path, "b.pt", **other), headers=True)
    assert report.complete == complete
    assert mention in str(report)
    assert ("nothing to do" in str(report)) == (mention == "nothing to do")
