"""Learning rates, momenta, states, warnings and errors are torch's, bit for bit."""

from __future__ import annotations

import random
from copy import deepcopy
from types import ModuleType
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch

from tests.optim.lr_scheduler.cases import (
    CASES,
    COMPOSED,
    DECAYS,
    LAMBDAS,
    LIBRARIES,
    OPTIMIZERS,
    OURS,
    SIMPLE,
    STEPS,
    TORCH,
    Case,
    advance,
    by_name,
    exact,
    make_optimizer,
    one,
    options,
    shown,
    state_loss_allowed,
)
from tests.releases import torchs_scheduler


def pair(case: Case, **how: Any) -> tuple[Any, Any]:
    """The case from both libraries, each on an optimizer of its own."""
    ours, theirs = (case.build(classes, make_optimizer(case, **how)) for classes in (OURS, TORCH))
    assert type(ours) is not type(theirs)
    assert isinstance(ours, type(theirs))
    return ours, theirs


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(**by_name(CASES))
def test_sixty_steps_are_the_same_floats(case: Case, groups: int, tensor_lr: bool) -> None:
    torchs_scheduler(case.name, tensor_lr=tensor_lr)
    ours, theirs = pair(case, groups=groups, tensor_lr=tensor_lr)
    assert options(ours.optimizer) == options(theirs.optimizer)
    for epoch in range(STEPS):
        advance(ours, epoch)
        advance(theirs, epoch)
        assert shown(ours.optimizer) == shown(theirs.optimizer), f"after step {epoch + 1}"
        assert exact(ours.get_last_lr()) == exact(theirs.get_last_lr())
    assert options(ours.optimizer) == options(theirs.optimizer)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(**by_name([case for case in CASES if case.momentum]))
def test_betas_cycle_as_momentum_does(case: Case, groups: int) -> None:
    ours, theirs = pair(case, groups=groups, adam=True)
    for epoch in range(STEPS):
        advance(ours, epoch)
        advance(theirs, epoch)
        assert shown(ours.optimizer) == shown(theirs.optimizer)


@pytest.mark.parametrize("library", OPTIMIZERS, ids=lambda library: library.__name__)
@pytest.mark.parametrize("classes", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize(**by_name(SIMPLE[::3] + COMPOSED))
def test_either_library_schedules_either_librarys_optimizer(case: Case, classes: Any, library: ModuleType) -> None:
    scheduler = case.build(classes, make_optimizer(case, 2, library=library))
    reference = case.build(TORCH, make_optimizer(case, 2))
    for epoch in range(STEPS):
        advance(scheduler, epoch)
        advance(reference, epoch)
    assert exact(scheduler.get_last_lr()) == exact(reference.get_last_lr())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(**by_name(CASES))
def test_state_dicts_have_torchs_keys_order_and_values(case: Case, groups: int) -> None:
    torchs_scheduler(case.name, state=True)
    ours, theirs = pair(case, groups=groups)
    with state_loss_allowed(case):
        for epoch in range(25):
            assert exact(ours.state_dict()) == exact(theirs.state_dict())
            advance(ours, epoch)
            advance(theirs, epoch)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("direction", ["torch>ours", "ours>torch", "ours>ours"])
@pytest.mark.parametrize(**by_name(CASES))
def test_a_run_resumed_from_either_librarys_state_goes_on_the_same(case: Case, direction: str, tensor_lr: bool) -> None:
    torchs_scheduler(case.name, tensor_lr=tensor_lr)
    saving, loading = (LIBRARIES[name] for name in direction.split(">"))
    random.seed(case.name + direction)
    whole = case.build(TORCH, make_optimizer(case, 2, tensor_lr=tensor_lr))
    stop = random.randrange(STEPS)
    first = case.build(saving, make_optimizer(case, 2, tensor_lr=tensor_lr))
    for epoch in range(stop):
        advance(whole, epoch)
        advance(first, epoch)
    second = case.build(loading, make_optimizer(case, 2, tensor_lr=tensor_lr))
    with state_loss_allowed(case):
        saved = deepcopy((first.optimizer.state_dict(), first.state_dict()))
        second.optimizer.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
    for epoch in range(stop, STEPS):
        advance(whole, epoch)
        advance(second, epoch)
        assert shown(second.optimizer) == shown(whole.optimizer), f"saved after {stop}, differs after {epoch + 1}"
        assert exact(second.get_last_lr()) == exact(whole.get_last_lr())


def test_a_sequence_constructed_at_a_later_epoch() -> None:
    made = []
    for classes in (OURS, TORCH):
        optimizer = make_optimizer(CASES[0], 2)
        parts = [classes.LinearLR(optimizer, 0.1, total_iters=9), classes.ExponentialLR(optimizer, 0.9)]
        made.append(classes.SequentialLR(optimizer, parts, [9], last_epoch=4))
    for epoch in range(30):
        assert exact(made[0].state_dict()) == exact(made[1].state_dict())
        for scheduler in made:
            advance(scheduler, epoch)
        assert shown(made[0].optimizer) == shown(made[1].optimizer)


def test_a_cosine_whose_steps_are_counted_anew_starts_from_the_closed_form() -> None:
    ours, theirs = pair(Case("cosine", one("CosineAnnealingLR", T_max=20, eta_min=1e-3)), groups=2)
    for scheduler in (ours, theirs):
        for epoch in range(7):
            advance(scheduler, epoch)
        scheduler.optimizer.param_groups[0]["lr"] = 5.0  # the recursive form would go on from here
        scheduler._step_count = 0
    for epoch in range(5):
        advance(ours, epoch)
        advance(theirs, epoch)
        assert shown(ours.optimizer) == shown(theirs.optimizer)
    assert ours.get_last_lr()[0] < 0.1


@pytest.mark.parametrize(**by_name(CASES))
def test_what_a_scheduler_remembers_is_not_the_optimizers_own_tensor(case: Case) -> None:
    optimizer = make_optimizer(case, 2, tensor_lr=True)
    scheduler = case.build(OURS, optimizer)
    own = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(3):
        remembered = [*scheduler.get_last_lr(), *getattr(scheduler, "base_lrs", ()), *getattr(scheduler, "max_lrs", ())]
        assert not [lr for lr in remembered if any(lr is live for live in own)]
        advance(scheduler, epoch)
        # Compiled optimizers hold on to the tensor, so it is filled and never replaced.
        assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, own, strict=True))


RESUMABLE = [case for case in SIMPLE if not case.name.startswith("ReduceLROnPlateau")]


@pytest.mark.parametrize("last_epoch", [0, 1, 17])
@pytest.mark.parametrize(**by_name(RESUMABLE))
def test_a_scheduler_constructed_at_a_later_epoch(case: Case, last_epoch: int) -> None:
    optimizers = [make_optimizer(case, 2) for _ in range(2)]
    for optimizer in optimizers:
        begun = case.build(TORCH, optimizer)
        for epoch in range(last_epoch):
            advance(begun, epoch)
    ours, theirs = (
        case.build(classes, optimizer, last_epoch=last_epoch)
        for classes, optimizer in zip((OURS, TORCH), optimizers, strict=True)
    )
    for epoch in range(30):
        assert shown(ours.optimizer) == shown(theirs.optimizer)
        advance(ours, epoch)
        advance(theirs, epoch)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(**by_name(LAMBDAS + DECAYS))
def test_stepping_to_an_epoch_uses_the_closed_form(case: Case, tensor_lr: bool) -> None:
    ours, theirs = pair(case, groups=2, tensor_lr=tensor_lr)
    for epoch in [3, 4, 9, 30, 5, 0, 50]:
        said = []
        for scheduler in (ours, theirs):
            scheduler.optimizer.step()
            with catch_warnings(record=True) as caught:
                simplefilter("always")
                scheduler.step(epoch)
            said.append([(w.category, str(w.message), w.filename) for w in caught])
        assert said[0] == said[1]
        assert shown(ours.optimizer) == shown(theirs.optimizer)
        advance(ours, epoch)
        advance(theirs, epoch)
        assert shown(ours.optimizer) == shown(theirs.optimizer)


def test_warm_restarts_take_fractions_of_an_epoch() -> None:
    for periods in ({"T_0": 5}, {"T_0": 2, "T_mult": 2, "eta_min": 1e-3}):
        case = Case("fractions", one("CosineAnnealingWarmRestarts", **periods))
        ours, theirs = pair(case, groups=2)
        for batch in range(120):
            ours.step(batch / 7)
            theirs.step(batch / 7)
            assert shown(ours.optimizer) == shown(theirs.optimizer)
            assert exact(ours.state_dict()) == exact(theirs.state_dict())


def test_the_plateau_scheduler_can_be_told_the_epoch() -> None:
    case = Case("plateau", one("ReduceLROnPlateau", patience=1))
    ours, theirs = pair(case)
    for scheduler in (ours, theirs):
        with pytest.warns(UserWarning, match="epoch parameter"):
            scheduler.step(torch.tensor(1.0), epoch=7)
    assert exact(ours.state_dict()) == exact(theirs.state_dict())


@pytest.mark.parametrize("second", ["MultiStepLR", "CosineAnnealingLR", "LinearLR"])
def test_schedulers_stepped_one_after_the_other(second: str) -> None:
    kwargs = {"MultiStepLR": {"milestones": [5, 9]}, "CosineAnnealingLR": {"T_max": 13}, "LinearLR": {}}[second]
    optimizers = [make_optimizer(CASES[0], 2) for _ in range(2)]
    both = [
        (classes.ExponentialLR(optimizer, 0.9), getattr(classes, second)(optimizer, **kwargs))
        for classes, optimizer in zip((OURS, TORCH), optimizers, strict=True)
    ]
    for epoch in range(STEPS):
        for schedulers in both:
            for scheduler in schedulers:
                advance(scheduler, epoch)
        assert shown(optimizers[0]) == shown(optimizers[1])
        for ours, theirs in zip(*both, strict=True):
            assert exact(ours.get_last_lr()) == exact(theirs.get_last_lr())


@pytest.mark.parametrize("kind", ["ChainedScheduler", "SequentialLR"])
@pytest.mark.parametrize("mix", [("ours", "torch", "ours"), ("torch", "ours", "torch"), ("ours", "ours", "torch")])
def test_schedulers_of_both_libraries_nest(kind: str, mix: tuple[str, str, str]) -> None:
    def build(outer: str, first: str, second: str) -> Any:
        optimizer = make_optimizer(CASES[0], 2)
        parts = [
            LIBRARIES[first].LinearLR(optimizer, 0.1, total_iters=6),
            LIBRARIES[second].CosineAnnealingLR(optimizer, 20),
        ]
        if kind == "ChainedScheduler":
            return LIBRARIES[outer].ChainedScheduler(parts)
        return LIBRARIES[outer].SequentialLR(optimizer, parts, [7])

    mixed, pure = build(*mix), build("torch", "torch", "torch")
    for epoch in range(STEPS):
        advance(mixed, epoch)
        advance(pure, epoch)
        assert shown(mixed.optimizer) == shown(pure.optimizer)
        assert exact(mixed.state_dict()) == exact(pure.state_dict())
    again = build(*mix)
    again.optimizer.load_state_dict(mixed.optimizer.state_dict())
    with state_loss_allowed(Case("", build, lossy=mix[0] == "torch")):  # torch's does not tell its parts that they are
        again.load_state_dict(deepcopy(mixed.state_dict()))
    advance(again, STEPS)
    advance(pure, STEPS)
    assert shown(again.optimizer) == shown(pure.optimizer)


def test_nests_that_torch_cannot_step_fail_alike() -> None:
    def build(classes: Any) -> Any:
        optimizer = make_optimizer(CASES[0])
        late = classes.ChainedScheduler([classes.ExponentialLR(optimizer, 0.9)])
        return classes.SequentialLR(optimizer, [classes.ConstantLR(optimizer), late], [2])

    for classes in LIBRARIES.values():
        scheduler = build(classes)
        advance(scheduler, 0)
        with catch_warnings():
            simplefilter("ignore")
            with pytest.raises(NotImplementedError):
                advance(scheduler, 1)


SGD = torch.optim.SGD
BAD = {
    "no optimizer": lambda c, o: c.StepLR("adam", 3),
    "no initial_lr": lambda c, o: c.StepLR(o, 3, last_epoch=4),
    "step gamma": lambda c, o: [s := c.StepLR(o, 1, None), o.step(), s.step()],
    "exponential gamma": lambda c, o: [s := c.ExponentialLR(o, None), o.step(), s.step()],
    "constant factor": lambda c, o: c.ConstantLR(o, factor=1.5),
    "linear start": lambda c, o: c.LinearLR(o, start_factor=0.0),
    "linear end": lambda c, o: c.LinearLR(o, end_factor=-1.0),
    "lambda count": lambda c, o: c.LambdaLR(o, [len]),
    "multiplicative count": lambda c, o: c.MultiplicativeLR(o, [len, len, len]),
    "multiplicative type": lambda c, o: c.MultiplicativeLR(o, 0.5),
    "plateau factor": lambda c, o: c.ReduceLROnPlateau(o, factor=1.0),
    "plateau optimizer": lambda c, o: c.ReduceLROnPlateau(None),
    "plateau min_lr": lambda c, o: c.ReduceLROnPlateau(o, min_lr=[0.1]),
    "plateau mode": lambda c, o: c.ReduceLROnPlateau(o, mode="least"),
    "plateau threshold": lambda c, o: c.ReduceLROnPlateau(o, threshold_mode="both"),
    "cyclic optimizer": lambda c, o: c.CyclicLR([], 0.1, 0.2),
    "cyclic mode": lambda c, o: c.CyclicLR(o, 0.1, 0.2, mode="square"),
    "cyclic lengths": lambda c, o: c.CyclicLR(o, [0.1, 0.1, 0.1], 0.2),
    "cyclic momentum": lambda c, o: c.CyclicLR(torch.optim.Rprop([torch.ones(1)]), 0.1, 0.2),
    "cyclic base momentum": lambda c, o: c.CyclicLR(o, 0.1, 0.2, base_momentum=[0.1]),
    "onecycle optimizer": lambda c, o: c.OneCycleLR(1, 0.1, 10),
    "onecycle length": lambda c, o: c.OneCycleLR(o, 0.1),
    "onecycle half a length": lambda c, o: c.OneCycleLR(o, 0.1, epochs=3),
    "onecycle steps": lambda c, o: c.OneCycleLR(o, 0.1, total_steps=0),
    "onecycle epochs": lambda c, o: c.OneCycleLR(o, 0.1, epochs=1.5, steps_per_epoch=2),
    "onecycle steps per epoch": lambda c, o: c.OneCycleLR(o, 0.1, epochs=1, steps_per_epoch=-2),
    "onecycle pct": lambda c, o: c.OneCycleLR(o, 0.1, 10, pct_start=1),
    "onecycle strategy": lambda c, o: c.OneCycleLR(o, 0.1, 10, anneal_strategy="sin"),
    "onecycle momentum": lambda c, o: c.OneCycleLR(torch.optim.Rprop([torch.ones(1)]), 0.1, 10),
    "onecycle over": lambda c, o: [s := c.OneCycleLR(o, 0.1, 3), o.step(), *(s.step() for _ in range(5))],
    "restarts T_0": lambda c, o: c.CosineAnnealingWarmRestarts(o, 0),
    "restarts T_0 float": lambda c, o: c.CosineAnnealingWarmRestarts(o, 2.5),
    "restarts T_mult": lambda c, o: c.CosineAnnealingWarmRestarts(o, 2, 0),
    "restarts eta": lambda c, o: c.CosineAnnealingWarmRestarts(o, 2, eta_min="0"),
    "restarts epoch": lambda c, o: c.CosineAnnealingWarmRestarts(o, 2).step(-1),
    "chained none": lambda c, o: c.ChainedScheduler([]),
    "chained plateau": lambda c, o: c.ChainedScheduler([c.ReduceLROnPlateau(o)]),
    "chained no optimizer": lambda c, o: c.ChainedScheduler([c.StepLR(o, 1), 3]),
    "sequence none": lambda c, o: c.SequentialLR(o, [], []),
    "sequence milestones": lambda c, o: c.SequentialLR(o, [c.StepLR(o, 1)], [3]),
    "sequence plateau": lambda c, o: c.SequentialLR(o, [c.StepLR(o, 1), c.ReduceLROnPlateau(o)], [2]),
    "swa strategy": lambda c, o: c.SWALR(o, 0.1, anneal_strategy="sin"),
    "swa epochs": lambda c, o: c.SWALR(o, 0.1, anneal_epochs=-1),
    "swa lengths": lambda c, o: c.SWALR(o, [0.1]),
}


@pytest.mark.parametrize("wrong", BAD.values(), ids=BAD)
def test_mistakes_are_the_same_errors(wrong: Any) -> None:
    errors = []
    for classes in LIBRARIES.values():
        with pytest.raises(Exception) as caught:
            wrong(classes, make_optimizer(CASES[0], 2))
        errors.append((caught.type, str(caught.value).replace("must by one", "must be one")))  # until torch 2.9
    assert errors[0] == errors[1]


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    for classes in LIBRARIES.values():
        other = classes.StepLR(make_optimizer(CASES[0]), 1)
        optimizer = make_optimizer(CASES[0])
        with pytest.raises(ValueError, match="StepLR at index 1 has SGD"):
            classes.SequentialLR(optimizer, [classes.StepLR(optimizer, 1), other], [2])
        with pytest.raises(ValueError, match="StepLR at index 0 has SGD"):
            classes.ChainedScheduler([other], optimizer)


def test_plateaus_of_the_other_library_are_refused_too() -> None:
    optimizer = make_optimizer(CASES[0])
    with pytest.raises(ValueError, match="does not support `ReduceLROnPlateau`"):
        OURS.ChainedScheduler([TORCH.ReduceLROnPlateau(optimizer)])


def stepped_too_early(scheduler: Any) -> None:
    scheduler.step()


def step_overridden(scheduler: Any) -> None:
    scheduler.optimizer.step = lambda: None
    scheduler.step()


def asked_outside_a_step(scheduler: Any) -> None:
    scheduler.get_lr()


def nested_first(scheduler: Any) -> None:
    classes = OURS if isinstance(scheduler, OURS.LRScheduler) else TORCH
    classes.SequentialLR(scheduler.optimizer, [classes.ChainedScheduler([scheduler])], [])


@pytest.mark.parametrize("misuse", [nested_first, stepped_too_early, step_overridden, asked_outside_a_step])
def test_misuse_gives_the_same_warnings(misuse: Any) -> None:
    said = []
    for classes in LIBRARIES.values():
        scheduler = classes.ExponentialLR(make_optimizer(CASES[0]), 0.9)
        with catch_warnings(record=True) as caught:
            simplefilter("always")
            misuse(scheduler)
        said.append([(w.category, str(w.message)) for w in caught])
    assert said[0] == said[1]
    assert len(said[0]) == 1


@pytest.mark.parametrize(**by_name([case for case in CASES if case.composed or case.name.startswith("plateau")]))
def test_what_has_no_next_rates_says_so_without_more_words(case: Case) -> None:
    for classes in LIBRARIES.values():
        scheduler = case.build(classes, make_optimizer(case))
        with catch_warnings():
            simplefilter("error")
            with pytest.raises(NotImplementedError):
                scheduler.get_lr()


def test_a_plateau_scheduler_meets_a_new_group_as_torchs_does() -> None:
    for min_lr in (0.0, [0.0]):
        outcomes = []
        for classes in LIBRARIES.values():
            optimizer = make_optimizer(CASES[0])
            scheduler = classes.ReduceLROnPlateau(optimizer, patience=0, min_lr=min_lr)
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
            scheduler.step(1.0)
            try:
                scheduler.step(2.0)
            except RuntimeError as error:
                outcomes.append(str(error))
            else:
                outcomes.append(exact(scheduler.state_dict()))
        assert outcomes[0] == outcomes[1]
