"""A plain name in a plan is a parameter, or else the module of that name with everything in it."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template

__all__ = ["Modules"]


class Modules:
    """The modules that some parameters are in.

    Args:
        names: Of the parameters.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    @cached_property
    def _known(self) -> set[str]:
        found = set()
        for name in self._names:
            end = name.rfind(".")
            while end > 0 and name[:end] not in found:
                found.add(name[:end])
                end = name.rfind(".", 0, end)
        return found

    def stands_for_module(self, template: Template) -> bool:
        """Whether a template is the plain name of a module, and of no parameter."""
        if not template.is_literal or any(mark in template.text for mark in "{}*"):
            return False
        return template.text not in self._names and template.text in self._known

    def reading(self, template: Template) -> Template:
        """The template, or the one for everything in the module that it names."""
        return Template(f"{template.text}.**") if self.stands_for_module(template) else template

    def rule(self, rule: Rule) -> Rule:
        """The rule with modules written as everything in them; messages show it as it was."""
        modules = [self.stands_for_module(source) for source in rule.sources]
        if not any(modules) or (rule.targets and not all(modules)):
            return rule
        if not rule.targets:
            return rule._replace(sources=tuple(map(self.reading, rule.sources)), label=str(rule))
        sources = tuple(Template(f"{source.text}.{{module**}}") for source in rule.sources)
        targets = tuple(Template(f"{target.text}.{{module}}") for target in rule.targets)
        return rule._replace(sources=sources, targets=targets, label=str(rule))
