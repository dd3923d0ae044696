"""Plans: what the planner follows, as objects, files and text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

from optimstate.describe import describe
from optimstate.errors import PlanSyntaxError, UsageError
from optimstate.plan.language import toml, toml_writing
from optimstate.plan.language.rules import GroupRule, Guard, OptimizerRule, Policy, Rule, SchedulerRule, fan_out
from optimstate.plan.language.template import Template
from optimstate.record import Record, field
from optimstate.state.algorithms.slots import Slot

__all__ = ["Plan"]


class Plan(Record):
    """Rules in order; for each name the first that matches decides, and a result is not matched again.

    Attributes:
        rules: The first pass.
        stages: Further passes, each over the names that the one before produced.
        groups: The param groups of the result; empty to keep those of the checkpoint.
        guard: What the checkpoint must look like.
        policy: What is done about mismatches.
        slots: Meanings of slots that are not known, by name.
        optimizer: The algorithm whose state the result has; empty for the one it has.
        optimizers: The optimizers of the result; empty to keep those of the checkpoint.
        schedulers: Arguments of schedulers that change.
        back: How many of the last stages lead back to a stored layout, which a live model does not have.
    """

    rules: tuple[Rule, ...] = ()
    stages: tuple[tuple[Rule, ...], ...] = ()
    groups: tuple[GroupRule, ...] = ()
    guard: Guard = Guard()
    policy: Policy = Policy()
    slots: Mapping[str, Slot] = field(default_factory=dict)
    optimizer: str = ""
    schedulers: tuple[SchedulerRule, ...] = ()
    optimizers: tuple[OptimizerRule, ...] = ()
    back: int = 0

    @classmethod
    def from_options(
        cls,
        *,
        rename: Iterable[str] = (),
        duplicate: Iterable[str] = (),
        drop: Iterable[str] = (),
        fresh: Iterable[str] = (),
    ) -> Plan:
        """From one-liners: `OLD=NEW`, `OLD=NEW1,NEW2`, `OLD`, `NAME`.

        Raises:
            PlanSyntaxError: One of them is not of this form.
        """
        rules = []
        for option, texts in (("rename", rename), ("duplicate", duplicate)):
            for text in texts:
                sides = split_outside(text, "=")
                if len(sides) != 2 or not all(sides):
                    raise PlanSyntaxError(
                        f"--{option} {describe(text)}: expected OLD=NEW", hint="For example: fc.{p}=head.{p}"
                    )
                rule = Rule((Template(sides[0]),), tuple(Template(target) for target in split_outside(sides[1], ",")))
                if option == "rename" and fan_out(rule) != 1:
                    raise PlanSyntaxError(f"--rename {describe(text)}: names several targets", hint="Use --duplicate.")
                rules.append(rule)
        rules.extend(Rule((Template(text),)) for text in drop)
        rules.extend(Rule((Template(text),), fresh=True) for text in fresh)
        return cls(tuple(rules))

    @classmethod
    def of(cls, plan: Plan | str | PathLike[str] | None) -> Plan:
        """What every function with a plan takes: a plan, the path of a plan file, or None for one that says nothing.

        Raises:
            PlanSyntaxError: The file cannot be read or is wrong; the message has the line and the key.
        """
        return cls() if plan is None else plan if isinstance(plan, Plan) else cls.from_file(Path(plan))

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """From a plan file (TOML).

        Raises:
            PlanSyntaxError: The file cannot be read or is wrong; the message has the line and the key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise PlanSyntaxError(f"{path}: not a plan: a plan is a text file (TOML)") from None
        except OSError as error:
            hint = "Plans are read from files, and not from stores; download it first." if ":/" in str(path) else ""
            raise PlanSyntaxError(f"{path}: the plan cannot be read: {error.strerror}", hint=hint) from None
        return cls._parsed(text, str(path), Path(path).parent)

    @classmethod
    def from_toml(cls, text: str, *, name: str = "plan") -> Plan:
        """From the text of a plan file.

        Args:
            text: TOML.
            name: What messages call it.

        Raises:
            PlanSyntaxError: It is wrong; the message has the line and the key.
        """
        return cls._parsed(text, name, Path())

    @classmethod
    def _parsed(cls, text: str, name: str, folder: Path) -> Plan:
        fields, view = toml.parsed(text, name, folder)
        made = cls(**fields)
        if view is None:
            return made
        back = cls.from_file(folder / view.back) if view.back else None
        return made.through(cls.from_file(folder / view.plan), back, section=view.section)

    @classmethod
    def derive(cls, function: Any, sources: Any, *, into: Any = None, allow_drop: bool = False) -> Any:
        """Read a plan off a function from state dict to state dict: see `optimstate.derive`, which this is.

        Args:
            function: From a mapping of names to tensors to another; with `into`, from an old and a new module to none.
            sources: Names, with a tensor or a shape for each; or a module.
            into: The new module, where the function copies weights from one module into another.
            allow_drop: Whether sources may go nowhere.

        Returns:
            A `Derived`, whose `plan` is compared with the function.

        Raises:
            DerivationError: No plan says what the function does.
        """
        # Derivation stands above plans; it is found by name when it is asked for, as containers are.
        return import_module("optimstate.derivation.derive").derive(function, sources, into=into, allow_drop=allow_drop)

    def to_toml(self) -> str:
        """The plan as a file."""
        return toml_writing.written(self)

    @property
    def passes(self) -> tuple[tuple[Rule, ...], ...]:
        """The rules of every pass."""
        return (self.rules, *self.stages)

    def all_rules(self) -> Iterator[Rule]:
        """The rules of every pass, in order."""
        for rules in self.passes:
            yield from rules

    @property
    def digest(self) -> str:
        """A SHA-256 of what the plan makes of a run, in hexadecimal: in whatever layout the result is stored."""
        from hashlib import sha256

        return sha256(self.forward().to_toml().encode()).hexdigest()

    def forward(self) -> Plan:
        """The plan for a live model: without the stages that lead back to a stored layout."""
        return self._replace(stages=self.stages[: len(self.stages) - self.back], back=0)

    def backward(self) -> Plan:
        """The stages that lead back to a stored layout, as a plan of their own."""
        passes = self.stages[len(self.stages) - self.back :]
        return Plan(passes[0], passes[1:], policy=Policy(unused=self.policy.unused)) if passes else Plan()

    def with_policy(self, **policies: Any) -> Plan:
        """The same plan with other policies.

        Raises:
            UsageError: A policy does not have such a value.
        """
        known = get_type_hints(Policy)
        for name, value in policies.items():
            UsageError.refuse_other(name, value, get_args(known[name]))
        return self._replace(policy=self.policy._replace(**policies))

    def only(self, section: str) -> Plan:
        """The same rules for one section alone.

        Raises:
            PlanSyntaxError: The plan says more than what becomes of weights.
        """
        if self._replace(rules=(), stages=()) != Plan():
            raise PlanSyntaxError(
                "a view has rules alone", hint="Take groups, policies and everything else into the plan that uses it."
            )

        def restricted(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            return tuple(rule._replace(only=section) for rule in rules)

        return self._replace(rules=restricted(self.rules), stages=tuple(map(restricted, self.stages)))

    def through(self, view: Plan, back: Plan | None = None, *, section: str = "model") -> Plan:
        """This plan for a checkpoint one of whose sections is stored in another layout than the plan speaks of.

        Args:
            view: Leads from the layout that is stored to the one that the rules speak of.
            back: Leads back, for the shapes of the result; without, the section stays in the layout of the rules.
            section: A kind of section, or the path of one.
        """
        passes = [rules for part in (view.only(section), self.forward()) for rules in part.passes if rules] or [()]
        last = [rules for part in (self.backward(), back.only(section) if back else Plan()) for rules in part.passes]
        last = [rules for rules in last if rules]
        return self._replace(rules=passes[0], stages=(*passes[1:], *last), back=len(last))

    def __add__(self, other: Plan) -> Plan:
        """Both plans in one pass where neither has stages, otherwise one after the other."""
        if self.stages:
            later = (*self.stages, *(rules for rules in other.passes if rules))
            joined = self._replace(stages=later)
        else:
            joined = self._replace(rules=self.rules + other.rules, stages=other.stages)
        # Rules that follow a way back speak of the stored layout, so that it is the last stage no more.
        back = other.back if other.rules or other.stages else self.back
        guard = Guard(
            self.guard.has + other.guard.has, self.guard.lacks + other.guard.lacks, self.guard.once or other.guard.once
        )
        default = Policy()._asdict()
        changed = {key: value for key, value in other.policy._asdict().items() if value != default[key]}
        return joined._replace(
            back=back,
            groups=self.groups + other.groups,
            guard=guard,
            policy=self.policy._replace(**changed),
            slots={**self.slots, **other.slots},
            optimizer=other.optimizer or self.optimizer,
            optimizers=self.optimizers + other.optimizers,
            schedulers=self.schedulers + other.schedulers,
        )


def split_outside(text: str, separator: str) -> list[str]:
    """Split at separators outside of braces."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == separator and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]
