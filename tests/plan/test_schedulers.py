"""Schedulers follow the groups of a migration: as if the run had had these groups and learning rates from the start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate import hooks
from optimstate.errors import MigrationError
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan

Schedules = torch.optim.lr_scheduler


def sequential(optimizer: Any) -> Any:
    parts = [Schedules.LinearLR(optimizer, 0.1, total_iters=4), Schedules.CosineAnnealingLR(optimizer, 20)]
    return Schedules.SequentialLR(optimizer, parts, [4])


SCHEDULERS = {
    "cosine": lambda optimizer: Schedules.CosineAnnealingLR(optimizer, 20),
    "step": lambda optimizer: Schedules.StepLR(optimizer, 3, 0.5),
    "sequential": sequential,
}
EPOCHS = 6


def started(make: Any, *lrs: float) -> tuple[Any, Any]:
    """A run with one parameter a learning rate, after some epochs; with one rate, of two parameters."""
    named = [(name, torch.nn.Parameter(torch.ones(2))) for name in "ab"]
    split = [[named[0]], [named[1]]] if len(lrs) > 1 else [named]
    groups = [{"params": members, "lr": lr} for members, lr in zip(split, lrs, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=9.0, momentum=0.9)
    scheduler = make(optimizer)
    for _ in range(EPOCHS):
        going_on(optimizer, scheduler, 1)
    return optimizer, scheduler


def going_on(optimizer: Any, scheduler: Any, epochs: int) -> list[list[float]]:
    rates = []
    for _ in range(epochs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def by_file(tmp_path: Path, plan: Plan, saved: dict[str, Any], target: Any) -> dict[str, Any]:
    """Both states after a plan, by way of a file."""
    torch.save(saved, tmp_path / "old.pt")
    document = open_checkpoint(tmp_path / "old.pt")
    tree, _, _ = apply_plan(plan, document.tree)
    get_format("torch").write(tree, tmp_path / "new.pt", like=document)
    made: dict[str, Any] = torch.load(tmp_path / "new.pt", weights_only=False)
    return made


def by_hook(tmp_path: Path, plan: Plan, saved: dict[str, Any], target: Any) -> dict[str, Any]:
    """Both states after the same plan, by the hooks."""
    hook = hooks.migrate(plan)
    made = hook(target, saved["optimizer"])
    return {"optimizer": made, "scheduler": hooks.migrate_scheduler(saved["scheduler"], hook.moves)}


def states(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    return copy.deepcopy({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})


def lists(state: dict[str, Any]) -> Any:
    """A scheduler's state without what its nested ones set last, which only they remember."""
    nested = [{**part, "_last_lr": None} for part in state.get("_schedulers", ())]
    return {**state, "_schedulers": nested}


pytestmark = [
    pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning"),
    pytest.mark.parametrize("door", [by_file, by_hook], ids=["file", "hook"]),
]


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("lrs", [(0.02, 0.01), (0.02,)], ids=["another group", "the same group"])
def test_a_group_with_another_learning_rate_goes_on_as_if_it_had_always_had_it(
    make: Any, lrs: tuple[float, ...], door: Any, tmp_path: Path
) -> None:
    saved = states(*started(make, 0.01))
    reference, schedule = started(make, *lrs)
    options = f"lr = {reference.param_groups[0]['lr']!r}, initial_lr = 0.02"
    match = "a" if len(lrs) > 1 else "**"
    text = f'[[group]]\nmatch = "{match}"\nset = {{ {options} }}\n'
    plan = Plan.from_toml(text + '[[group]]\nmatch = "**"\n' * (len(lrs) > 1))
    optimizer, scheduler = started(make, *lrs)
    given = copy.deepcopy(saved)
    made = door(tmp_path, plan, saved, optimizer)
    assert saved["scheduler"] == given["scheduler"]
    assert lists(made["scheduler"]) == lists(schedule.state_dict())
    for group in optimizer.param_groups:  # what is loaded must decide, not what was there
        group["lr"] = group["initial_lr"] = 7.0
    optimizer.load_state_dict(made["optimizer"])
    scheduler.load_state_dict(made["scheduler"])
    assert hooks.resume_problems(optimizer, scheduler=scheduler) == []
    rates = going_on(reference, schedule, 10)
    assert going_on(optimizer, scheduler, 10) == rates
    assert len(set(map(tuple, rates))) > 2


def test_a_plan_that_leaves_groups_alone_leaves_the_scheduler_alone(door: Any, tmp_path: Path) -> None:
    saved = states(*started(SCHEDULERS["cosine"], 0.02, 0.01))
    optimizer, _ = started(SCHEDULERS["cosine"], 0.02, 0.01)
    plan = Plan.from_toml('[[group]]\nmatch = "a"\nset = { momentum = 0.5 }\n[[group]]\nmatch = "**"\n')
    made = door(tmp_path, plan, saved, optimizer)
    assert made["scheduler"] == saved["scheduler"]
    assert [group["momentum"] for group in made["optimizer"]["param_groups"]] == [0.5, 0.9]


def test_options_of_another_group_bring_its_schedule(door: Any, tmp_path: Path) -> None:
    saved = states(*started(SCHEDULERS["step"], 0.02, 0.01))
    optimizer, _ = started(SCHEDULERS["step"], 0.02, 0.01)
    for group in optimizer.param_groups:  # alike, so that no difference would be lost
        group["lr"] = group["initial_lr"] = 1.0
    plan = Plan.from_toml('[[group]]\nmatch = "a"\nlike = 1\n[[group]]\nmatch = "**"\n')
    made = door(tmp_path, plan, saved, optimizer)
    assert made["scheduler"]["base_lrs"] == [0.01, 0.01]
    assert made["scheduler"]["_last_lr"] == [group["lr"] for group in made["optimizer"]["param_groups"]]


def test_nested_schedulers_that_start_from_different_rates_are_not_set_to_one(door: Any, tmp_path: Path) -> None:
    def make(optimizer: Any) -> Any:
        cycle = Schedules.CyclicLR(optimizer, 0.001, 0.1, cycle_momentum=False)
        parts = [cycle, Schedules.StepLR(optimizer, 3)]
        parts[1].base_lrs = [0.5]
        return Schedules.SequentialLR(optimizer, parts, [4])

    saved = states(*started(make, 0.01))
    optimizer, _ = started(make, 0.01)
    plan = Plan.from_toml('[[group]]\nmatch = "**"\nset = { initial_lr = 0.25 }\n')
    with pytest.raises(MigrationError, match=r"start from 0\.25, but its schedulers start from 0\.0?0?1 and 0\.5"):
        door(tmp_path, plan, saved, optimizer)
