"""What a plan is made of: rules, tables of param groups, a guard and policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

from optimstate.describe import describe
from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.base import Operation
from optimstate.plan.language.template import Template
from optimstate.record import Record, field

__all__ = ["SECTIONS", "GroupRule", "Guard", "OptimizerRule", "Policy", "Rule", "SchedulerRule"]

SECTIONS = ("model", "optimizer", "ema")
"""The kinds of sections whose parameters rules move."""

Renamed = list[tuple[str, dict[str, str]]]


class Rule(Record):
    """What becomes of the parameters that some templates match.

    Attributes:
        sources: Select them; empty for a parameter that is new.
        targets: The names they become; empty where they are dropped, or only made fresh.
        operations: What is done to the tensors, in order.
        fresh: The parameter keeps its value, but gets no optimizer state.
        group: The param group of a new parameter.
        label: How messages refer to the rule; empty for its text.
        only: The sections it is for: a kind (`model`, `optimizer`, `ema`) or a path; empty for all.
    """

    sources: tuple[Template, ...]
    targets: tuple[Template, ...] = ()
    operations: tuple[Operation, ...] = ()
    fresh: bool = False
    group: int | None = None
    label: str = ""
    only: str = ""

    @classmethod
    def of(
        cls,
        source: str | Iterable[str] = (),
        target: str | Iterable[str] = (),
        *operations: Operation,
        fresh: bool = False,
        group: int | None = None,
        only: str = "",
        **named: Any,
    ) -> Rule:
        """From templates as text; operations also by name, as in a plan file: `concat=0`.

        Raises:
            PlanSyntaxError: A template or operation is wrong, or they do not belong together.
        """
        from optimstate.plan.language.operations import parse_operation  # a rename at the command line needs none

        made = [operation for key, value in named.items() for operation in parse_operation(key, value)]
        return cls(templates(source), templates(target), (*operations, *made), fresh, group, only=only)

    def __post_init__(self) -> None:
        for check in (self._check_presence, self._check_captures, self._check_gathering):
            check()

    def _check_presence(self) -> None:
        if not self.sources and not (self.fresh and self.targets):
            raise PlanSyntaxError(f"{self}: the rule has no `from`", hint="Add `from`, or `fresh = true`.")
        if self.operations and not self.targets:
            raise PlanSyntaxError(f"{self}: operations need `to`")
        for target in self.targets:
            if target.is_regex:
                raise PlanSyntaxError(f"{self}: a regular expression cannot produce names")
            if target.has_wildcard or (self.sources and any(source.has_wildcard for source in self.sources)):
                raise PlanSyntaxError(f"{self}: * has no name to produce from", hint="Name it: {rest**}.")

    def _check_captures(self) -> None:
        if not self.targets:
            return
        for target in self.targets:
            for name, choices in target.captures.items():
                for source in self.sources:
                    if name in source.captures:
                        self._check_choices(name, source.captures[name], choices)
                known = any(name in source.captures for source in self.sources)
                if not known and choices is None:
                    origin = " or ".join(describe(source.text) for source in self.sources) or "anything"
                    raise PlanSyntaxError(f"{self}: {{{name}}} is not captured by {origin}")
        for source in self.sources:
            shared = {name for name in source.captures if name in self._produced}
            lost = self.shared - shared
            if lost:
                raise PlanSyntaxError(f"{self}: {{{min(lost)}}} is not captured by {describe(source.text)} too")
            for target in self.targets:
                lost = shared - target.captures.keys()
                if lost:
                    raise PlanSyntaxError(
                        f"{self}: {{{min(lost)}}} is captured, but {describe(target.text)} does not use it: "
                        "several parameters would become one",
                        hint="Use the capture on both sides, or write out its value.",
                    )

    def _check_choices(self, name: str, old: tuple[str, ...] | None, new: tuple[str, ...] | None) -> None:
        if new is not None and (old is None or len(old) != len(new)):
            raise PlanSyntaxError(
                f"{self}: {{{name}}} has {len(new)} choices on one side and "
                f"{'none' if old is None else len(old)} on the other",
                hint="Give both sides as many choices (they are paired in order), or only the left one any.",
            )

    def _check_gathering(self) -> None:
        if not self.targets or not self.sources:
            return
        joins = any(operation.JOINS for operation in self.operations)
        if not joins and len(self.sources) > 1:
            raise PlanSyntaxError(f"{self}: several sources, but nothing joins them", hint="Add concat or stack.")
        for source in self.sources:
            for name in source.captures.keys() - self._produced:
                if not joins:
                    raise PlanSyntaxError(
                        f"{self}: {{{name}}} is captured, but {describe(self.targets[0].text)} does not use it: "
                        "several parameters would become one",
                        hint="Use the capture on both sides, write out its value, or add concat or stack.",
                    )
                if source.captures[name] is None and name not in source.counting:
                    raise PlanSyntaxError(
                        f"{self}: {{{name}}} gathers parameters, but nothing says in which order",
                        hint=f"Enumerate it, {{{name}=a|b|c}} or {{{name}=0..7}}, or count: {{{name}:int}}.",
                    )

    @property
    def _produced(self) -> set[str]:
        return {name for target in self.targets for name in target.captures}

    @property
    def shared(self) -> set[str]:
        """The captures on both sides."""
        return {name for source in self.sources for name in source.captures if name in self._produced}

    @property
    def source(self) -> Template:
        """The first source, or the first target of a rule for new parameters."""
        return (self.sources or self.targets)[0]

    def is_for(self, section: str) -> bool:
        """Whether it is for a section, which reports call by its kind and path."""
        kind, _, path = section.partition(" ")
        return not self.only or kind not in SECTIONS or self.only in (kind, path)

    @property
    def drops(self) -> bool:
        """Whether matches are removed."""
        return not self.targets and not self.fresh

    def names_for(self, source: Template, captures: Mapping[str, str]) -> list[str]:
        """The names that a match of `source` with these captures becomes, in the order of the tensors.

        Raises:
            PlanSyntaxError: An index that is to be computed is not an integer.
        """
        key = (id(source), *captures)
        if key not in self._spellers:
            self._spellers[key] = [
                (_renamed(source, target), spell) for target in self.targets for spell in target.spellings(captures)
            ]
        made = []
        for renamed, spell in self._spellers[key]:
            values = {**captures, **{name: new[captures[name]] for name, new in renamed}} if renamed else captures
            made.append(spell(values))
        return made

    @cached_property
    def _spellers(self) -> dict[tuple[Any, ...], list[tuple[Renamed, Callable[[Mapping[str, str]], str]]]]:
        return {}

    def __str__(self) -> str:
        if self.label:
            return self.label
        where = f"in {self.only} alone: " if self.only else ""
        left = where + ", ".join(source.text for source in self.sources)
        right = ", ".join(target.text for target in self.targets)
        if self.drops:
            return f"drop {left}"
        if self.fresh:
            return f"fresh {left or right}" if not (left and right) else f"{left} -> {right}, fresh"
        steps = "".join(f", {operation}" for operation in self.operations)
        return f"{left} -> {right}{steps}"


def _renamed(source: Template, target: Template) -> Renamed:
    """Enumerations with other words on each side: what each word becomes."""
    pairs = ((name, source.captures.get(name), new) for name, new in target.captures.items())
    return [(name, dict(zip(old, new, strict=True))) for name, old, new in pairs if old and new and old != new]


def templates(texts: str | Iterable[str]) -> tuple[Template, ...]:
    """One template or several."""
    return tuple(Template(text) for text in ([texts] if isinstance(texts, str) else texts))


class GroupRule(Record):
    """One param group of the result; or, without `match`, options of groups whose members stay as they are.

    Attributes:
        match: Templates of the parameters in it; the first group that matches a parameter takes it.
        set: Options that replace those of the checkpoint.
        like: The old group whose options it starts from; None for the one its parameters were in.
        optimizer: The path of the optimizer it is for; empty for every one.
        number: Without `match`: the group whose options are set; None for all of them.
    """

    match: tuple[Template, ...]
    set: Mapping[str, Any] = field(default_factory=dict)
    like: int | None = None
    optimizer: str = ""
    number: int | None = None

    def is_for(self, label: str) -> bool:
        """Whether it is for the optimizer at a path."""
        return self.optimizer in ("", label)


class OptimizerRule(Record):
    """One optimizer of the result.

    Attributes:
        path: Where it stands in the result: its keys, joined by dots.
        match: Templates of the parameters in it; the first table that matches a parameter takes it.
        algorithm: Whose state it has; empty for that of the optimizer its parameters were in.
        set: Options of its groups that replace those of the checkpoint.
    """

    path: str
    match: tuple[Template, ...]
    algorithm: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"[[optimizer]] {describe(self.path)}"


class SchedulerRule(Record):
    """Arguments of a scheduler that change, as if it had had them from the start.

    Attributes:
        set: By name, as the scheduler's constructor has them.
        path: The scheduler, or a part of it (`_schedulers[1]`); empty for every scheduler.
    """

    set: Mapping[str, Any]
    path: str = ""


class Guard(Record):
    """What a checkpoint must look like.

    Attributes:
        has: Each must match a name.
        lacks: None may match a name.
        once: The result is stamped with the plan's digest, and a checkpoint that has it is refused.
    """

    has: tuple[Template, ...] = ()
    lacks: tuple[Template, ...] = ()
    once: bool = False


class Policy(Record):
    """What is done about mismatches; the defaults refuse.

    Attributes:
        missing: A target that nothing fills.
        unexpected: A parameter of the checkpoint that the target does not have.
        unused: A rule that matches nothing.
        step: Parameters with different step counts that become one; `keep` takes the first one's.
        approximate: A slot that can only be approximated.
        quantized: 8-bit slots of parameters that are cut, joined or scaled: refused, or decoded and coded again.
        hyperparameters: Whether groups take their options from the checkpoint or from the live optimizer.
        schedule: Whether a scheduler has the arguments of the checkpoint or of the live one.
        merge: Old groups with different options that become one: which of them stands for all (`min` and `max` choose
            by initial learning rate).
    """

    missing: Literal["error", "fresh"] = "error"
    unexpected: Literal["error", "drop"] = "error"
    unused: Literal["error", "ignore"] = "error"
    step: Literal["error", "min", "max", "keep"] = "error"
    approximate: Literal["allow", "refuse"] = "allow"
    quantized: Literal["refuse", "requantize"] = "refuse"
    hyperparameters: Literal["checkpoint", "live"] = "checkpoint"
    merge: Literal["refuse", "first", "min", "max"] = "refuse"
    schedule: Literal["checkpoint", "live"] = "checkpoint"


def fan_out(rule: Rule) -> int:
    """How many names one match becomes."""
    count = 0
    for target in rule.targets:
        made = 1
        for name, choices in target.captures.items():
            if name not in rule.shared:
                made *= len(choices or ())
        count += made
    return count
