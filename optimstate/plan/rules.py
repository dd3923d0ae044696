"""Rules and plans, from Python, from one-liners and from TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimstate.errors import PlanSyntaxError
from optimstate.plan.template import Template

__all__ = ["Plan", "Rule"]


@dataclass(frozen=True)
class Rule:
    """What becomes of the parameters one template matches.

    Attributes:
        source: The template that selects them.
        targets: What each becomes: one name renames, several duplicate, none drops.
        label: How messages refer to the rule.
    """

    source: Template
    targets: tuple[Template, ...]
    label: str = ""

    def __post_init__(self) -> None:
        if self.source.has_affine:
            raise PlanSyntaxError(f"{self}: arithmetic can only stand on the producing side")
        known = self.source.captures
        for target in self.targets:
            if target.has_wildcard or (self.source.has_wildcard and self.targets):
                raise PlanSyntaxError(f"{self}: * has no name to produce from", hint="Name it: {rest**}.")
            for name, choices in target.captures.items():
                if name not in known and choices is None:
                    raise PlanSyntaxError(f"{self}: {{{name}}} is not captured by {self.source.text!r}")
            lost = known.keys() - target.captures.keys()
            if lost:
                raise PlanSyntaxError(
                    f"{self}: {{{min(lost)}}} is captured, but {target.text!r} does not use it: "
                    "several parameters would become one",
                    hint="Use the capture on both sides, or write out its value.",
                )

    @property
    def drops(self) -> bool:
        """Whether matches are removed."""
        return not self.targets

    def match(self, name: str) -> list[str] | None:
        """The names that `name` becomes, or None when the rule does not match it."""
        captures = self.source.match(name)
        if captures is None:
            return None
        return [made for target in self.targets for made in target.produce(captures)]

    def __str__(self) -> str:
        if self.label:
            return self.label
        right = ", ".join(target.text for target in self.targets)
        return f"{self.source.text} -> {right}" if self.targets else f"drop {self.source.text}"


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of braces."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == separator and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


@dataclass(frozen=True)
class Plan:
    """Rules in order; for each name the first that matches decides, and a result is not matched again."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def from_options(
        cls, *, rename: Iterable[str] = (), duplicate: Iterable[str] = (), drop: Iterable[str] = ()
    ) -> Plan:
        """From one-liners: `OLD=NEW`, `OLD=NEW1,NEW2`, `OLD`.

        Raises:
            PlanSyntaxError: One of them is not of this form.
        """
        rules = []
        for option, texts in (("rename", rename), ("duplicate", duplicate)):
            for text in texts:
                sides = _split(text, "=")
                if len(sides) != 2 or not all(sides):
                    raise PlanSyntaxError(f"--{option} {text!r}: expected OLD=NEW", hint="For example: fc.{p}=head.{p}")
                rule = Rule(Template(sides[0]), tuple(Template(target) for target in _split(sides[1], ",")))
                if option == "rename" and len(list(_fan_out(rule))) != 1:
                    raise PlanSyntaxError(f"--rename {text!r}: names several targets", hint="Use --duplicate.")
                rules.append(rule)
        rules.extend(Rule(Template(text), ()) for text in drop)
        return cls(tuple(rules))

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """From a TOML file of `[[rule]]` tables with `from` and `to` or `drop = true`.

        Raises:
            PlanSyntaxError: The file cannot be read or parsed, or has an unknown key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanSyntaxError(f"{path}: the plan cannot be read: {getattr(error, 'strerror', error)}") from None
        try:
            return cls.from_mapping(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise PlanSyntaxError(f"{path}: {error}") from None
        except PlanSyntaxError as error:
            raise PlanSyntaxError(f"{path}: {error.message}", hint=error.hint) from None

    @classmethod
    def from_mapping(cls, document: Mapping[str, Any]) -> Plan:
        """From the contents of a plan file."""
        _refuse_unknown(document, {"rule"}, "the plan")
        tables = document.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise PlanSyntaxError("`rule` is no array of tables", hint="Write [[rule]].")
        return cls(tuple(_rule_from_table(table, number) for number, table in enumerate(tables, 1)))

    def to_toml(self) -> str:
        """The plan as a file."""
        return "\n".join(_table_of(rule) for rule in self.rules)

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.rules + other.rules)


def _fan_out(rule: Rule) -> Iterable[tuple[str, str]]:
    """One entry per name a single match becomes."""
    for target in rule.targets:
        free = [choices or () for name, choices in target.captures.items() if name not in rule.source.captures]
        count = 1
        for choices in free:
            count *= len(choices)
        yield from ((target.text, str(index)) for index in range(count))


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise PlanSyntaxError(f"{where}: unknown key {unknown[0]!r}", hint=f"Known keys: {', '.join(sorted(known))}.")


def _rule_from_table(table: Mapping[str, Any], number: int) -> Rule:
    where = f"rule {number}"
    _refuse_unknown(table, {"from", "to", "drop"}, where)
    source, targets, drop = table.get("from"), table.get("to"), table.get("drop", False)
    if not isinstance(source, str):
        raise PlanSyntaxError(f"{where}: `from` must be a template", hint='For example: from = "fc.{p}"')
    if isinstance(targets, str):
        targets = [targets]
    if targets is not None and not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
        raise PlanSyntaxError(f"{where}: `to` must be a template or a list of templates")
    if not isinstance(drop, bool) or drop is (targets is not None):
        raise PlanSyntaxError(f"{where}: needs either `to` or `drop = true`")
    try:
        return Rule(Template(source), tuple(Template(target) for target in targets or ()))
    except PlanSyntaxError as error:
        raise PlanSyntaxError(f"{where}: {error.message}", hint=error.hint) from None


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _table_of(rule: Rule) -> str:
    targets: Sequence[str] = [_quoted(target.text) for target in rule.targets]
    right = (
        "drop = true" if rule.drops else f"to = {targets[0] if len(targets) == 1 else '[' + ', '.join(targets) + ']'}"
    )
    return f"[[rule]]\nfrom = {_quoted(rule.source.text)}\n{right}\n"
