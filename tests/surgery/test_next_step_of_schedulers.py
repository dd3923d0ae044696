"""What torch's schedulers cannot take a step with is a fault, in every field and in a scheduler within another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch.optim import lr_scheduler as torchs

import optimstate
from optimstate.errors import OptimStateError

Tree = dict[str, Any]
Made = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Made] = {
    "StepLR": lambda o: torchs.StepLR(o, 2),
    "MultiStepLR": lambda o: torchs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: torchs.ConstantLR(o, total_iters=9),
    "LinearLR": lambda o: torchs.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o: torchs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torchs.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: torchs.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: torchs.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, 0.1, total_steps=20),
    "LambdaLR": lambda o: torchs.LambdaLR(o, lambda step: 0.9**step),
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: torchs.SequentialLR(o, [torchs.ConstantLR(o), torchs.ExponentialLR(o, 0.9)], [6]),
    "ChainedScheduler": lambda o: torchs.ChainedScheduler([torchs.ConstantLR(o), torchs.ExponentialLR(o, 0.9)]),
}
VALUES: list[Any] = ["x", None, [], {}, math.nan, [math.nan, math.nan], ["x", "x"], [1.0], torch.ones(2)]
IGNORED = {"_last_lr", "_is_initial", "_get_lr_called_within_step", "verbose", "_scale_fn_custom"}


def run(name: str) -> tuple[torch.optim.Optimizer, Any]:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def stepped(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, torchs.ReduceLROnPlateau) else []))


def checkpoint(name: str) -> Tree:
    optimizer, scheduler = run(name)
    for _ in range(4):
        stepped(optimizer, scheduler)
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}


def resumes(name: str, saved: Tree) -> bool:
    """Whether a run goes on for three steps, with rates that are numbers."""
    optimizer, scheduler = run(name)
    saved = copy.deepcopy(saved)
    try:
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["lr_scheduler"])
        for _ in range(3):
            stepped(optimizer, scheduler)
        return all(math.isfinite(group["lr"]) for group in optimizer.param_groups)
    except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError):
        return False


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every mapping of a scheduler's state with one of its keys."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in IGNORED:
                yield node, key
            yield from places(value)
    elif isinstance(node, list):
        for item in node:
            yield from places(item)


def faults(saved: Tree, path: Path) -> list[str]:
    torch.save(saved, path)
    return [str(finding) for finding in optimstate.verify(path, numbers=False).findings if finding.level == "fault"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_field_that_torch_cannot_step_with_is_a_fault(name: str, tmp_path: Path) -> None:
    saved = checkpoint(name)
    assert faults(saved, tmp_path / "a.pt") == []
    assert resumes(name, saved)
    for fields, key in list(places(saved["lr_scheduler"])):
        kept = fields[key]
        for value in VALUES:
            fields[key] = value
            if not resumes(name, saved):
                assert faults(saved, tmp_path / "a.pt"), (key, value)
        fields[key] = kept


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_field_that_hides_a_method_is_a_fault(name: str, tmp_path: Path) -> None:
    saved = checkpoint(name)
    saved["lr_scheduler"]["step"] = 3
    assert any("method" in line for line in faults(saved, tmp_path / "a.pt"))


def test_bounds_that_the_groups_lack_are_a_fault(tmp_path: Path) -> None:
    saved = checkpoint("OneCycleLR")
    del saved["optimizer"]["param_groups"][1]["max_lr"]
    assert not resumes("OneCycleLR", saved)
    assert any("max_lr" in line for line in faults(saved, tmp_path / "a.pt"))


def test_a_scheduler_that_is_not_of_torch_is_said_not_to_be_checked(tmp_path: Path) -> None:
    saved = checkpoint("ExponentialLR")
    saved["lr_scheduler"]["decay_mode"] = saved["lr_scheduler"].pop("gamma")
    torch.save(saved, tmp_path / "a.pt")
    assert any("not one of torch's" in line for line in optimstate.verify(tmp_path / "a.pt").blind)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_distributed_checkpoint_of_it_is_healthy(name: str, tmp_path: Path) -> None:
    torch.distributed.checkpoint.save(checkpoint(name), checkpoint_id=str(tmp_path / "dcp"))
    assert optimstate.verify(tmp_path / "dcp", numbers=False).healthy
    plan = optimstate.Plan.from_toml("[[group]]\nset = { lr = 0.05 }\n")
    optimstate.remap(tmp_path / "dcp", tmp_path / "b", plan)


def spoilt(saved: Tree) -> Iterator[None]:
    """The scheduler's state with each of the values in each field."""
    for fields, key in list(places(saved["lr_scheduler"])):
        kept = fields[key]
        for value in VALUES:
            fields[key] = value
            yield
        fields[key] = kept


def with_tensors(node: Any) -> Any:
    """The state with a tensor in place of every fraction, as schedules of a rate that is a tensor keep them."""
    if isinstance(node, dict):
        return {key: with_tensors(value) for key, value in node.items()}
    if isinstance(node, list):
        return [with_tensors(value) for value in node]
    return torch.tensor(node, dtype=torch.float64) if type(node) is float else node


@pytest.mark.parametrize("name", SCHEDULERS)
def test_tensors_of_one_number_are_computed_with(name: str, tmp_path: Path) -> None:
    saved, plan = checkpoint(name), optimstate.Plan.from_toml("[[group]]\nset = { lr = 0.05 }\n")
    made = []
    for number, state in enumerate((saved["lr_scheduler"], with_tensors(saved["lr_scheduler"]))):
        torch.save({**saved, "lr_scheduler": state}, tmp_path / f"{number}.pt")
        assert optimstate.verify(tmp_path / f"{number}.pt", numbers=False).healthy
        report = optimstate.remap(tmp_path / f"{number}.pt", tmp_path / f"{number}.out.pt", plan)
        told = any("tensors of one number" in note for note in report.notes)
        assert told == (number == 1) or name == "ReduceLROnPlateau"  # which needs nothing computed
        made.append(torch.load(tmp_path / f"{number}.out.pt", weights_only=False))
    assert made[1]["optimizer"]["param_groups"] == made[0]["optimizer"]["param_groups"]
    assert resumes(name, made[1])


ARGUMENTS: dict[str, str] = {
    "StepLR": "gamma = 0.5",
    "MultiStepLR": "milestones = [3, 9]",
    "ConstantLR": "total_iters = 12",
    "LinearLR": "end_factor = 0.5",
    "ExponentialLR": "gamma = 0.5",
    "PolynomialLR": "power = 2.0",
    "CosineAnnealingLR": "T_max = 20",
    "CosineAnnealingWarmRestarts": "T_0 = 5",
    "CyclicLR": "gamma = 0.5",
    "OneCycleLR": "total_steps = 40",
    "ReduceLROnPlateau": "patience = 4",
    "SequentialLR": "milestones = [9]",
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plan_that_computes_with_a_damaged_state_is_refused_or_done(name: str, tmp_path: Path) -> None:
    saved = checkpoint(name)
    plans = ["[[group]]\nset = { lr = 0.05 }\n", f"[scheduler]\nset = {{ {ARGUMENTS.get(name, 'gamma = 0.5')} }}\n"]
    for number, _ in enumerate(spoilt(saved)):
        torch.save(saved, tmp_path / "a.pt")
        with suppress(OptimStateError):  # any other error is a crash
            optimstate.remap(tmp_path / "a.pt", None, optimstate.Plan.from_toml(plans[number % 2]), dry_run=True)


@pytest.mark.parametrize("target", ["Lion", "NAdam", "Adamax", "AdamW"])
def test_an_optimizer_that_becomes_another_keeps_the_bounds_of_its_schedule(target: str, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    scheduler = torchs.OneCycleLR(optimizer, 0.1, total_steps=20)
    weight.sum().backward()
    stepped(optimizer, scheduler)
    torch.save({"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}, tmp_path / "a.pt")
    optimstate.convert(tmp_path / "a.pt", tmp_path / "b.pt", optimizer=target)
    made = torch.load(tmp_path / "b.pt")["optimizer"]["param_groups"][0]
    bounds = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
    assert [made[key] for key in bounds] == [optimizer.param_groups[0][key] for key in bounds]
    assert optimstate.verify(tmp_path / "b.pt").healthy
