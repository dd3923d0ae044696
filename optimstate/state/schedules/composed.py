"""Schedulers that are made of other schedulers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from optimstate.state.schedules.schedule import Check, Form, Line, Options, Schedule, is_steps, schedule_of

__all__ = ["acting", "Chained", "Parts", "Sequential", "parts"]


class Parts(Schedule):
    """A scheduler that is made of others."""

    USES_BASE = True
    NESTS = True
    FORMS: ClassVar[Mapping[str, Form]] = {
        "_schedulers": Form(
            lambda value: isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value),
            "the states of the schedulers that it is made of",
        )
    }

    def unusable(self) -> Iterator[str]:
        wrong = [*super().unusable()]
        yield from wrong
        for number, part in enumerate(self.parts if not wrong else ()):
            yield from (f"_schedulers[{number}]: {why}" for why in part.unusable())

    @property
    def parts(self) -> list[Schedule]:
        found = self.state["_schedulers"]
        return [schedule_of(part) for part in found if isinstance(part, dict)] if isinstance(found, list) else []

    def misfits(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        yield from super().misfits(groups)
        for number, part in enumerate(self.parts):
            yield from (f"_schedulers[{number}]: {why}" for why in part.misfits(groups))

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


class Sequential(Parts):
    """One part after the other."""

    NAME = "SequentialLR"
    KEYS = frozenset({"_milestones"})
    ARGUMENTS: ClassVar[Mapping[str, Check]] = {"milestones": is_steps}
    FORMS: ClassVar[Mapping[str, Form]] = {
        **Parts.FORMS,
        "_milestones": Form(is_steps, "a rising list of steps"),
    }

    def unusable(self) -> Iterator[str]:
        wrong = [*super().unusable()]
        yield from wrong
        milestones, count = self.state["_milestones"], len(self.state["_schedulers"]) if not wrong else 0
        if count and len(milestones) != count - 1:
            yield f"_milestones must be {count - 1}, one between each two schedulers, not {len(milestones)}"

    @property
    def present(self) -> Schedule:
        """The part that is active now."""
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


class Chained(Parts):
    """All parts, one after the other at every step."""

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


def acting(schedule: Schedule) -> list[Schedule]:
    """The schedulers that are active now: the scheduler itself, or parts of it."""
    if isinstance(schedule, Sequential):
        return acting(schedule.present)
    return [each for part in schedule.parts for each in acting(part)] if isinstance(schedule, Parts) else [schedule]


def parts(schedule: Schedule, path: str = "") -> Iterator[tuple[str, Schedule]]:
    """A scheduler and those inside it, each with the path of its state: `_schedulers[1]`."""
    yield path, schedule
    if isinstance(schedule, Parts):
        for number, part in enumerate(schedule.parts):
            yield from parts(part, f"{path}{'.' if path else ''}_schedulers[{number}]")
