"""The base of all schedulers: a position, arguments, and a rate that is a linear function of the initial one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from optimstate.describe import describe
from optimstate.record import Record
from optimstate.state.scheduler import PER_GROUP_KEYS

__all__ = [
    "COUNTER",
    "Check",
    "DIVISOR",
    "FLAG",
    "Form",
    "Line",
    "NUMBER",
    "NUMBERS",
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
    "word",
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


_METHODS = {"step", "get_lr", "get_last_lr", "state_dict", "load_state_dict", "optimizer"}


class Line(Record):
    """A learning rate as `constant + slope * initial`."""

    constant: float
    slope: float

    def at(self, initial: float) -> float:
        """The rate of a param group that began with `initial`."""
        return self.constant + self.slope * initial

    def initial(self, rate: float) -> float | None:
        """The initial rate of a param group whose rate is `rate`; None if the rate does not depend on it."""
        return (rate - self.constant) / self.slope if abs(self.slope) > 1e-9 else None


def is_count(value: Any) -> bool:
    """Whether a value is an integer above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_count_or_zero(value: Any) -> bool:
    """Whether a value is an integer from 0 up."""
    return value == 0 or is_count(value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def is_fraction(value: Any) -> bool:
    """Whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_steps(value: Any) -> bool:
    """Whether a value is a sorted list of integers from 0 up."""
    return isinstance(value, list) and all(is_count_or_zero(item) for item in value) and value == sorted(value)


def is_flag(value: Any) -> bool:
    """Whether a value is True or False."""
    return isinstance(value, bool)


def one_of(*words: str) -> Check:
    """A check for one of some words."""
    return lambda value: value in words


class Form(Record):
    """What a field of a scheduler's state has to be for torch to take a step with it.

    Attributes:
        check: Whether a value is of the form.
        words: The form, in words.
    """

    check: Check
    words: str


NUMBER = Form(is_number, "a finite number")
NUMBERS = Form(lambda value: isinstance(value, list | tuple) and all(map(is_number, value)), "a list of finite numbers")
DIVISOR = Form(lambda value: is_number(value) and value > 0, "a number above 0")
COUNTER = Form(lambda value: is_number(value) and value >= -1, "a count of steps")
FLAG = Form(is_flag, "true or false")


def word(*words: str) -> Form:
    """The form of a field that is one of some words."""
    return Form(lambda value: isinstance(value, str) and value in words, " or ".join(map(describe, words)))


class Schedule:
    """One scheduler.

    Attributes:
        state: Its `state_dict()`; changed in place by `set` and `start_from`.
        NAME: Torch's name.
        KEYS: The keys of its state, besides those of all schedulers.
        OPTIONAL: Further keys that states of some releases or options have. A state with other keys is not recognised.
        ARGUMENTS: The constructor's arguments that can be changed in a state, each with the check of its values.
        FORMS: The form of each field that the next step reads.
        USES_BASE: Whether a later step reads `base_lrs`.
        NESTS: Whether it is made of other schedulers.
    """

    NAME: ClassVar[str] = ""
    KEYS: ClassVar[frozenset[str]] = frozenset()
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {}
    FORMS: ClassVar[Mapping[str, Form]] = {}
    USES_BASE: ClassVar[bool] = False
    NESTS: ClassVar[bool] = False

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __init_subclass__(cls) -> None:
        if cls.NAME:
            _KNOWN.append(cls)

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether a state is of this scheduler."""
        own = state.keys() - _COMMON
        return own >= cls.KEYS and not own - cls.KEYS - cls.OPTIONAL and ("_schedulers" in state) == cls.NESTS

    def unusable(self) -> Iterator[str]:
        """Why torch cannot take the next step with the values of this state, one sentence for each field."""
        for key, form in {**_COMMON_FORMS, **self.FORMS}.items():
            if key in self.state and not form.check(self.state[key]):
                yield f"{key} must be {form.words}, not {describe(self.state[key])}"
        if shadowed := sorted(_METHODS & self.state.keys()):
            yield f"{shadowed[0]} is a method of schedulers, which torch would replace by this value"

    def misfits(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Why its state is not for these param groups, with numbers as Python has them, one sentence for each field."""
        for key in sorted((PER_GROUP_KEYS if self.NAME else {"_last_lr"}) & self.state.keys()):
            found = self.state[key]
            if isinstance(found, list | tuple) and len(found) != len(groups):
                yield f"{key} has values for {len(found)} groups, and there are {len(groups)}"
        for bound in self.bounds:
            if not all(is_number(options.get(bound)) for options in groups):
                yield f"the next step reads {bound} of every group, and not all have a number there"

    @property
    def bounds(self) -> tuple[str, ...]:
        """The options of each param group that the next step reads, besides `lr`."""
        return ()

    @property
    def position(self) -> int:
        """The number of steps so far."""
        return int(self.state.get("last_epoch", 0))

    @property
    def proportional(self) -> bool:
        """Whether the rate is proportional to the initial rate, now and at every later step."""
        return True

    def line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        """The current rate of a param group as a function of its initial rate; None if the state does not show it.

        Args:
            number: The number of the group.
            options: The options of the group.
        """
        return None

    def initial(self, number: int, options: Mapping[str, Any]) -> Any:
        """The initial rate of a param group according to the scheduler; None if it is not known."""
        found = self.state.get("base_lrs")
        return found[number] if isinstance(found, list) and number < len(found) else options.get("initial_lr")

    def start_from(self, number: int, initial: float, options: Options) -> None:
        """Set the initial rate of a param group; the scheduler's own bounds do not change."""
        if isinstance(self.state.get("base_lrs"), list):
            self.state["base_lrs"] = [*self.state["base_lrs"]]
            self.state["base_lrs"][number] = initial

    @property
    def is_over(self) -> bool:
        """Whether the rate has reached its final value, which every later step sets again."""
        return False

    @property
    def scalable(self) -> bool:
        """Whether `grow` can multiply all later rates by a factor."""
        return self.proportional

    def grow(self, number: int, factor: float, options: Options) -> None:
        """Multiply the values from which later rates of a param group are computed, except `lr`."""
        initial = self.initial(number, options)
        if initial is not None:
            self.start_from(number, float(initial) * factor, options)

    def argument(self, key: str) -> Any:
        """The value of an argument of the constructor."""
        return self.state[key]

    def set(self, key: str, value: Any, groups: Sequence[Options]) -> None:
        """Change the value of an argument of the constructor, and the values derived from it.

        Args:
            key: One of `ARGUMENTS`.
            value: A valid value.
            groups: The options of the param groups; changed if the scheduler keeps values there.
        """
        self.state[key] = value

    def move_to(self, position: int) -> None:
        """Set the position, as if this many steps had been made."""
        self.state["last_epoch"] = position
        if "_step_count" in self.state:
            self.state["_step_count"] = position + 1

    def turn(self, number: int, options: Options) -> None:
        """Set the momentum of a param group for the current position, if the scheduler cycles it."""


_COMMON_FORMS = {"last_epoch": COUNTER, "_step_count": COUNTER, "base_lrs": NUMBERS}
_KNOWN: list[type[Schedule]] = []


def schedule_of(state: dict[str, Any]) -> Schedule:
    """The scheduler that a state belongs to; without a NAME if it is not one of torch's."""
    return next((kind for kind in _KNOWN if kind.recognises(state)), _Unknown)(state)


class _Unknown(Schedule):
    """A scheduler that is not torch's."""

    USES_BASE = True
