"""Plans written as TOML; `toml.parsed` of the text is the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optimstate.plan.language.base import toml_key, toml_value
from optimstate.plan.language.rules import Policy, Rule
from optimstate.state.algorithms.slots import Slot

if TYPE_CHECKING:
    from optimstate.plan.language.plan import Plan

__all__ = ["written"]


def written(plan: Plan) -> str:
    """The plan as the text of a file; `parsed`, it is the same plan."""
    blocks = [f"optimizer = {toml_value(plan.optimizer)}\n"] if plan.optimizer else []
    guard = {
        "has": [template.text for template in plan.guard.has],
        "lacks": [template.text for template in plan.guard.lacks],
        "once": plan.guard.once,
    }
    blocks += _block("[guard]", {key: value for key, value in guard.items() if value})
    default = Policy()._asdict()
    blocks += _block("[policy]", {key: value for key, value in plan.policy._asdict().items() if value != default[key]})
    blocks += _block("[slots]", {name: _written_slot(slot) for name, slot in plan.slots.items()})
    blocks += [_written_rule("[[rule]]", rule) for rule in plan.rules]
    for number, stage in enumerate(plan.stages, 1):
        leads_back = "back = true\n" if number > len(plan.stages) - plan.back else ""
        blocks += [f"[[stage]]\n{leads_back}", *(_written_rule("[[stage.rule]]", rule) for rule in stage)]
    for part in plan.optimizers:
        fields = {"path": part.path, "match": _one_or_list([template.text for template in part.match])}
        extra = {"algorithm": part.algorithm, "set": part.set}
        blocks += _block("[[optimizer]]", {**fields, **{key: value for key, value in extra.items() if value}})
    for group in plan.groups:
        table: dict[str, Any] = {"optimizer": group.optimizer} if group.optimizer else {}
        if group.match:
            table["match"] = _one_or_list([template.text for template in group.match])
        if group.number is not None:
            table["number"] = group.number
        if group.like is not None:
            table["like"] = group.like
        if group.set:
            table["set"] = group.set
        blocks += _block("[[group]]", table)
    for rule in plan.schedulers:
        blocks += _block("[[scheduler]]", {**({"path": rule.path} if rule.path else {}), "set": rule.set})
    return "\n".join(blocks)


def _written_slot(slot: Slot) -> dict[str, Any]:
    return {key: value for key, value in slot._asdict().items() if key == "kind" or value}


def _one_or_list(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def _written_rule(header: str, rule: Rule) -> str:
    table: dict[str, Any] = {}
    left, right = [template.text for template in rule.sources], [template.text for template in rule.targets]
    if left and not right:
        table["drop" if rule.drops else "fresh"] = _one_or_list(left)
    else:
        if left:
            table["from"] = _one_or_list(left)
        table["to"] = _one_or_list(right)
        if rule.fresh:
            table["fresh"] = True
    if rule.group is not None:
        table["group"] = rule.group
    if rule.only:
        table["only"] = rule.only
    if len(rule.operations) == 1:
        table[rule.operations[0].KEY] = rule.operations[0].value()
    elif rule.operations:
        table["ops"] = [{operation.KEY: operation.value()} for operation in rule.operations]
    return _block(header, table)[0]


def _block(header: str, table: Mapping[str, Any]) -> list[str]:
    if not table:
        return []
    return [header + "\n" + "".join(f"{toml_key(key)} = {toml_value(value)}\n" for key, value in table.items())]
