"""Scheduler states follow their param groups: splits, merges, swaps, and what is refused."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import MigrationError, SchedulerStateWarning
from optimstate.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, LinearLR, SequentialLR
from optimstate.state.scheduler import regroup_scheduler_state, representatives
from tests.optim.lr_scheduler.cases import (
    CASES,
    LIBRARIES,
    OURS,
    STEPS,
    TORCH,
    Case,
    advance,
    by_name,
    exact,
    make_optimizer,
    shown,
    state_loss_allowed,
)
from tests.releases import SCHEDULERS_ARE_VERBOSE

# Until 2.7 torch's SequentialLR warns of itself in every construction.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")

FILES = Path(__file__).parents[2] / "fixtures" / "files"


def regrouped_optimizer_state(state: dict[str, Any], sources: Sequence[int | None]) -> dict[str, Any]:
    """The optimizer's half: each new group (of one parameter) has the options of the old one it stands for."""
    groups = [{**state["param_groups"][old or 0], "params": [new]} for new, old in enumerate(sources)]
    return {"state": {}, "param_groups": groups}


def resume_in_groups(case: Case, saved: Any, group_map: list[list[int]], classes: Any, same_lr: bool = True) -> Any:
    """A new run whose groups are made from those of a saved one."""
    with state_loss_allowed(case):
        state = copy.deepcopy(saved.state_dict())
        optimizer = make_optimizer(case, len(group_map), same_lr=same_lr)
        scheduler = case.build(classes, optimizer)
        sources = representatives(state, group_map)
        optimizer.load_state_dict(regrouped_optimizer_state(saved.optimizer.state_dict(), sources))
        scheduler.load_state_dict(regroup_scheduler_state(state, group_map))
    return scheduler


def go_on_together(scheduler: Any, reference: Any, start: int, group_map: list[list[int]]) -> None:
    for epoch in range(start, STEPS):
        advance(scheduler, epoch)
        advance(reference, epoch)
        expected = [shown(reference.optimizer)[sources[0]] for sources in group_map]
        assert shown(scheduler.optimizer) == expected, f"regrouped after {start}, differs after {epoch + 1}"
        expected_last = [reference.get_last_lr()[sources[0]] for sources in group_map]
        assert exact(scheduler.get_last_lr()) == exact(expected_last)


@pytest.mark.parametrize("classes", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize(**by_name(CASES))
def test_one_group_split_in_two_follows_two_from_the_start(case: Case, classes: Any) -> None:
    stop = random.Random(case.name).randrange(1, 40)
    two_from_the_start = case.build(TORCH, make_optimizer(case, 2, same_lr=True))
    one = case.build(classes, make_optimizer(case, 1))
    for epoch in range(stop):
        advance(two_from_the_start, epoch)
        advance(one, epoch)
    split = resume_in_groups(case, one, [[0], [0]], classes)
    go_on_together(split, two_from_the_start, stop, [[0], [1]])


@pytest.mark.parametrize("classes", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize(**by_name(CASES))
def test_two_groups_merged_into_one_follow_one_from_the_start(case: Case, classes: Any) -> None:
    stop = random.Random(case.name).randrange(1, 40)
    one_from_the_start = case.build(TORCH, make_optimizer(case, 1))
    two = case.build(classes, make_optimizer(case, 2, same_lr=True))
    for epoch in range(stop):
        advance(one_from_the_start, epoch)
        advance(two, epoch)
    merged = resume_in_groups(case, two, [[0, 1]], classes)
    go_on_together(merged, one_from_the_start, stop, [[0]])


# Where the groups have functions of their own, those are the caller's to reorder.
REORDERED = [case for case in CASES if case.name != "LambdaLR-list"]


@pytest.mark.parametrize("group_map", [[[1], [0]], [[1], [0], [1]], [[1]]], ids=str)
@pytest.mark.parametrize(**by_name(REORDERED))
def test_groups_of_their_own_learning_rates_keep_them_in_another_order(case: Case, group_map: list[list[int]]) -> None:
    reference = case.build(OURS, make_optimizer(case, 2))
    for epoch in range(17):
        advance(reference, epoch)
    scheduler = resume_in_groups(case, reference, group_map, OURS, same_lr=False)
    go_on_together(scheduler, reference, 17, group_map)


# The rules, on small states.


def state_of(**lists: Any) -> dict[str, Any]:
    return {"gamma": 0.5, "last_epoch": 3, **lists}


def test_the_given_state_is_not_changed_and_the_rest_is_kept() -> None:
    state = state_of(base_lrs=[0.1, 0.2], _last_lr=[0.05, 0.1], _milestones=[4, 9])
    before = copy.deepcopy(state)
    regrouped = regroup_scheduler_state(state, [[1], [0], [1]])
    assert state == before
    assert regrouped == state_of(base_lrs=[0.2, 0.1, 0.2], _last_lr=[0.1, 0.05, 0.1], _milestones=[4, 9])
    assert list(regrouped) == list(state)
    regrouped["base_lrs"].append(1)
    assert state == before


def test_values_that_go_to_several_groups_share_nothing() -> None:
    lr, memory = torch.tensor(0.1), {"seen": [1], "lr": torch.tensor(2.0)}
    regrouped = regroup_scheduler_state(state_of(base_lrs=[lr], lr_lambdas=[memory]), [[0], [0]])
    regrouped["base_lrs"][1].fill_(7)
    regrouped["lr_lambdas"][1]["seen"].append(2)
    regrouped["lr_lambdas"][1]["lr"].fill_(7)
    assert float(lr) == pytest.approx(0.1)
    assert memory["seen"] == [1]
    assert float(memory["lr"]) == 2.0


def test_every_list_of_every_nested_scheduler_is_rebuilt() -> None:
    inner = state_of(base_lrs=[0.1, 0.2], max_lrs=[1, 2], base_momentums=[3, 4], max_momentums=[5, 6])
    outer = {
        "_last_lr": [7, 8],
        "_schedulers": [{"_schedulers": [inner], "_last_lr": [0, 1]}, state_of(min_lrs=[8, 9])],
    }
    regrouped = regroup_scheduler_state(outer, [[1]])
    assert regrouped == {
        "_last_lr": [8],
        "_schedulers": [
            {
                "_schedulers": [state_of(base_lrs=[0.2], max_lrs=[2], base_momentums=[4], max_momentums=[6])],
                "_last_lr": [1],
            },
            state_of(min_lrs=[9]),
        ],
    }


def test_groups_with_different_values_are_not_merged() -> None:
    state = {
        "_last_lr": [0.1, 0.1],
        "_schedulers": [state_of(base_lrs=[0.1, 0.1], lr_lambdas=[{"k": 1}, None]), state_of(base_lrs=[0.1, 0.3])],
    }
    with pytest.raises(MigrationError) as error:
        regroup_scheduler_state(state, [[0, 1]])
    assert tuple(map(str, error.value.problems)) == (
        "_schedulers[0].lr_lambdas: new group 0 merges old group 0 ({'k': 1}) and old group 1 (None)",
        "_schedulers[1].base_lrs: new group 0 merges old group 0 (0.1) and old group 1 (0.3)",
    )
    for policy in ("'first'", "'min'", "'max'"):
        assert policy in error.value.hint


@pytest.mark.parametrize(("merge", "chosen"), [("first", 1), ("min", 0), ("max", 2)])
def test_a_policy_chooses_one_group_for_all_lists(merge: Any, chosen: int) -> None:
    state = state_of(base_lrs=[0.1, 0.2, 0.3], _last_lr=[3.0, 2.0, 1.0], lr_lambdas=[{"k": 0}, {"k": 1}, {"k": 2}])
    assert representatives(state, [[1, 0, 2], [1]], merge=merge) == [chosen, 1]
    regrouped = regroup_scheduler_state(state, [[1, 0, 2]], merge=merge)
    assert regrouped == state_of(
        **{key: [state[key][chosen]] for key in ("base_lrs", "_last_lr", "lr_lambdas")},
    )


def test_policies_look_at_nested_initial_learning_rates_and_else_at_the_last() -> None:
    nested = {"_last_lr": [1.0, 0.0], "_schedulers": [state_of(base_lrs=[0.1, 0.2])]}
    assert representatives(nested, [[0, 1]], merge="min") == [0]
    assert representatives({"_last_lr": [1.0, 0.0]}, [[0, 1]], merge="min") == [1]
    with pytest.raises(MigrationError, match="neither base_lrs nor _last_lr"):
        representatives({"min_lrs": [1.0, 0.0]}, [[0, 1]], merge="max")


def test_equal_tensors_merge_and_different_ones_are_shown() -> None:
    state = state_of(base_lrs=[torch.tensor(0.5), torch.tensor(0.5)], _last_lr=[torch.tensor(1.0), torch.tensor(2.0)])
    with pytest.raises(
        MigrationError, match=r"_last_lr: .* group 0 \(tensor\(1\.\)\) and old group 1 \(tensor\(2\.\)\)"
    ):
        regroup_scheduler_state(state, [[0, 1]])
    state["_last_lr"] = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])]  # no truth value: not known to be equal
    with pytest.raises(MigrationError, match="_last_lr"):
        regroup_scheduler_state(state, [[0, 1]])
    del state["_last_lr"]
    assert regroup_scheduler_state(state, [[0, 1]])["base_lrs"] == [torch.tensor(0.5)]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="merge must be one of refuse, first, min, max, got 'mean'"):
        regroup_scheduler_state(state_of(base_lrs=[1]), [[0]], merge="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("group_map", [[[0], [2]], [[-1]]])
def test_a_group_map_must_name_groups_that_exist(group_map: list[list[int]]) -> None:
    with pytest.raises(MigrationError, match=r"comes from old group (2|-1), but the scheduler state has 2 groups"):
        regroup_scheduler_state(state_of(base_lrs=[1, 2]), group_map)


def test_lists_that_disagree_are_refused() -> None:
    with pytest.raises(MigrationError, match=r"disagree on the number of param groups \(base_lrs: 1, _last_lr: 2\)"):
        regroup_scheduler_state(state_of(base_lrs=[1], _last_lr=[1, 2]), [[0]])


def test_one_min_lr_for_all_is_remade() -> None:
    state = state_of(default_min_lr=1e-4, min_lrs=[1e-4], _last_lr=[0.1, 0.2])
    assert regroup_scheduler_state(state, [[0], [1], [1]])["min_lrs"] == [1e-4] * 3
    state["default_min_lr"] = None
    with pytest.raises(MigrationError, match=r"disagree .*min_lrs: 1, _last_lr: 2"):
        regroup_scheduler_state(state, [[0]])


def test_a_new_group_needs_values() -> None:
    state = {"_last_lr": [0.1], "_schedulers": [state_of(base_lrs=[0.2], lr_lambdas=[None])]}
    with pytest.raises(MigrationError) as error:
        regroup_scheduler_state(state, [[0], []], fresh={1: {"_last_lr": 0.5}, 0: {"_last_lr": 0.7}, 2: {}})
    assert tuple(map(str, error.value.problems)) == (
        "`fresh` gives values to new group 0, which takes them from old group 0",
        "`fresh` gives values to new group 2, but there are 2 new groups",
        "_schedulers[0].base_lrs: new group 1 comes from no old group and has no value",
        "_schedulers[0].lr_lambdas: new group 1 comes from no old group and has no value",
    )
    fresh = {1: {"_last_lr": 0.5, "base_lrs": 0.6, "lr_lambdas": None}}
    assert regroup_scheduler_state(state, [[0], []], fresh=fresh) == {
        "_last_lr": [0.1, 0.5],
        "_schedulers": [state_of(base_lrs=[0.2, 0.6], lr_lambdas=[None, None])],
    }


def test_lists_of_unknown_schedulers_must_be_explained() -> None:
    state = state_of(own_rates=[1, 2], decay_at=[10, 20], _last_lr=[0.1, 0.2], names=["a", "b", "c"])
    with pytest.raises(MigrationError) as error:
        regroup_scheduler_state(state, [[1]])
    assert len(error.value.problems) == 2
    assert "own_rates is unknown and has 2 entries" in str(error.value.problems[0])
    assert "per_group=['decay_at'] or shared=['decay_at']" in str(error.value.problems[1])
    regrouped = regroup_scheduler_state(state, [[1]], per_group=["own_rates"], shared=["decay_at"])
    assert regrouped == state_of(own_rates=[2], decay_at=[10, 20], _last_lr=[0.2], names=["a", "b", "c"])


def test_a_state_without_lists_needs_nothing() -> None:
    assert regroup_scheduler_state(state_of(), [[0], [0]]) == state_of()


def test_no_torch_is_needed() -> None:
    code = (
        "import sys\n"
        "from optimstate.state.scheduler import regroup_scheduler_state as regroup\n"
        "print(regroup({'base_lrs': [1.0]}, [[0], [0]]), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "{'base_lrs': [1.0, 1.0]} False"


def test_a_split_warmup_of_the_documentation() -> None:
    """Decay and no-decay in the middle of a warm-up, without the case table."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingWarmRestarts(optimizer, 7)], [5]
    )
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    old = optimizer.state_dict()
    split = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], lr=1e-3)
    resumed = SequentialLR(split, [LinearLR(split, 0.1, total_iters=5), CosineAnnealingWarmRestarts(split, 7)], [5])
    (group,) = old["param_groups"]
    groups = [{**group, "params": [0]}, {**group, "params": [1], "weight_decay": 0.0}]
    split.load_state_dict({"state": old["state"], "param_groups": groups})
    resumed.load_state_dict(regroup_scheduler_state(scheduler.state_dict(), [[0], [0]]))
    for _ in range(20):
        scheduler.step()
        resumed.step()
        assert resumed.get_last_lr() == scheduler.get_last_lr() * 2


# States written by other programs.


def read(path: str) -> Any:
    return torch.load(FILES / path, weights_only=True)


def on_an_optimizer_like(saved: dict[str, Any], make: Any, cls: Any = torch.optim.AdamW) -> tuple[Any, Any]:
    """Our and torch's scheduler, each on an optimizer with the saved one's groups and state."""
    made = []
    for classes in (OURS, TORCH):
        groups: list[dict[str, Any]] = []
        for group in saved["param_groups"]:
            names = group.get("param_names")
            params = [torch.nn.Parameter(torch.zeros(())) for _ in group["params"]]
            groups.append({"params": list(zip(names, params, strict=True)) if names else params})
        optimizer = cls(groups, lr=group.get("initial_lr", group["lr"]))
        scheduler = make(classes, optimizer)
        optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
        made.append(scheduler)
    return made[0], made[1]


def linear_schedule(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    """The curve of `get_linear_schedule_with_warmup`, which Trainer wraps in a partial."""
    if step < num_warmup_steps:
        return step / max(1, num_warmup_steps)
    return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))


TRAINER = partial(linear_schedule, num_warmup_steps=0, num_training_steps=4)


def wild(path: str, section: str = "") -> Any:
    tree = read(path)
    for key in section.split("."):
        tree = tree[int(key) if key.isdigit() else key] if key else tree
    return tree


def lightning(case: str) -> tuple[Any, Any]:
    file = f"lightning/{case}/epoch=1-step=8.ckpt"
    return wild(file, "optimizer_states.0"), wild(file, "lr_schedulers.0")


def torch_file(case: str) -> tuple[Any, Any]:
    file = f"torch/adamw_sched_{case}/checkpoint.pt"
    return wild(file, "optimizer"), wild(file, "scheduler")


WRITTEN_BY: dict[str, tuple[Any, Any, bool]] = {
    "transformers": (
        lambda: tuple(read(f"transformers/gpt2_adamw/checkpoint-4/{part}.pt") for part in ("optimizer", "scheduler")),
        lambda classes, optimizer: classes.LambdaLR(optimizer, TRAINER),
        True,
    ),
    "accelerate": (
        lambda: tuple(read(f"accelerate/save_state_adamw/checkpoint_0/{p}.bin") for p in ("optimizer", "scheduler")),
        lambda classes, optimizer: classes.StepLR(optimizer, 77),
        False,
    ),
    "accelerate, two groups": (
        lambda: tuple(
            read(f"accelerate/save_state_unsafe_bin_custom/checkpoint_0/{p}.bin") for p in ("optimizer", "scheduler")
        ),
        lambda classes, optimizer: classes.StepLR(optimizer, 77),
        False,
    ),
    "lightning": (
        lambda: lightning("adamw_onecycle"),
        lambda classes, optimizer: classes.OneCycleLR(optimizer, 9.0, 99),
        False,
    ),
    "lightning, two groups": (
        lambda: lightning("adamw_named_groups"),
        lambda classes, optimizer: classes.OneCycleLR(optimizer, 9.0, 99),
        False,
    ),
    "torch, warm restarts": (
        lambda: torch_file("warmrestarts"),
        lambda classes, optimizer: classes.CosineAnnealingWarmRestarts(optimizer, 50),
        False,
    ),
    "torch, plateau": (
        lambda: torch_file("plateau"),
        lambda classes, optimizer: classes.ReduceLROnPlateau(optimizer, factor=0.9),
        False,
    ),
    "torch, one cycle": (
        lambda: torch_file("onecycle"),
        lambda classes, optimizer: classes.OneCycleLR(optimizer, 9.0, 99),
        False,
    ),
    "torch, lambda": (
        lambda: torch_file("lambdalr"),
        lambda classes, optimizer: classes.LambdaLR(optimizer, lambda epoch: 1 / (epoch + 1)),
        True,
    ),
}


@pytest.mark.parametrize(("files", "make", "lossy"), WRITTEN_BY.values(), ids=WRITTEN_BY)
def test_states_of_other_programs_load_and_go_on_as_in_torch(files: Any, make: Any, lossy: bool) -> None:
    optimizer_state, state = files()
    ours, theirs = on_an_optimizer_like(optimizer_state, make)
    case = Case("", make, lossy=lossy)
    theirs.load_state_dict(copy.deepcopy(state))
    if lossy:
        with pytest.warns(SchedulerStateWarning, match=r"LambdaLR: lr_lambda is not restored .*\(param group 0, 1: "):
            ours.load_state_dict(state)
    else:
        ours.load_state_dict(state)
    assert ours.get_last_lr() == [group["lr"] for group in optimizer_state["param_groups"]] == state["_last_lr"]
    with state_loss_allowed(case):
        if SCHEDULERS_ARE_VERBOSE and "patience" in state:  # and have another order
            assert ours.state_dict() == {k: v for k, v in theirs.state_dict().items() if k != "verbose"}
        else:
            assert exact(ours.state_dict()) == exact(theirs.state_dict())
    for epoch in range(min(30, getattr(theirs, "total_steps", 99) - theirs.last_epoch)):
        advance(ours, epoch)
        advance(theirs, epoch)
        assert shown(ours.optimizer) == shown(theirs.optimizer)


@pytest.mark.parametrize(("files", "make", "lossy"), WRITTEN_BY.values(), ids=WRITTEN_BY)
def test_states_of_other_programs_can_be_split(files: Any, make: Any, lossy: bool) -> None:
    optimizer_state, state = files()
    groups = optimizer_state["param_groups"]
    group_map = [[old] for old in range(len(groups)) for _ in range(2)]
    split = {"param_groups": [dict(groups[old]) for (old,) in group_map]}
    whole, _ = on_an_optimizer_like(optimizer_state, make)
    ours, theirs = on_an_optimizer_like(split, make)
    with state_loss_allowed(Case("", make, lossy=lossy)):
        whole.load_state_dict(state)
        for scheduler in (ours, theirs):
            scheduler.load_state_dict(regroup_scheduler_state(state, group_map))
    for epoch in range(min(30, getattr(theirs, "total_steps", 99) - theirs.last_epoch)):
        for scheduler in (whole, ours, theirs):
            advance(scheduler, epoch)
        assert shown(ours.optimizer) == shown(theirs.optimizer)
        assert shown(ours.optimizer) == [shown(whole.optimizer)[old] for (old,) in group_map]


def test_trainers_schedule_is_named_at_load() -> None:
    state = read("transformers/gpt2_adamw/checkpoint-4/scheduler.pt")
    optimizer = make_optimizer(CASES[0], 2)
    scheduler = LambdaLR(optimizer, TRAINER)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.warns(SchedulerStateWarning, match=r"function and arguments of partial\(.*linear_schedule"):
        scheduler.load_state_dict(state)
