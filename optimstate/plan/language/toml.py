"""Plan files read from TOML. Every mistake is reported with its line and key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from optimstate.describe import describe
from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.base import Operation
from optimstate.plan.language.rules import GroupRule, Guard, OptimizerRule, Policy, Rule, SchedulerRule, templates
from optimstate.plan.language.template import Template
from optimstate.record import Record
from optimstate.state.algorithms.slots import Slot, SlotKind

if TYPE_CHECKING:
    pass

__all__ = ["parsed"]

_RULE_KEYS = {"from", "to", "drop", "fresh", "group", "only", "ops"}
_PLAN_KEYS = {"rule", "stage", "group", "guard", "policy", "slots", "optimizer", "scheduler", "view"}


class _Mistake(Exception):
    """A mistake at a place of the document: the table, its number and the key."""

    def __init__(self, message: str, table: str, number: int = 0, key: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.table, self.number, self.key, self.hint = message, table, number, key, hint


class View(Record):
    """That one section is stored in another layout than the rules speak of.

    Attributes:
        plan: The file of the plan from what is stored to what the rules speak of.
        back: The file of the plan back; empty to leave the section in the layout of the rules.
        section: A kind of section, or the path of one.
    """

    plan: str
    back: str = ""
    section: str = "model"


def parsed(text: str, name: str, folder: Path) -> tuple[dict[str, Any], View | None]:
    """What a text says, as the fields of a `Plan`, and the view through which they are meant.

    Args:
        text: TOML.
        name: What messages call it.
        folder: Where the files are that it names.

    Raises:
        PlanSyntaxError: It is wrong; the message has the line and the key.
    """
    import tomllib  # writing plans, which every remap does, needs none of it

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanSyntaxError(f"{name}: {error}") from None
    try:
        return _fields(document, folder), _view(document)
    except _Mistake as mistake:
        line = _line_of(text, mistake.table, mistake.number, mistake.key)
        place = f" {mistake.number}" if mistake.number else ""
        what = f"{mistake.table}{place}: " if mistake.table else ""
        raise PlanSyntaxError(f"{name}:{line}: {what}{mistake.message}", hint=mistake.hint) from None


_HEADER = re.compile(r"\s*\[\[?\s*([\w.\"' -]+?)\s*\]\]?\s*(#.*)?$")
_ASSIGNMENT = re.compile(r"\s*[\"']?([\w.-]+)[\"']?\s*=")


def _line_of(text: str, table: str, number: int, key: str) -> int:
    """The line of a key in the n-th table of that name; of the table's header where the key is not found."""
    header, count, current = 1, 0, ""
    for index, line in enumerate(text.splitlines(), 1):
        if match := _HEADER.match(line):
            current = match[1]
            if current == table:
                count += 1
                if count == max(number, 1):
                    header = index
        elif (
            (match := _ASSIGNMENT.match(line))
            and match[1] == key
            and current == table
            and (count == max(number, 1) or not table)
        ):
            return index
    return header


def _refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str, number: int = 0) -> None:
    known = sorted(known)
    for key in table:
        if key not in known:
            from difflib import get_close_matches

            close = get_close_matches(key, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known keys: {', '.join(known)}."
            raise _Mistake(f"unknown key {describe(key)}", where, number, key, hint)


def _tables(document: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _Mistake(f"`{key}` is not an array of tables", "", 0, key, f"Write [[{where}]].")
    return tables


def _fields(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _refuse_unknown(document, _PLAN_KEYS, "")
    rules = tuple(
        _rule(table, "rule", number, folder) for number, table in enumerate(_tables(document, "rule", "rule"), 1)
    )
    stages, number, back = [], 0, 0
    for place, stage in enumerate(_tables(document, "stage", "stage"), 1):
        _refuse_unknown(stage, {"back", "rule"}, "stage", place)
        if not isinstance(leads_back := stage.get("back", False), bool):
            raise _Mistake("`back` must be true or false", "stage", place, "back")
        if back and not leads_back:
            raise _Mistake("follows one with `back`, and only the last can lead back", "stage", place, "")
        back += leads_back
        made = []
        for table in _tables(stage, "rule", "stage.rule"):
            number += 1
            made.append(_rule(table, "stage.rule", number, folder))
        stages.append(tuple(made))
    groups = tuple(_group(table, number) for number, table in enumerate(_tables(document, "group", "group"), 1))
    optimizer = document.get("optimizer", "")
    optimizers: tuple[OptimizerRule, ...] = ()
    if isinstance(optimizer, list):
        tables = enumerate(_tables(document, "optimizer", "optimizer"), 1)
        optimizer, optimizers = "", tuple(_optimizer(table, number) for number, table in tables)
    if not isinstance(optimizer, str):
        message = '`optimizer` is the name of an algorithm, as "AdamW", or [[optimizer]] tables'
        raise _Mistake(message, "", 0, "optimizer")
    return {
        "rules": rules,
        "stages": tuple(stages),
        "back": back,
        "groups": groups,
        "guard": _guard(_table_of(document, "guard")),
        "policy": _policy(_table_of(document, "policy")),
        "slots": _slots(_table_of(document, "slots")),
        "optimizer": optimizer,
        "optimizers": optimizers,
        "schedulers": _schedulers(document.get("scheduler", [])),
    }


def _view(document: Mapping[str, Any]) -> View | None:
    if "view" not in document:
        return None
    table = _table_of(document, "view")
    _refuse_unknown(table, View._fields, "view")
    for key in View._fields:
        if key in table and (not isinstance(table[key], str) or not table[key]):
            raise _Mistake(f"`{key}` must be text that is not empty", "view", 0, key)
    if "plan" not in table:
        raise _Mistake("needs `plan`", "view", 0, "", 'For example: plan = "to-live.toml"')
    return View(table["plan"], table.get("back", ""), table.get("section", "model"))


def _optimizer(table: Mapping[str, Any], number: int) -> OptimizerRule:
    _refuse_unknown(table, {"path", "match", "algorithm", "set"}, "optimizer", number)
    for key, example in (("path", 'path = "muon"'), ("match", 'match = "blocks.*.weight"')):
        if key not in table:
            raise _Mistake(f"needs `{key}`", "optimizer", number, "", f"For example: {example}")
    for key in ("path", "algorithm"):
        value = table.get(key, "-")
        if not isinstance(value, str) or not value or not all(value.split(".")):
            raise _Mistake(f"`{key}` must be text that is not empty", "optimizer", number, key)
    options = table.get("set", {})
    if not isinstance(options, dict):
        raise _Mistake("`set` is a table of options", "optimizer", number, "set", "For example: set = { lr = 0.02 }")
    match = _checked_templates(_texts(table["match"], "optimizer", number, "match"), "optimizer", number, "match")
    return OptimizerRule(table["path"], match, table.get("algorithm", ""), options)


def _table_of(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise _Mistake(f"`{key}` is not a table", "", 0, key, f"Write [{key}].")
    return table


def _texts(value: Any, where: str, number: int, key: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _Mistake(f"`{key}` must be a template or a list of templates", where, number, key)


def _rule(table: Mapping[str, Any], where: str, number: int, folder: Path) -> Rule:
    from optimstate.plan.language.operations import OPERATIONS  # a rename at the command line needs none

    _refuse_unknown(table, _RULE_KEYS | OPERATIONS.keys(), where, number)
    source, taken = _texts(table["from"], where, number, "from") if "from" in table else (), "from"
    target = _texts(table["to"], where, number, "to") if "to" in table else ()
    drop, fresh, group = table.get("drop", False), table.get("fresh", False), table.get("group")
    for key, value in (("drop", drop), ("fresh", fresh)):
        if not isinstance(value, bool):
            if source or target:
                raise _Mistake(f"with `from` or `to`, `{key}` must be true or left out", where, number, key)
            source, taken = _texts(value, where, number, key), key
    if bool(drop) and (target or fresh):
        raise _Mistake("`drop` cannot be combined with `to` or `fresh`", where, number, "drop")
    if not (drop or fresh or target):
        raise _Mistake("needs `to`, `drop` or `fresh`", where, number, "from", 'For example: to = "head.{p}"')
    if not source and not fresh:
        raise _Mistake("needs `from`", where, number, "to", 'For example: from = "fc.{p}"')
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or not fresh):
        raise _Mistake("`group` is the number of a param group, for fresh parameters", where, number, "group")
    only = table.get("only", "")
    if not isinstance(only, str) or (not only and "only" in table):
        example = 'For example: only = "model"'
        raise _Mistake("`only` is a kind of section or the path of one", where, number, "only", example)
    operations = _operations(table, where, number, folder)
    left, right = _checked_templates(source, where, number, taken), _checked_templates(target, where, number, "to")
    try:
        return Rule(left, right, operations, bool(fresh), group, only=only)
    except PlanSyntaxError as error:
        raise _Mistake(error.message, where, number, taken, error.hint) from None


def _operations(table: Mapping[str, Any], where: str, number: int, folder: Path) -> tuple[Operation, ...]:
    from optimstate.plan.language.operations import OPERATIONS

    inline = [key for key in table if key in OPERATIONS]
    if len(inline) > 1 or (inline and "ops" in table):
        raise _Mistake(
            f"`{inline[0]}` and `{[*inline, 'ops'][1]}` in one rule: the order is not defined",
            where,
            number,
            inline[0],
            "Write them in order: ops = [{ ... }, { ... }]",
        )
    if inline:
        return tuple(_operation(inline[0], table[inline[0]], where, number, inline[0], folder))
    steps = table.get("ops", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) and len(step) == 1 for step in steps):
        raise _Mistake("`ops` is a list of tables of one operation each", where, number, "ops")
    made: list[Operation] = []
    for step in steps:
        ((key, value),) = step.items()
        if key not in OPERATIONS:
            from difflib import get_close_matches

            close = get_close_matches(key, OPERATIONS, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Operations: {', '.join(sorted(OPERATIONS))}."
            raise _Mistake(f"unknown operation {describe(key)}", where, number, "ops", hint)
        made.extend(_operation(key, value, where, number, "ops", folder))
    return tuple(made)


def _operation(key: str, value: Any, where: str, number: int, place: str, folder: Path) -> list[Operation]:
    from optimstate.plan.language.operations import parse_operation

    try:
        return parse_operation(key, value, folder)
    except PlanSyntaxError as error:
        raise _Mistake(error.message, where, number, place, error.hint) from None


def _checked_templates(texts: tuple[str, ...], where: str, number: int, key: str) -> tuple[Template, ...]:
    try:
        return templates(texts)
    except PlanSyntaxError as error:
        raise _Mistake(error.message, where, number, key, error.hint) from None


def _group(table: Mapping[str, Any], number: int) -> GroupRule:
    _refuse_unknown(table, {"match", "set", "like", "optimizer", "number"}, "group", number)
    options, like, optimizer = table.get("set", {}), table.get("like"), table.get("optimizer", "")
    if not isinstance(options, dict):
        raise _Mistake(
            "`set` is a table of options", "group", number, "set", "For example: set = { weight_decay = 0.0 }"
        )
    for key in ("like", "number"):
        if key in table and (not isinstance(table[key], int) or isinstance(table[key], bool)):
            raise _Mistake(f"`{key}` is the number of a param group", "group", number, key)
    if not isinstance(optimizer, str):
        raise _Mistake("`optimizer` is the path of an optimizer", "group", number, "optimizer")
    if "match" in table:
        if "number" in table:
            raise _Mistake("`number` cannot be combined with `match`", "group", number, "number")
        match = _checked_templates(_texts(table["match"], "group", number, "match"), "group", number, "match")
        return GroupRule(match, options, like, optimizer)
    if not options or like is not None:
        raise _Mistake("needs `match`", "group", number, "", 'For example: match = ["**.bias", "**.norm.*"]')
    return GroupRule((), options, None, optimizer, table.get("number"))


def _schedulers(tables: Any) -> tuple[SchedulerRule, ...]:
    made = []
    for number, table in enumerate([tables] if isinstance(tables, dict) else tables, 1):
        if not isinstance(table, dict):
            raise _Mistake("`scheduler` is not a table", "", 0, "scheduler", "Write [scheduler] or [[scheduler]].")
        _refuse_unknown(table, {"set", "path"}, "scheduler", number)
        options, path = table.get("set"), table.get("path", "")
        if not isinstance(options, dict) or not options:
            raise _Mistake(
                "needs `set`, a table of arguments", "scheduler", number, "set", "For example: set = { T_max = 40 }"
            )
        if not isinstance(path, str):
            raise _Mistake("`path` is the path of a scheduler", "scheduler", number, "path")
        made.append(SchedulerRule(options, path))
    return tuple(made)


def _guard(table: Mapping[str, Any]) -> Guard:
    _refuse_unknown(table, {"has", "lacks", "once"}, "guard")
    found = {
        key: _checked_templates(_texts(table[key], "guard", 0, key), "guard", 0, key) if key in table else ()
        for key in ("has", "lacks")
    }
    once = table.get("once", False)
    if not isinstance(once, bool):
        raise _Mistake("`once` is true or false", "guard", 0, "once")
    return Guard(found["has"], found["lacks"], once)


def _policy(table: Mapping[str, Any]) -> Policy:
    choices = {name: get_args(hint) for name, hint in get_type_hints(Policy).items() if name in Policy._fields}
    _refuse_unknown(table, choices, "policy")
    for key, value in table.items():
        if value not in choices[key]:
            raise _Mistake(f"`{key}` is one of {', '.join(choices[key])}, not {describe(value)}", "policy", 0, key)
    return Policy(**table)


def _slots(table: Mapping[str, Any]) -> dict[str, Slot]:
    made = {}
    for name, value in table.items():
        if not isinstance(value, dict) or value.get("kind") not in get_args(SlotKind):
            hint = (
                f'For example: {name} = {{ kind = "like_param", degree = 1 }}; kinds: {", ".join(get_args(SlotKind))}'
            )
            raise _Mistake(f"`{name}` does not say what kind of slot it is", "slots", 0, name, hint)
        _refuse_unknown(value, Slot._fields, f"slots.{name}")
        made[name] = Slot(**{"power": int(value["kind"] == "weight"), **value})
    return made
