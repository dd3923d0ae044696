"""`verify` finds what was planted, and nothing in healthy files of real frameworks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import CheckpointError
from optimstate.installed_torch import has_dtype
from optimstate.plan.language.plan import Plan
from optimstate.surgery.verification.verifying import verify, verify_against
from optimstate.surgery.writing.remapping import remap
from tests.corpus import Case, all_cases, case

Checkpoint = dict[str, Any]


def trained(steps: int = 5) -> Checkpoint:
    """A healthy run: model, named AdamW in two groups, scheduler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    named = list(model.named_parameters())
    groups = [
        {"params": [pair for pair in named if pair[1].ndim > 1], "weight_decay": 0.1},
        {"params": [pair for pair in named if pair[1].ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


def slots(checkpoint: Checkpoint, key: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint["optimizer"]["state"][key]
    return found


def zero_moments(c: Checkpoint) -> None:
    slots(c)["exp_avg"].zero_()
    slots(c)["exp_avg_sq"].zero_()


def empty_second_moment(c: Checkpoint) -> None:
    slots(c)["exp_avg_sq"].zero_()


def missing_slot(c: Checkpoint) -> None:
    del slots(c)["exp_avg_sq"]


def orphan_state(c: Checkpoint) -> None:
    c["optimizer"]["state"][99] = slots(c)


def step_mismatch(c: Checkpoint) -> None:
    slots(c)["step"].fill_(3.0)


def stale_learning_rate(c: Checkpoint) -> None:
    c["optimizer"]["param_groups"][1]["lr"] = 1e-3


def rate_of_another_decimal(c: Checkpoint) -> None:
    c["optimizer"]["param_groups"][1]["lr"] *= 1 + 1e-4


def other_number_of_groups(c: Checkpoint) -> None:
    c["scheduler"]["_last_lr"] = [1e-3]


def not_a_number(c: Checkpoint) -> None:
    slots(c)["exp_avg"][0, 0] = float("nan")


def infinite(c: Checkpoint) -> None:
    slots(c)["exp_avg_sq"][0, 0] = float("inf")


def negative_second_moment(c: Checkpoint) -> None:
    slots(c)["exp_avg_sq"][0, 0] = -1.0


def wrong_dtype(c: Checkpoint) -> None:
    slots(c)["exp_avg"] = slots(c)["exp_avg"].to(torch.bfloat16)


def alias_between_parameters(c: Checkpoint) -> None:
    slots(c, 4)["exp_avg"] = slots(c, 3)["exp_avg"]


def alias_between_moments(c: Checkpoint) -> None:
    slots(c)["exp_avg_sq"] = slots(c)["exp_avg"] = slots(c)["exp_avg"].abs()


def equal_moments(c: Checkpoint) -> None:
    slots(c)["exp_avg_sq"] = slots(c)["exp_avg"].abs_().clone()


def wrong_shape(c: Checkpoint) -> None:
    slots(c)["exp_avg"] = slots(c)["exp_avg"].t().contiguous()


def reshaped_with_its_moments(c: Checkpoint) -> None:
    for slot in ("exp_avg", "exp_avg_sq"):
        slots(c)[slot] = slots(c)[slot].reshape(-1)


def name_of_no_weight(c: Checkpoint) -> None:
    c["optimizer"]["param_groups"][0]["param_names"][0] = "9.weight"


def name_given_twice(c: Checkpoint) -> None:
    c["optimizer"]["param_groups"][1]["param_names"][1] = c["optimizer"]["param_groups"][1]["param_names"][0]


FAULTS: list[tuple[Callable[[Checkpoint], None], str]] = [
    (zero_moments, "moments"),
    (empty_second_moment, "moments"),
    (missing_slot, "coverage"),
    (other_number_of_groups, "group"),
    (not_a_number, "numbers"),
    (infinite, "numbers"),
    (negative_second_moment, "numbers"),
    (alias_between_parameters, "aliases"),
    (alias_between_moments, "aliases"),
    (equal_moments, "moments"),
    (wrong_shape, "shapes"),
    (reshaped_with_its_moments, "shapes"),
    (name_of_no_weight, "name"),
    (name_given_twice, "name"),
]


def no_groups(c: Checkpoint) -> None:
    c["optimizer"] = {"state": {}, "param_groups": []}


def no_rate(c: Checkpoint) -> None:
    del c["optimizer"]["param_groups"][0]["lr"]


def step_as_a_number(c: Checkpoint) -> None:
    slots(c)["step"] = 7  # type: ignore[assignment]


def no_model(c: Checkpoint) -> None:
    c["model"] = {}


FAULTS += [(no_groups, "group"), (no_rate, "lr")]
NOTES: list[tuple[Callable[[Checkpoint], None], str]] = [
    (orphan_state, "coverage"),
    (stale_learning_rate, "lr"),
    (rate_of_another_decimal, "lr"),
    (wrong_dtype, "dtypes"),
    (step_mismatch, "steps"),
    (no_model, "section"),
]


@pytest.mark.parametrize(("plant", "check"), NOTES, ids=lambda value: getattr(value, "__name__", value))
def test_what_may_be_right_is_a_note(plant: Callable[[Checkpoint], None], check: str, tmp_path: Path) -> None:
    checkpoint = trained()
    plant(checkpoint)
    report = verify(saved(checkpoint, tmp_path))
    assert report.healthy
    assert check in {finding.kind for finding in report.findings}


def test_neighbours_in_one_storage_share_nothing(tmp_path: Path) -> None:
    checkpoint = trained()
    both = torch.stack([slots(checkpoint)["exp_avg"], slots(checkpoint)["exp_avg_sq"]])
    slots(checkpoint).update(exp_avg=both[0], exp_avg_sq=both[1])
    assert both[0].untyped_storage().data_ptr() == both[1].untyped_storage().data_ptr()
    assert not verify(saved(checkpoint, tmp_path)).findings


def refused_by_torch(checkpoint: Checkpoint) -> bool:
    """Whether an optimizer of the same parameters and groups does not load the state, or fails in its next step."""
    model = {name: torch.nn.Parameter(weight.clone()) for name, weight in trained()["model"].items()}
    groups = trained()["optimizer"]["param_groups"]
    named = [{"params": [(name, model[name]) for name in group["param_names"]]} for group in groups]
    optimizer = torch.optim.AdamW(named)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter in model.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except (RuntimeError, ValueError, KeyError, TypeError):
        return True
    return False


@pytest.mark.parametrize(
    "plant", [*(plant for plant, _ in (*FAULTS, *NOTES)), step_as_a_number], ids=lambda plant: plant.__name__
)
def test_what_torch_refuses_is_a_fault_and_what_is_no_fault_torch_takes(
    plant: Callable[[Checkpoint], None], tmp_path: Path
) -> None:
    checkpoint = trained()
    plant(checkpoint)
    path = saved(checkpoint, tmp_path)
    assert not (refused_by_torch(torch.load(path)) and verify(path).healthy)


def test_a_buffer_that_torch_begins_is_not_missed(tmp_path: Path) -> None:
    weights = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("a", "b", "c")}
    optimizer = torch.optim.SGD([*weights.items()], lr=0.1, momentum=0.9)
    for parameter in weights.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = None
    torch.save({"model": weights, "optimizer": state}, tmp_path / "a.pt")
    assert verify(tmp_path / "a.pt").healthy


def saved(checkpoint: Checkpoint, folder: Path) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(checkpoint, path)
    return path


def test_a_healthy_run_has_no_findings_and_the_report_says_what_cannot_be_seen(tmp_path: Path) -> None:
    report = verify(saved(trained(), tmp_path))
    assert report.healthy
    assert not report.findings
    assert "swapped" in report.blind[0]


@pytest.mark.parametrize(("plant", "check"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_planted_fault_is_found_by_its_check(
    plant: Callable[[Checkpoint], None], check: str, tmp_path: Path
) -> None:
    checkpoint = trained()
    plant(checkpoint)
    report = verify(saved(checkpoint, tmp_path))
    assert check in {finding.kind for finding in report.findings if finding.level == "fault"}
    assert not report.healthy


def test_one_flipped_byte_in_a_storage_is_found_although_torch_loads_it(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path)
    data = bytearray(path.read_bytes())
    moment = torch.load(path, weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    at = bytes(data).index(moment.numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    findings = verify(path).findings
    assert [finding.kind for finding in findings] == ["checksum"]
    assert "exp_avg" in findings[0].message


def test_a_truncated_file_is_a_typed_error(tmp_path: Path) -> None:
    path = saved(trained(), tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="directory"):
        verify(path)


def test_moments_at_the_first_steps_may_be_empty(tmp_path: Path) -> None:
    checkpoint = trained(steps=1)
    zero_moments(checkpoint)
    assert verify(saved(checkpoint, tmp_path)).healthy


def test_fresh_parameters_are_notes(tmp_path: Path) -> None:
    checkpoint = trained()
    del checkpoint["optimizer"]["state"][2]
    report = verify(saved(checkpoint, tmp_path))
    assert report.healthy
    assert [finding.kind for finding in report.findings] == ["coverage"]
    assert "4.weight" in report.findings[0].place


def readable() -> list[Case]:
    named = [found for found in all_cases() if not found.is_hostile and found.framework not in ("optimstate", "")]
    return [found for found in named if found.name != "optimstate/tensors_extremes"]  # NaN among its weights


@pytest.mark.parametrize("case", readable(), ids=str)
def test_healthy_files_of_real_frameworks_pass(case: Case) -> None:
    if case.name == "optimstate/tensors_dtypes" and not has_dtype("float8_e8m0fnu"):
        pytest.skip("this torch lacks one of the dtypes")
    assert [finding for finding in verify(case.entry).findings if finding.level == "fault"] == []


def test_against_its_source_every_byte_is_accounted_for(tmp_path: Path) -> None:
    source, target = saved(trained(), tmp_path), tmp_path / "renamed.pt"
    plan = Plan.from_options(rename=["{i}.{p}=layers.{i}.{p}"])
    remap(source, target, plan)
    assert verify_against(target, source, plan).healthy
    checkpoint = torch.load(target, weights_only=True)
    state = checkpoint["optimizer"]["state"]
    state[3]["exp_avg"], state[4]["exp_avg"] = state[4]["exp_avg"], state[3]["exp_avg"]  # equal shapes, swapped
    torch.save(checkpoint, target)
    assert verify(target).healthy
    assert not verify_against(target, source, plan).healthy


def test_other_steps_are_a_note_as_a_parameter_may_have_been_frozen(tmp_path: Path) -> None:
    checkpoint = trained()
    step_mismatch(checkpoint)
    report = verify(saved(checkpoint, tmp_path))
    assert report.healthy
    assert [finding.kind for finding in report.findings] == ["steps"]


@pytest.mark.parametrize("tree", [{"note": "nothing", "n": [1, 2]}, {"queue": [torch.ones(3)], "epoch": 1}])
def test_what_is_not_recognised_is_not_called_healthy(tree: Any, tmp_path: Path) -> None:
    report = verify(saved(tree, tmp_path))
    assert (report.verdict, report.healthy) == ("unknown", False)
    assert "healthy" not in str(report)


def test_every_tensor_is_looked_at(tmp_path: Path) -> None:
    checkpoint = trained()
    checkpoint["model"]["2.bias"][0] = math.nan
    checkpoint["buffers"] = [torch.tensor([1.0, math.inf])]
    report = verify(saved(checkpoint, tmp_path))
    found = {(finding.level, finding.place) for finding in report.findings if finding.kind == "numbers"}
    assert found == {("fault", "model at model, 2.bias"), ("note", "buffers[0]")}
    assert "25 tensors" in str(report)


def test_what_was_not_read_is_said(tmp_path: Path) -> None:
    report = verify(saved(trained(), tmp_path), numbers=False)
    assert any("not read" in line for line in report.blind)
    quantized = verify(case("torchao/adamw8bit").entry)
    assert any("only dtypes and shapes are known" in line for line in quantized.blind)


def test_experts_that_are_stored_one_by_one_are_no_fault(tmp_path: Path) -> None:
    live = {"l.0.mlp.gate.weight": torch.ones(2, 4), "l.0.mlp.experts.up": torch.ones(2, 4, 4), "l.0.n": torch.ones(4)}
    disk = {"l.0.n": torch.ones(4), "l.0.block_sparse_moe.gate.weight": torch.ones(2, 4)}
    disk |= {f"l.0.block_sparse_moe.experts.{i}.w1.weight": torch.ones(4, 4) for i in range(2)}

    def findings(parameters: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
        named = [(name, torch.nn.Parameter(value)) for name, value in parameters.items()]
        optimizer = torch.optim.AdamW(named)
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        report = verify(saved({"model": disk, "optimizer": optimizer.state_dict()}, tmp_path))
        return [(finding.level, finding.kind) for finding in report.findings]

    assert findings(live) == [("note", "name")]
    live["l.0.mlp.gait.weight"] = live.pop("l.0.mlp.gate.weight")
    assert ("fault", "name") in findings(live)
    live["l.0.mlp.gate.weight"] = live.pop("l.0.mlp.gait.weight")
    live["l.0.mlp.experts.up"] = torch.ones(2, 4, 5)  # not the elements that are stored
    assert ("fault", "name") in findings(live)


@pytest.mark.parametrize(
    ("optimizer", "level"),
    [
        ({"state": {0: {"a": {"b": torch.tensor([math.nan])}}}, "param_groups": [{"params": [0], "lr": 0.1}]}, "fault"),
        ({"state": {5: {"a": torch.tensor([math.nan])}}, "param_groups": [{"params": [0], "lr": 0.1}]}, "note"),
        ({"state": {}, "param_groups": [{"params": [0], "lr": 0.1}], "fp32": [torch.tensor([math.nan])]}, "note"),
    ],
    ids=["within a slot", "of no parameter", "beside the state"],
)
def test_numbers_are_looked_at_wherever_an_optimizer_keeps_them(optimizer: Any, level: str, tmp_path: Path) -> None:
    report = verify(saved({"optimizer": optimizer}, tmp_path))
    assert {finding.level for finding in report.findings if finding.kind == "numbers"} == {level}


@pytest.mark.parametrize("form", ["slots first", "flat", "no params listed"])
def test_optimizer_state_that_is_not_recognised_is_not_healthy(form: str, tmp_path: Path) -> None:
    model = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
    moments = {slot: {name: value * 2 for name, value in model.items()} for slot in ("exp_avg", "exp_avg_sq")}
    state: dict[str, Any] = {
        "slots first": {"adam": moments},
        "flat": {f"{slot}/{name}": value for slot, found in moments.items() for name, value in found.items()},
        "no params listed": {"opt": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}},
    }[form]
    report = verify(saved({"model": model, **state}, tmp_path))
    assert report.verdict == "unknown"
    assert "of optimizer state (exp_avg" in report.unread[0]
    assert "whether a run can resume from it is unknown, as its optimizer state was not recognised" in str(report)


def test_what_torch_reads_and_cannot_use_is_a_fault(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for slots in state["state"].values():
        slots["exp_avg"] = slots["exp_avg"].numpy()
    report = verify(saved({"optimizer": state}, tmp_path))
    assert [finding.kind for finding in report.findings if finding.level == "fault"] == ["dtypes"]
    with pytest.raises(TypeError):
        optimizer.load_state_dict(state)
    weights = {"weight": torch.ones(3, 2, device="meta"), "bias": torch.ones(3)}
    report = verify(saved({"model": weights}, tmp_path))
    assert [(f.kind, f.names) for f in report.findings if f.level == "fault"] == [("numbers", ("weight",))]
    with pytest.raises(RuntimeError, match="meta"):
        model.load_state_dict(weights)
