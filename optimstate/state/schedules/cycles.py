"""Schedulers that move between bounds of their own, and may also cycle the momentum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from optimstate.state.schedules.schedule import (
    DIVISOR,
    FLAG,
    NUMBER,
    NUMBERS,
    Check,
    Form,
    Line,
    Options,
    Schedule,
    is_count,
    is_flag,
    is_fraction,
    is_number,
    one_of,
    word,
)
from optimstate.tree import Opaque


class Momentum(Schedule):
    """A scheduler between bounds that may also cycle the momentum: `momentum`, or the first of the `betas`."""

    proportional = False
    scalable = True

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


class Cyclic(Momentum):
    """The rate rises and falls between two bounds."""

    NAME = "CyclicLR"
    KEYS = frozenset(
        {"max_lrs", "total_size", "step_ratio", "mode", "gamma", "scale_mode", "cycle_momentum", "_scale_fn_custom"}
    )
    OPTIONAL = frozenset({"_scale_fn_ref", "use_beta1", "base_momentums", "max_momentums"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "base_lr": is_number,
        "max_lr": is_number,
        "step_size_up": is_count,
        "step_size_down": is_count,
        "mode": one_of("triangular", "triangular2", "exp_range"),
        "gamma": is_number,
    }
    FORMS: ClassVar[Mapping[str, Form]] = {
        "max_lrs": NUMBERS,
        "total_size": DIVISOR,
        "step_ratio": NUMBER,
        "gamma": NUMBER,
        "cycle_momentum": FLAG,
        "use_beta1": FLAG,
        "_scale_fn_custom": Form(
            lambda value: value is None or isinstance(value, Mapping | Opaque) or callable(value),
            "a function or nothing",
        ),
        "base_momentums": NUMBERS,
        "max_momentums": NUMBERS,
    }
    USES_BASE = True

    def unusable(self) -> Iterator[str]:
        yield from super().unusable()
        absent = [key for key in ("base_momentums", "max_momentums") if key not in self.state]
        if self.state["cycle_momentum"] is True and absent:
            yield f"cycle_momentum is on, and there are no {absent[0]}"

    @property
    def _height(self) -> float | None:
        if self.state["_scale_fn_custom"] is not None or self.state.get("mode") not in (
            "triangular",
            "triangular2",
            "exp_range",
        ):
            return None
        size, ratio, step = self.state["total_size"], self.state["step_ratio"], self.position
        cycle = math.floor(1 + step / size)
        x = 1.0 + step / size - cycle
        height = x / ratio if x <= ratio else (x - 1) / (ratio - 1)
        mode = self.state["mode"]
        scale = (
            1.0
            if mode == "triangular"
            else 1 / 2.0 ** (cycle - 1)
            if mode == "triangular2"
            else self.state["gamma"] ** step
        )
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
                sizes["step_size_down"] = value  # it was not given separately
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


class OneCycle(Momentum):
    """The rate rises once and falls once; the bounds are in the param groups."""

    NAME = "OneCycleLR"
    KEYS = frozenset({"total_steps", "_schedule_phases", "_anneal_func_type", "cycle_momentum"})
    OPTIONAL = frozenset({"use_beta1"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {
        "total_steps": is_count,
        "pct_start": is_fraction,
        "anneal_strategy": one_of("cos", "linear"),
        "three_phase": is_flag,
        "max_lr": is_number,
    }
    FORMS: ClassVar[Mapping[str, Form]] = {
        "total_steps": DIVISOR,
        "_schedule_phases": Form(lambda value: _are_phases(value), "the phases of the schedule"),
        "_anneal_func_type": word("cos", "linear"),
        "cycle_momentum": FLAG,
        "use_beta1": FLAG,
    }
    USES_BASE = True
    BOUNDS = ("initial_lr", "max_lr", "min_lr")

    @property
    def bounds(self) -> tuple[str, ...]:
        momenta = [(phase["start_momentum"], phase["end_momentum"]) for phase in self.state["_schedule_phases"]]
        cycled = {key for pair in momenta for key in pair} if self.state["cycle_momentum"] else set[str]()
        rates = {phase[end] for phase in self.state["_schedule_phases"] for end in ("start_lr", "end_lr")}
        return tuple(sorted(rates | cycled))

    def initial(self, number: int, options: Mapping[str, Any]) -> Any:
        return options.get("initial_lr")

    def start_from(self, number: int, initial: float, options: Options) -> None:
        super().start_from(number, initial, options)
        if options.get("initial_lr") and "min_lr" in options:  # keeps `final_div_factor`
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
        return phase_at(self.state["_schedule_phases"], self.position)

    def _anneal(self, start: float, end: float, done: float) -> float:
        if self.state["_anneal_func_type"] == "cos":
            return end + (start - end) / 2.0 * (math.cos(math.pi * done) + 1)
        return (end - start) * done + start

    def argument(self, key: str) -> Any:
        found = self.state["_schedule_phases"]
        match key:
            case "pct_start":
                return (found[0]["end_step"] + 1) / self.state["total_steps"]
            case "three_phase":
                return len(found) == 3
            case "anneal_strategy":
                return self.state["_anneal_func_type"]
            case "max_lr":
                return None  # it is in the groups
        return self.state[key]

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        if key == "anneal_strategy":
            self.state["_anneal_func_type"] = value
        elif key == "max_lr":
            for options in groups:  # keeps `div_factor`
                factor = value / options["max_lr"]
                options.update({bound: options[bound] * factor for bound in self.BOUNDS})
        else:
            found = {name: self.argument(name) for name in ("total_steps", "pct_start", "three_phase")} | {key: value}
            self.state["total_steps"] = found["total_steps"]
            self.state["_schedule_phases"] = phases(**found)

    def _momenta(self, number: int, options: Mapping[str, Any]) -> tuple[Any, Any]:
        phase, _ = self._phase()
        return options.get(phase["start_momentum"]), options.get(phase["end_momentum"])

    def _between(self, start: float, end: float, number: int) -> float:
        return self._anneal(start, end, self._phase()[1])


def _are_phases(value: Any) -> bool:
    """Whether a value lists phases, each with its last step and the options of a group that are its bounds."""
    bounds = ("start_lr", "end_lr", "start_momentum", "end_momentum")
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(phase, Mapping)
            and is_number(phase.get("end_step"))
            and all(isinstance(phase.get(bound), str) for bound in bounds)
            for phase in value
        )
    )


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0


def phase_at(phases: Sequence[Mapping[str, Any]], step: int) -> tuple[Mapping[str, Any], float]:
    """The phase of a OneCycleLR that a step is in, and the fraction of it that is done."""
    start = 0.0
    for phase in phases[:-1]:
        if step <= phase["end_step"]:
            break
        start = phase["end_step"]
    else:
        phase = phases[-1]
    return phase, (step - start) / (phase["end_step"] - start)


def phases(total_steps: int, pct_start: float, three_phase: bool) -> list[dict[str, Any]]:
    """The phases of a OneCycleLR: the last step of each, and the options of a param group that are its bounds."""
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
