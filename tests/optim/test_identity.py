"""Every class is an instance of torch's of its name, and none of torch's algorithms runs in it."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import optimstate.optim as optim
from optimstate.optim import lr_scheduler, swa_utils
from tests import cases, oracle
from tests.optim.lr_scheduler.cases import CASES, OURS, TORCH, advance, by_name, make_optimizer
from tests.optim.lr_scheduler.cases import Case as SchedulerCase
from tests.releases import torchs_scheduler

MACHINERY = {"optimizer"}  # the base class and its helpers, which ours derives from


def algorithm_modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(torch.optim.__path__, "torch.optim."):
        if info.name.split(".")[2] not in MACHINERY:
            yield importlib.import_module(info.name)


def plain(value: Any) -> FunctionType | None:
    """The function inside decorators and descriptors, if there is one."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def used_by(function: FunctionType, module: ModuleType) -> Iterator[FunctionType]:
    """The functions of the same module that a function calls, and those that these call."""

    def names(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from names(constant)

    for name in names(function.__code__):
        called = plain(vars(module).get(name))
        if called is not None and called is not function and called.__module__ == module.__name__:
            yield called
            yield from used_by(called, module)


def scheduler_machinery() -> set[FunctionType]:
    """What the base of all schedulers does, which ours derives from."""
    module = torch.optim.lr_scheduler
    own = [found for value in vars(module.LRScheduler).values() if (found := plain(value))]
    # ...and the classes that the base enters and leaves.
    helpers = [
        function
        for name, value in vars(module).items()
        if inspect.isclass(value) and name.startswith("_") and not issubclass(value, module.LRScheduler)
        for function in map(plain, vars(value).values())
        if function
    ]
    return {*own, *helpers, *(called for function in own for called in used_by(function, module))}


def algorithm_functions() -> Iterator[FunctionType]:
    spared = scheduler_machinery()
    for module in algorithm_modules():
        for value in vars(module).values():
            values = vars(value).values() if inspect.isclass(value) else [value]
            for found in map(plain, values):
                if found and found.__module__ == module.__name__ and found not in spared:
                    yield found


def raising(like: CodeType) -> CodeType:
    """Code that raises, of a function with as many variables of an enclosing one; a generator's for a generator."""
    names = "".join(f"v{number}, " for number in range(len(like.co_freevars)))
    last = ["  yield"] if like.co_flags & inspect.CO_GENERATOR else []
    body = (f"  ({names})", '  raise AssertionError("this is torch\'s")', *last, " return inner")
    scope: dict[str, Any] = {}
    exec("\n".join((f"def outer({names}):", " def inner(*_, **__):", *body)), scope)
    code: CodeType = scope["outer"](*like.co_freevars).__code__
    return code


@pytest.fixture
def _torchs_algorithms_raise() -> Iterator[None]:
    """Every function of torch's algorithm modules raises, by whatever name or method it is reached."""
    before = {}
    try:
        for function in set(algorithm_functions()):
            before[function] = function.__code__
            function.__code__ = raising(function.__code__)
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code


alone = pytest.mark.usefixtures("_torchs_algorithms_raise")


@alone
def test_the_guard_catches_torchs_own() -> None:
    p = nn.Parameter(torch.ones(2))
    for name in cases.OPTIMIZERS:
        with pytest.raises(AssertionError, match="this is torch's"):
            getattr(torch.optim, name)([p])
    with pytest.raises(AssertionError, match="this is torch's"):
        torch.optim.lr_scheduler.StepLR(optim.SGD([p]), 1)
    with pytest.raises(AssertionError, match="this is torch's"):
        torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))


@alone
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_an_optimizer_lives_without_torchs_algorithms(name: str) -> None:
    """Constructed, stepped by every implementation, saved, loaded, copied, pickled and given another group."""
    row = cases.TABLE[name]
    for implementation in row.implementations:
        for case in cases.telling(name, implementation, cases.dtypes_of(row, implementation)[0]):
            run = oracle.Run(getattr(optim, name), case)
            assert isinstance(run.optimizer, getattr(torch.optim, name))
            run.steps(0, 3)
            if implementation == "differentiable":
                continue
            run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
            repr(run.optimizer)
            for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
                assert type(copied) is type(run.optimizer)
            if row.second_group is not None:
                shape = (2, 2)
                run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(shape))]})
                run.optimizer.zero_grad()
            run.steps(3, 4)
    if name == "Adagrad":
        run.optimizer.share_memory()  # type: ignore[attr-defined]


@alone
@pytest.mark.filterwarnings("ignore::optimstate.errors.SchedulerStateWarning", "ignore:The epoch parameter")
@pytest.mark.parametrize(**by_name(CASES))
def test_a_scheduler_lives_without_torchs_algorithms(case: SchedulerCase) -> None:
    made = case.build(OURS, make_optimizer(case, groups=2, library=optim))
    assert isinstance(made, getattr(torch.optim.lr_scheduler, type(made).__name__, torch.optim.swa_utils.SWALR))
    for epoch in range(12):
        advance(made, epoch)
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    made.get_last_lr()
    repr(made)
    if not isinstance(made, lr_scheduler.ReduceLROnPlateau) and not case.composed:
        made.step(4)  # the closed form
    advance(made, 12)


@alone
def test_averaging_lives_without_torchs_algorithms() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for options in (
        {},
        {"avg_fn": swa_utils.get_ema_avg_fn()},
        {"avg_fn": swa_utils.get_swa_avg_fn()},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(), "use_buffers": True},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    ):
        averaged = swa_utils.AveragedModel(model, **options)
        assert isinstance(averaged, torch.optim.swa_utils.AveragedModel)
        for _ in range(3):
            averaged.update_parameters(model)
        averaged.load_state_dict(averaged.state_dict())
        swa_utils.update_bn([torch.ones(4, 2)], averaged)
        averaged(torch.ones(2, 2))


@pytest.mark.parametrize("module", ["", ".lr_scheduler", ".swa_utils"])
def test_every_class_of_torchs_has_ours(module: str) -> None:
    torchs, ours = (importlib.import_module(f"{base}{module}") for base in ("torch.optim", "optimstate.optim"))
    for name, value in vars(torchs).items():
        if (
            not inspect.isclass(value)
            or name.startswith("_")
            or value.__module__ not in ("torch.optim", torchs.__name__)
        ):
            continue
        assert issubclass(getattr(ours, name), value), name
        # A pickle names the place that stays, as torch's does.
        assert getattr(ours, name).__module__ == value.__module__.replace("torch.optim", "optimstate.optim"), name


BASES = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # which ours derives from


@pytest.mark.parametrize("module", ["", ".lr_scheduler", ".swa_utils"])
def test_what_runs_is_never_torchs_even_where_a_class_inherits_it(module: str) -> None:
    """No method or property of ours, private ones included, is defined by torch's namesake alone."""
    torchs, ours = (importlib.import_module(f"{base}{module}") for base in ("torch.optim", "optimstate.optim"))
    borrowed = [
        f"{name}.{attribute}"
        for name, value in vars(torchs).items()
        if inspect.isclass(value) and value.__module__ in ("torch.optim", torchs.__name__) and value not in BASES
        for attribute, member in vars(value).items()
        if not attribute.startswith("__") and plain(member)
        for owner in [next(base for base in getattr(ours, name).__mro__ if attribute in vars(base))]
        if not name.startswith("_") and owner.__module__.startswith("torch.")
    ]
    assert borrowed == []


# --- what schedulers hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(**by_name(CASES))
def test_the_attributes_of_a_scheduler_are_torchs(case: SchedulerCase) -> None:
    """Frameworks save and copy `vars(scheduler)`: what is live in ours is no part of it."""
    torchs_scheduler(case.name, state=True)
    ours, theirs = (case.build(classes, make_optimizer(case)) for classes in (OURS, TORCH))
    ours.register_state_dict_post_hook(lambda *_: None)
    advance(ours, 2)
    advance(theirs, 2)
    assert set(vars(ours)) <= set(vars(theirs))


def test_a_pickled_scheduler_is_whole_and_starts_without_hooks() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    made = lr_scheduler.StepLR(optimizer, 2)
    made.register_state_dict_post_hook(lambda *_: None)
    copied: Callable[..., Any]
    del optimizer.step  # torch's base watches it by a function that no pickle takes
    made.optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other = copied(made)
        assert type(other) is type(made)
        assert {k: v for k, v in vars(other).items() if k != "optimizer"} == made.state_dict()
        assert not other._runtime.state_dict_post
