"""Torch's schedulers as their states show them: what the next learning rate is computed from, and what it is now.

Most schedulers of torch multiply the learning rate that they find in the param group; others compute it from the rate
that the run began with (`base_lrs`, which the groups call `initial_lr`), or from bounds of their own. Every rate is a
line over the initial one, `a + b * initial`, as long as the position stays: that is what a changed rate, a changed
length or a param group that joins late is computed by. Nothing here imports torch; the formulas are those of torch's
documentation, for the position that the state has.

| scheduler | the next step computes from |
|---|---|
| StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR, ReduceLROnPlateau | `lr` |
| MultiplicativeLR | `lr` (its state cannot be told from LambdaLR's, so both are kept right) |
| LambdaLR, CosineAnnealingWarmRestarts | `base_lrs` |
| CosineAnnealingLR | `lr`, and `base_lrs` where it turns |
| CyclicLR | `base_lrs` and `max_lrs` |
| OneCycleLR | `initial_lr`, `max_lr` and `min_lr` of the group |
| SWALR | `lr` and `swa_lr` of the group |
| SequentialLR | what its present part does; `base_lrs` at its milestones |
| ChainedScheduler | what its parts do, one after the other |
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from optimstate.tree import Opaque, cloned

__all__ = ["Line", "Schedule", "parts", "schedule_of"]

Options = dict[str, Any]
Check = Callable[[Any], bool]

_COMMON = {
    "base_lrs",
    "last_epoch",
    "_step_count",
    "_is_initial",
    "_initial_step",
    "_get_lr_called_within_step",
    "_last_lr",
    "verbose",
    "_schedulers",
}


class Line(NamedTuple):
    """A learning rate as `constant + slope * initial`."""

    constant: float
    slope: float

    def at(self, initial: float) -> float:
        """The rate of a param group that began with `initial`."""
        return self.constant + self.slope * initial

    def initial(self, rate: float) -> float | None:
        """What a param group began with whose rate is `rate`; None where every beginning leads to the same."""
        return (rate - self.constant) / self.slope if abs(self.slope) > 1e-9 else None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count_or_none(value: Any) -> bool:
    return value == 0 or _count(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _steps(value: Any) -> bool:
    return isinstance(value, list) and all(_count_or_none(item) for item in value) and value == sorted(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _one_of(*words: str) -> Check:
    return lambda value: value in words


class Schedule:
    """One scheduler.

    Attributes:
        state: Its `state_dict()`; changed in place by `set` and `start_from`.
        NAME: Torch's name.
        KEYS: What its state has beside what all have; more or less is another scheduler.
        OPTIONAL: What states of some versions or options have too.
        ARGUMENTS: What of its constructor can be changed in a state, and what values it takes.
        USES_BASE: Whether a later step computes from `base_lrs`.
    """

    NAME: ClassVar[str] = ""
    KEYS: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {}
    USES_BASE: ClassVar[bool] = False
    is_over = False

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether it is a state of this scheduler."""
        own = state.keys() - _COMMON
        return own >= cls.KEYS and not own - cls.KEYS - cls.OPTIONAL and ("_schedulers" in state) == issubclass(cls, _Parts)

    @property
    def position(self) -> int:
        """How many steps were taken."""
        return int(self.state.get("last_epoch", 0))

    @property
    def proportional(self) -> bool:
        """Whether rates and initial rates grow alike, now and at every later step."""
        return True

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        """The present rate of a param group over its initial one; None where the state does not tell.

        Args:
            number: Of the group.
            options: Of the group.
        """
        return None

    def initial(self, number: int, options: Mapping[str, Any]) -> Any:
        """What the param group began with, as the scheduler has it; None where it does not know."""
        found = self.state.get("base_lrs")
        return found[number] if isinstance(found, list) and number < len(found) else options.get("initial_lr")

    def start_from(self, number: int, initial: float, options: Options) -> None:
        """Let a param group have begun with another rate; bounds of the scheduler's own stay."""
        if isinstance(self.state.get("base_lrs"), list):
            self.state["base_lrs"] = [*self.state["base_lrs"]]
            self.state["base_lrs"][number] = initial

    @property
    def scalable(self) -> bool:
        """Whether all later rates grow by a factor where everything they are computed from does."""
        return self.proportional

    def grow(self, number: int, factor: float, options: Options) -> None:
        """Multiply whatever later rates of a param group are computed from, `lr` aside."""
        initial = self.initial(number, options)
        if initial is not None:
            self.start_from(number, float(initial) * factor, options)

    def argument(self, key: str) -> Any:
        """The value that an argument of the constructor has."""
        return self.state[key]

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        """Give an argument of the constructor another value; what is derived from it follows.

        Args:
            key: One of `ARGUMENTS`.
            value: One that it takes.
            groups: The options of the param groups; changed where the scheduler keeps something there.
        """
        self.state[key] = value

    def move_to(self, position: int) -> None:
        """Take another position, as if so many steps had been taken."""
        self.state["last_epoch"] = position
        if "_step_count" in self.state:
            self.state["_step_count"] = position + 1

    def turn(self, number: int, options: Options) -> None:
        """Give the param group the momentum that the scheduler has it at, if it cycles one."""


class _Function(Schedule):
    NAME = "LambdaLR or MultiplicativeLR"
    KEYS = frozenset({"lr_lambdas"})
    USES_BASE = True


class _Step(Schedule):
    NAME = "StepLR"
    KEYS = frozenset({"step_size", "gamma"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"step_size": _count, "gamma": _number}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return Line(0.0, self.state["gamma"] ** (self.position // self.state["step_size"]))


class _MultiStep(Schedule):
    NAME = "MultiStepLR"
    KEYS = frozenset({"milestones", "gamma"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"milestones": _steps, "gamma": _number}

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
    """How often each step is a milestone; a pickle's record of a `Counter` is read as one."""
    if isinstance(milestones, Opaque):
        return dict(milestones.arguments[0]) if milestones.arguments else dict(milestones.entries)
    return milestones if isinstance(milestones, Mapping) else Counter(milestones)


class _Constant(Schedule):
    NAME = "ConstantLR"
    KEYS = frozenset({"factor", "total_iters"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"factor": _fraction, "total_iters": _count_or_none}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return Line(0.0, 1.0 if self.position >= self.state["total_iters"] else self.state["factor"])


class _Linear(Schedule):
    NAME = "LinearLR"
    KEYS = frozenset({"start_factor", "end_factor", "total_iters"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "start_factor": lambda value: _fraction(value) and value > 0,
        "end_factor": _fraction,
        "total_iters": _count,
    }

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        start, end, total = (self.state[key] for key in ("start_factor", "end_factor", "total_iters"))
        return Line(0.0, start + (end - start) * min(total, self.position) / total)


class _Exponential(Schedule):
    NAME = "ExponentialLR"
    KEYS = frozenset({"gamma"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"gamma": _number}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return Line(0.0, self.state["gamma"] ** self.position)


class _Polynomial(Schedule):
    NAME = "PolynomialLR"
    KEYS = frozenset({"total_iters", "power"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"total_iters": _count, "power": _number}

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        total = self.state["total_iters"]
        return Line(0.0, (1.0 - min(total, self.position) / total) ** self.state["power"])


def _cosine(lowest: float, done: float) -> Line:
    height = (1 + math.cos(math.pi * done)) / 2
    return Line(lowest * (1 - height), height)


class _Cosine(Schedule):
    NAME = "CosineAnnealingLR"
    KEYS = frozenset({"T_max", "eta_min"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"T_max": _count, "eta_min": _number}
    USES_BASE = True

    @property
    def proportional(self) -> bool:
        return bool(self.state["eta_min"] == 0)

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return _cosine(self.state["eta_min"], self.position / self.state["T_max"])


class _WarmRestarts(Schedule):
    NAME = "CosineAnnealingWarmRestarts"
    KEYS = frozenset({"T_0", "T_i", "T_mult", "eta_min", "T_cur"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"T_0": _count, "T_mult": _count, "eta_min": _number}
    USES_BASE = True

    @property
    def proportional(self) -> bool:
        return bool(self.state["eta_min"] == 0)

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


class _Momentum(Schedule):
    """Cycles the momentum too, in `momentum` or in `betas`."""

    def turn(self, number: int, options: Options) -> None:
        if not self.state.get("cycle_momentum"):
            return
        start, end = self._momenta(number, options)
        if start is None or end is None:
            return
        value = self._between(start, end, number)
        if self.state.get("use_beta1") and "betas" in options:
            options["betas"] = type(options["betas"])((value, *tuple(options["betas"])[1:]))
        elif "momentum" in options:
            options["momentum"] = value

    def _momenta(self, number: int, options: Mapping[str, Any]) -> tuple[Any, Any]:
        raise NotImplementedError

    def _between(self, start: float, end: float, number: int) -> float:
        raise NotImplementedError


class _Cyclic(_Momentum):
    NAME = "CyclicLR"
    KEYS = frozenset(
        {"max_lrs", "total_size", "step_ratio", "mode", "gamma", "scale_mode", "cycle_momentum", "_scale_fn_custom"}
    )
    OPTIONAL = frozenset({"_scale_fn_ref", "use_beta1", "base_momentums", "max_momentums"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "base_lr": _number,
        "max_lr": _number,
        "step_size_up": _count,
        "step_size_down": _count,
        "mode": _one_of("triangular", "triangular2", "exp_range"),
        "gamma": _number,
    }
    USES_BASE = True

    @property
    def proportional(self) -> bool:
        return False

    @property
    def scalable(self) -> bool:
        return True

    @property
    def _height(self) -> float | None:
        if self.state["_scale_fn_custom"] is not None or self.state.get("mode") not in ("triangular", "triangular2", "exp_range"):
            return None
        size, ratio, step = self.state["total_size"], self.state["step_ratio"], self.position
        cycle = math.floor(1 + step / size)
        x = 1.0 + step / size - cycle
        height = x / ratio if x <= ratio else (x - 1) / (ratio - 1)
        mode = self.state["mode"]
        scale = 1.0 if mode == "triangular" else 1 / 2.0 ** (cycle - 1) if mode == "triangular2" else self.state["gamma"] ** step
        return float(height * scale)

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        height = self._height
        return None if height is None else Line(self.state["max_lrs"][number] * height, 1 - height)

    def grow(self, number: int, factor: float, options: Options) -> None:
        super().grow(number, factor, options)
        self.state["max_lrs"] = [*self.state["max_lrs"]]
        self.state["max_lrs"][number] *= factor

    def argument(self, key: str) -> Any:
        up = self.state["total_size"] * self.state["step_ratio"]
        derived = {"step_size_up": up, "step_size_down": self.state["total_size"] - up}
        derived |= {"base_lr": self.state["base_lrs"], "max_lr": self.state["max_lrs"]}
        return derived[key] if key in derived else self.state[key]

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        if key in ("base_lr", "max_lr"):
            values = value if isinstance(value, list) else [value] * len(groups)
            self.state[f"{key}s"] = [float(item) for item in values]
            if key == "base_lr":
                for options, item in zip(groups, values, strict=True):
                    options["initial_lr"] = float(item)
        elif key.startswith("step_size"):
            sizes = {name: self.argument(name) for name in ("step_size_up", "step_size_down")}
            if key == "step_size_up" and sizes["step_size_down"] == sizes["step_size_up"]:
                sizes["step_size_down"] = value  # it was not given apart
            sizes[key] = value
            self.state["total_size"] = float(sum(sizes.values()))
            self.state["step_ratio"] = sizes["step_size_up"] / self.state["total_size"]
        else:
            self.state[key] = value
            if key == "mode":
                self.state["scale_mode"] = "iterations" if value == "exp_range" else "cycle"

    def _momenta(self, number: int, options: Mapping[str, Any]) -> tuple[Any, Any]:
        return self.state["max_momentums"][number], self.state["base_momentums"][number]

    def _between(self, start: float, end: float, number: int) -> float:
        height = self._height
        return start if height is None else start + (end - start) * height


class _OneCycle(_Momentum):
    NAME = "OneCycleLR"
    KEYS = frozenset({"total_steps", "_schedule_phases", "_anneal_func_type", "cycle_momentum"})
    OPTIONAL = frozenset({"use_beta1"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "total_steps": _count,
        "pct_start": _fraction,
        "anneal_strategy": _one_of("cos", "linear"),
        "three_phase": _flag,
        "max_lr": _number,
    }
    USES_BASE = True
    BOUNDS = ("initial_lr", "max_lr", "min_lr")

    @property
    def proportional(self) -> bool:
        return False

    @property
    def scalable(self) -> bool:
        return True

    def initial(self, number: int, options: Mapping[str, Any]) -> Any:
        return options.get("initial_lr")

    def start_from(self, number: int, initial: float, options: Options) -> None:
        super().start_from(number, initial, options)
        if options.get("initial_lr") and "min_lr" in options:  # `final_div_factor` stays
            options["min_lr"] *= initial / options["initial_lr"]
        options["initial_lr"] = initial

    def grow(self, number: int, factor: float, options: Options) -> None:
        super().grow(number, factor, options)
        options["max_lr"] *= factor

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        if not all(bound in options for bound in self.BOUNDS):
            return None
        phase, done = self._phase()
        rate = self._anneal(options[phase["start_lr"]], options[phase["end_lr"]], done)
        slopes = {"initial_lr": 1.0, "max_lr": 0.0, "min_lr": _ratio(options["min_lr"], options["initial_lr"])}
        slope = self._anneal(slopes[phase["start_lr"]], slopes[phase["end_lr"]], done)
        return Line(rate - slope * options["initial_lr"], slope)

    def _phase(self) -> tuple[Mapping[str, Any], float]:
        start = 0.0
        phases = self.state["_schedule_phases"]
        for phase in phases[:-1]:
            if self.position <= phase["end_step"]:
                break
            start = phase["end_step"]
        else:
            phase = phases[-1]
        return phase, (self.position - start) / (phase["end_step"] - start)

    def _anneal(self, start: float, end: float, done: float) -> float:
        if self.state["_anneal_func_type"] == "cos":
            return end + (start - end) / 2.0 * (math.cos(math.pi * done) + 1)
        return (end - start) * done + start

    def argument(self, key: str) -> Any:
        phases = self.state["_schedule_phases"]
        match key:
            case "pct_start":
                return (phases[0]["end_step"] + 1) / self.state["total_steps"]
            case "three_phase":
                return len(phases) == 3
            case "anneal_strategy":
                return self.state["_anneal_func_type"]
            case "max_lr":
                return None  # it is in the groups
        return self.state[key]

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        if key == "anneal_strategy":
            self.state["_anneal_func_type"] = value
        elif key == "max_lr":
            for options in groups:  # `div_factor` stays
                factor = value / options["max_lr"]
                options.update({bound: options[bound] * factor for bound in self.BOUNDS})
        else:
            found = {name: self.argument(name) for name in ("total_steps", "pct_start", "three_phase")} | {key: value}
            self.state["total_steps"] = found["total_steps"]
            self.state["_schedule_phases"] = _phases(**found)

    def _momenta(self, number: int, options: Mapping[str, Any]) -> tuple[Any, Any]:
        phase, _ = self._phase()
        return options.get(phase["start_momentum"]), options.get(phase["end_momentum"])

    def _between(self, start: float, end: float, number: int) -> float:
        return self._anneal(start, end, self._phase()[1])


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0


def _phases(total_steps: int, pct_start: float, three_phase: bool) -> list[dict[str, Any]]:
    """Each phase's last step and, by their names in a param group, what it starts from and ends at."""
    low, top, end = ("initial_lr", "max_momentum"), ("max_lr", "base_momentum"), ("min_lr", "max_momentum")
    corners = [(float(pct_start * total_steps) - 1, low, top)]
    if three_phase:
        corners += [(float(2 * pct_start * total_steps) - 2, top, low), (total_steps - 1, low, end)]
    else:
        corners += [(total_steps - 1, top, end)]
    names = ("start_lr", "end_lr", "start_momentum", "end_momentum")
    return [
        {"end_step": last, **dict(zip(names, (start[0], stop[0], start[1], stop[1]), strict=True))}
        for last, start, stop in corners
    ]


class _Plateau(Schedule):
    NAME = "ReduceLROnPlateau"
    KEYS = frozenset({"factor", "patience", "num_bad_epochs", "mode"})
    OPTIONAL = frozenset(
        {"default_min_lr", "min_lrs", "cooldown", "eps", "mode_worse", "threshold", "threshold_mode", "best"}
        | {"cooldown_counter", "_scale_fn"}
    )
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "factor": lambda value: _number(value) and value < 1,
        "patience": _count_or_none,
        "cooldown": _count_or_none,
        "threshold": _number,
        "threshold_mode": _one_of("rel", "abs"),
        "eps": _number,
    }


class _SWA(Schedule):
    NAME = "SWALR"
    KEYS = frozenset({"anneal_epochs"})
    OPTIONAL = frozenset({"_anneal_strategy", "anneal_func", "swa_lrs"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"anneal_epochs": _count_or_none}

    @property
    def proportional(self) -> bool:
        return False

    @property
    def _share(self) -> float | None:
        step, epochs = self.state["_step_count"] - 1, self.state["anneal_epochs"]
        done = max(0.0, min(1.0, (max(1, step) if epochs == 0 else step) / max(1, epochs)))
        strategy = self.state.get("_anneal_strategy")
        return {"linear": done, "cos": (1 - math.cos(math.pi * done)) / 2}.get(strategy or "")

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        share = self._share
        return None if share is None or "swa_lr" not in options else Line(options["swa_lr"] * share, 1 - share)

    @property
    def is_over(self) -> bool:
        """Whether the rate has reached `swa_lr`, which every later step sets again."""
        return self._share == 1


class _Parts(Schedule):
    """A scheduler of schedulers."""

    USES_BASE = True

    @property
    def parts(self) -> list[Schedule]:
        return [schedule_of(part) for part in self.state["_schedulers"]]

    @property
    def proportional(self) -> bool:
        return all(part.proportional for part in self.parts)

    def initial(self, number: int, options: Mapping[str, Any]) -> Any:
        found = [part.initial(number, options) for part in self.parts]
        known = [value for value in found if value is not None]
        return known[0] if known else options.get("initial_lr")

    def start_from(self, number: int, initial: float, options: Options) -> None:
        for part in self.parts:
            part.start_from(number, initial, options)

    @property
    def scalable(self) -> bool:
        return all(part.scalable for part in self.parts)

    def grow(self, number: int, factor: float, options: Options) -> None:
        for part in self.parts:
            part.grow(number, factor, options)

    def turn(self, number: int, options: Options) -> None:
        for part in self.parts:
            part.turn(number, options)


class _Sequential(_Parts):
    NAME = "SequentialLR"
    KEYS = frozenset({"_milestones"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"milestones": _steps}

    @property
    def present(self) -> Schedule:
        """The part that has its turn."""
        return self.parts[bisect_right(self.state["_milestones"], self.position)]

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        return self.present.line(number, options)

    def argument(self, key: str) -> Any:
        return self.state["_milestones"]

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        self.state["_milestones"] = list(value)
        self.move_to(self.position)

    def move_to(self, position: int) -> None:
        self.state["last_epoch"] = position
        starts = [0, *self.state["_milestones"]]
        turn = bisect_right(self.state["_milestones"], position)
        for number, part in enumerate(self.parts):
            if number <= turn:
                part.move_to(position - starts[number] if number == turn else starts[number + 1] - starts[number] - 1)
                part.state["_is_initial"] = False

    def turn(self, number: int, options: Options) -> None:
        self.present.turn(number, options)


class _Chained(_Parts):
    NAME = "ChainedScheduler"

    @property
    def position(self) -> int:
        return self.parts[0].position

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        if not self.proportional or any(part.USES_BASE for part in self.parts):
            return None
        slope = 1.0
        for part in self.parts:
            found = part.line(number, options)
            if found is None:
                return None
            slope *= found.slope
        return Line(0.0, slope)

    def move_to(self, position: int) -> None:
        for part in self.parts:
            part.move_to(position)


class _Unknown(Schedule):
    """A scheduler that is not torch's."""

    USES_BASE = True

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        return True


_KNOWN: tuple[type[Schedule], ...] = (
    _Function,
    _Step,
    _MultiStep,
    _Constant,
    _Linear,
    _Exponential,
    _Polynomial,
    _Cosine,
    _WarmRestarts,
    _Cyclic,
    _OneCycle,
    _Plateau,
    _SWA,
    _Sequential,
    _Chained,
    _Unknown,
)


def schedule_of(state: dict[str, Any]) -> Schedule:
    """The scheduler that a state is of; one without a NAME where it is none of torch's."""
    return next(kind for kind in _KNOWN if kind.recognises(state))(state)


def parts(schedule: Schedule, path: str = "") -> Iterator[tuple[str, Schedule]]:
    """A scheduler and those inside it, each with the path that its state has: `_schedulers[1]`."""
    yield path, schedule
    if isinstance(schedule, _Parts):
        for number, part in enumerate(schedule.parts):
            yield from parts(part, f"{path}{'.' if path else ''}_schedulers[{number}]")
