"""Options of param groups set from the command line, as the `[[group]]` tables that say the same."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from optimstate.errors import MigrationError, PlanError, PlanSyntaxError
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.planner import SectionMoves
from optimstate.problems import Problem
from optimstate.surgery.reports import opening

__all__ = ["with_options"]


class _Setting(NamedTuple):
    """`WHERE:KEY=VALUE`: for all parameters, for an old param group, or for those a template matches."""

    text: str
    where: int | Template | None
    key: str
    value: Any

    def applies(self, group: int, name: str) -> bool:
        """Whether it is meant for a parameter of the result."""
        if isinstance(self.where, Template):
            return _matches(self.where, name)
        return self.where is None or self.where == group


def with_options(plan: Plan | str | PathLike[str], source: str | Path, settings: Sequence[str]) -> Plan:
    """A plan that also sets options of param groups.

    The plan language names the groups of a result by the parameters in them, so the checkpoint is looked at: groups
    stay as they are, except that parameters which get other options than the rest of theirs form one of their own.

    Args:
        plan: What else is done, as a plan or the path of a plan file; it has no `[[group]]` tables.
        source: The checkpoint that it is for.
        settings: `KEY=VALUE`, `GROUP:KEY=VALUE` with the number of a group, `TEMPLATE:KEY=VALUE` with a template of the
            result's parameter names. Values are TOML.

    Raises:
        PlanSyntaxError: A setting is not of this form.
        PlanError: It matches nothing, no group has such an option, or nothing says which optimizer is meant.
        MigrationError: The plan does not fit the checkpoint.
        CheckpointError: The checkpoint cannot be read.
    """
    plan = Plan.of(plan)
    parsed = [_parsed(text) for text in settings]
    if plan.groups:
        raise PlanError("--set beside [[group]] tables of a plan", hint="Write `set = { ... }` in these tables.")
    with opening(source):
        _, migration, _ = apply_plan(plan, open_checkpoint(source).tree)
    optimizers = {key: section for key, section in migration.sections.items() if section.groups}
    if len(optimizers) != 1:
        found = ", ".join(optimizers) or "none"
        hint = "Write [[group]] tables in a plan." if optimizers else "`optimstate name` gives parameters their names."
        raise PlanError(f"--set needs one optimizer whose parameters have names; there are: {found}", hint=hint)
    (section,) = optimizers.values()
    _refuse_misplaced(parsed, section)
    return plan._replace(groups=tuple(_tables(parsed, section)))


def _parsed(text: str) -> _Setting:
    left, equals, right = _cut(text, "=")
    where, _, key = _cut(left, ":", last=True)
    if not equals or not re.fullmatch(r"\w+", key.strip()):
        raise PlanSyntaxError(f"--set {text!r}: expected KEY=VALUE", hint="For example: '**.bias:weight_decay=0.0'")
    try:
        value = tomllib.loads(f"value = {right}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        raise PlanSyntaxError(
            f"--set {text!r}: {right.strip()!r} is no value",
            hint="Write numbers, true, false, [0.9, 0.95], or text in double quotes; None cannot be set.",
        ) from None
    where = where.strip()
    return _Setting(text, int(where) if where.isdigit() else Template(where) if where else None, key.strip(), value)


def _cut(text: str, separator: str, *, last: bool = False) -> tuple[str, str, str]:
    """Cut at the first separator outside of braces; with `last`, at the last one, and all is right of none."""
    depth, places = 0, []
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == separator and depth == 0:
            places.append(place)
    if not places:
        return ("", "", text) if last else (text, "", "")
    place = places[-1 if last else 0]
    return text[:place], separator, text[place + 1 :]


def _refuse_misplaced(settings: Sequence[_Setting], section: SectionMoves) -> None:
    problems = []
    known = dict.fromkeys(key for group in section.groups for key in group.options)
    for setting in settings:
        if setting.key not in known:
            close = difflib.get_close_matches(setting.key, known, n=1)
            said = f"is it {close[0]!r}?" if close else f"there are {', '.join(known)}"
            message = f"no param group has an option {setting.key!r}; {said}"
            problems.append(Problem("setting", message, f"--set {setting.text!r}"))
        if not any(setting.applies(n, name) for n, group in enumerate(section.groups) for name in group.members):
            counts = f"{len(section.groups)} param groups, {sum(len(group.members) for group in section.groups)} names"
            problems.append(Problem("unmatched", f"applies to none of {counts}", f"--set {setting.text!r}"))
        for group in section.groups:
            old = group.options.get(setting.key)
            if isinstance(old, bool | int | float) and _kind(old) != _kind(setting.value):
                message = f"{setting.key} is {old!r} now, which is of another type"
                problems.append(Problem("setting", message, f"--set {setting.text!r}"))
                break
    problems += [
        Problem(
            "group",
            f"param group {number} is empty, and the plan language names groups by their parameters: "
            "--set would lose it",
        )
        for number, group in enumerate(section.groups)
        if not group.members
    ]
    if problems:
        raise MigrationError(problems)


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _tables(settings: Sequence[_Setting], section: SectionMoves) -> Iterable[GroupRule]:
    """A table for each group, or part of one that gets options of its own."""
    new = {move.target for move in section.moves if move.expression is None}
    cells: list[tuple[int, Mapping[str, Any], list[str]]] = []
    for number, group in enumerate(section.groups):
        parts: dict[tuple[bool, ...], list[str]] = {}
        for name in group.members:
            parts.setdefault(tuple(setting.applies(number, name) for setting in settings), []).append(name)
        for chosen, names in parts.items():
            options: dict[str, Any] = {
                s.key: float(s.value) if isinstance(group.options.get(s.key), float) else s.value
                for s, applies in zip(settings, chosen, strict=True)
                if applies
            }
            cells.append((number, options, names))
    for place, (number, chosen_options, names) in enumerate(cells):
        later = [name for _, _, others in cells[place + 1 :] for name in others]
        yield GroupRule(tuple(_templates(names, later)), chosen_options, number if new.issuperset(names) else None)


_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def _templates(names: Sequence[str], others: Sequence[str]) -> list[Template]:
    """Few templates that match all names, and none of the others."""
    if not others:
        return [Template("**")]
    made: list[Template] = []
    for name in names:
        if any(_matches(template, name) for template in made):
            continue
        for text in ("**." + name.rpartition(".")[2], _INDEX.sub("*", name), name):
            template = _template(text)
            if template is not None and _matches(template, name) and not any(_matches(template, o) for o in others):
                made.append(template)
                break
        else:
            made.append(Template("re:" + re.escape(name)))
    return made


def _matches(template: Template, name: str) -> bool:
    return template.match(name) is not None


def _template(text: str) -> Template | None:
    """A template, or None where a name has characters that mean something in one."""
    try:
        return Template(text)
    except PlanSyntaxError:
        return None
