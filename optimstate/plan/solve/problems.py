"""The wording of mismatches: each names the parameter, both sides and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from optimstate.describe import describe
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Guard, Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.migration import Inventory
from optimstate.problems import Problem

__all__ = ["Suggestions", "guarded", "idle_rules", "shape_problem", "shortened", "unmatched"]

_SHOWN = 20  # problems of one kind that are spelled out


def guarded(guard: Guard, sections: Mapping[str, Inventory]) -> Iterator[Problem]:
    """How a checkpoint fails the plan's guard."""
    names = dict.fromkeys(name for inventory in sections.values() for name in inventory.shapes)
    modules = Modules(names)
    wrong = "this is another checkpoint than the plan is for, or the plan was applied already"
    for template in guard.has:
        if not any(modules.reading(template).match(name) is not None for name in names):
            yield Problem("guard", f"the guard asks for {describe(template.text)}, and no name is like that: {wrong}")
    for template in guard.lacks:
        found = next((name for name in names if modules.reading(template).match(name) is not None), None)
        if found is not None:
            message = f"the guard excludes {describe(template.text)}, and there is {describe(found)}: {wrong}"
            yield Problem("guard", message, names=(found,))


def unmatched(number: int, rule: Rule, sections: Mapping[str, Inventory]) -> Problem:
    """A rule that matches nothing."""
    from difflib import get_close_matches

    place = f"rule {number} ({rule})"
    mine = [inventory for key, inventory in sections.items() if rule.is_for(key)]
    if not mine and sections:
        there = ", ".join(map(describe, sections))
        return Problem("unmatched", f"`only` names no section: there are {there}", place)
    known = list(dict.fromkeys(name for inventory in mine for name in inventory.shapes))
    if not known:
        return Problem("unmatched", "the checkpoint names no parameters", place)
    close = get_close_matches(rule.source.text, known[:2000], n=3, cutoff=0.3) or known[:3]
    message = (
        f"{describe(rule.source.text)} matches none of {len(known)} names; there are {', '.join(map(describe, close))}"
    )
    return Problem("unmatched", message, place, tuple(close), _wider(rule.source, known))


def _wider(template: Template, names: Sequence[str]) -> str:
    """What to write where wildcards for any number of components would match names that wildcards for one do not."""
    if template.is_regex:
        return ""
    wide = re.sub(r"(?<!\*)\*(?!\*)", "**", re.sub(r"\{(\w+)\}", r"{\1**}", template.text))
    if wide == template.text or all(Template(wide).match(name) is None for name in names):
        return ""
    return f"a wildcard stands for one component of a name; {describe(wide)} stands for any number of them"


def idle_rules(plan: Plan, counts: Sequence[int], sections: Iterable[str] = ()) -> list[str]:
    """A note on rules that match nothing because the checkpoint already has the names of the live run.

    Args:
        plan: The plan.
        counts: How many parameters each of its rules matched; empty where none matched any.
        sections: What is resumed, by kind and path.
    """
    rules = list(plan.all_rules())
    idle = [number for number, count in enumerate(counts or [0] * len(rules), 1) if not count]
    if plan.policy.unused != "error":
        return []
    there = list(sections)
    apart = [number for number in idle if there and not any(rules[number - 1].is_for(key) for key in there)]
    idle = [number for number in idle if number not in apart]
    notes = [
        f"rule {number} has no effect: nothing is given that is {describe(rules[number - 1].only)}" for number in apart
    ]
    if not idle:
        return notes
    which = f"rule {idle[0]} matches" if len(idle) == 1 else f"rules {', '.join(map(str, idle))} match"
    return [*notes, f"{which} nothing: the checkpoint has the live names already, so that there was nothing left to do"]


def shortened(problems: Sequence[Problem]) -> list[Problem]:
    """The first few problems, and how many more there are."""
    if len(problems) <= _SHOWN:
        return list(problems)
    return [*problems[:_SHOWN], Problem("more", f"and {len(problems) - _SHOWN} more problems like these")]


def shape_problem(name: str, shape: Shape, wanted: Shape) -> Problem:
    """A shape that differs from the target's."""
    if sorted(shape) == sorted(wanted):
        remedy = "permute it (transpose = true)"
    elif len(shape) == len(wanted) and sum(a != b for a, b in zip(shape, wanted, strict=True)) == 1:
        dim = next(dim for dim, (a, b) in enumerate(zip(shape, wanted, strict=True)) if a != b)
        remedy = f"resize it (resize = {{ dim = {dim}, size = {wanted[dim]} }}), cut or join it"
    else:
        remedy = "give its rule the operations that make it fit, or make it fresh and drop the old one"
    message = f"the checkpoint gives the shape {list(shape)}, the target has {list(wanted)}"
    return Problem("shape", message, describe(name), (name,), remedy)


class Suggestions:
    """Suggests names that could have been meant, those of the same shape first."""

    def __init__(self, names: Sequence[str], shapes: Mapping[str, Shape | None]) -> None:
        self._names, self._shapes = names[:1000], shapes
        self._left = _SHOWN

    def of(self, name: str, shape: Shape | None) -> str:
        """A remark to put behind the name, or nothing."""
        if not self._left:
            return ""
        from difflib import get_close_matches

        self._left -= 1
        alike = [other for other in self._names if shape is not None and self._shapes.get(other) == shape]
        close = get_close_matches(name, alike or self._names, n=1, cutoff=0.3)
        if not close:
            return ""
        note = f" of its shape {list(shape)}" if alike and shape is not None else ""
        return f" (is it {describe(close[0])}{note}?)"
