"""From names given to hooks to rules: templates, and modules that stand for everything below them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, PlanError
from optimstate.hooks.engine.hook import LoadHook
from optimstate.hooks.engine.request import LoadRequest
from optimstate.plan.language.operations import Operation
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template

__all__ = ["HookStep", "below", "is_module", "literal", "matching", "ruled", "templates"]


class HookStep(LoadHook):
    """A hook that consists of what it asks for."""

    def __init__(self, name: str, prepare: Callable[[LoadRequest], None]) -> None:
        self._name, self._prepare = name, prepare

    def prepare(self, request: LoadRequest) -> None:
        """Add what the hook asks for to the request."""
        self._prepare(request)

    def __str__(self) -> str:
        return self._name


def ruled(
    hook: str,
    names: Mapping[str, Any],
    rule: Callable[[str, Any], Rule],
    *,
    several: bool = False,
    flip: bool = False,
) -> LoadHook:
    """A hook of one rule for each entry.

    Args:
        hook: What it is called.
        names: What the user gave: names to others.
        rule: Makes a rule of an entry.
        several: Whether an entry's value is several names, not one.
        flip: Whether the old names are on the right.

    Raises:
        PlanError: One name stands where several belong, or several where one does.
    """
    for key, value in names.items():
        if isinstance(value, str) == several:
            wanted = "a list of names" if several else "one name"
            raise PlanError(f"{hook}: {describe(key)} is given {describe(value)}, expected {wanted}")
    given = {key: list(value) if several else value for key, value in names.items()}
    left, right = ("{rest}", "{rest**}") if flip else ("{rest**}", "{rest}")

    def prepare(request: LoadRequest) -> None:
        known = set(request.names())
        rules = []
        for key, value in given.items():
            if all(is_module(name, known) for name in (value if flip else [key])):
                wide = [f"{name}.{right}" for name in value] if several else f"{value}.{right}"
                rules.append(rule(f"{key}.{left}", wide))
            else:
                rules.append(rule(key, value))
        request.add(Plan(tuple(rules)))

    return HookStep(hook, prepare)


def templates(*texts: str) -> tuple[Template, ...]:
    """Texts as templates."""
    return tuple(map(Template, texts))


def literal(old: str, new: str, *operations: Operation) -> Rule:
    """A rule for one name, taken literally even if it looks like a template."""
    return Rule((Template.literal(old),), (Template.literal(new),), operations)


def _is_plain(name: str) -> bool:
    return not name.startswith("re:") and not any(mark in name for mark in "{}*")


def is_module(name: str, known: Collection[str]) -> bool:
    """Whether a name without captures stands for everything below it."""
    return _is_plain(name) and name not in known and any(other.startswith(name + ".") for other in known)


def below(name: str, known: Collection[str]) -> str:
    """A template for a name, or for everything below a module."""
    return f"{name}.**" if is_module(name, known) else name


def matching(names: Iterable[str], known: Sequence[str], hook: str) -> list[str]:
    """The known names that the given ones stand for.

    Raises:
        MigrationError: One stands for none.
    """
    found: dict[str, None] = {}
    for name in names:
        template = Template(below(name, set(known)))
        matches = [other for other in known if template.match(other) is not None]
        if not matches:
            raise MigrationError.of("unmatched", f"{describe(name)} matches no parameter of the checkpoint", hook)
        found.update(dict.fromkeys(matches))
    return list(found)
