"""Rules and names, pass by pass: which source names each target is made from, and by which expression."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from optimstate.describe import describe
from optimstate.errors import PlanSyntaxError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf, Node, Shape
from optimstate.plan.language.base import Misfit
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.problems import Problem
from optimstate.state.names import in_module_order

__all__ = ["Application", "Made", "Resolved", "Resolver"]


class Application:
    """One use of a rule: the names it took, with their shapes, and the names it gave. The pass is counted from 0."""

    __slots__ = ("number", "rule", "shapes", "sources", "targets")

    def __init__(
        self,
        rule: Rule,
        number: int,
        sources: list[str],
        shapes: Sequence[Shape | None] = (),
        targets: Sequence[str] = (),
    ) -> None:
        self.rule, self.number, self.sources, self.shapes, self.targets = rule, number, sources, shapes, targets


class Made:
    """How a target is made, and by which uses of rules, in order."""

    __slots__ = ("applications", "expression")

    def __init__(self, expression: Expr, applications: tuple[Application, ...]) -> None:
        self.expression, self.applications = expression, applications


class Resolved(NamedTuple):
    """What a plan turns the names of a section into.

    Attributes:
        made: The targets, in order.
        dropped: Sources that go nowhere, with the rule that drops them.
        applications: Every use of a rule, pass by pass, in order.
    """

    made: dict[str, Made]
    dropped: list[tuple[str, Rule]]
    applications: list[list[Application]]


class Resolver:
    """Applies the passes of a plan to names.

    Args:
        passes: The rules of each pass.
        where: What messages call the section.
        counts: Matches per rule over all passes; added to.
        problems: Added to.
    """

    def __init__(
        self, passes: Sequence[Sequence[Rule]], where: str, counts: list[int], problems: list[Problem]
    ) -> None:
        self._passes, self._where, self._counts, self._problems = passes, where, counts, problems

    def resolve(self, names: Mapping[str, Shape | None]) -> Resolved:
        """What becomes of the names, given their shapes."""
        made = {name: Made(Leaf(name, shape), ()) for name, shape in names.items()}
        gone: list[tuple[Made, Rule]] = []
        applications: list[list[Application]] = []
        first = 0
        for number, rules in enumerate(self._passes):
            modules = Modules(made)
            found = _Pass(
                [modules.rule(rule) for rule in rules], first, number, self._where, self._counts, self._problems
            )
            made = found.run(made)
            gone.extend(found.gone)
            applications.append(found.applications)
            first += len(rules)
        used = {leaf.name for item in made.values() for leaf in ex.leaves(item.expression)} if gone else set()
        dropped = {
            leaf.name: rule for item, rule in gone for leaf in ex.leaves(item.expression) if leaf.name not in used
        }
        return Resolved(made, list(dropped.items()), applications)


class _Gathering:
    """The members that one use of a joining rule has found so far, by source template and gathered captures."""

    def __init__(self, application: Application, names: list[str]) -> None:
        self.application, self.names = application, names
        self.members: dict[tuple[int, tuple[str, ...]], str] = {}


class _Pass:
    def __init__(
        self, rules: Sequence[Rule], first: int, number: int, where: str, counts: list[int], problems: list[Problem]
    ) -> None:
        self.rules, self.first, self.number, self.where = rules, first, number, where
        self.counts, self.problems = counts, problems
        self.gone: list[tuple[Made, Rule]] = []
        self.applications: list[Application] = []
        self._matchers: list[tuple[int, str, str, str, Template, tuple[int, Rule, int]]] = []
        self._literals: dict[str, tuple[int, tuple[int, Rule, int]]] = {}
        sources = [
            (n, rule, *entry) for n, rule in enumerate(rules) if rule.is_for(where) for entry in enumerate(rule.sources)
        ]
        for order, (index, rule, place, source) in enumerate(sources):
            if source.is_literal:
                self._literals.setdefault(source.text, (order, (index, rule, place)))
            else:
                self._matchers.append((order, *source.landmarks, source, (index, rule, place)))
        self._over = [_gathered(rule) for rule in rules]

    def run(self, before: Mapping[str, Made]) -> dict[str, Made]:
        gathering: dict[tuple[int, tuple[tuple[str, str], ...]], _Gathering] = {}
        uses: list[Application | _Gathering | str] = []
        for name, item in before.items():
            match = self._first_match(name)
            if match is None:
                uses.append(name)
                continue
            (index, rule, place), captures = match
            self.counts[self.first + index] += 1
            if rule.drops:
                self.gone.append((item, rule))
                self.applications.append(Application(rule, self.number, [name], [item.expression.shape]))
                continue
            found = self._use(index, rule, place, captures, name, gathering)
            if found is not None:
                uses.append(found)
        return self._emit(uses, before)

    def _first_match(self, name: str) -> tuple[tuple[int, Rule, int], dict[str, str]] | None:
        """The first rule with a source that matches, its number and that of the source, and the captures."""
        last, literal = self._literals.get(name, (len(self._literals) + len(self._matchers), None))
        for order, prefix, suffix, inner, source, found in self._matchers:
            if order > last:
                break
            # As Template.match, whose call would take longer than what it does for most rules.
            if inner in name and name.startswith(prefix) and name.endswith(suffix):
                captures = source.captured(name)
                if captures is not None:
                    return found, captures
        return None if literal is None else (literal, {})

    def _use(
        self,
        index: int,
        rule: Rule,
        place: int,
        captures: dict[str, str],
        name: str,
        gathering: dict[tuple[int, tuple[tuple[str, str], ...]], _Gathering],
    ) -> Application | _Gathering | None:
        source = rule.sources[place]
        try:
            over = self._over[index]
            if over is None:
                targets = rule.names_for(source, captures) if rule.targets else [name]
                return Application(rule, self.number, [name], [], targets)
            shared = {key: value for key, value in captures.items() if key not in over[place]}
            key = index, tuple(sorted(shared.items()))
            member = place, tuple(captures[capture] for capture in over[place])
            found = gathering.get(key)
            if found is None:
                found = gathering[key] = _Gathering(Application(rule, self.number, []), rule.names_for(source, shared))
                found.members[member] = name
                return found
            found.members[member] = name
        except PlanSyntaxError as error:
            where = f"{self.where}: rule {self.first + index + 1} on {describe(name)}"
            self.problems.append(Problem("syntax", error.message, where, (name,)))
        return None

    def _emit(self, uses: Sequence[Application | _Gathering | str], before: Mapping[str, Made]) -> dict[str, Made]:
        """The results of the uses of rules, in order; a string is a name that no rule matches."""
        made: dict[str, Made] = {}
        run: list[tuple[str, Made]] = []  # results of neighbours that become several each are put in module order

        def end_run() -> None:
            order = in_module_order([name for name, _ in run]) if len(run) > 2 else range(len(run))
            for place in order:
                self._put(made, *run[place])
            run.clear()

        for use in uses:
            if isinstance(use, str):
                results = [(use, before[use])]
            else:
                application = self._completed(use) if isinstance(use, _Gathering) else use
                if application is None:
                    continue
                results = self._results(application, before)
                self.applications.append(application)
                if len(results) > 1:
                    run.extend(results)
                    continue
            if run:
                end_run()
            self._put(made, *results[0])
        if run:
            end_run()
        return made

    def _put(self, made: dict[str, Made], name: str, item: Made) -> None:
        other = made.setdefault(name, item)
        if other is not item:
            message = f"{_origin(other)} and {_origin(item)} would both become {describe(name)}"
            self.problems.append(Problem("conflict", message, self.where, (name,), "rename or drop one of them"))

    def _completed(self, found: _Gathering) -> Application | None:
        """The members in order; None, with a problem noted, where one is missing."""
        rule = found.application.rule
        over = _gathered(rule) or []
        names: list[str] = []
        missing: list[str] = []
        for place, source in enumerate(rule.sources):
            present = [key for where, key in found.members if where == place]
            values = [_values(source, name, [key[n] for key in present]) for n, name in enumerate(over[place])]
            for key in itertools.product(*values):
                name = found.members.get((place, key))
                if name is None:
                    missing.append(_spelled(source, found, dict(zip(over[place], key, strict=True))))
                else:
                    names.append(name)
        if missing:
            message = (
                f"{rule} joins {', '.join(map(describe, names[:3]))} into {describe(found.names[0])}, "
                f"but there is no {', '.join(map(describe, missing[:3]))}"
            )
            self.problems.append(Problem("incomplete", message, self.where, tuple(missing)))
            return None
        found.application.sources, found.application.targets = names, found.names
        return found.application

    def _results(self, application: Application, before: Mapping[str, Made]) -> list[tuple[str, Made]]:
        items = [before[name] for name in application.sources]
        tensors = [item.expression for item in items]
        application.shapes = [tensor.shape for tensor in tensors]
        history = (*_past(items), application) if self.number else (application,)
        try:
            expressions = _applied(application.rule, tensors, len(application.targets))
        except Misfit as misfit:
            sources = ", ".join(map(describe, application.sources[:4]))
            place = f"{self.where}: {application.rule} on {sources}"
            self.problems.append(Problem("operation", str(misfit), place, tuple(application.sources)))
            expressions = [Node(ex.Unsized("?"), tuple(tensors), None)] * len(application.targets)
        return [
            (name, Made(expression, history)) for name, expression in zip(application.targets, expressions, strict=True)
        ]


def _past(items: Iterable[Made]) -> tuple[Application, ...]:
    found = {id(application): application for item in items for application in item.applications}
    return tuple(found.values())


def _gathered(rule: Rule) -> list[tuple[str, ...]] | None:
    """For each source template, the captures it gathers over; None for a rule that takes one parameter at a time."""
    over = [tuple(name for name in source.captures if name not in rule.shared) for source in rule.sources]
    return over if rule.targets and (len(rule.sources) > 1 or any(over)) else None


def _values(source: Template, name: str, found: Sequence[str]) -> Sequence[str]:
    """The values that a gathered capture must take: those it enumerates, or the integers from least to greatest."""
    choices = source.captures[name]
    if choices is not None:
        return choices
    numbers = sorted({int(value) for value in found})
    spelled = {int(value): value for value in found}
    return [spelled.get(n, str(n)) for n in range(numbers[0], numbers[-1] + 1)] if numbers else []


def _spelled(source: Template, found: _Gathering, captures: dict[str, str]) -> str:
    """The name of a missing member, as far as the other names determine it."""
    (known, _), name = next(iter(found.members.items()))
    values = {**(found.application.rule.sources[known].match(name) or {}), **captures}
    try:
        return next(source.produce({key: values[key] for key in source.captures}))
    except (KeyError, PlanSyntaxError):
        return source.text


def _applied(rule: Rule, tensors: list[Expr], targets: int) -> list[Expr]:
    if len(tensors) == targets and not (rule.operations or rule.fresh):
        return tensors
    for operation in rule.operations:
        tensors = operation.apply(tensors, targets)
    if rule.fresh:
        tensors = [Node(ex.Fresh(), (tensor,), tensor.shape) for tensor in tensors]
    if len(tensors) == targets:
        return tensors
    if len(tensors) == 1:
        return tensors * targets
    raise Misfit(f"its operations give {len(tensors)} tensors for {targets} names")


def _origin(item: Made) -> str:
    sources = ", ".join(describe(leaf.name) for leaf in itertools.islice(ex.leaves(item.expression), 3))
    rule = item.applications[-1].rule if item.applications else None
    return f"{sources} (by {rule})" if rule is not None else f"{sources} (kept)"
