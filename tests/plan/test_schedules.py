"""Every scheduler of torch with another rate, length or group: the next 50 rates are those of a run that had it so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR

import optimstate
from optimstate import hooks
from optimstate.errors import MigrationError
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from tests.releases import KEEPS_TENSOR_RATES

STEPS = 50
AT = (1, 4, 11)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., Any]


def chained(optimizer: Any, total_iters: int = 20) -> Any:
    return S.ChainedScheduler([S.LinearLR(optimizer, 0.5, total_iters=total_iters), S.ExponentialLR(optimizer, 0.97)])


def sequential(optimizer: Any, T_max: int = 30, milestone: int = 6) -> Any:
    parts = [S.LinearLR(optimizer, 0.1, total_iters=6), S.CosineAnnealingLR(optimizer, T_max)]
    return S.SequentialLR(optimizer, parts, [milestone])


def cyclic(optimizer: Any, size: int = 7) -> Any:
    rates = [group["lr"] for group in optimizer.param_groups]
    return S.CyclicLR(optimizer, rates, [rate * 5 for rate in rates], size, cycle_momentum=False)


def one_cycle(optimizer: Any, total_steps: int = 70) -> Any:
    return S.OneCycleLR(optimizer, [group["lr"] * 20 for group in optimizer.param_groups], total_steps, div_factor=20)


def halved(epoch: int) -> float:
    return 1 / (1 + epoch)


def shrunk(epoch: int) -> float:
    return 0.98


# For each: how it is made (from a length), the length in the file, another one, and how a plan says the other one.
SCHEDULERS: dict[str, tuple[Make, Any, Any, str]] = {
    "LambdaLR": (lambda o, n=None: S.LambdaLR(o, halved), None, None, ""),
    "MultiplicativeLR": (lambda o, n=None: S.MultiplicativeLR(o, shrunk), None, None, ""),
    "StepLR": (lambda o, n=5: S.StepLR(o, n, 0.6), 5, 3, "set = { step_size = 3 }"),
    "MultiStepLR": (
        lambda o, n=(3, 9, 30): S.MultiStepLR(o, list(n), 0.6),
        (3, 9, 30),
        (2, 2, 25),
        "set = { milestones = [2, 2, 25] }",
    ),
    "ConstantLR": (lambda o, n=9: S.ConstantLR(o, 0.25, n), 9, 20, "set = { total_iters = 20 }"),
    "LinearLR": (lambda o, n=20: S.LinearLR(o, 0.2, 0.9, n), 20, 45, "set = { total_iters = 45 }"),
    "ExponentialLR": (lambda o, n=0.95: S.ExponentialLR(o, n), 0.95, 0.9, "set = { gamma = 0.9 }"),
    "PolynomialLR": (lambda o, n=80: S.PolynomialLR(o, n, 2.0), 80, 65, "set = { total_iters = 65 }"),
    "CosineAnnealingLR": (lambda o, n=24: S.CosineAnnealingLR(o, n), 24, 40, "set = { T_max = 40 }"),
    "CosineAnnealingLR above 0": (
        lambda o, n=24: S.CosineAnnealingLR(o, n, eta_min=0.002),
        24,
        40,
        "set = { T_max = 40 }",
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o, n=5: S.CosineAnnealingWarmRestarts(o, n, 2, eta_min=0.002),
        5,
        8,
        "set = { T_0 = 8 }",
    ),
    "ChainedScheduler": (chained, 20, 30, 'path = "_schedulers[0]"\nset = { total_iters = 30 }'),
    "SequentialLR": (sequential, 30, 17, 'path = "_schedulers[1]"\nset = { T_max = 17 }'),
    "SequentialLR's milestones": (
        lambda o, n=6: sequential(o, milestone=n),
        6,
        8,
        "set = { milestones = [8] }",
    ),
    "a sequence in a chain": (
        lambda o, n=30: S.ChainedScheduler([sequential(o, n), S.ExponentialLR(o, 0.99)]),
        30,
        17,
        'path = "_schedulers[0]._schedulers[1]"\nset = { T_max = 17 }',
    ),
    "ReduceLROnPlateau": (lambda o, n=2: S.ReduceLROnPlateau(o, patience=n), 2, 4, "set = { patience = 4 }"),
    "CyclicLR": (cyclic, 7, 10, "set = { step_size_up = 10 }"),
    "OneCycleLR": (one_cycle, 70, 90, "set = { total_steps = 90 }"),
    "SWALR": (lambda o, n=30: SWALR(o, 0.02, n), 30, 45, "set = { anneal_epochs = 45 }"),
}


def test_all_sixteen_are_there() -> None:
    every = {name for name, kind in vars(S).items() if isinstance(kind, type) and issubclass(kind, S.LRScheduler)} - {
        "LRScheduler",
        "_LRScheduler",
    }
    assert every | {"SWALR", "ReduceLROnPlateau"} <= set(SCHEDULERS)


def started(make: Make, rates: tuple[float, ...], steps: int, *length: Any) -> tuple[Any, Any]:
    """An optimizer with one named parameter a rate, two with one rate, and its scheduler, after some steps."""
    named = [(name, torch.nn.Parameter(torch.ones(2))) for name in "ab"]
    split = [[named[0]], [named[1]]] if len(rates) > 1 else [named]
    groups = [{"params": members, "lr": rate} for members, rate in zip(split, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=9.0)
    scheduler = make(optimizer, *length)
    going_on(optimizer, scheduler, steps)
    return optimizer, scheduler


def going_on(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*((1.0,) if isinstance(scheduler, S.ReduceLROnPlateau) else ()))
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def planned(text: str, optimizer: Any, scheduler: Any, folder: Path) -> tuple[dict[str, Any], list[str]]:
    torch.save(
        copy.deepcopy({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}), folder / "old.pt"
    )
    document = open_checkpoint(folder / "old.pt")
    tree, _, notes = apply_plan(Plan.from_toml(text), document.tree)
    get_format("torch").write(tree, folder / "new.pt", like=document)
    made: dict[str, Any] = torch.load(folder / "new.pt", weights_only=False)
    return made, notes


def goes_on_as(
    made: dict[str, Any], make: Make, wanted: tuple[Any, Any], rates: tuple[float, ...], *length: Any
) -> None:
    """Loaded into a run of any rate, what was written has the present and the next 50 rates of another run."""
    reference, schedule = wanted
    optimizer, scheduler = started(make, rates, 0, *length)
    for group in optimizer.param_groups:
        group["lr"] = 7.0
    optimizer.load_state_dict(made["optimizer"])
    scheduler.load_state_dict(made["scheduler"])
    now = [[group["lr"] for group in run.param_groups] for run in (optimizer, reference)]
    got = [now[0], *going_on(optimizer, scheduler, STEPS)]
    right = [now[1], *going_on(reference, schedule, STEPS)]
    for step, (mine, truth) in enumerate(zip(got, right, strict=True)):
        assert mine == pytest.approx(truth, rel=1e-9, abs=1e-15), f"after {step} steps: {mine}, not {truth}"


TABLE = pytest.mark.parametrize("name", SCHEDULERS)
POSITIONS = pytest.mark.parametrize("at", AT)


@TABLE
@POSITIONS
def test_another_rate_now(name: str, at: int, tmp_path: Path) -> None:
    make, *_ = SCHEDULERS[name]
    optimizer, scheduler = started(make, (0.01,), at)
    wanted = started(make, (0.03,), at)
    if name == "SWALR":  # its end is a rate of its own: the way there starts elsewhere, and ends where it ended
        wanted = started(lambda o, n=30: SWALR(o, 0.02, n), (0.03,), at)
    rate = wanted[0].param_groups[0]["lr"]
    made, _ = planned(f'[[group]]\nmatch = "**"\nset = {{ lr = {rate!r} }}\n', optimizer, scheduler, tmp_path)
    goes_on_as(made, make, wanted, (0.5,))


@TABLE
@POSITIONS
def test_another_initial_rate(name: str, at: int, tmp_path: Path) -> None:
    make, *_ = SCHEDULERS[name]
    optimizer, scheduler = started(make, (0.01,), at)
    text = '[[group]]\nmatch = "**"\nset = { initial_lr = 0.03 }\n'
    if name == "ReduceLROnPlateau":
        with pytest.raises(MigrationError, match="ReduceLROnPlateau does not compute from initial_lr: set lr instead"):
            planned(text, optimizer, scheduler, tmp_path)
        return
    bounds = {  # the upper bounds are arguments of their own, and stay
        "CyclicLR": lambda o, n=7: S.CyclicLR(o, 0.03, 0.05, n, cycle_momentum=False),
        "OneCycleLR": lambda o, n=70: S.OneCycleLR(o, 0.2, n, div_factor=0.2 / 0.03),
    }
    made, _ = planned(text, optimizer, scheduler, tmp_path)
    goes_on_as(made, make, started(bounds.get(name, make), (0.03,), at), (0.5,))
    assert made["optimizer"]["param_groups"][0]["initial_lr"] == 0.03


@TABLE
@POSITIONS
def test_another_length(name: str, at: int, tmp_path: Path) -> None:
    make, old, new, table = SCHEDULERS[name]
    optimizer, scheduler = started(make, (0.01,), at, *(() if old is None else (old,)))
    if not table:
        with pytest.raises(MigrationError, match="no argument 'T_max' that can be changed"):
            planned("[scheduler]\nset = { T_max = 40 }\n", optimizer, scheduler, tmp_path)
        return
    made, _ = planned(f"[scheduler]\n{table}\n", optimizer, scheduler, tmp_path)
    wanted = started(make, (0.01,), at, new)
    if name == "ReduceLROnPlateau":  # what it did depends on the metrics it saw: only what it will do changes
        wanted = started(make, (0.01,), at, old)
        wanted[1].patience = new
    assert made["scheduler"].keys() == torch.load(tmp_path / "old.pt", weights_only=False)["scheduler"].keys()
    goes_on_as(made, make, wanted, (0.5,), old)


@TABLE
@POSITIONS
def test_a_group_split_in_two_rates(name: str, at: int, tmp_path: Path) -> None:
    make, *_ = SCHEDULERS[name]
    if name == "LambdaLR":
        make = lambda o: S.LambdaLR(o, [halved] * len(o.param_groups))  # noqa: E731
    optimizer, scheduler = started(make, (0.01,), at)
    rate = "lr" if name in ("ReduceLROnPlateau", "CyclicLR", "OneCycleLR") else "initial_lr"
    wanted = started(make, (0.03, 0.01), at)
    value = 0.03 if rate == "initial_lr" else wanted[0].param_groups[0]["lr"]
    text = f'[[group]]\nmatch = "a"\nset = {{ {rate} = {value!r} }}\n[[group]]\nmatch = "b"\n'
    made, _ = planned(text, optimizer, scheduler, tmp_path)
    goes_on_as(made, make, wanted, (0.5, 0.7))


@TABLE
def test_a_plan_that_sets_no_rate_leaves_the_schedule_alone(name: str, tmp_path: Path) -> None:
    make, *_ = SCHEDULERS[name]
    optimizer, scheduler = started(make, (0.01,), 4)
    made, notes = planned("[[group]]\nset = { weight_decay = 0.3 }\n", optimizer, scheduler, tmp_path)
    assert str(made["scheduler"]) == str(scheduler.state_dict())
    assert made["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    assert notes == []


# --- live schedulers ------------------------------------------------------------------------------------------------


def states(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    return copy.deepcopy({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})


@TABLE
@POSITIONS
def test_the_live_schedule_keeps_its_arguments_and_takes_the_position(name: str, at: int) -> None:
    make, old, new, _ = SCHEDULERS[name]
    lengths = ((), ()) if old is None else ((old,), (new,))
    saved = states(*started(make, (0.01,), at, *lengths[0]))
    wanted = started(make, (0.01,), at, *lengths[1])
    if name == "ReduceLROnPlateau":
        wanted = started(make, (0.01,), at, *lengths[0])
        wanted[1].patience = new
    optimizer, scheduler = started(make, (0.01,), 0, *lengths[1])
    if (name, at) == ("a sequence in a chain", 11):  # at a milestone, torch forgets what the rest of the chain did
        with pytest.raises(MigrationError, match="depends on the steps before"):
            optimstate.resume(saved, optimizer=optimizer, scheduler=scheduler, schedule="live")
        return
    made = optimstate.resume(saved, optimizer=optimizer, scheduler=scheduler, schedule="live")
    now = [[group["lr"] for group in run.param_groups] for run in (optimizer, wanted[0])]
    got, right = (
        [rates, *going_on(*run, STEPS)] for rates, run in zip(now, ((optimizer, scheduler), wanted), strict=True)
    )
    for mine, truth in zip(got, right, strict=True):
        assert mine == pytest.approx(truth, rel=1e-9, abs=1e-15)
    assert bool([note for note in made.notes if "the live one is used" in note]) == (old is not None)


@TABLE
def test_a_difference_is_a_note_and_none_is_none(name: str) -> None:
    make, old, new, _ = SCHEDULERS[name]
    saved = states(*started(make, (0.01,), 4, *(() if old is None else (old,))))
    for length, differs in ((old, False), (new, True)):
        optimizer, scheduler = started(make, (0.01,), 0, *(() if length is None else (length,)))
        made = optimstate.resume(copy.deepcopy(saved), optimizer=optimizer, scheduler=scheduler)
        noted = [note for note in made.notes if note.startswith("scheduler") and "the checkpoint's is used" in note]
        assert bool(noted) == (differs and old is not None)


def test_the_state_of_another_scheduler_is_refused_and_nothing_is_loaded() -> None:
    saved = states(*started(SCHEDULERS["CosineAnnealingLR"][0], (0.01,), 4))
    optimizer, scheduler = started(SCHEDULERS["StepLR"][0], (0.01,), 0)
    with pytest.raises(MigrationError, match="the checkpoint's scheduler is CosineAnnealingLR, the live one is StepLR"):
        optimstate.resume(copy.deepcopy(saved), optimizer=optimizer, scheduler=scheduler)
    assert scheduler.last_epoch == 0
    assert not hasattr(scheduler, "T_max")
    optimstate.resume(saved, optimizer=optimizer, scheduler=scheduler, schedule="live")
    wanted = started(SCHEDULERS["StepLR"][0], (0.01,), 4)
    assert going_on(optimizer, scheduler, 9) == going_on(*wanted, 9)
    assert not hasattr(scheduler, "T_max")


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
@POSITIONS
def test_a_group_that_is_new_gets_the_rate_that_it_would_have_had(name: str, at: int) -> None:
    make, *_ = SCHEDULERS[name]
    if name == "LambdaLR":
        make = lambda o: S.LambdaLR(o, [halved] * len(o.param_groups))  # noqa: E731

    def run(names: str, steps: int) -> tuple[Any, Any]:
        groups = [{"params": [(n, torch.nn.Parameter(torch.ones(2)))], "lr": 0.01 * (1 + (n == "b"))} for n in names]
        optimizer = torch.optim.AdamW(groups)
        scheduler = make(optimizer)
        going_on(optimizer, scheduler, steps)
        return optimizer, scheduler

    saved = states(*run("a", at))
    optimizer, scheduler = run("ab", 0)
    optimstate.resume(saved, optimizer=optimizer, scheduler=scheduler, plan=Plan.from_options(fresh=["b"]))
    wanted = run("ab", at)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([g["lr"] for g in wanted[0].param_groups])
    for mine, truth in zip(going_on(optimizer, scheduler, STEPS), going_on(*wanted, STEPS), strict=True):
        assert mine == pytest.approx(truth, rel=1e-9, abs=1e-15)


def test_a_scheduler_that_is_not_torchs_is_never_passed_over(tmp_path: Path) -> None:
    optimizer, scheduler = started(SCHEDULERS["ExponentialLR"][0], (0.01,), 4)
    scheduler.warmup = 3
    made, notes = planned("[[group]]\nset = { initial_lr = 0.03 }\n", optimizer, scheduler, tmp_path)
    assert made["optimizer"]["param_groups"][0]["lr"] == pytest.approx(3 * optimizer.param_groups[0]["lr"])
    assert any("a scheduler which is not torch's" in note and "check the next rates" in note for note in notes)
    with pytest.raises(MigrationError, match="no argument 'gamma' that can be changed"):
        planned("[scheduler]\nset = { gamma = 0.9 }\n", optimizer, scheduler, tmp_path)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_a_swalr_whose_state_holds_its_function_is_planned_alike(strategy: str, tmp_path: Path) -> None:
    """As torch writes it before 2.10; the file has the function's name."""
    made = []
    for older in (True, False):
        optimizer, scheduler = started(lambda o: SWALR(o, 0.02, 30, strategy), (0.01,), 7)
        state = {k: v for k, v in scheduler.state_dict().items() if k not in ("_anneal_strategy", "anneal_func")}
        function = SWALR._cosine_anneal if strategy == "cos" else SWALR._linear_anneal
        scheduler.state_dict = lambda: state | ({"anneal_func": function} if older else {"_anneal_strategy": strategy})  # noqa: B023
        made.append(planned("[scheduler]\nset = { anneal_epochs = 45 }\n", optimizer, scheduler, tmp_path)[0])
    assert made[0]["optimizer"]["param_groups"] == made[1]["optimizer"]["param_groups"]
    assert made[0]["optimizer"]["param_groups"][0]["lr"] != 0.01
    assert made[0]["scheduler"]["_last_lr"] == made[1]["scheduler"]["_last_lr"]
    assert made[0]["scheduler"]["anneal_func"].__name__ == function.__name__


@pytest.mark.parametrize("optimizer_gets", ["the optimizer", "the live scheduler", "nothing"])
def test_a_scheduler_alone_sets_the_rates_of_the_groups_or_is_refused(optimizer_gets: str) -> None:
    def run(names: str, steps: int) -> tuple[Any, Any]:
        groups = [{"params": [(n, torch.nn.Parameter(torch.ones(2)))], "lr": 0.01 * (1 + (n == "b"))} for n in names]
        optimizer = torch.optim.AdamW(groups)
        scheduler = S.CosineAnnealingLR(optimizer, 24)
        going_on(optimizer, scheduler, steps)
        return optimizer, scheduler

    saved = states(*run("a", 10))
    optimizer, scheduler = run("ab", 0)
    hook = hooks.migrate(Plan.from_options(fresh=["b"]))
    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(saved["optimizer"])
    if optimizer_gets == "nothing":
        with pytest.raises(MigrationError, match="give the optimizer too"):
            hooks.migrate_scheduler(saved["scheduler"], hook.moves)
        return
    given = {"optimizer": optimizer} if optimizer_gets == "the optimizer" else {"live": scheduler}
    scheduler.load_state_dict(hooks.migrate_scheduler(saved["scheduler"], hook.moves, **given))
    wanted = run("ab", 10)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([g["lr"] for g in wanted[0].param_groups])
    for mine, truth in zip(going_on(optimizer, scheduler, STEPS), going_on(*wanted, STEPS), strict=True):
        assert mine == pytest.approx(truth, rel=1e-9, abs=1e-15)


def test_a_scheduler_alone_takes_a_plans_arguments() -> None:
    saved = states(*started(SCHEDULERS["CosineAnnealingLR"][0], (0.01,), 10))
    optimizer, scheduler = started(SCHEDULERS["CosineAnnealingLR"][0], (0.01,), 0)
    hook = hooks.match_names()
    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(saved["optimizer"])
    plan = Plan.from_toml("[scheduler]\nset = { T_max = 40 }\n")
    scheduler.load_state_dict(hooks.migrate_scheduler(saved["scheduler"], hook.moves, optimizer=optimizer, plan=plan))
    wanted = started(SCHEDULERS["CosineAnnealingLR"][0], (0.01,), 10, 40)
    for mine, truth in zip(going_on(optimizer, scheduler, STEPS), going_on(*wanted, STEPS), strict=True):
        assert mine == pytest.approx(truth, rel=1e-9, abs=1e-15)
    other = Plan.from_toml('[scheduler]\npath = "elsewhere"\nset = { T_max = 40 }\n')
    with pytest.raises(MigrationError, match="no scheduler is at 'elsewhere'"):
        hooks.migrate_scheduler(saved["scheduler"], hook.moves, optimizer=optimizer, plan=other)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR", "ExponentialLR"])
def test_rates_that_are_tensors_stay_tensors(name: str) -> None:
    """As capturable optimizers have them: the tensor is kept, and has the rate."""
    make, _, new, text = SCHEDULERS[name]
    if name == "SequentialLR" and not KEEPS_TENSOR_RATES:
        pytest.skip("torch puts a number in the place of a tensor learning rate")

    def run(steps: int, *length: Any) -> tuple[Any, Any]:
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([("a", parameter)], lr=torch.tensor(0.01, dtype=torch.float64))
        scheduler = make(optimizer, *length)
        going_on(optimizer, scheduler, steps)
        return optimizer, scheduler

    saved = states(*run(10))
    optimizer, scheduler = run(0)
    optimstate.resume(saved, optimizer=optimizer, scheduler=scheduler, plan=Plan.from_toml(f"[scheduler]\n{text}\n"))
    wanted = run(10, new)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    for mine, truth in zip(going_on(optimizer, scheduler, STEPS), going_on(*wanted, STEPS), strict=True):
        assert [float(rate) for rate in mine] == pytest.approx([float(rate) for rate in truth], rel=1e-6)
