"""Schedulers whose rate changes in one direction: functions, steps, curves, plateaus, and SWA's annealing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from optimstate.state.schedules.schedule import (
    COUNTER,
    DIVISOR,
    NUMBER,
    NUMBERS,
    Check,
    Form,
    Line,
    Options,
    Schedule,
    is_count,
    is_count_or_zero,
    is_fraction,
    is_number,
    is_steps,
    one_of,
    word,
)
from optimstate.tree import Opaque, cloned


def _is_real(value: Any) -> bool:
    """Whether a value is a number or an infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _are_functions(value: Any) -> bool:
    """Whether a value lists what states keep of functions: nothing, or the attributes of an object."""
    kept = (type(None), Mapping, Opaque)
    return isinstance(value, list | tuple) and all(isinstance(item, kept) or callable(item) for item in value)


def _counts_steps(value: Any) -> bool:
    """Whether a value tells how often each step is a milestone."""
    if not isinstance(value, Mapping | Opaque | list):
        return False
    try:
        return all(is_number(item) for pair in _counted(value).items() for item in pair)
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


class Function(Schedule):
    """A factor that a function of the step returns; the state seldom contains the function."""

    NAME = "LambdaLR or MultiplicativeLR"
    KEYS = frozenset({"lr_lambdas"})
    FORMS: ClassVar[Mapping[str, Form]] = {"lr_lambdas": Form(_are_functions, "a list of functions")}
    USES_BASE = True


class Step(Schedule):
    """A factor every so many steps."""

    NAME = "StepLR"
    KEYS = frozenset({"step_size", "gamma"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"step_size": is_count, "gamma": is_number}
    FORMS: ClassVar[Mapping[str, Form]] = {"step_size": DIVISOR, "gamma": NUMBER}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return Line(0.0, self.state["gamma"] ** (self.position // self.state["step_size"]))


class MultiStep(Schedule):
    """A factor at each milestone."""

    NAME = "MultiStepLR"
    KEYS = frozenset({"milestones", "gamma"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"milestones": is_steps, "gamma": is_number}
    FORMS: ClassVar[Mapping[str, Form]] = {
        "milestones": Form(_counts_steps, "a count of times for each step"),
        "gamma": NUMBER,
    }

    def argument(self, key: str) -> Any:
        found = self.state[key]
        return found if key == "gamma" else sorted(Counter(_counted(found)).elements())

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        passed = sum(times for step, times in _counted(self.state["milestones"]).items() if step <= self.position)
        return Line(0.0, self.state["gamma"] ** passed)

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        old = self.state[key]
        if key == "milestones" and isinstance(old, Opaque):
            made = cloned(old)
            made.arguments, made.entries = (dict(Counter(value)),), []
            self.state[key] = made
        else:
            self.state[key] = Counter(value) if key == "milestones" else value


def _counted(milestones: Any) -> Mapping[int, int]:
    """How often each step is a milestone, from a `Counter`, a pickle's record of one, or a list.

    Keys of mappings are texts in distributed checkpoints.
    """
    if isinstance(milestones, Opaque):
        milestones = dict(milestones.arguments[0]) if milestones.arguments else dict(milestones.entries)
    if not isinstance(milestones, Mapping):
        return Counter(milestones)
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: times for key, times in milestones.items()}


class Constant(Schedule):
    """A factor until a step."""

    NAME = "ConstantLR"
    KEYS = frozenset({"factor", "total_iters"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"factor": is_fraction, "total_iters": is_count_or_zero}
    FORMS: ClassVar[Mapping[str, Form]] = {"factor": DIVISOR, "total_iters": NUMBER}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return Line(0.0, 1.0 if self.position >= self.state["total_iters"] else self.state["factor"])


class Linear(Schedule):
    """A factor that changes linearly from one value to another."""

    NAME = "LinearLR"
    KEYS = frozenset({"start_factor", "end_factor", "total_iters"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "start_factor": lambda value: is_fraction(value) and value > 0,
        "end_factor": is_fraction,
        "total_iters": is_count,
    }
    FORMS: ClassVar[Mapping[str, Form]] = {"start_factor": NUMBER, "end_factor": NUMBER, "total_iters": DIVISOR}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        start, end, total = (self.state[key] for key in ("start_factor", "end_factor", "total_iters"))
        return Line(0.0, start + (end - start) * min(total, self.position) / total)


class Exponential(Schedule):
    """A factor at every step."""

    NAME = "ExponentialLR"
    KEYS = frozenset({"gamma"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"gamma": is_number}
    FORMS: ClassVar[Mapping[str, Form]] = {"gamma": NUMBER}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return Line(0.0, self.state["gamma"] ** self.position)


class Polynomial(Schedule):
    """A power of the remaining part of the schedule."""

    NAME = "PolynomialLR"
    KEYS = frozenset({"total_iters", "power"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"total_iters": is_count, "power": is_number}
    FORMS: ClassVar[Mapping[str, Form]] = {"total_iters": DIVISOR, "power": NUMBER}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        total = self.state["total_iters"]
        return Line(0.0, (1.0 - min(total, self.position) / total) ** self.state["power"])


def _cosine(lowest: float, done: float) -> Line:
    height = (1 + math.cos(math.pi * done)) / 2
    return Line(lowest * (1 - height), height)


class Annealing(Schedule):
    """A scheduler between the initial rate and `eta_min`."""

    USES_BASE = True

    @property
    def proportional(self) -> bool:
        return bool(self.state["eta_min"] == 0)


class Cosine(Annealing):
    """Half a cosine down, and up again."""

    NAME = "CosineAnnealingLR"
    KEYS = frozenset({"T_max", "eta_min"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"T_max": is_count, "eta_min": is_number}
    FORMS: ClassVar[Mapping[str, Form]] = {"T_max": DIVISOR, "eta_min": NUMBER}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return _cosine(self.state["eta_min"], self.position / self.state["T_max"])


class WarmRestarts(Annealing):
    """Half a cosine down, repeated."""

    NAME = "CosineAnnealingWarmRestarts"
    KEYS = frozenset({"T_0", "T_i", "T_mult", "eta_min", "T_cur"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"T_0": is_count, "T_mult": is_count, "eta_min": is_number}
    FORMS: ClassVar[Mapping[str, Form]] = {
        "T_0": DIVISOR,
        "T_i": DIVISOR,
        "T_mult": DIVISOR,
        "T_cur": NUMBER,
        "eta_min": NUMBER,
    }

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return _cosine(self.state["eta_min"], self.state["T_cur"] / self.state["T_i"])

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        self.state[key] = value
        self.move_to(self.position)

    def move_to(self, position: int) -> None:
        fraction = self.state["T_cur"] % 1 if position == self.position else 0
        self.state["last_epoch"] = position
        length, left = self.state["T_0"], position
        while left >= length:
            left -= length
            length *= self.state["T_mult"]
        self.state["T_cur"], self.state["T_i"] = left + fraction, length


class Plateau(Schedule):
    """A factor whenever a metric stops improving."""

    NAME = "ReduceLROnPlateau"
    KEYS = frozenset({"factor", "patience", "num_bad_epochs", "mode"})
    OPTIONAL = frozenset(
        {"default_min_lr", "min_lrs", "cooldown", "eps", "mode_worse", "threshold", "threshold_mode", "best"}
        | {"cooldown_counter", "_scale_fn"}
    )
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "factor": lambda value: is_number(value) and value < 1,
        "patience": is_count_or_zero,
        "cooldown": is_count_or_zero,
        "threshold": is_number,
        "threshold_mode": one_of("rel", "abs"),
        "eps": is_number,
    }
    FORMS: ClassVar[Mapping[str, Form]] = {
        "factor": NUMBER,
        "patience": NUMBER,
        "cooldown": NUMBER,
        "cooldown_counter": NUMBER,
        "num_bad_epochs": NUMBER,
        "threshold": NUMBER,
        "eps": NUMBER,
        "min_lrs": NUMBERS,
        "best": Form(_is_real, "a number"),
        "mode_worse": Form(_is_real, "a number"),
        "mode": word("min", "max"),
        "threshold_mode": word("rel", "abs"),
    }


class SWA(Schedule):
    """Annealing to the learning rate of weight averaging."""

    NAME = "SWALR"
    KEYS = frozenset({"anneal_epochs"})
    OPTIONAL = frozenset({"_anneal_strategy", "anneal_func", "swa_lrs"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"anneal_epochs": is_count_or_zero}
    FORMS: ClassVar[Mapping[str, Form]] = {"anneal_epochs": COUNTER}
    proportional = False

    @property
    def bounds(self) -> tuple[str, ...]:
        return ("swa_lr",)

    @property
    def _share(self) -> float | None:
        step, epochs = self.state["_step_count"] - 1, self.state["anneal_epochs"]
        done = max(0.0, min(1.0, (max(1, step) if epochs == 0 else step) / max(1, epochs)))
        return {"linear": done, "cos": (1 - math.cos(math.pi * done)) / 2}.get(self._strategy)

    @property
    def _strategy(self) -> str:
        """`linear` or `cos`. Before torch 2.10 the state has the annealing function, or in a file its name."""
        function = self.state.get("anneal_func")
        name = str(getattr(function, "qualname", getattr(function, "__qualname__", "")))
        by_name = {"_linear_anneal": "linear", "_cosine_anneal": "cos"}.get(name.rpartition(".")[2], "")
        return str(self.state.get("_anneal_strategy", by_name))

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        share = self._share
        return None if share is None or "swa_lr" not in options else Line(options["swa_lr"] * share, 1 - share)

    @property
    def is_over(self) -> bool:
        return self._share == 1
