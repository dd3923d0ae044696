"""Layouts of known libraries: pairs of rules, as data, and the names of modules that mean the same.

The data is `known_layouts.toml` beside this file, which says how it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib.resources import files
from math import gcd
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import PlanError, PlanSyntaxError
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.operations import parse_operation
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.inverse import inverse
from optimstate.record import Record

__all__ = ["Knowledge", "KnownLayout", "RuleForm", "knowledge"]

Names = Mapping[str, Shape]

_USUAL_HEADS = (128, 64, 256, 96, 80, 32)
_BEFORE = 3
"""How many components may stand before the names of a layout, as in `_orig_mod.module.model.`."""


class RuleForm(Record):
    """A rule of a layout, whose numbers depend on the shapes that are met.

    Attributes:
        sources: Templates without a prefix.
        targets: Likewise.
        operations: What a plan file says of each; texts stand for numbers.
        back: Those of the other direction; empty where `operations` can be undone.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[str, Any], ...] = ()
    back: tuple[tuple[str, Any], ...] = ()

    @property
    def needs_heads(self) -> bool:
        """Whether its numbers depend on the size of a head."""
        return any(word in str(self.operations) for word in ("$head", "$half", "$group"))

    def made(self, prefixes: tuple[str, str], names: Names, head_dim: int | None, *, back: bool = False) -> Rule | None:
        """The rule under these prefixes of sources and targets; None where the shapes do not allow it.

        Args:
            prefixes: Of the sources and of the targets.
            names: Of the side that has the sources.
            head_dim: The size of a head, where it is known.
            back: Whether the rule by `back` is meant, from the targets to the sources.
        """
        sides = [[before + text for text in texts] for before, texts in zip(prefixes, self._sides, strict=True)]
        numbers = self._numbers(sides[0], names, head_dim)
        try:
            made = [
                operation
                for key, value in (self.back if back else self.operations)
                for operation in parse_operation(key, _filled(value, numbers))
            ]
            return Rule.of(*(reversed(sides) if back else sides), *made)
        except (KeyError, PlanSyntaxError):
            return None

    @property
    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.sources, self.targets

    def head_sizes(self, prefix: str, names: Names) -> list[int]:
        """The sizes that a head can have, usual ones first."""
        rows = [shape[0] for text in self.sources for _, shape in _matches(prefix + text, names) if shape]
        whole = gcd(*rows)
        sizes = [size for size in range(2, whole + 1, 2) if whole % size == 0]
        return sorted(sizes, key=lambda size: (_USUAL_HEADS.index(size) if size in _USUAL_HEADS else 99, -size))

    def _numbers(self, sources: Sequence[str], names: Names, head_dim: int | None) -> dict[str, Any]:
        found = [next(_matches(text, names), None) for text in sources]
        shapes = [item[1] for item in found if item is not None and item[1]]
        if not shapes or len(shapes) < len(sources):
            return {}
        rows = [shape[0] for shape in shapes]
        experts = {match["e"] for text in sources for match, _ in _matches(text, names) if "e" in match}
        made: dict[str, Any] = {
            "$rows": rows[0],
            "$rows_2": 2 * rows[0],
            "$columns": shapes[0][-1],
            "$all_rows": sum(rows),
        }
        made |= {"$experts": len(experts), "$experts_2": 2 * len(experts)}
        if head_dim and not any(size % head_dim for size in rows) and head_dim % 2 == 0:
            groups = rows[-1] // head_dim
            made |= {"$head_dim": head_dim, "$half": head_dim // 2, "$heads": rows[0] // head_dim, "$groups": groups}
            if not any(size % groups for size in rows):
                made |= {"$group_rows": sum(rows) // groups, "$group_sizes": [size // groups for size in rows]}
        return made


class KnownLayout(Record):
    """Rules from one layout to another, which are used both ways."""

    name: str
    rules: tuple[RuleForm, ...]


class Knowledge(Record):
    """What is known of the layouts of libraries.

    Attributes:
        layouts: Pairs of layouts.
        same: Of every module that is known, by its name with the module around it, what it means.
    """

    layouts: tuple[KnownLayout, ...]
    same: Mapping[str, str]

    @classmethod
    def from_toml(cls, text: str, name: str) -> Knowledge:
        """Read a file of the same format as `known_layouts.toml`.

        Raises:
            PlanSyntaxError: It has another form.
        """
        import tomllib

        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanSyntaxError(f"{name}: {error}") from None
        try:
            for key in document.keys() - {"layout", "same"}:
                raise PlanSyntaxError(f"{name}: unknown key {describe(key)}", hint="Known keys: layout, same.")
            layouts = tuple(
                KnownLayout(str(table["name"]), tuple(map(_form, table["rule"])))
                for table in document.get("layout", ())
            )
            same = {
                f"{around}.{word}": meaning
                for table in document.get("same", ())
                for meaning, words in table["names"].items()
                for around in table["inside"]
                for word in words
            }
        except (KeyError, TypeError, AttributeError) as error:
            message = f"{name} is not a file of known layouts: {describe(str(error))}"
            raise PlanSyntaxError(message, hint="The comment at the top of known_layouts.toml says its form.") from None
        return cls(layouts, same)

    def __add__(self, other: Knowledge) -> Knowledge:
        return Knowledge((*other.layouts, *self.layouts), {**self.same, **other.same})

    def meaning(self, pattern: str) -> str:
        """A dotted name with known modules in the words of the table: `h.#.self_attn.wq` is `h.#.(q)`."""
        return self._known_modules.sub(lambda match: f"({self.same[match[0]]})", pattern) if self.same else pattern

    @cached_property
    def _known_modules(self) -> re.Pattern[str]:
        words = sorted(self.same, key=len, reverse=True)
        return re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, words))})(?![^.])")


@cache
def knowledge() -> Knowledge:
    """The layouts that this release knows."""
    path = files("optimstate.plan.solve") / "known_layouts.toml"
    return Knowledge.from_toml(path.read_text(encoding="utf-8"), "known_layouts.toml")


def read(path: Path) -> Knowledge:
    """The layouts that this release knows, together with those of a file.

    Raises:
        PlanSyntaxError: The file has another form, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PlanSyntaxError(f"{path}: it cannot be read: {reason}") from None
    return knowledge() + Knowledge.from_toml(text, str(path))


def prefixes(texts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Prefixes, without numbers, before names that one of the templates matches."""
    found: dict[str, None] = {}
    templates = [Template(text) for text in texts]
    for name in names:
        parts = name.split(".")
        for count in range(min(_BEFORE, len(parts) - 1) + 1):
            if any(part.isdigit() for part in parts[:count]):
                break
            if any(template.match(".".join(parts[count:])) is not None for template in templates):
                found["".join(f"{part}." for part in parts[:count])] = None
    return list(found)


def rules_between(
    form: RuleForm, pair: tuple[str, str], old: Names, new: Names, head_dim: int | None, *, back: bool
) -> tuple[Rule, ...]:
    """The rules that a form means between what there is and what is wanted; none where the shapes do not allow it.

    Args:
        form: Of a layout.
        pair: The prefixes of its sources and of its targets.
        old: What there is.
        new: What is wanted.
        head_dim: The size of a head.
        back: Whether what is wanted has the sources of the form.
    """
    if back and form.back:
        made = form.made(pair, new, head_dim, back=True)
        return (made,) if made is not None else ()
    rule = form.made(pair, new if back else old, head_dim)
    if rule is None or not back:
        return (rule,) if rule is not None else ()
    meant = {name: shape for name, shape in new.items() if any(t.match(name) is not None for t in rule.sources)}
    try:
        return inverse(Plan((rule,)), meant).rules
    except PlanError:
        return ()


def _matches(text: str, names: Names) -> Iterator[tuple[Mapping[str, str], Shape]]:
    template = Template(text)
    return ((found, shape) for name, shape in names.items() if (found := template.match(name)) is not None)


def _form(table: Mapping[str, Any]) -> RuleForm:
    sides = [[table[key]] if isinstance(table[key], str) else list(table[key]) for key in ("from", "to")]
    listed = table.get("ops", [{key: value} for key, value in table.items() if key not in ("from", "to", "back")])
    operations = [
        tuple(item for entry in entries for item in entry.items()) for entries in (listed, table.get("back", ()))
    ]
    return RuleForm(tuple(sides[0]), tuple(sides[1]), *operations)


def _filled(value: Any, numbers: Mapping[str, Any]) -> Any:
    """A value with the numbers that its placeholders stand for."""
    if isinstance(value, Mapping):
        return {key: _filled(item, numbers) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, numbers) for item in value]
    return numbers[value] if isinstance(value, str) else value
