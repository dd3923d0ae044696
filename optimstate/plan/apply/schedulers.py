"""A scheduler's state, and the learning rates of the param groups it schedules, after a migration.

The two belong together: half of what a schedule depends on is in the scheduler's lists, half in the groups. A rate that
a plan sets, a group that is new, an argument that changes: everything is made as if the run had had it from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optimstate.errors import MigrationError
from optimstate.plan.expressions.evaluate import copied, number_of
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import SchedulerRule
from optimstate.plan.solve.groups import same_value
from optimstate.plan.solve.migration import SectionMoves
from optimstate.problems import Problem
from optimstate.state.scheduler import PER_GROUP_KEYS, regroup_scheduler_state
from optimstate.state.schedules import Line, Schedule, parts, schedule_of

__all__ = ["Followed", "Groups", "LiveScheduler", "differences", "followed", "reaches"]

_BOUNDS = ("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
_COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "mode_worse", "_step_count")


class Groups(NamedTuple):
    """The param groups that a scheduler follows.

    Attributes:
        options: Of each group of the result.
        bases: For each of them the old group whose options it has; None for a new one.
        before: The options of the old groups.
        given: Which options of each group the plan sets, be they others than before or not.
    """

    options: list[dict[str, Any]]
    bases: list[int | None]
    before: list[dict[str, Any]]
    given: list[frozenset[str]]

    @classmethod
    def of(cls, moves: SectionMoves, before: Sequence[Mapping[str, Any]]) -> Groups:
        """Those of an optimizer that was migrated."""
        return cls(
            [dict(group.options) for group in moves.groups],
            [group.base for group in moves.groups],
            [dict(options) for options in before],
            [frozenset(group.rule.set if group.rule else ()) for group in moves.groups],
        )

    @property
    def unchanged(self) -> bool:
        """Whether they are the old ones, with the same learning rates and bounds."""
        return self.bases == list(range(len(self.before))) and all(
            same_value(made.get(key), had.get(key))
            for made, had in zip(self.options, self.before, strict=True)
            for key in ("lr", "initial_lr", *_BOUNDS)
        )


class LiveScheduler(NamedTuple):
    """A scheduler in memory.

    Attributes:
        name: Its class.
        state: Its `state_dict()`.
        groups: The options of its optimizer's param groups.
        functions: Its `lr_lambdas`, where it has them.
    """

    name: str
    state: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]] = ()
    functions: Sequence[Any] = ()

    @classmethod
    def of(cls, scheduler: Any) -> LiveScheduler:
        """One of torch's, or of optimstate's."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in scheduler.optimizer.param_groups]
        functions = getattr(scheduler, "lr_lambdas", ())
        return cls(type(scheduler).__name__, scheduler.state_dict(), groups, functions)


class Followed(NamedTuple):
    """What a scheduler and its param groups become.

    Attributes:
        state: The scheduler's.
        options: Of each param group.
        notes: What was computed, and what deserves attention.
    """

    state: dict[str, Any]
    options: list[dict[str, Any]]
    notes: list[str]


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
    """Whether a `[scheduler]` table speaks of a scheduler or of a part of it."""
    return any(rule.path in _spellings(label, path) for path, _ in parts(schedule_of(dict(state))))


def _spellings(label: str, path: str) -> set[str]:
    """How a plan may call a scheduler or a part of it."""
    if not path:
        return {"", label}
    return {path, f"{label}.{path}", f"{label}{path.replace('_schedulers', '[' + repr('_schedulers') + ']')}"}


def differences(state: Mapping[str, Any], live: LiveScheduler) -> list[str]:
    """What a scheduler in memory was made with and its state would replace.

    Raises:
        MigrationError: The state is of another scheduler.
    """
    saved, own = schedule_of(_own(state)), schedule_of(_own(live.state))
    if type(saved) is not type(own) or len(list(parts(saved))) != len(list(parts(own))):
        raise MigrationError(
            [Problem("scheduler", f"the checkpoint's scheduler is {_named(saved)}, the live one is {live.name}")],
            hint='Build the same scheduler, or let the live one take the position: schedule = "live" in [policy].',
        )
    found = []
    for (path, old), (_, new) in zip(parts(saved), parts(own), strict=True):
        if type(old) is not type(new):
            raise MigrationError(
                [
                    Problem(
                        "scheduler", f"in the checkpoint it is {_named(old)}, in the live scheduler {_named(new)}", path
                    )
                ],
                hint='Build the same scheduler, or say schedule = "live" in [policy].',
            )
        for key in old.ARGUMENTS:
            had, has = old.argument(key), new.argument(key)
            if not same_value(had, has) and key not in ("base_lr", "max_lr"):
                where = f"{path}: " if path else ""
                found.append(
                    f"{where}{key} is {had} in the checkpoint's {_named(old)} and {has} in the live one: "
                    'the checkpoint\'s is used (schedule = "live" in [policy] keeps the live one)'
                )
    return found


def _named(schedule: Schedule) -> str:
    return schedule.NAME or "a scheduler that is not torch's"


def _own(node: Any) -> Any:
    """The state with containers of its own; what they hold is shared."""
    if type(node) is dict:
        return {key: _own(value) for key, value in node.items()}
    return [_own(value) for value in node] if type(node) is list else node


def _near(one: float, other: float, scale: float = 0.0) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9 * abs(scale))


class _Work:
    """A scheduler and its param groups while they are made to agree."""

    def __init__(self, groups: Groups, plan: Plan, live: LiveScheduler | None) -> None:
        self.groups, self.plan, self.live = groups, plan, live
        self.options = [dict(options) for options in groups.options]
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.schedule = schedule_of({})
        self.first: list[float | None] = []

    def take(self, state: Mapping[str, Any]) -> None:
        """Take the scheduler's state, its lists rebuilt for the groups of the result."""
        identity = self.groups.bases == list(range(len(self.groups.before)))
        if identity:
            made = _own(state)
        else:
            fresh = {number: self._fresh(number, state) for number in self._new()}
            group_map = [[] if base is None else [base] for base in self.groups.bases]
            made = _own(regroup_scheduler_state(state, group_map, fresh=fresh))
        self.schedule = schedule_of(made)

    def _new(self) -> Iterator[int]:
        yield from (number for number, base in enumerate(self.groups.bases) if base is None)

    def _fresh(self, number: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the lists of a scheduler have for a group that is new."""
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

    # --- rates ------------------------------------------------------------------------------------------------------

    def rates(self) -> None:
        """Make the rates that groups were given true, now and at the next step."""
        for number, base in enumerate(self.groups.bases):
            if base is None:
                self._join(number)
            elif self.groups.before[base].get("lr") is not None:
                self._follow(number, self.groups.before[base])

    def _follow(self, number: int, had: Mapping[str, Any]) -> None:
        options = self.options[number]
        rate, initial = _rate(had.get("lr")), _rate(self.schedule.initial(number, had))
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
        elif any(not same_value(options.get(key), had.get(key)) for key in _BOUNDS):
            self._be_where_it_leads(number, options, had, rate)

    def _both(self, number: int, options: dict[str, Any]) -> None:
        """Both rates are given."""
        wanted = _rate(options["initial_lr"])
        if wanted is None or not self._start_from(number, wanted, dict(options)):
            return
        line, rate = self.schedule.line(number, options), _rate(options.get("lr"))
        if (
            self.schedule.USES_BASE
            and line is not None
            and rate is not None
            and not _near(line.at(wanted), rate, wanted)
        ):
            self._note(number, f"has lr = {rate!r} now, but {_named(self.schedule)} gives {line.at(wanted):.6g} there")
        self._last(number, options["lr"])

    def _begin(
        self, number: int, options: dict[str, Any], had: Mapping[str, Any], rate: float, initial: float | None
    ) -> None:
        """Another initial rate: everything is as if the group had had it from the start."""
        wanted = _rate(options["initial_lr"])
        if initial is None or wanted is None:
            self._refuse(number, f"{_named(self.schedule)} does not compute from initial_lr", "set lr instead")
            return
        line = self.schedule.line(number, had)
        options["initial_lr"] = had.get("initial_lr")
        if not self._start_from(number, wanted, options):
            return
        options["initial_lr"] = wanted
        new = self.schedule.line(number, options)
        if line is not None and new is not None and _near(line.at(initial), rate, initial):
            made = new.at(wanted)
        elif self.schedule.proportional and initial:
            made = rate * wanted / initial
            if line is not None:
                self._note(number, f"had lr = {rate:.6g} where its schedule gives {line.at(initial):.6g}: that is kept")
        else:
            self._refuse(number, f"it has lr = {rate!r}, which its schedule does not give", "set lr, not initial_lr")
            return
        self._set_lr(number, made)
        if not same_value(options["lr"], had["lr"]):
            self._note(
                number, f"has lr = {made:.9g} now, which {_named(self.schedule)} gives for initial_lr = {wanted:.9g}"
            )

    def _be_at(
        self, number: int, options: dict[str, Any], had: Mapping[str, Any], rate: float, initial: float | None
    ) -> None:
        """Another rate now: the schedule is the one that gives it at this position."""
        wanted = _rate(options["lr"])
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
                    f"{_named(self.schedule)} is at lr = {rate:.6g}, which every initial_lr leads to",
                    "set initial_lr instead, or change the schedule",
                )
                return
            if not self._start_from(number, found, options):
                return
            started = found
        if "initial_lr" in options:
            options["initial_lr"] = started
        self._note(number, f"has initial_lr = {started:.9g} now, from which {_named(self.schedule)} gives its lr")

    def _be_where_it_leads(self, number: int, options: dict[str, Any], had: Mapping[str, Any], rate: float) -> None:
        """A bound of the schedule is another: the rate is what it gives."""
        initial = _rate(self.schedule.initial(number, options))
        old, new = self.schedule.line(number, had), self.schedule.line(number, options)
        if initial is not None and old is not None and new is not None and _near(old.at(initial), rate, initial):
            self._set_lr(number, new.at(initial))

    def _join(self, number: int) -> None:
        """A group that is new gets the rate that it would have if it had been there from the start."""
        options = self.options[number]
        initial = _rate(options.get("initial_lr", options.get("lr")))
        if initial is None or self.schedule.initial(number, options) is None:
            if options.get("lr") is not None:
                self._note(number, f"is new: it starts at lr = {options['lr']!r}, whatever {_named(self.schedule)} did")
            return
        line = self._line(number, options)
        if line is None:
            self._refuse(
                number,
                f"it is new, and the state does not tell which rate {_named(self.schedule)} gives it",
                "say like = 0 for the options of an old group",
            )
            return
        options.setdefault("initial_lr", initial)
        self._set_lr(number, line.at(initial))
        self.schedule.turn(number, options)
        self._note(number, f"is new: lr = {line.at(initial):.9g}, which {_named(self.schedule)} gives it at this step")

    def _line(self, number: int, options: Mapping[str, Any]) -> Line | None:
        """The rate over the initial one; of functions as the live scheduler has them, or as the other groups show."""
        found = self.schedule.line(number, options)
        if found is not None or not self.schedule.proportional:
            return found
        if self.live is not None and number < len(self.live.functions) and self.live.functions[number] is not None:
            return self._called(number)
        factors = set()
        for other, base in enumerate(self.groups.bases):
            had = {} if base is None else self.groups.before[base]
            rate, initial = _rate(had.get("lr")), _rate(self.schedule.initial(other, had))
            if rate is not None and initial:
                factors.add(round(rate / initial, 9))
        return Line(0.0, factors.pop()) if len(factors) == 1 else None

    def _called(self, number: int) -> Line | None:
        assert self.live is not None
        function, position = self.live.functions[number], self.schedule.position
        if self.live.name == "MultiplicativeLR":
            return Line(0.0, math.prod(function(step) for step in range(1, position + 1)))
        return Line(0.0, float(function(position)))

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
        name = f"scheduler {_named(part)}{' at ' + path if path else ''}"
        check = part.ARGUMENTS.get(key)
        if check is None:
            others = [where for where, other in there if key in other.ARGUMENTS and where != path]
            known = ", ".join(part.ARGUMENTS) or "nothing: what it computes with is not in its state"
            remedy = f"{others[0]} has it: say path = {others[0]!r}" if others else f"it has {known}"
            self._wrong(name, f"there is no argument {key!r} that can be changed", remedy)
            return
        if not check(value):
            self._wrong(name, f"{key} cannot be {value!r}", f"it is {part.argument(key)!r} now")
            return
        if key == "total_steps" and value <= part.position:
            self._wrong(name, f"it is at step {part.position} already", "total_steps must be more than that")
            return
        old = [self._now(number) for number in range(len(self.options))]
        own = [part.line(number, options) for number, options in enumerate(self.options)]
        part.set(key, value, self.options)
        for number, options in enumerate(self.options):
            self._move_rate(number, old[number], own[number], part)
            self.schedule.turn(number, options)

    def _now(self, number: int) -> Line | None:
        return self.schedule.line(number, self.options[number])

    def _move_rate(self, number: int, old: Line | None, own: Line | None, part: Schedule) -> None:
        """The present rate after an argument changed, where it was what the schedule gave before."""
        options = self.options[number]
        rate, initial = _rate(options.get("lr")), _rate(self.schedule.initial(number, options))
        if rate is None or initial is None:
            return  # what is computed from lr alone goes on from it
        new, mine = self._now(number), part.line(number, options)
        if old is not None and new is not None and _near(old.at(initial), rate, initial):
            made = new.at(initial)
        elif old is not None and old == new:
            return
        elif self.schedule.proportional and own is not None and mine is not None and own.slope and part.proportional:
            made = rate * mine.slope / own.slope
            if old is not None:
                self._note(number, f"had lr = {rate:.6g} where its schedule gave {old.at(initial):.6g}: that is kept")
        else:
            self._refuse(
                number,
                f"it has lr = {rate!r}, which its schedule does not give",
                "change the schedule first, then set lr",
            )
            return
        self._set_lr(number, made)

    # --- the live schedule ------------------------------------------------------------------------------------------

    def live_wins(self, saved: Mapping[str, Any]) -> None:
        """The live scheduler's arguments, at the position of the saved one; rates as the live schedule gives them."""
        assert self.live is not None
        position = self.schedule.position
        old, self.schedule = self.schedule, schedule_of(_own(self.live.state))
        self.notes += [
            note.replace("the checkpoint's is used", "the live one is used").partition(" (schedule")[0]
            for note in (differences(saved, self.live) if type(old) is type(self.schedule) else ())
        ]
        if type(old) is not type(self.schedule):
            self.notes.append(f"the checkpoint's scheduler is {_named(old)}: the live {self.live.name} is used instead")
        self.schedule.move_to(position)
        if type(old) is type(self.schedule):
            self.schedule.state.update({key: saved[key] for key in _COUNTERS if key in saved})
        for number, options in enumerate(self.options):
            self._take_live(number, options)

    def _take_live(self, number: int, options: dict[str, Any]) -> None:
        assert self.live is not None
        mine = self.live.groups[number] if number < len(self.live.groups) else {}
        options.update({key: mine[key] for key in _BOUNDS if key in mine})
        wanted = _rate(options.get("initial_lr"))
        if (self.schedule.scalable and not self.schedule.proportional) or wanted is None:
            wanted = _rate(mine.get("initial_lr"))  # the schedule has bounds of its own
        if wanted is None:
            self._last(number, options.get("lr"))
            return
        if not (self.schedule.scalable and not self.schedule.proportional):
            self._start_from(number, wanted, dict(options))
        options["initial_lr"] = wanted
        line = self._line(number, options)
        if line is not None:
            self._set_lr(number, line.at(wanted))
        else:
            self._last(number, options.get("lr"))
        self.schedule.turn(number, options)

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


def _rate(value: Any) -> float | None:
    found = number_of(value)
    return None if found is None or isinstance(found, complex) else float(found)


def _like(old: Any, rate: float) -> Any:
    """A rate as a tensor where it was one in memory."""
    full = getattr(old, "new_full", None)
    return full(tuple(old.shape), rate) if callable(full) else rate
