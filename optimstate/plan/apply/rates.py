"""Making the learning rates of param groups and the state of their scheduler agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.plan.apply.scheduled import BOUNDS, Groups, LiveScheduler, named, near, rate_of, unshared
from optimstate.plan.expressions.evaluate import copied, number_of
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.groups import same_value
from optimstate.problems import Problem
from optimstate.state.scheduler import PER_GROUP_KEYS, regroup_scheduler_state
from optimstate.state.schedules import Line, Schedule, parts, schedule_of
from optimstate.tree import nodes

__all__ = ["Rates"]


def _with_numbers(node: Any) -> Any:
    """A copy of the state in which tensors of one element are numbers."""
    if type(node) is dict:  # others, such as the `Counter` of milestones, are kept
        return {key: _with_numbers(value) for key, value in node.items()}
    if type(node) is list:
        return [_with_numbers(value) for value in node]
    number = number_of(node)
    return node if number is None else number


class Rates:
    """A scheduler's state and the rates of its groups; rates that are set take effect at the next step.

    Args:
        groups: The param groups; not changed.
        plan: Its policies.
        live: The scheduler that will get the state.
    """

    def __init__(self, groups: Groups, plan: Plan, live: LiveScheduler | None) -> None:
        self.groups, self.plan, self.live = groups, plan, live
        self.options = [dict(options) for options in groups.options]
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.schedule = schedule_of({})
        self.first: list[float | None] = []

    def take(self, state: Mapping[str, Any]) -> None:
        """Take the scheduler's state, its lists rebuilt for the groups of the result."""
        self._refuse_damaged(schedule_of(_with_numbers(state)))
        identity = self.groups.bases == list(range(len(self.groups.before)))
        if identity:
            made = unshared(state)
        else:
            fresh = {number: self._fresh(number, state) for number in self._new()}
            group_map = [[] if base is None else [base] for base in self.groups.bases]
            made = unshared(regroup_scheduler_state(state, group_map, fresh=fresh, groups=len(self.groups.before)))
        plain = _with_numbers(made)
        if any(number_of(leaf) is not None and not isinstance(leaf, bool | int | float) for leaf in nodes(made)):
            self.notes.append("tensors of one number in the state of the scheduler are numbers in the result")
        self.schedule = schedule_of(plain)

    def _refuse_damaged(self, schedule: Schedule) -> None:
        """Refuse a state that torch could not take a step with, as nothing can be computed with it either."""
        wrong = list(schedule.unusable()) or list(schedule.misfits([_with_numbers(old) for old in self.groups.before]))
        if wrong:
            raise MigrationError(
                [Problem("scheduler", f"the state of {named(schedule)} is damaged: {why}") for why in wrong],
                hint="`optimstate verify` shows it; leave the learning rates and schedules as they are.",
            )

    def _new(self) -> Iterator[int]:
        yield from (number for number, base in enumerate(self.groups.bases) if base is None)

    def _fresh(self, number: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a scheduler's lists for a new group."""
        options = self.options[number]
        lr = options.get("lr")
        made = {"base_lrs": options.get("initial_lr", lr), "_last_lr": lr}
        if not any(state.get("lr_lambdas") or [None]):
            made["lr_lambdas"] = None
        for key in PER_GROUP_KEYS - made.keys():
            values = self.live.state.get(key) if self.live is not None else None
            if isinstance(values, list) and number < len(values):
                made[key] = values[number]
        return made

    def rates(self) -> None:
        """Make the rates that groups were given take effect, now and at the next step."""
        for number, base in enumerate(self.groups.bases):
            if base is None:
                self._join(number)
            elif self.groups.before[base].get("lr") is not None:
                self._follow(number, self.groups.before[base])

    def _follow(self, number: int, had: Mapping[str, Any]) -> None:
        options = self.options[number]
        rate, initial = rate_of(had.get("lr")), rate_of(self.schedule.initial(number, had))
        if rate is None:
            return
        lr_set = not same_value(options.get("lr"), had.get("lr"))
        given = self.groups.given[number]
        initial_set = "initial_lr" in options and not same_value(options["initial_lr"], had.get("initial_lr"))
        lr_set, initial_set = (
            lr_set or (initial_set and "lr" in given),
            initial_set or (lr_set and "initial_lr" in given),
        )
        if self.plan.policy.hyperparameters == "live" and initial is not None and (lr_set or initial_set):
            options.setdefault("initial_lr", options.get("lr"))
            lr_set, initial_set = False, True
        if (lr_set or initial_set) and not self.schedule.NAME:
            what = "which is not torch's: its lr and initial_lr grow by one factor; check the next rates"
            self._note(number, f"follows a scheduler {what}")
        if initial_set and lr_set:
            self._both(number, options)
        elif initial_set:
            self._begin(number, options, had, rate, initial)
        elif lr_set:
            self._be_at(number, options, had, rate, initial)
        elif any(not same_value(options.get(key), had.get(key)) for key in BOUNDS):
            self._be_where_it_leads(number, options, had, rate)

    def _both(self, number: int, options: dict[str, Any]) -> None:
        """Both rates are given."""
        wanted = rate_of(options["initial_lr"])
        if wanted is None or not self._start_from(number, wanted, dict(options)):
            return
        line, rate = self.schedule.line(number, options), rate_of(options.get("lr"))
        if (
            self.schedule.USES_BASE
            and line is not None
            and rate is not None
            and not near(line.at(wanted), rate, wanted)
        ):
            self._note(
                number, f"has lr = {describe(rate)} now, but {named(self.schedule)} gives {line.at(wanted):.6g} there"
            )
        self._last(number, options["lr"])

    def _begin(
        self, number: int, options: dict[str, Any], had: Mapping[str, Any], rate: float, initial: float | None
    ) -> None:
        """Another initial rate: the result is as if the group had had it from the start."""
        wanted = rate_of(options["initial_lr"])
        if initial is None or wanted is None:
            self._refuse(number, f"{named(self.schedule)} does not compute from initial_lr", "set lr instead")
            return
        line = self.schedule.line(number, had)
        options["initial_lr"] = had.get("initial_lr")
        if not self._start_from(number, wanted, options):
            return
        options["initial_lr"] = wanted
        new = self.schedule.line(number, options)
        if line is not None and new is not None and near(line.at(initial), rate, initial):
            made = new.at(wanted)
        elif self.schedule.proportional and initial:
            made = rate * wanted / initial
            if line is not None:
                self._note(number, f"had lr = {rate:.6g} where its schedule gives {line.at(initial):.6g}: that is kept")
        else:
            self._refuse(
                number, f"it has lr = {describe(rate)}, which its schedule does not give", "set lr, not initial_lr"
            )
            return
        self._set_lr(number, made)
        if not same_value(options["lr"], had["lr"]):
            self._note(
                number,
                f"has lr = {made:.9g} now, which {named(self.schedule)} gives for initial_lr = {wanted:.9g}",
            )

    def _be_at(
        self, number: int, options: dict[str, Any], had: Mapping[str, Any], rate: float, initial: float | None
    ) -> None:
        """Another rate now: the schedule is the one that gives it at this position."""
        wanted = rate_of(options["lr"])
        if wanted is None:
            return
        self._last(number, options["lr"])
        if self.schedule.is_over:
            options["swa_lr"] = wanted
        if not self.schedule.USES_BASE or initial is None:
            return
        if self.schedule.scalable:
            if not rate:
                self._refuse(
                    number, "its lr is 0 now, and no factor makes another rate of it", "set initial_lr instead"
                )
                return
            self.schedule.grow(number, wanted / rate, options)
            started = initial * wanted / rate
        else:
            line = self.schedule.line(number, had)
            found = None if line is None else line.initial(wanted)
            if found is None or line is None or abs(rate - line.constant) <= 1e-9 * abs(initial):
                self._refuse(
                    number,
                    f"{named(self.schedule)} is at lr = {rate:.6g}, which every initial_lr leads to",
                    "set initial_lr instead, or change the schedule",
                )
                return
            if not self._start_from(number, found, options):
                return
            started = found
        if "initial_lr" in options:
            options["initial_lr"] = started
        self._note(number, f"has initial_lr = {started:.9g} now, from which {named(self.schedule)} gives its lr")

    def _be_where_it_leads(self, number: int, options: dict[str, Any], had: Mapping[str, Any], rate: float) -> None:
        """Another bound of the schedule, from which the rate follows."""
        initial = rate_of(self.schedule.initial(number, options))
        old, new = self.schedule.line(number, had), self.schedule.line(number, options)
        if initial is not None and old is not None and new is not None and near(old.at(initial), rate, initial):
            self._set_lr(number, new.at(initial))

    def _join(self, number: int) -> None:
        """A group that is new gets the rate that it would have if it had been there from the start."""
        options = self.options[number]
        initial = rate_of(options.get("initial_lr", options.get("lr")))
        if initial is None or self.schedule.initial(number, options) is None:
            if options.get("lr") is not None:
                self._note(
                    number, f"is new: it starts at lr = {describe(options['lr'])}, whatever {named(self.schedule)} did"
                )
            return
        line = self._line(number, options)
        if line is None:
            self._refuse(
                number,
                f"it is new, and the state does not tell which rate {named(self.schedule)} gives it",
                "say like = 0 for the options of an old group",
            )
            return
        options.setdefault("initial_lr", initial)
        self._set_lr(number, line.at(initial))
        self.schedule.turn(number, options)
        self._note(number, f"is new: lr = {line.at(initial):.9g}, which {named(self.schedule)} gives it at this step")

    def _line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        """The rate divided by the initial one; for functions, as the live scheduler or the other groups show it."""
        found = self.schedule.line(number, options)
        if found is not None or not self.schedule.proportional:
            return found
        if self.live is not None and number < len(self.live.functions) and self.live.functions[number] is not None:
            return self._called(number)
        factors = set()
        for other, base in enumerate(self.groups.bases):
            had = {} if base is None else self.groups.before[base]
            rate, initial = rate_of(had.get("lr")), rate_of(self.schedule.initial(other, had))
            if rate is not None and initial:
                factors.add(round(rate / initial, 9))
        return Line(0.0, factors.pop()) if len(factors) == 1 else None

    def _called(self, number: int) -> Line | None:
        assert self.live is not None
        function, position = self.live.functions[number], self.schedule.position
        if self.live.name == "MultiplicativeLR":
            return Line(0.0, math.prod(function(step) for step in range(1, position + 1)))
        return Line(0.0, float(function(position)))

    # --- small things -----------------------------------------------------------------------------------------------

    def _start_from(self, number: int, initial: float, options: dict[str, Any]) -> bool:
        """Set what the group began with, in every part of the schedule; False where the parts began differently."""
        lists = [
            part.state["base_lrs"] for _, part in parts(self.schedule) if isinstance(part.state.get("base_lrs"), list)
        ]
        found = [values[number] for values in lists if number < len(values)]
        if any(same_value(value, initial) for value in found) and not same_value(initial, found[0]):
            return True
        if any(not same_value(value, found[0]) for value in found):
            listed = " and ".join(map(str, found))
            self._refuse(
                number,
                f"it should start from {initial}, but its schedulers start from {listed}",
                "leave initial_lr out of the plan, and set it in the schedulers",
            )
            return False
        self.schedule.start_from(number, initial, options)
        return True

    def _set_lr(self, number: int, rate: float) -> None:
        self.options[number]["lr"] = _like(self.options[number].get("lr"), rate)
        self._last(number, self.options[number]["lr"])

    def _last(self, number: int, rate: Any) -> None:
        """Let the scheduler say that it set this rate."""
        last = self.schedule.state.get("_last_lr")
        if isinstance(last, list) and number < len(last) and rate is not None:
            last[number] = copied(rate)

    def _refuse(self, number: int, message: str, remedy: str) -> None:
        self.problems.append(Problem("scheduler", message, f"param group {number}", remedy=remedy))

    def _wrong(self, name: str, message: str, remedy: str) -> None:
        self.problems.append(Problem("setting", message, name, remedy=remedy))

    def _note(self, number: int, what: str) -> None:
        self.notes.append(f"param group {number} {what}")


def _like(old: Any, rate: float) -> Any:
    """A rate as a tensor where it was one in memory."""
    full = getattr(old, "new_full", None)
    return full(tuple(old.shape), rate) if callable(full) else rate
