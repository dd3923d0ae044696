"""Rules and names, pass by pass: which source names each target is made from, and by which expression."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from optimstate.errors import PlanSyntaxError
from optimstate.plan import expressions as ex
from optimstate.plan.expressions import Expr, Leaf, Node, Shape
from optimstate.plan.operation import Misfit
from optimstate.plan.rules import Rule
from optimstate.plan.template import Template
from optimstate.state.names import in_module_order

__all__ = ["Application", "Made", "Resolved", "Resolver"]


class Application:
    """One use of a rule: the names it took, with their shapes, and the names it gave.

    Attributes:
        rule: None where a name was kept because no rule matches it.
        number: The pass, from 0.
    """

    __slots__ = ("number", "rule", "shapes", "sources", "targets")

    def __init__(
        self,
        rule: Rule | None,
        number: int,
        sources: list[str],
        shapes: Sequence[Shape | None] = (),
        targets: Sequence[str] = (),
    ) -> None:
        self.rule, self.number, self.sources, self.shapes, self.targets = rule, number, sources, shapes, targets


class Made:
    """A target: how it is made, and by which uses of rules, the last one last."""

    __slots__ = ("applications", "expression")

    def __init__(self, expression: Expr, applications: tuple[Application, ...]) -> None:
        self.expression, self.applications = expression, applications


class Resolved(NamedTuple):
    """What a plan makes of the names of a section.

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

    def __init__(self, passes: Sequence[Sequence[Rule]], where: str, counts: list[int], problems: list[str]) -> None:
        self._passes, self._where, self._counts, self._problems = passes, where, counts, problems

    def resolve(self, names: Mapping[str, Shape | None]) -> Resolved:
        """What becomes of the names, which have these shapes."""
        made = {name: Made(Leaf(name, shape), ()) for name, shape in names.items()}
        gone: list[tuple[Made, Rule]] = []
        applications: list[list[Application]] = []
        first = 0
        for number, rules in enumerate(self._passes):
            found = _Pass(rules, first, number, self._where, self._counts, self._problems)
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
    """The members one use of a joining rule has found so far, by source template and the captures it gathers over."""

    def __init__(self, application: Application, names: list[str]) -> None:
        self.application, self.names = application, names
        self.members: dict[tuple[int, tuple[str, ...]], str] = {}


class _Pass:
    def __init__(
        self, rules: Sequence[Rule], first: int, number: int, where: str, counts: list[int], problems: list[str]
    ) -> None:
        self.rules, self.first, self.number, self.where = rules, first, number, where
        self.counts, self.problems = counts, problems
        self.gone: list[tuple[Made, Rule]] = []
        self.applications: list[Application] = []
        self._matchers = [
            (index, rule, place, source)
            for index, rule in enumerate(rules)
            for place, source in enumerate(rule.sources)
        ]
        self._over = [_gathered(rule) for rule in rules]

    def run(self, before: Mapping[str, Made]) -> dict[str, Made]:
        gathering: dict[tuple[int, tuple[tuple[str, str], ...]], _Gathering] = {}
        uses: list[Application | _Gathering] = []
        for name, item in before.items():
            index, rule, place, captures = self._first_match(name)
            if rule is None:
                uses.append(Application(None, self.number, [name], [item.expression.shape], [name]))
                continue
            self.counts[self.first + index] += 1
            if rule.drops:
                self.gone.append((item, rule))
                self.applications.append(Application(rule, self.number, [name], [item.expression.shape]))
                continue
            found = self._use(index, rule, place, captures, name, gathering)
            if found is not None:
                uses.append(found)
        return self._emit(uses, before)

    def _first_match(self, name: str) -> tuple[int, Rule | None, int, dict[str, str]]:
        for index, rule, place, source in self._matchers:
            captures = source.match(name)
            if captures is not None:
                return index, rule, place, captures
        return -1, None, 0, {}

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
            self.problems.append(f"{self.where}: rule {self.first + index + 1} on {name!r}: {error.message}")
        return None

    def _emit(self, uses: Sequence[Application | _Gathering], before: Mapping[str, Made]) -> dict[str, Made]:
        made: dict[str, Made] = {}
        run: list[tuple[str, Made]] = []  # results of neighbours that become several each are put in module order

        def end_run() -> None:
            for place in in_module_order([name for name, _ in run]):
                self._put(made, *run[place])
            run.clear()

        for use in uses:
            application = self._completed(use) if isinstance(use, _Gathering) else use
            if application is None:
                continue
            results = self._results(application, before)
            if application.rule is not None:
                self.applications.append(application)
            if len(application.targets) > 1:
                run.extend(results)
            else:
                end_run()
                for name, item in results:
                    self._put(made, name, item)
        end_run()
        return made

    def _put(self, made: dict[str, Made], name: str, item: Made) -> None:
        other = made.setdefault(name, item)
        if other is not item:
            self.problems.append(
                f"{self.where}: {_origin(other)} and {_origin(item)} would both become {name!r}; "
                "rename or drop one of them"
            )

    def _completed(self, found: _Gathering) -> Application | None:
        """The members in order; None, with a problem noted, where one is missing."""
        rule = found.application.rule
        assert rule is not None
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
            self.problems.append(
                f"{self.where}: {rule} joins {', '.join(map(repr, names[:3]))} into {found.names[0]!r}, "
                f"but there is no {', '.join(map(repr, missing[:3]))}"
            )
            return None
        found.application.sources, found.application.targets = names, found.names
        return found.application

    def _results(self, application: Application, before: Mapping[str, Made]) -> list[tuple[str, Made]]:
        items = [before[name] for name in application.sources]
        if application.rule is None:
            return [(application.targets[0], items[0])]
        application.shapes = [item.expression.shape for item in items]
        past = _past(items)
        try:
            expressions = _applied(application.rule, [item.expression for item in items], len(application.targets))
        except Misfit as misfit:
            sources = ", ".join(map(repr, application.sources[:4]))
            self.problems.append(f"{self.where}: {application.rule} on {sources}: {misfit}")
            expressions = [Node(ex.Unsized("?"), tuple(item.expression for item in items), None)] * len(
                application.targets
            )
        return [
            (name, Made(expression, (*past, application)))
            for name, expression in zip(application.targets, expressions, strict=True)
        ]


def _past(items: Iterable[Made]) -> tuple[Application, ...]:
    found = {id(application): application for item in items for application in item.applications}
    return tuple(found.values())


def _gathered(rule: Rule) -> list[tuple[str, ...]] | None:
    """For each source template the captures it gathers over; None for a rule that takes one parameter at a time."""
    over = [tuple(name for name in source.captures if name not in rule.shared) for source in rule.sources]
    return over if rule.targets and (len(rule.sources) > 1 or any(over)) else None


def _values(source: Template, name: str, found: Sequence[str]) -> Sequence[str]:
    """The values a gathered capture must have: those it enumerates, or the integers from the least to the greatest."""
    choices = source.captures[name]
    if choices is not None:
        return choices
    numbers = sorted({int(value) for value in found})
    spelled = {int(value): value for value in found}
    return [spelled.get(n, str(n)) for n in range(numbers[0], numbers[-1] + 1)] if numbers else []


def _spelled(source: Template, found: _Gathering, captures: dict[str, str]) -> str:
    """The name of a missing member, as far as the names of the others tell."""
    assert found.application.rule is not None
    (known, _), name = next(iter(found.members.items()))
    values = {**(found.application.rule.sources[known].match(name) or {}), **captures}
    try:
        return next(source.produce({key: values[key] for key in source.captures}))
    except (KeyError, PlanSyntaxError):
        return source.text


def _applied(rule: Rule, tensors: list[Expr], targets: int) -> list[Expr]:
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
    sources = ", ".join(repr(leaf.name) for leaf in itertools.islice(ex.leaves(item.expression), 3))
    rule = item.applications[-1].rule if item.applications else None
    return f"{sources} (by {rule})" if rule is not None else f"{sources} (kept)"
