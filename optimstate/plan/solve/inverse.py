"""The plan that undoes a plan, or why there is none."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from optimstate.describe import describe
from optimstate.errors import PlanError, PlanSyntaxError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf, Shape
from optimstate.plan.language.base import Irreversible, Misfit, Operation, toml_value
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule, Guard, Rule, fan_out
from optimstate.plan.language.template import Template, constrained
from optimstate.plan.solve.groups import Candidate, GroupPlan, plan_groups, same_value
from optimstate.plan.solve.resolve import Application, Made, Resolver
from optimstate.problems import Problem
from optimstate.state.optimizer import Group

__all__ = ["inverse"]


def inverse(
    plan: Plan, names: Mapping[str, Shape | None] | None = None, *, groups: Sequence[Group] | None = None
) -> Plan:
    """The plan that undoes a plan.

    Args:
        plan: One that loses nothing.
        names: Of the checkpoint it is for, with shapes where known. With them the inverse is tried on the names; where
            one rule cannot undo a rule for all of them, it spells them out. Without them it is right for checkpoints
            whose other names no rule of the inverse matches, and `split` is taken to be into equal parts.
        groups: The param groups of the checkpoint, without which `[[group]]` tables cannot be undone.

    Raises:
        PlanError: It loses something; every rule that does is named, with what it loses.
    """
    problems = _losses(plan)
    if plan.groups and groups is None:
        message = "the [[group]] tables do not say what the param groups were"
        problems.append(Problem("irreversible", message, remedy="give the checkpoint they are for"))
    if problems:
        raise _refused(problems, hint="Keep the original checkpoint.")
    if plan.groups and groups is not None:
        shapes = names or dict.fromkeys(name for group in groups for name in group.names or ())
        return _regrouped(plan, inverse(plan._replace(groups=()), shapes), shapes, groups)
    reasons: list[Problem] = []
    made = _by_templates(plan, reasons)
    if names is None:
        if made is None:
            raise _refused(reasons, "cannot invert without names", hint="Give the names and shapes of the checkpoint.")
        return made
    if made is not None and _undoes(plan, made, names):
        return made
    return _spelled_out(plan, names)


def _refused(problems: Sequence[Problem], what: str = "cannot invert", *, hint: str = "") -> PlanError:
    return PlanError(f"{what}: {'; '.join(map(str, problems))}", hint=hint, problems=problems)


def _losses(plan: Plan) -> list[Problem]:
    reasons: list[str] = []
    for number, rule in enumerate(plan.all_rules(), 1):
        name = f"rule {number}"
        if rule.drops:
            reasons.append(f"{name} drops {', '.join(describe(source.text) for source in rule.sources)}")
        elif rule.fresh:
            reasons.append(f"{name} leaves the optimizer state of {describe(rule.source.text)} behind")
        elif fan_out(rule) > 1 and not any(operation.CUTS for operation in rule.operations):
            message = f"copies {describe(rule.source.text)}; the copies diverge in training and cannot be merged back"
            reasons.append(f"{name} {message}")
        else:
            for operation in rule.operations:
                try:
                    operation.inverse([None])
                except Irreversible as reason:
                    if not reason.needs_names:
                        reasons.append(f"{name}: {reason}")
    reasons += _lost_in_division(plan)
    if plan.optimizer:
        reasons.append(f"the conversion to {plan.optimizer} does not keep what it started from")
    return [Problem("irreversible", reason) for reason in reasons]


def _lost_in_division(plan: Plan) -> list[str]:
    """What `[[optimizer]]` tables do not keep."""
    reasons = []
    for rule in plan.optimizers:
        if rule.algorithm:
            from optimstate.plan.slots.counterparts import counterpart  # few plans need it

            found = counterpart("AdamW", rule.algorithm) or counterpart("SGD", rule.algorithm)
            slots = [line[0] for line in found[0] if line[1] == "dropped"] if found is not None else []
            lost = f": of AdamW's state it drops {', '.join(slots)}" if slots else ", whose state means something else"
            reasons.append(f"{rule} makes state of {rule.algorithm}{lost}")
        if rule.set:
            reasons.append(f"{rule} sets {', '.join(rule.set)} and does not say what they were")
    if plan.optimizers:
        message = "[[optimizer]] divides the optimizer and its param groups, which stay divided when it is joined again"
        reasons.append(f'{message}; a plan that joins it says [[optimizer]] path = "optimizer", match = "**"')
    return reasons


def _by_templates(plan: Plan, reasons: list[Problem]) -> Plan | None:
    passes = []
    for rules in reversed(plan.passes):
        made = []
        for rule in rules:
            try:
                made.append(_inverted(rule))
            except (Irreversible, PlanSyntaxError) as reason:
                reasons.append(Problem("irreversible", str(reason), str(rule)))
        passes.append(tuple(made))
    return None if reasons else _of_passes(plan, passes)


def _of_passes(plan: Plan, passes: Sequence[tuple[Rule, ...]]) -> Plan:
    kept = [rules for rules in passes if rules] or [()]
    return plan._replace(rules=kept[0], stages=tuple(kept[1:]), guard=Guard(), back=0)


def _inverted(rule: Rule) -> Rule:
    for source in rule.sources:
        if source.is_regex:
            raise Irreversible("a regular expression does not say what it replaced")
        for name in source.captures.keys() - rule.shared:
            if source.captures[name] is None:
                raise Irreversible(f"{{{name}}} does not say how many there were")
    operations: list[Operation] = []
    for operation in reversed(rule.operations):
        operations.extend(operation.inverse([None]))
    sources = tuple(constrained(target, rule.sources) for target in rule.targets)
    targets = tuple(constrained(source, rule.targets) for source in rule.sources)
    return Rule(sources, targets, tuple(operations), only=rule.only)


def _undoes(plan: Plan, made: Plan, names: Mapping[str, Shape | None]) -> bool:
    """Whether a plan followed by its supposed inverse restores every name with its shape."""
    problems: list[Problem] = []
    passes = (*plan.passes, *made.passes)
    found = Resolver(passes, "", [0] * sum(map(len, passes)), problems).resolve(names)
    if problems or found.made.keys() != names.keys():
        return False
    for name, item in found.made.items():
        back = ex.simplified(item.expression)
        if back.shape != names[name] or {leaf.name for leaf in ex.leaves(back)} != {name}:
            return False
    return True


def _spelled_out(plan: Plan, names: Mapping[str, Shape | None]) -> Plan:
    problems: list[Problem] = []
    found = Resolver(plan.passes, "the checkpoint", [0] * len(list(plan.all_rules())), problems).resolve(names)
    if problems:
        raise _refused(problems)
    passes = [
        tuple(_literal(use) for use in uses if use.sources != use.targets or use.rule.operations)
        for uses in reversed(found.applications)
    ]
    made = _of_passes(plan, passes)
    if not _undoes(plan, made, names):
        raise _refused([Problem("irreversible", "no sequence of inverse rules restores these names")])
    return made


def _literal(use: Application) -> Rule:
    """The rule that undoes one use of a rule, name by name."""
    rule = use.rule
    tensors: list[Expr] = [
        Leaf(name, shape) for name, shape in zip(use.sources, use.shapes or [None] * len(use.sources), strict=True)
    ]
    undoing: list[Operation] = []
    for operation in rule.operations:
        try:
            undoing = operation.inverse([tensor.shape for tensor in tensors]) + undoing
            tensors = operation.apply(tensors, len(use.targets))
        except (Irreversible, Misfit) as reason:
            raise _refused([Problem("irreversible", str(reason), str(rule))]) from None
    targets, sources = (tuple(map(Template.literal, names)) for names in (use.targets, use.sources))
    return Rule(targets, sources, tuple(undoing), only=rule.only)


def _regrouped(plan: Plan, made: Plan, shapes: Mapping[str, Shape | None], groups: Sequence[Group]) -> Plan:
    """The inverse with tables that put the names back into the checkpoint's param groups."""
    problems: list[Problem] = []
    group_of = {name: number for number, group in enumerate(groups) for name in group.names or ()}
    there = {name: shapes.get(name) for name in group_of}
    found = Resolver(plan.passes, "the checkpoint", [0] * len(list(plan.all_rules())), problems).resolve(there)
    candidates = [
        Candidate(name, tuple(dict.fromkeys(group_of[leaf.name] for leaf in ex.leaves(item.expression))))
        for name, item in found.made.items()
    ]
    new = plan_groups(plan, candidates, groups, None, problems)
    moved = {name: found.made[name].expression.shape for group in new for name in group.members}
    back = Resolver(made.passes, "the result", [0] * len(list(made.all_rules())), problems).resolve(moved)
    tables = [_table(number, group, new, found.made, list(back.made), problems) for number, group in enumerate(groups)]
    if problems:
        raise _refused(problems, hint="Keep the original checkpoint.")
    return made._replace(groups=tuple(tables))


def _table(
    number: int,
    group: Group,
    new: Sequence[GroupPlan],
    made: Mapping[str, Made],
    order: Sequence[str],
    problems: list[Problem],
) -> GroupRule:
    """The table that makes one of the old groups from the new ones."""
    names = group.names or ()
    if not names:
        message = f"the checkpoint's param group {number} has no parameters, and a [[group]] table makes none"
        problems.append(Problem("irreversible", message))
        return GroupRule(())
    members = set(names)
    shares = [
        (one.base == number, sum(not members.isdisjoint(_sources(made[name])) for name in one.members)) for one in new
    ]
    like = max(range(len(new)), key=shares.__getitem__)
    there = new[like].options
    chosen = {key: value for key, value in group.options.items() if not same_value(value, there.get(key, _ABSENT))}
    problems.extend(
        Problem(
            "irreversible",
            f"a [[group]] table gives param group {like} an option {describe(key)}, which none takes away",
        )
        for key in there
        if key not in group.options
    )
    for key, value in chosen.items():
        try:
            toml_value(value)
        except PlanSyntaxError:
            message = (
                f"the option {describe(key)} of param group {number} was {describe(value)}, which no plan file can say"
            )
            problems.append(Problem("irreversible", message))
    in_order = [name for name in order if name in members] == list(names)
    return GroupRule(tuple(_patterns(names, order) if in_order else map(Template.literal, names)), chosen, like)


_ABSENT = object()


def _sources(item: Made) -> set[str]:
    return {leaf.name for leaf in ex.leaves(item.expression)}


def _patterns(names: Sequence[str], everything: Collection[str]) -> list[Template]:
    """A small set of templates that match these names and no others."""
    members = set(names)
    found: dict[str, Template | None] = {}
    made: list[Template] = []
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        if pattern not in found:
            template = Template.literal(name) if pattern == name else Template(pattern)
            others = (other for other in everything if other not in members)
            found[pattern] = None if any(template.match(other) is not None for other in others) else template
            made += [template] if found[pattern] else []
        if found[pattern] is None:
            made.append(Template.literal(name))
    return made
