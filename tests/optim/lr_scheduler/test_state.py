"""What a scheduler's state says about itself: hooks, what is lost, what does not fit."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch

from optimstate.errors import SchedulerStateWarning, StateMismatchError
from optimstate.optim import lr_scheduler, swa_utils
from optimstate.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from optimstate.state.scheduler import PER_GROUP_KEYS
from tests.optim.lr_scheduler.cases import (
    CASES,
    OURS,
    Case,
    Halving,
    advance,
    by_name,
    exact,
    make_optimizer,
    shown,
    state_loss_allowed,
    warmup,
)

ANY = CASES[0]


def optimizer_of(groups: int = 1, lr: float = 0.1) -> torch.optim.Optimizer:
    return make_optimizer(ANY, groups, lr=lr)


def trained(scheduler: Any, steps: int = 5) -> Any:
    for epoch in range(steps):
        advance(scheduler, epoch)
    return scheduler


def resumed(scheduler: Any, saved: Any, state: dict[str, Any] | None = None) -> Any:
    """`scheduler` with the state of `saved`, its optimizer's first."""
    scheduler.optimizer.load_state_dict(saved.optimizer.state_dict())
    scheduler.load_state_dict(saved.state_dict() if state is None else state)
    return scheduler


# Hooks.


@pytest.mark.parametrize(**by_name(CASES))
def test_hooks_see_every_class_and_stay_out_of_the_state(case: Case) -> None:
    scheduler = case.build(OURS, make_optimizer(case, 2))
    seen: list[str] = []
    with state_loss_allowed(case):
        before = exact(scheduler.state_dict())
        scheduler.register_state_dict_post_hook(lambda s, state: seen.append(f"save {s is scheduler}"))
        scheduler.register_load_state_dict_pre_hook(lambda s, state: seen.append(f"load {s is scheduler}"))
        scheduler.register_load_state_dict_post_hook(lambda s: seen.append(f"loaded {s is scheduler}"))
        state = scheduler.state_dict()
        assert exact(state) == before
        scheduler.load_state_dict(state)
    assert seen == ["save True", "load True", "loaded True"]


def test_hooks_run_in_order_and_prepended_ones_first() -> None:
    scheduler = StepLR(optimizer_of(), 3)
    for register in (
        scheduler.register_state_dict_post_hook,
        scheduler.register_load_state_dict_pre_hook,
    ):
        seen: list[int] = []
        first = register(lambda s, state, seen=seen: seen.append(1))
        second = register(lambda s, state, seen=seen: seen.append(2))
        third = register(lambda s, state, seen=seen: seen.append(3), prepend=True)
        scheduler.load_state_dict(scheduler.state_dict())
        assert seen == [3, 1, 2]
        first.remove()
        third.remove()
        scheduler.load_state_dict(scheduler.state_dict())
        assert seen == [3, 1, 2, 2]
        second.remove()
    seen = []
    scheduler.register_load_state_dict_post_hook(lambda s: seen.append(1))
    scheduler.register_load_state_dict_post_hook(lambda s: seen.append(2), prepend=True)
    scheduler.load_state_dict(scheduler.state_dict())
    assert seen == [2, 1]


def test_hooks_change_the_state_in_place_or_replace_it() -> None:
    scheduler = trained(StepLR(optimizer_of(), 3))
    scheduler.register_state_dict_post_hook(lambda s, state: state.update(written_by="me"))
    scheduler.register_state_dict_post_hook(lambda s, state: {**state, "at": state["last_epoch"]})
    state = scheduler.state_dict()
    assert (state["written_by"], state["at"]) == ("me", 5)

    def strip(_: LRScheduler, given: dict[str, Any]) -> None:
        del given["written_by"], given["at"]

    other = StepLR(optimizer_of(), 99)
    other.register_load_state_dict_pre_hook(strip)
    other.register_load_state_dict_pre_hook(lambda s, given: {**given, "gamma": 0.25})
    resumed(other, scheduler, state)
    assert (other.step_size, other.gamma, other.last_epoch) == (3, 0.25, 5)
    assert not hasattr(other, "at")
    assert state["gamma"] == 0.1
    assert "at" in state


def test_hooks_of_nested_schedulers_run() -> None:
    optimizer = optimizer_of()
    inner = StepLR(optimizer, 3)
    outer = ChainedScheduler([inner])
    inner.register_state_dict_post_hook(lambda s, state: {**state, "gamma": 0.7})
    assert outer.state_dict()["_schedulers"][0]["gamma"] == 0.7


def test_a_scheduler_with_a_state_hook_can_be_copied_and_pickled() -> None:
    scheduler = trained(StepLR(optimizer_of(), 3))
    twin = copy.deepcopy(scheduler)
    advance(twin, 0)
    advance(scheduler, 0)
    assert exact(twin.state_dict()) == exact(scheduler.state_dict())
    assert exact(pickle.loads(pickle.dumps(scheduler)).state_dict()) == exact(scheduler.state_dict())


# What a state cannot hold.


class Owner:
    def method(self, epoch: int) -> float:
        return 1.0


NOT_SAVED = {
    "function": (warmup, r"the function tests\.optim\.lr_scheduler\.cases\.warmup"),
    "lambda": (lambda epoch: 1.0, r"the function .*<lambda>"),
    "partial": (partial(warmup, length=3), r"the function and arguments of partial\(.*warmup"),
    "method": (Owner().method, r"the method .*Owner\.method and the object it is bound to"),
    "builtin": (math.cos, r"the callable math\.cos, which has no attributes"),
}


@pytest.mark.parametrize("cls", [LambdaLR, MultiplicativeLR])
@pytest.mark.parametrize(("function", "named"), NOT_SAVED.values(), ids=NOT_SAVED)
def test_a_function_is_named_once_at_save_and_at_every_load(cls: Any, function: Any, named: str) -> None:
    scheduler = cls(optimizer_of(3), [Halving(), function, function])
    with pytest.warns(SchedulerStateWarning, match=rf"{cls.__name__}: .*\(param group 1, 2: {named}") as said:
        state = scheduler.state_dict()
    assert len(said) == 1
    assert said[0].filename == __file__
    assert exact(scheduler.state_dict()) == exact(state)  # quiet now
    for _ in range(2):
        with pytest.warns(SchedulerStateWarning, match="param group 1, 2: the state holds nothing of it") as said:
            scheduler.load_state_dict(state)
        assert len(said) == 1
        assert said[0].filename == __file__


def test_a_callable_object_is_saved_and_restored_quietly() -> None:
    saved = trained(LambdaLR(optimizer_of(), Halving(4)))
    other = resumed(LambdaLR(optimizer_of(), Halving(99)), saved)
    assert vars(other.lr_lambdas[0]) == {"period": 4, "furthest": 5}


def test_an_objects_attributes_find_no_home_in_a_function() -> None:
    saved = LambdaLR(optimizer_of(), Halving())
    with pytest.warns(
        SchedulerStateWarning, match=r"attributes of an object \(furthest, period\), which .*warmup cannot"
    ):
        resumed(LambdaLR(optimizer_of(), warmup), saved)
    assert not vars(warmup)


def test_an_object_that_was_a_function_when_saved_is_named() -> None:
    saved = LambdaLR(optimizer_of(), warmup)
    with pytest.warns(SchedulerStateWarning, match="is not saved"):
        state = saved.state_dict()
    with pytest.warns(SchedulerStateWarning, match=r"holds nothing of it, so .*Halving stays"):
        resumed(LambdaLR(optimizer_of(), Halving()), saved, state)


def cyclic(scale_fn: Any = None, **options: Any) -> CyclicLR:
    return CyclicLR(optimizer_of(), 0.01, 0.1, 5, cycle_momentum=False, scale_fn=scale_fn, **options)


def test_a_scale_fn_is_named_at_save_and_at_load() -> None:
    scheduler = cyclic(lambda x: 0.5**x)
    with pytest.warns(SchedulerStateWarning, match=r"CyclicLR: scale_fn is not saved .*<lambda>"):
        state = scheduler.state_dict()
    scheduler.state_dict()
    with pytest.warns(SchedulerStateWarning, match=r"CyclicLR: scale_fn is not restored .*<lambda>"):
        scheduler.load_state_dict(state)
    quiet = trained(cyclic(Halving(30)))
    other = cyclic(Halving(1))
    resumed(other, quiet)
    assert vars(other._scale_fn_custom) == vars(quiet._scale_fn_custom)


def test_a_state_saved_with_a_scale_fn_needs_one() -> None:
    for saved in (cyclic(Halving(3)), cyclic(Halving(3), mode="own"), cyclic(Halving(3), scale_mode="iterations")):
        state = saved.state_dict()
        with pytest.raises(StateMismatchError, match="was saved with a scale_fn, and this scheduler has none") as error:
            cyclic().load_state_dict(state)
        assert "scale_fn of the saved run" in error.value.hint


def test_a_state_without_a_scale_fn_replaces_the_mode() -> None:
    saved = trained(cyclic(mode="exp_range", gamma=0.9))
    other = cyclic(mode="triangular2")
    resumed(other, saved)
    advance(other, 0)
    advance(saved, 0)
    assert shown(other.optimizer) == shown(saved.optimizer)


# What does not fit.


def test_another_number_of_groups_is_refused_before_anything_changes() -> None:
    for make in (
        lambda o: StepLR(o, 3),
        lambda o: LambdaLR(o, Halving()),
        lambda o: CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
        lambda o: swa_utils.SWALR(o, 0.1),
        lambda o: ReduceLROnPlateau(o, min_lr=[0.0] * len(o.param_groups)),
        lambda o: SequentialLR(o, [LinearLR(o), StepLR(o, 2)], [3]),
    ):
        saved, other = trained(make(optimizer_of(1))), make(optimizer_of(2))
        before = exact(other.state_dict())
        with pytest.raises(
            StateMismatchError, match=r"another number of param groups \(.*1.*\) than .* \(2\)"
        ) as error:
            other.load_state_dict(saved.state_dict())
        assert "regroup_scheduler_state" in error.value.hint
        assert exact(other.state_dict()) == before


def test_one_min_lr_for_all_fits_any_number_of_groups() -> None:
    saved, other = trained(ReduceLROnPlateau(optimizer_of(1), min_lr=1e-3)), ReduceLROnPlateau(optimizer_of(3))
    other.load_state_dict(saved.state_dict())
    assert other.min_lrs == [1e-3] * 3
    assert other.get_last_lr() == [group["lr"] for group in other.optimizer.param_groups]


def test_a_state_saved_after_a_group_was_added_is_named_and_goes_on() -> None:
    grown = StepLR(optimizer_of(1), 3)
    grown.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.3})
    trained(grown, 7)
    other = StepLR(optimizer_of(2), 3)
    with pytest.warns(SchedulerStateWarning, match=r"base_lrs: 1, _last_lr: 2\) .* after groups had been added"):
        resumed(other, grown)
    for epoch in range(10):
        advance(grown, epoch)
        advance(other, epoch)
        assert shown(grown.optimizer) == shown(other.optimizer)


def test_another_number_of_nested_schedulers_is_refused() -> None:
    def chain(parts: int) -> ChainedScheduler:
        optimizer = optimizer_of()
        return ChainedScheduler([ExponentialLR(optimizer, 0.9) for _ in range(parts)])

    for count in (1, 3):
        other = chain(2)
        with pytest.raises(StateMismatchError, match=rf"holds {count} nested .* has 2 \(ExponentialLR, ExponentialLR"):
            other.load_state_dict(chain(count).state_dict())


def test_a_nest_that_fails_half_way_is_put_back_whole() -> None:
    def nest() -> SequentialLR:
        optimizer = optimizer_of()
        parts = [LambdaLR(optimizer, Halving()), ExponentialLR(optimizer, 0.9)]
        return SequentialLR(optimizer, [LinearLR(optimizer), ChainedScheduler(parts)], [30])

    other = nest()
    state = trained(nest()).state_dict()
    state["_schedulers"][1]["_schedulers"][0]["lr_lambdas"][0]["period"] = 55
    state["_schedulers"][1]["_schedulers"][1]["base_lrs"] = [0.1, 0.2]
    state["_schedulers"][1]["_schedulers"][1]["_last_lr"] = [0.1, 0.2]
    before, given = exact(other.state_dict()), exact(state)
    with pytest.raises(StateMismatchError):
        other.load_state_dict(state)
    assert exact(other.state_dict()) == before
    assert exact(state) == given


@pytest.mark.parametrize(
    ("make", "lost", "named"),
    [
        (lambda o: OneCycleLR(o, 0.4, 30), ["max_lr", "min_lr"], "max_lr, min_lr"),
        (lambda o: OneCycleLR(o, 0.4, 30), ["base_momentum"], "base_momentum"),
        (lambda o: swa_utils.SWALR(o, 0.1), ["swa_lr"], "swa_lr"),
    ],
)
def test_options_that_are_lost_from_the_groups_are_named(make: Any, lost: list[str], named: str) -> None:
    case = Case("", make, momentum=True)
    saved, other = trained(make(make_optimizer(case, 2))), make(make_optimizer(case, 2))
    before = exact(other.state_dict())
    other.optimizer.load_state_dict(saved.optimizer.state_dict())
    for option in lost:
        del other.optimizer.param_groups[1][option]
    with pytest.raises(StateMismatchError, match=f"param group 1 of the optimizer lacks {named}, in which"):
        other.load_state_dict(saved.state_dict())
    assert exact(other.state_dict()) == before
    with pytest.raises(KeyError, match=lost[0]):  # as without the check
        advance(other, 0)


def test_the_state_of_another_class_is_named() -> None:
    saved = trained(StepLR(optimizer_of(), 3), 2)
    other = CosineAnnealingLR(optimizer_of(), 10)
    with pytest.warns(SchedulerStateWarning, match=r"lacks T_max, eta_min; it has gamma, step_size, unknown") as said:
        resumed(other, saved)
    assert len(said) == 1
    assert (other.T_max, other.last_epoch) == (10, 2)


def test_states_of_older_torch_versions_load_quietly() -> None:
    saved = trained(StepLR(optimizer_of(), 3), 4)
    state = {k: v for k, v in saved.state_dict().items() if k not in ("_is_initial", "_get_lr_called_within_step")}
    other = resumed(StepLR(optimizer_of(), 9), saved, {**state, "verbose": False})
    advance(other, 0)
    advance(saved, 0)
    assert shown(other.optimizer) == shown(saved.optimizer)


# The optimizer shows another learning rate.

DIFFERS = r"disagree on the learning rate \(group 0: \S+ in the state, 0\.(1|09{9}\d*) in the optimizer\)"


@pytest.mark.parametrize(
    "make",
    [
        lambda o: StepLR(o, 2),
        lambda o: ReduceLROnPlateau(o, patience=0),
        lambda o: OneCycleLR(o, 0.4, 30, cycle_momentum=False, div_factor=4.0),
        lambda o: SequentialLR(o, [ExponentialLR(o, 0.5), LinearLR(o, total_iters=30)], [20]),
        lambda o: ChainedScheduler([ExponentialLR(o, 0.9), ConstantLR(o, 1.0)]),
    ],
    ids=["step", "plateau", "onecycle", "sequence", "chained"],
)
def test_a_scheduler_loaded_without_its_optimizer_is_named(make: Any) -> None:
    saved = trained(make(optimizer_of()), 27)
    other = make(optimizer_of())
    with pytest.warns(SchedulerStateWarning, match=DIFFERS) as said:
        other.load_state_dict(saved.state_dict())
    assert len(said) == 1
    assert said[0].filename == __file__
    resumed(make(optimizer_of()), saved)  # quiet


def test_a_nested_scheduler_whose_turn_has_not_come_excuses_nothing() -> None:
    def sequence() -> SequentialLR:
        optimizer = optimizer_of()
        return SequentialLR(optimizer, [ExponentialLR(optimizer, 0.5), StepLR(optimizer, 2)], [20])

    saved = trained(sequence())
    assert saved._schedulers[1].get_last_lr() == [0.1]
    with pytest.warns(SchedulerStateWarning, match=f"SequentialLR: .*{DIFFERS}"):
        sequence().load_state_dict(saved.state_dict())


def test_only_the_groups_that_differ_are_named() -> None:
    saved = trained(ExponentialLR(optimizer_of(3), 0.5), 1)
    other = ExponentialLR(optimizer_of(3), 0.5)
    other.optimizer.load_state_dict(saved.optimizer.state_dict())
    other.optimizer.param_groups[1]["lr"] = 7.0
    with pytest.warns(SchedulerStateWarning, match=r"\(group 1: 0\.025 in the state, 7\.0 in the optimizer\)"):
        other.load_state_dict(saved.state_dict())


def test_a_tensor_that_rounds_the_float_agrees_with_it() -> None:
    saved = trained(ExponentialLR(optimizer_of(), 0.9), 3)
    other = ExponentialLR(make_optimizer(ANY, tensor_lr=True), 0.9)
    other.optimizer.param_groups[0]["lr"].fill_(saved.optimizer.param_groups[0]["lr"])
    other.load_state_dict(saved.state_dict())


def averaging_run() -> tuple[CosineAnnealingLR, swa_utils.SWALR]:
    optimizer = optimizer_of()
    return CosineAnnealingLR(optimizer, 50), swa_utils.SWALR(optimizer, 0.05)


def test_schedulers_that_share_an_optimizer_are_quiet_when_one_of_them_agrees() -> None:
    first, second = averaging_run()
    trained(first, 9)
    trained(second, 4)  # what `first` remembers is out of date now
    other, another = averaging_run()
    other.optimizer.load_state_dict(first.optimizer.state_dict())
    other.load_state_dict(first.state_dict())
    another.load_state_dict(second.state_dict())
    advance(another, 0)
    advance(second, 0)
    assert shown(another.optimizer) == shown(second.optimizer)


def test_schedulers_that_share_an_optimizer_are_named_when_none_agrees() -> None:
    first, second = averaging_run()
    trained(first, 9)
    trained(second, 4)
    other, another = averaging_run()
    other.load_state_dict(first.state_dict())
    with pytest.warns(SchedulerStateWarning, match="SWALR: the loaded state and the optimizer disagree"):
        another.load_state_dict(second.state_dict())


def test_a_scheduler_that_is_gone_does_not_count() -> None:
    optimizer = optimizer_of()
    for _ in range(3):
        last = StepLR(optimizer, 2)
    with pytest.warns(SchedulerStateWarning, match=DIFFERS):
        last.load_state_dict(trained(StepLR(optimizer_of(), 2)).state_dict())


# The rest of the contract.


@pytest.mark.parametrize(**by_name(CASES))
def test_a_complete_state_saves_and_loads_without_a_word(case: Case) -> None:
    saved = trained(case.build(OURS, make_optimizer(case, 2)), 11)
    other = case.build(OURS, make_optimizer(case, 2))
    with state_loss_allowed(case), catch_warnings():
        if not case.lossy:
            simplefilter("error")
        resumed(other, saved)
    assert exact(other.get_last_lr()) == exact(saved.get_last_lr())


@pytest.mark.parametrize(**by_name(CASES))
def test_every_list_of_groups_is_known_to_the_state_tools(case: Case) -> None:
    scheduler = case.build(OURS, make_optimizer(case, 3))
    assert set(scheduler._per_group) <= PER_GROUP_KEYS
    lists = {key for key, value in vars(scheduler).items() if isinstance(value, list) and len(value) == 3}
    assert lists - {"_schedulers", "_schedule_phases", "_milestones"} <= set(scheduler._per_group)


def test_a_subclass_that_defines_get_lr_works_as_with_torch() -> None:
    class Mine(LRScheduler):
        def get_lr(self) -> list[Any]:
            return [base / (1 + self.last_epoch) for base in self.base_lrs]

    scheduler = trained(Mine(optimizer_of(2)), 3)
    assert scheduler.get_last_lr() == [0.1 / 4, 0.05 / 4]


def test_public_names_are_torchs() -> None:
    assert lr_scheduler.__all__ == sorted(lr_scheduler.__all__)
    assert set(lr_scheduler.__all__) == set(torch.optim.lr_scheduler.__all__)
    for name in lr_scheduler.__all__:
        assert issubclass(getattr(lr_scheduler, name), torch.optim.lr_scheduler.LRScheduler)
