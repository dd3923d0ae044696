"""A scheduler's state, and the learning rates of the param groups it schedules, after a migration.

The two belong together: half of what a schedule depends on is in the scheduler's lists, half in the groups. A rate that
a plan sets, a group that is new, an argument that changes: everything is made as if the run had had it from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.plan.apply.rates import Rates
from optimstate.plan.apply.scheduled import BOUNDS, Followed, Groups, LiveScheduler, named, near, rate_of, unshared
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import SchedulerRule
from optimstate.plan.solve.groups import same_value
from optimstate.problems import Problem
from optimstate.state.schedules import Chained, Line, Schedule, acting, parts, schedule_of

__all__ = ["differences", "followed", "reaches", "unreached_schedulers"]

_COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "mode_worse", "_step_count")


def followed(
    state: Mapping[str, Any],
    groups: Groups,
    *,
    plan: Plan | None = None,
    label: str = "",
    live: LiveScheduler | None = None,
) -> Followed:
    """A scheduler's state for the param groups of the result, and the rates of these groups.

    Args:
        state: The `state_dict()` of a scheduler, nested ones included; not changed.
        groups: The param groups; not changed.
        plan: Its `[scheduler]` tables, and the policies on hyperparameters and schedules.
        label: What the plan calls the scheduler.
        live: The scheduler that will get the state.

    Raises:
        MigrationError: The state does not fit the old groups or the live scheduler, or something that is asked cannot
            be made true at the next step.
    """
    plan = plan or Plan()
    work = _Work(groups, plan, live)
    work.take(state)
    if live is not None and plan.policy.schedule == "live":
        work.live_wins(state)
    else:
        work.rates()
        if live is not None:
            work.notes += differences(state, live)
    for rule in plan.schedulers:
        work.change(rule, label)
    if work.problems:
        raise MigrationError(list(dict.fromkeys(work.problems)))
    return Followed(work.schedule.state, work.options, list(dict.fromkeys(work.notes)))


def reaches(rule: SchedulerRule, state: Mapping[str, Any], label: str) -> bool:
    """Whether a `[scheduler]` table applies to a scheduler or to a part of it."""
    return any(rule.path in _spellings(label, path) for path, _ in parts(schedule_of(dict(state))))


def unreached_schedulers(plan: Plan, schedulers: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Problem]:
    """`[scheduler]` tables for schedulers that are not there, and arguments that two of them set.

    Args:
        plan: With the tables.
        schedulers: All that it is applied to, each with its path.
    """
    known = f"there are {', '.join(label for label, _ in schedulers)}" if schedulers else ""
    for rule in plan.schedulers:
        if not any(reaches(rule, state, label) for label, state in schedulers):
            message = f"no scheduler is at {describe(rule.path)}" if rule.path else "there is no scheduler to change"
            yield Problem("unreached", message, "[scheduler]", remedy=known or "take the table out of the plan")
    for label, state in schedulers:
        for path, _ in parts(schedule_of(dict(state))):
            mine = [key for rule in plan.schedulers if rule.path in _spellings(label, path) for key in rule.set]
            for key in dict.fromkeys(key for key in mine if mine.count(key) > 1):
                which = f"{label}.{path}" if path and label else path or label
                message = f"two tables set {key} of the scheduler {which}".rstrip()
                yield Problem("setting", message, "[scheduler]", remedy="say it once")


def _spellings(label: str, path: str) -> set[str]:
    """The names that a plan may use for a scheduler or a part of it."""
    if not path:
        return {"", label}
    return {path, f"{label}.{path}", f"{label}{path.replace('_schedulers', '[' + repr('_schedulers') + ']')}"}


def differences(state: Mapping[str, Any], live: LiveScheduler) -> list[str]:
    """Arguments that a scheduler in memory was built with and that loading would replace.

    Raises:
        MigrationError: The state is of another scheduler.
    """
    saved, own = schedule_of(unshared(state)), schedule_of(unshared(live.state))
    if type(saved) is not type(own) or len(list(parts(saved))) != len(list(parts(own))):
        raise MigrationError.of(
            "scheduler",
            f"the checkpoint's scheduler is {named(saved)}, the live one is {live.name}",
            hint='Build the same scheduler, or let the live one take the position: schedule = "live" in [policy].',
        )
    found = []
    for (path, old), (_, new) in zip(parts(saved), parts(own), strict=True):
        if type(old) is not type(new):
            raise MigrationError.of(
                "scheduler",
                f"in the checkpoint it is {named(old)}, in the live scheduler {named(new)}",
                path,
                hint='Build the same scheduler, or say schedule = "live" in [policy].',
            )
        for key in old.ARGUMENTS:
            had, has = old.argument(key), new.argument(key)
            if not same_value(had, has) and key not in ("base_lr", "max_lr"):
                where = f"{path}: " if path else ""
                found.append(
                    f"{where}{key} is {had} in the checkpoint's {named(old)} and {has} in the live one: "
                    'the checkpoint\'s is used (schedule = "live" in [policy] keeps the live one)'
                )
    return found


class _Work(Rates):
    """A scheduler and its param groups while arguments change or the live schedule takes over."""

    # --- arguments --------------------------------------------------------------------------------------------------

    def change(self, rule: SchedulerRule, label: str) -> None:
        """Give a scheduler, or a part of one, other arguments."""
        there = list(parts(self.schedule))
        for path, part in there:
            if rule.path not in _spellings(label, path):
                continue
            for key, value in rule.set.items():
                self._change_argument(path, part, key, value, there)

    def _change_argument(
        self, path: str, part: Schedule, key: str, value: Any, there: Sequence[tuple[str, Schedule]]
    ) -> None:
        name = f"scheduler {part.NAME}" if part.NAME else named(part)
        name += f" at {path}" if path else ""
        check = part.ARGUMENTS.get(key)
        if check is None:
            others = [where for where, other in there if key in other.ARGUMENTS and where != path]
            known = ", ".join(part.ARGUMENTS) or "nothing: what it computes with is not in its state"
            remedy = f"{others[0]} has it: say path = {describe(others[0])}" if others else f"it has {known}"
            self._wrong(name, f"there is no argument {describe(key)} that can be changed", remedy)
            return
        if not check(value):
            self._wrong(name, f"{key} cannot be {describe(value)}", f"it is {describe(part.argument(key))} now")
            return
        if key == "total_steps" and value <= part.position:
            self._wrong(name, f"it is at step {part.position} already", "total_steps must be more than that")
            return
        old = [self._now(number) for number in range(len(self.options))]
        own = [self._lines(number) for number in range(len(self.options))]
        part.set(key, value, self.options)
        for number, options in enumerate(self.options):
            self._move_rate(number, old[number], own[number], part)
            self.schedule.turn(number, options)

    def _now(self, number: int) -> Line | None:
        return self.schedule.line(number, self.options[number])

    def _lines(self, number: int) -> list[Line | None]:
        """For each active scheduler, the present rate as a function of the initial rate of a group."""
        return [part.line(number, self.options[number]) for part in acting(self.schedule)]

    def _move_rate(self, number: int, old: Line | None, own: list[Line | None], part: Schedule) -> None:
        """The present rate after an argument changed, where it was what the schedule gave before."""
        options = self.options[number]
        rate, initial = rate_of(options.get("lr")), rate_of(self.schedule.initial(number, options))
        if rate is None or initial is None:
            return  # what is computed from lr alone goes on from it
        new, mine = self._now(number), self._lines(number)
        slopes = [[line.slope if line is not None else 0.0 for line in lines] for lines in (own, mine)]
        if old is not None and new is not None and near(old.at(initial), rate, initial):
            made = new.at(initial)
        elif own == mine and None not in own:
            return
        elif self.schedule.proportional and part.proportional and all(slopes[0]) and None not in mine:
            made = rate * math.prod(slopes[1]) / math.prod(slopes[0])
            if old is not None:
                self._note(number, f"had lr = {rate:.6g} where its schedule gave {old.at(initial):.6g}: that is kept")
        else:
            self._refuse(
                number,
                f"it has lr = {describe(rate)}, which its schedule does not give",
                "change the schedule first, then set lr",
            )
            return
        self._set_lr(number, made)

    # --- the live schedule ------------------------------------------------------------------------------------------

    def live_wins(self, saved: Mapping[str, Any]) -> None:
        """The live scheduler's arguments, at the position of the saved one; rates as the live schedule gives them."""
        assert self.live is not None
        position = self.schedule.position
        lines = [self._lines(number) for number in range(len(self.options))]
        old, self.schedule = self.schedule, schedule_of(unshared(self.live.state))
        self.notes += [
            note.replace("the checkpoint's is used", "the live one is used").partition(" (schedule")[0]
            for note in (differences(saved, self.live) if type(old) is type(self.schedule) else ())
        ]
        if type(old) is not type(self.schedule):
            self.notes.append(f"the checkpoint's scheduler is {named(old)}: the live {self.live.name} is used instead")
        self.schedule.move_to(position)
        if type(old) is type(self.schedule):
            self.schedule.state.update({key: saved[key] for key in _COUNTERS if key in saved})
        for number, options in enumerate(self.options):
            self._take_live(number, options, lines[number])

    def _take_live(self, number: int, options: dict[str, Any], had: list[Line | None]) -> None:
        assert self.live is not None
        mine = self.live.groups[number] if number < len(self.live.groups) else {}
        options.update({key: mine[key] for key in BOUNDS if key in mine})
        wanted = rate_of(options.get("initial_lr"))
        if (self.schedule.scalable and not self.schedule.proportional) or wanted is None:
            wanted = rate_of(mine.get("initial_lr"))  # the schedule has bounds of its own
        if wanted is None:
            self._last(number, options.get("lr"))
            return
        if not (self.schedule.scalable and not self.schedule.proportional):
            self._start_from(number, wanted, dict(options))
        options["initial_lr"] = wanted
        chained = isinstance(self.schedule, Chained) and self._now(number) is None
        line = self._line(number, options)
        if chained and self._lines(number) != had:
            remedy = "build the checkpoint's schedule, or start it anew and set lr"
            self._refuse(number, f"what {named(self.schedule)} gives it now depends on the steps before", remedy)
        elif line is not None:
            self._set_lr(number, line.at(wanted))
        else:
            self._last(number, options.get("lr"))
        self.schedule.turn(number, options)
