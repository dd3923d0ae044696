"""What all schedulers have: a position, arguments, and a present rate that is a line over the initial one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from optimstate.record import Record

__all__ = [
    "Check",
    "Line",
    "Options",
    "Schedule",
    "is_count",
    "is_count_or_zero",
    "is_flag",
    "is_fraction",
    "is_number",
    "is_steps",
    "one_of",
    "schedule_of",
]

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


class Line(Record):
    """A learning rate as `constant + slope * initial`."""

    constant: float
    slope: float

    def at(self, initial: float) -> float:
        """The rate of a param group that began with `initial`."""
        return self.constant + self.slope * initial

    def initial(self, rate: float) -> float | None:
        """The initial rate of a param group whose rate is `rate`; None where every initial rate leads to it."""
        return (rate - self.constant) / self.slope if abs(self.slope) > 1e-9 else None


def is_count(value: Any) -> bool:
    """A whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_count_or_zero(value: Any) -> bool:
    """A whole number from 0."""
    return value == 0 or is_count(value)


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_fraction(value: Any) -> bool:
    """A number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_steps(value: Any) -> bool:
    """Whole numbers in order."""
    return isinstance(value, list) and all(is_count_or_zero(item) for item in value) and value == sorted(value)


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def one_of(*words: str) -> Check:
    """One of some words."""
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
        NESTS: Whether it is made of schedulers.
    """

    NAME: ClassVar[str] = ""
    KEYS: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {}
    USES_BASE: ClassVar[bool] = False
    NESTS: ClassVar[bool] = False

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __init_subclass__(cls) -> None:
        if cls.NAME:
            _KNOWN.append(cls)

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether it is a state of this scheduler."""
        own = state.keys() - _COMMON
        return own >= cls.KEYS and not own - cls.KEYS - cls.OPTIONAL and ("_schedulers" in state) == cls.NESTS

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
        """The initial rate of the param group according to the scheduler; None where it does not know."""
        found = self.state.get("base_lrs")
        return found[number] if isinstance(found, list) and number < len(found) else options.get("initial_lr")

    def start_from(self, number: int, initial: float, options: Options) -> None:
        """Set the initial rate of a param group; bounds that the scheduler has itself stay."""
        if isinstance(self.state.get("base_lrs"), list):
            self.state["base_lrs"] = [*self.state["base_lrs"]]
            self.state["base_lrs"][number] = initial

    @property
    def is_over(self) -> bool:
        """Whether the rate has reached its end, which every later step sets again."""
        return False

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
        """Set the position, as if so many steps had been taken."""
        self.state["last_epoch"] = position
        if "_step_count" in self.state:
            self.state["_step_count"] = position + 1

    def turn(self, number: int, options: Options) -> None:
        """Give the param group the momentum that the scheduler has it at, if it cycles one."""


_KNOWN: list[type[Schedule]] = []


def schedule_of(state: dict[str, Any]) -> Schedule:
    """The scheduler that a state is of; one without a NAME where it is not torch's."""
    return next((kind for kind in _KNOWN if kind.recognises(state)), _Unknown)(state)


class _Unknown(Schedule):
    """A scheduler that is not torch's."""

    USES_BASE = True
