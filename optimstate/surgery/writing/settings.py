"""Options of param groups and arguments of schedulers from the command line, as the equivalent plan tables."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, PlanError, PlanSyntaxError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule, SchedulerRule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.migration import SectionMoves
from optimstate.plan.solve.reach import option_problems
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.surgery.opening import opening

__all__ = ["with_options", "with_schedules"]


class _Setting(Record):
    """`WHERE:KEY=VALUE`.

    Attributes:
        text: As it was given.
        optimizer: The path of the only optimizer it is for; empty for all.
        where: A param group, or those of the parameters that a template matches; None for every group.
        key: The option.
        value: What it becomes.
    """

    text: str
    optimizer: str
    where: int | Template | None
    key: str
    value: Any

    def is_for(self, label: str) -> bool:
        """Whether it is for the optimizer at a path."""
        return self.optimizer in ("", label)

    def applies(self, group: int, name: str) -> bool:
        """Whether it is meant for a parameter of the result."""
        if isinstance(self.where, Template):
            return _matches(self.where, name)
        return self.where is None or self.where == group


def with_options(plan: Plan | str | PathLike[str], source: Place, settings: Sequence[str]) -> Plan:
    """A plan that also sets options of param groups.

    What is set for whole groups needs no parameter names. A template does: its parameters form a group of their own
    where the rest of theirs keeps other options, so the checkpoint is looked at.

    Args:
        plan: What else is done, as a plan or the path of a plan file; it has no `[[group]]` tables.
        source: The checkpoint that it is for.
        settings: `KEY=VALUE` for all param groups, `GROUP:KEY=VALUE` with the number of a group, `TEMPLATE:KEY=VALUE`
            with a template of the result's parameter names; with the path of an optimizer before it, for that one
            alone: `PATH:KEY=VALUE`, `PATH:GROUP:KEY=VALUE`. Values are TOML.

    Raises:
        PlanSyntaxError: A setting is not of this form.
        PlanError: The plan has `[[group]]` tables.
        MigrationError: The plan does not fit the checkpoint, a setting matches nothing, or no group has such an option.
        CheckpointError: The checkpoint cannot be read.
    """
    plan = Plan.of(plan)
    if plan.groups:
        raise PlanError("--set beside [[group]] tables of a plan", hint="Write `set = { ... }` in these tables.")
    with opening(source):
        tree = open_checkpoint(source).tree
        states = {section.label: section.optimizer() for section in find_sections(tree) if section.kind == "optimizer"}
        parsed = [_parsed(text, states) for text in settings]
        if not states:
            raise MigrationError.of("unreached", "--set changes optimizers, and the checkpoint has none")
        moves: dict[str, SectionMoves] = {}
        if any(isinstance(setting.where, Template) for setting in parsed):
            _, migration, _ = apply_plan(plan, tree)
            moves = {key.removeprefix("optimizer "): found for key, found in migration.sections.items() if found.groups}
    groups = {label: _found(state, moves.get(label)) for label, state in states.items()}
    if problems := list(_misplaced(parsed, groups)):
        raise MigrationError(problems)
    tables: list[GroupRule] = []
    for label, found in groups.items():
        mine = [setting for setting in parsed if setting.is_for(label) and any(True for _ in _reached(setting, found))]
        path = label if len(states) > 1 else ""
        if any(isinstance(setting.where, Template) for setting in mine):
            tables += _split_groups(mine, moves[label], path)
        else:
            tables += _whole_groups(mine, path)
    return plan._replace(groups=tuple(tables))


def with_schedules(plan: Plan | str | PathLike[str], settings: Sequence[str]) -> Plan:
    """A plan that also changes arguments of schedulers.

    Args:
        plan: What else is done, as a plan or the path of a plan file.
        settings: `KEY=VALUE` for every scheduler, or `PATH:KEY=VALUE` with the path of one, or of a part of one
            (`_schedulers[1]`). Values are TOML.

    Raises:
        PlanSyntaxError: A setting is not of this form.
        MigrationError: An argument is set twice.
    """
    plan = Plan.of(plan)
    found: dict[str, dict[str, Any]] = {}
    for text in settings:
        path, key, value = _split(text, "--set-schedule", "'T_max=40'")
        if key in found.get(path, {}):
            place = f"--set-schedule {describe(text)}"
            raise MigrationError.of("setting", f"{key} is set twice for the same scheduler", place)
        found.setdefault(path, {})[key] = value
    return plan._replace(
        schedulers=(*plan.schedulers, *(SchedulerRule(options, path) for path, options in found.items()))
    )


class _Group(Record):
    """A param group of the result: its options, and its parameters' names where they have some."""

    options: Mapping[str, Any]
    members: tuple[str, ...]


class _Found(Record):
    """The param groups of an optimizer of the result, and whether its parameters have names."""

    groups: tuple[_Group, ...]
    named: bool


def _found(state: OptimizerState, moves: SectionMoves | None) -> _Found:
    if moves is not None:
        return _Found(tuple(_Group(group.options, group.members) for group in moves.groups), named=bool(moves.moves))
    return _Found(tuple(_Group(group.options, group.names or ()) for group in state.groups), named=False)


def _parsed(text: str, optimizers: Collection[str]) -> _Setting:
    where, key, value = _split(text, "--set", "'**.bias:weight_decay=0.0'")
    optimizer = ""
    for label in sorted(optimizers, key=len, reverse=True):
        if where == label or where.startswith(f"{label}:"):
            optimizer, where = label, where[len(label) + 1 :]
            break
    return _Setting(text, optimizer, int(where) if where.isdigit() else Template(where) if where else None, key, value)


def _split(text: str, option: str, example: str) -> tuple[str, str, Any]:
    """`WHERE:KEY=VALUE` in its parts."""
    left, equals, right = _cut(text, "=")
    where, _, key = _cut(left, ":", last=True)
    if not equals or not re.fullmatch(r"\w+", key.strip()):
        raise PlanSyntaxError(f"{option} {describe(text)}: expected KEY=VALUE", hint=f"For example: {example}")
    try:
        value = tomllib.loads(f"value = {right}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        raise PlanSyntaxError(
            f"{option} {describe(text)}: {describe(right.strip())} is not a value",
            hint="Write numbers, true, false, [0.9, 0.95], or text in double quotes; None cannot be set.",
        ) from None
    return where.strip(), key.strip(), value


def _cut(text: str, separator: str, *, last: bool = False) -> tuple[str, str, str]:
    """Split at the first separator outside braces; with `last`, at the last. Without one, all is on the right."""
    depth, places = 0, []
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == separator and depth == 0:
            places.append(place)
    if not places:
        return ("", "", text) if last else (text, "", "")
    place = places[-1 if last else 0]
    return text[:place], separator, text[place + 1 :]


def _misplaced(settings: Sequence[_Setting], groups: Mapping[str, _Found]) -> Iterator[Problem]:
    """Settings that no group has an option for, that match nothing, or that are given twice."""
    seen: set[tuple[str, str, str]] = set()
    for setting in settings:
        place = f"--set {describe(setting.text)}"
        key = setting.optimizer, str(setting.where), setting.key
        if key in seen:
            yield Problem("setting", f"{setting.key} is set twice for the same groups", place)
        seen.add(key)
        mine = [found for label, found in groups.items() if setting.is_for(label)]
        if isinstance(setting.where, Template) and not any(found.named for found in mine):
            remedy = "`optimstate name` gives them names; KEY=VALUE and GROUP:KEY=VALUE need none"
            yield Problem("name", "the parameters of the optimizer have no names to match", place, remedy=remedy)
            continue
        reached = [found.groups[number] for found in mine for number in _reached(setting, found)]
        if not reached:
            counts = " and ".join(
                f"{len(found.groups)} param groups, {sum(len(group.members) for group in found.groups)} names"
                for found in mine
            )
            yield Problem("unmatched", f"applies to none of {counts}", place)
            continue
        yield from option_problems({setting.key: setting.value}, [group.options for group in reached], place)


def _reached(setting: _Setting, found: _Found) -> Iterator[int]:
    """The numbers of the groups of an optimizer that a setting is for, in part or whole."""
    for number, group in enumerate(found.groups):
        if not isinstance(setting.where, Template):
            if setting.where in (None, number):
                yield number
        elif found.named and any(_matches(setting.where, name) for name in group.members):
            yield number


def _whole_groups(settings: Sequence[_Setting], path: str) -> Iterator[GroupRule]:
    """Tables for groups that keep their members: one for all, one for each number."""
    made: dict[int | None, dict[str, Any]] = {}
    for setting in settings:
        assert not isinstance(setting.where, Template)
        made.setdefault(setting.where, {})[setting.key] = setting.value
    yield from (GroupRule((), options, None, path, number) for number, options in made.items())


def _split_groups(settings: Sequence[_Setting], section: SectionMoves, path: str) -> Iterator[GroupRule]:
    """A table for each group, or part of one that gets options of its own.

    Raises:
        MigrationError: A group is empty: it has no names that a table could match.
    """
    if empty := [number for number, group in enumerate(section.groups) if not group.members]:
        message = f"param group {empty[0]} is empty, and a template of --set would lose it"
        raise MigrationError.of("group", message, remedy="set options by the numbers of groups")
    new = {move.target for move in section.moves if move.expression is None}
    cells: list[tuple[int, Mapping[str, Any], list[str]]] = []
    for number, group in enumerate(section.groups):
        parts: dict[tuple[bool, ...], list[str]] = {}
        for name in group.members:
            parts.setdefault(tuple(setting.applies(number, name) for setting in settings), []).append(name)
        for chosen, names in parts.items():
            options: dict[str, Any] = {s.key: s.value for s, applies in zip(settings, chosen, strict=True) if applies}
            cells.append((number, options, names))
    for place, (number, chosen_options, names) in enumerate(cells):
        later = [name for _, _, others in cells[place + 1 :] for name in others]
        like = number if new.issuperset(names) else None
        yield GroupRule(tuple(_templates(names, later)), chosen_options, like, path)


_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def _templates(names: Sequence[str], others: Sequence[str]) -> list[Template]:
    """A small set of templates that match all names and none of the others."""
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
    """The template, or None where the name has characters with a meaning in templates."""
    try:
        return Template(text)
    except PlanSyntaxError:
        return None
