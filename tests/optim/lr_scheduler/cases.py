"""Every scheduler with many configurations, and how to run one on either library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

import optimstate.optim
from optimstate.errors import SchedulerStateWarning
from optimstate.optim import lr_scheduler, swa_utils

STEPS = 60
OURS = SimpleNamespace(**{name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__}, SWALR=swa_utils.SWALR)
TORCH = SimpleNamespace(
    **{name: getattr(torch.optim.lr_scheduler, name) for name in lr_scheduler.__all__},
    SWALR=torch.optim.swa_utils.SWALR,
)
LIBRARIES = {"ours": OURS, "torch": TORCH}
# Schedulers must work on the optimizers of both libraries, as far as this checkout has them.
OPTIMIZERS: list[ModuleType] = [torch.optim, *([optimstate.optim] if hasattr(optimstate.optim, "SGD") else [])]


class Halving:
    """A callable object with a memory: its attributes are its state."""

    def __init__(self, period: int = 7) -> None:
        self.period = period
        self.furthest = 0.0

    def __call__(self, epoch: float) -> float:
        self.furthest = max(self.furthest, epoch)
        return 0.5 ** (epoch / self.period) + 0.001 * (self.furthest % 3)


def warmup(epoch: int, length: int = 9) -> float:
    return min(1.0, (epoch + 1) / length)


@dataclass(frozen=True)
class Case:
    """One configuration of one scheduler.

    `build(classes, optimizer)` makes it from either library; `**more` reaches the constructor.
    """

    name: str
    build: Callable[..., Any]
    momentum: bool = False  # needs an optimizer with momentum or betas
    lossy: bool = False  # its state cannot hold everything
    composed: bool = False


class PerGroup:
    """An option made for the groups at hand: alike for groups that all have the same learning rate."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __call__(self, optimizer: torch.optim.Optimizer) -> Any:
        groups = optimizer.param_groups
        if len({float(group["lr"]) for group in groups}) == 1 and isinstance(self.make(1), list):
            return [self.make(1)[0] for _ in groups]
        return self.make(len(groups))


def one(name: str, **options: Any) -> Callable[..., Any]:
    """A scheduler of class `name`."""

    def build(classes: SimpleNamespace, optimizer: torch.optim.Optimizer, **more: Any) -> Any:
        made = {key: value(optimizer) if isinstance(value, PerGroup) else value for key, value in options.items()}
        return getattr(classes, name)(optimizer, **made, **more)

    return build


def spread(value: float) -> PerGroup:
    return PerGroup(lambda groups: [value / (index + 1) for index in range(groups)])


def simple(name: str, label: str = "", *, momentum: bool = False, lossy: bool = False, **options: Any) -> Case:
    title = "-".join(filter(None, [name, label or "_".join(f"{k}={v}" for k, v in options.items())]))
    return Case(title, one(name, **options), momentum, lossy)


LAMBDAS = [
    simple("LambdaLR", "function", lr_lambda=warmup, lossy=True),
    simple("LambdaLR", "lambda", lr_lambda=lambda epoch: 0.95**epoch, lossy=True),
    simple("LambdaLR", "partial", lr_lambda=partial(warmup, length=20), lossy=True),
    simple("LambdaLR", "object", lr_lambda=PerGroup(lambda n: [Halving(5 + i) for i in range(n)])),
    simple(
        "LambdaLR", "list", lr_lambda=PerGroup(lambda n: [warmup, Halving(4), lambda e: 1 / (e + 1)][:n]), lossy=True
    ),
    simple("MultiplicativeLR", "lambda", lr_lambda=lambda epoch: 0.97, lossy=True),
    simple("MultiplicativeLR", "objects", lr_lambda=PerGroup(lambda n: [Halving(900 + i) for i in range(n)])),
]
DECAYS = [
    simple("StepLR", step_size=7),
    simple("StepLR", step_size=1, gamma=0.93),
    simple("StepLR", step_size=13, gamma=1 / 3),
    simple("MultiStepLR", milestones=[4, 9, 30]),
    simple("MultiStepLR", milestones=[30, 5, 5, 5], gamma=0.7),
    simple("MultiStepLR", milestones=[0, 2], gamma=0.3),
    simple("ConstantLR"),
    simple("ConstantLR", factor=0.1, total_iters=20),
    simple("ConstantLR", factor=1.0, total_iters=3),
    simple("LinearLR"),
    simple("LinearLR", start_factor=0.01, total_iters=33),
    simple("LinearLR", start_factor=1.0, end_factor=0.0, total_iters=50),
    simple("LinearLR", start_factor=0.3, end_factor=0.3, total_iters=7),
    simple("ExponentialLR", gamma=0.9),
    simple("ExponentialLR", gamma=1.01),
    simple("PolynomialLR"),
    simple("PolynomialLR", total_iters=40, power=2.5),
    simple("PolynomialLR", total_iters=100, power=0.5),
    simple("CosineAnnealingLR", T_max=60),
    simple("CosineAnnealingLR", T_max=11, eta_min=1e-4),
    simple("CosineAnnealingLR", T_max=1),
    simple("CosineAnnealingLR", T_max=7, eta_min=0.5),
    simple("CosineAnnealingWarmRestarts", T_0=10),
    simple("CosineAnnealingWarmRestarts", T_0=3, T_mult=2, eta_min=1e-5),
    simple("CosineAnnealingWarmRestarts", T_0=1, T_mult=3),
]
CYCLES = [
    simple("CyclicLR", base_lr=0.001, max_lr=0.1, step_size_up=5, momentum=True),
    simple("CyclicLR", base_lr=0.001, max_lr=0.1, step_size_up=5, cycle_momentum=False),
    simple("CyclicLR", base_lr=0.01, max_lr=0.3, step_size_up=4, step_size_down=9, mode="triangular2", momentum=True),
    simple("CyclicLR", base_lr=0.01, max_lr=0.3, step_size_up=6, mode="exp_range", gamma=0.98, momentum=True),
    simple("CyclicLR", "lists", base_lr=spread(0.01), max_lr=spread(0.4), step_size_up=7, momentum=True),
    simple(
        "CyclicLR",
        "momenta",
        base_lr=0.01,
        max_lr=0.4,
        step_size_up=7,
        base_momentum=spread(0.6),
        max_momentum=spread(0.95),
        momentum=True,
    ),
    simple(
        "CyclicLR",
        "function",
        base_lr=0.01,
        max_lr=0.4,
        step_size_up=5,
        scale_fn=lambda x: 1 / (5 ** (x * 0.01)),
        scale_mode="iterations",
        momentum=True,
        lossy=True,
    ),
    simple(
        "CyclicLR",
        "object",
        base_lr=0.01,
        max_lr=0.4,
        step_size_up=5,
        scale_fn=PerGroup(lambda n: Halving(30)),
        momentum=True,
    ),
    simple("OneCycleLR", max_lr=0.1, total_steps=60, momentum=True),
    simple("OneCycleLR", max_lr=0.1, total_steps=61, three_phase=True, momentum=True),
    simple("OneCycleLR", max_lr=0.1, epochs=9, steps_per_epoch=7, anneal_strategy="linear", momentum=True),
    simple("OneCycleLR", max_lr=0.1, total_steps=90, cycle_momentum=False, pct_start=0.4),
    simple("OneCycleLR", "lists", max_lr=spread(0.4), total_steps=60, base_momentum=spread(0.8), momentum=True),
    simple("OneCycleLR", max_lr=0.3, total_steps=60, div_factor=7.0, final_div_factor=3.0, momentum=True),
    simple("SWALR", swa_lr=0.05),
    simple("SWALR", swa_lr=0.001, anneal_epochs=25, anneal_strategy="linear"),
    simple("SWALR", swa_lr=0.3, anneal_epochs=0),
    simple("SWALR", "lists", swa_lr=spread(0.05), anneal_epochs=40),
]
PLATEAUS = [
    simple("ReduceLROnPlateau"),
    simple("ReduceLROnPlateau", patience=2, factor=0.5, cooldown=3),
    simple("ReduceLROnPlateau", mode="max", patience=1, threshold=0.05),
    simple("ReduceLROnPlateau", mode="max", patience=0, threshold_mode="abs", threshold=0.2, factor=0.8),
    simple("ReduceLROnPlateau", patience=0, threshold_mode="abs", min_lr=0.01, eps=0.002),
    simple("ReduceLROnPlateau", "lists", patience=1, factor=0.3, min_lr=spread(0.02)),
]


def chained(*parts: Callable[..., Any]) -> Callable[..., Any]:
    return lambda classes, optimizer: classes.ChainedScheduler([part(classes, optimizer) for part in parts], optimizer)


def sequence(milestones: list[int], *parts: Callable[..., Any]) -> Callable[..., Any]:
    return lambda classes, optimizer: classes.SequentialLR(
        optimizer, [part(classes, optimizer) for part in parts], list(milestones)
    )


def hushed(build: Callable[..., Any]) -> Callable[..., Any]:
    """Composed schedulers as the first of a sequence warn in both libraries that `step()` was called too early."""

    def quiet(classes: SimpleNamespace, optimizer: torch.optim.Optimizer) -> Any:
        with catch_warnings():
            simplefilter("ignore")
            return build(classes, optimizer)

    return quiet


WARM = one("LinearLR", start_factor=0.1, total_iters=6)
COOL = one("ExponentialLR", gamma=0.95)
FALL = one("MultiStepLR", milestones=[8, 20], gamma=0.5)
COSINE = one("CosineAnnealingLR", T_max=25, eta_min=1e-3)
RESTART = one("CosineAnnealingWarmRestarts", T_0=8, T_mult=2)
CYCLE = one("CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=6)

COMPOSED = [
    Case("chained-constant-exponential", chained(one("ConstantLR", factor=0.1, total_iters=20), COOL), composed=True),
    Case("chained-three", chained(WARM, FALL, COSINE), composed=True),
    Case(
        "chained-lambda",
        chained(one("MultiplicativeLR", lr_lambda=PerGroup(lambda n: [Halving(700)] * n)), COOL),
        composed=True,
    ),
    Case("chained-chained", chained(chained(WARM, COOL), FALL), composed=True),
    Case("chained-sequence", chained(sequence([10], WARM, COSINE), COOL), composed=True),
    Case("sequence-warmup-cosine", sequence([6], WARM, COSINE), composed=True),
    Case("sequence-three", sequence([5, 20], WARM, FALL, COOL), composed=True),
    Case("sequence-restarts", sequence([6], WARM, RESTART), composed=True),
    Case(
        "sequence-polynomial", sequence([3, 3, 9], WARM, COOL, one("PolynomialLR", total_iters=30), FALL), composed=True
    ),
    Case("sequence-chained-first", hushed(sequence([12], chained(WARM, COOL), COSINE)), composed=True),
    Case("sequence-sequence-first", hushed(sequence([30], sequence([7], WARM, FALL), COOL)), composed=True),
    Case("sequence-cycle", sequence([10], WARM, CYCLE), momentum=True, composed=True),
    Case("sequence-lambda", sequence([10], one("LambdaLR", lr_lambda=warmup), COSINE), lossy=True, composed=True),
]

SIMPLE = LAMBDAS + DECAYS + CYCLES + PLATEAUS
CASES = SIMPLE + COMPOSED


def by_name(cases: list[Case]) -> dict[str, Any]:
    """The arguments of a parametrize over cases."""
    return {"argnames": "case", "argvalues": cases, "ids": [case.name for case in cases]}


def make_optimizer(
    case: Case,
    groups: int = 1,
    *,
    tensor_lr: bool = False,
    adam: bool = False,
    lr: float = 0.1,
    library: ModuleType = torch.optim,
    same_lr: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer with one small parameter in each group."""
    lrs = [lr if same_lr else lr / (index + 1) for index in range(groups)]
    params: list[dict[str, Any]] = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": torch.tensor(value) if tensor_lr else value}
        for value in lrs
    ]
    if adam:
        return library.Adam(params)
    return library.SGD(params, momentum=0.9 if case.momentum else 0.0)


def advance(scheduler: Any, epoch: int) -> None:
    """One scheduler step, after an optimizer step if it is the first; the plateau's metric comes from the epoch."""
    if not getattr(scheduler.optimizer, "_opt_called", False):
        scheduler.optimizer.step()
    if hasattr(scheduler, "num_bad_epochs"):
        scheduler.step(metric(epoch))
    else:
        scheduler.step()


def metric(epoch: int) -> float:
    """A loss that improves, stalls, jumps and improves again."""
    return 3.0 / (1 + epoch // 9) + 0.3 * math.sin(epoch * 1.7)


def shown(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What a scheduler changes in an optimizer at each step, as exact values."""
    return [[exact(group.get(key)) for key in ("lr", "momentum", "betas")] for group in optimizer.param_groups]


def options(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Every option of every group, as exact values."""
    return [exact({key: value for key, value in group.items() if key != "params"}) for group in optimizer.param_groups]


def exact(value: Any) -> Any:
    """A form that compares equal only for the same types, bits and order of keys."""
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return (type(value).__name__, [(exact(key), exact(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [exact(entry) for entry in value])
    return (type(value).__name__, value)


@contextmanager
def state_loss_allowed(case: Case) -> Iterator[None]:
    """Let a case whose state cannot be complete say so; any other warning, and one from any other case, is an error."""
    with catch_warnings():
        if case.lossy:
            simplefilter("ignore", SchedulerStateWarning)
        yield
