"""Name templates: patterns over dotted parameter names, and the names they produce.

    {i}        one component                    {i:int}     one component of digits
    {rest**}   one or more components           {x=q|k|v}   one of the words
    {e=0..7}   an integer of the range          {2*i+1}     an affine function of an integer capture
    *  **      like {i} and {rest**}, without a name: only where nothing is produced from the match
    re:...     a regular expression with (?P<name>...) groups, for what the others cannot say; nothing undoes it

A template matches a whole name or not at all. Everything else stands for itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial

from optimstate.describe import describe
from optimstate.errors import PlanSyntaxError
from optimstate.record import Record

__all__ = ["Template", "constrained"]

_TOKEN = re.compile(r"\{([^{}]*)\}|(\*\*?)|([^{}*]+)|(.)", re.DOTALL)
_CAPTURE = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<kind>\*\*|:int|=(?P<choices>[^=]+))?")
_AFFINE = re.compile(r"(?:(?P<scale>-?\d+)\s*\*\s*)?(?P<name>[A-Za-z_]\w*)\s*(?P<shift>[+-]\s*\d+)?")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_ONE, _MANY = r"[^.]+", r"[^.]+(?:\.[^.]+)*"
_CANONICAL = re.compile(r"0|-?[1-9]\d*")
MAX_CHOICES = 100_000


class _Capture(Record):
    """`{name...}`; `choices` are the values it enumerates, None where it takes what it finds."""

    name: str
    pattern: str
    choices: tuple[str, ...] | None = None


class _Affine(Record):
    """`{scale*name+shift}`."""

    name: str
    scale: int
    shift: int


class _Wildcard(Record):
    pattern: str


_Part = str | _Capture | _Affine | _Wildcard


class Template(Record):
    """A parsed template.

    Attributes:
        text: As written.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise PlanSyntaxError("an empty template matches nothing")
        if self.is_regex:
            self._regex  # noqa: B018 - parse now, so that a mistake is reported where it was made
        self.parts  # noqa: B018

    @classmethod
    def literal(cls, name: str) -> Template:
        """A template that matches and produces exactly this name, whatever characters it has."""
        made = cls("x")
        object.__setattr__(made, "text", name)
        made.__dict__.update(parts=(name,), is_regex=False)
        return made

    @cached_property
    def is_regex(self) -> bool:
        """Whether it is a `re:` template."""
        return self.text.startswith("re:")

    @cached_property
    def parts(self) -> tuple[_Part, ...]:
        """Literals, captures and wildcards in order."""
        if self.is_regex:
            return tuple(_Capture(name, "") for name in self._regex.groupindex)
        return tuple(self._part(*match.groups()) for match in _TOKEN.finditer(self.text))

    def _part(self, braces: str | None, wildcard: str | None, literal: str | None, stray: str | None) -> _Part:
        if literal is not None:
            return literal
        if wildcard is not None:
            return _Wildcard(_ONE if wildcard == "*" else _MANY)
        if braces is None:
            raise PlanSyntaxError(
                f"template {describe(self.text)}: unbalanced {describe(stray)}", hint="Write {name} for a capture."
            )
        if match := _CAPTURE.fullmatch(braces.strip()):
            return self._capture(match["name"], match["kind"] or "", match["choices"])
        if match := _AFFINE.fullmatch(braces.strip()):
            scale, shift = int(match["scale"] or 1), int((match["shift"] or "0").replace(" ", ""))
            if scale:
                return _Affine(match["name"], scale, shift)
        raise PlanSyntaxError(
            f"template {describe(self.text)}: {{{braces}}} is not a capture",
            hint="Captures are {i}, {i:int}, {rest**}, {x=a|b}, {e=0..7} and {2*i+1}.",
        )

    def _capture(self, name: str, kind: str, choices: str | None) -> _Capture:
        if choices is None:
            return _Capture(name, {"": _ONE, "**": _MANY, ":int": r"\d+"}[kind])
        if match := _RANGE.fullmatch(choices):
            low, high = int(match[1]), int(match[2])
            if not 0 <= high - low < MAX_CHOICES:
                raise PlanSyntaxError(f"template {describe(self.text)}: the range {choices} is empty or too long")
            return _Capture(name, r"-?\d+", tuple(map(str, range(low, high + 1))))
        words = tuple(choices.split("|"))
        if len(set(words)) != len(words) or not all(words):
            raise PlanSyntaxError(
                f"template {describe(self.text)}: the choices {describe(choices)} repeat or are empty"
            )
        return _Capture(name, "|".join(map(re.escape, sorted(words, key=len, reverse=True))), words)

    @cached_property
    def captures(self) -> dict[str, tuple[str, ...] | None]:
        """The named captures in order, with the values of those that enumerate."""
        found: dict[str, tuple[str, ...] | None] = {}
        for part in self.parts:
            if isinstance(part, _Capture):
                found[part.name] = part.choices or found.get(part.name)
            elif isinstance(part, _Affine):
                found.setdefault(part.name, None)
        return found

    @cached_property
    def counting(self) -> frozenset[str]:
        """The captures that hold nothing but integers."""
        return frozenset(
            part.name
            for part in self.parts
            if isinstance(part, _Affine) or (isinstance(part, _Capture) and part.pattern in (r"\d+", r"-?\d+"))
        )

    @cached_property
    def has_wildcard(self) -> bool:
        """Whether a part of the match has no name."""
        return any(isinstance(part, _Wildcard) for part in self.parts)

    @cached_property
    def is_literal(self) -> bool:
        """Whether it stands for exactly one name."""
        return not self.is_regex and all(isinstance(part, str) for part in self.parts)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        if self.is_regex:
            try:
                return re.compile(self.text.removeprefix("re:"))
            except re.error as error:
                raise PlanSyntaxError(f"template {describe(self.text)}: {error}") from None
        pieces: list[str] = []
        seen: set[str] = set()
        for index, part in enumerate(self.parts):
            if isinstance(part, str):
                pieces.append(re.escape(part))
            elif isinstance(part, _Wildcard):
                pieces.append(part.pattern)
            elif isinstance(part, _Affine):
                pieces.append(rf"(?P<_{index}>-?\d+)")
            elif part.name in seen:
                pieces.append(f"(?P={part.name})")
            else:
                seen.add(part.name)
                pieces.append(f"(?P<{part.name}>{part.pattern})")
        return re.compile("".join(pieces))

    @cached_property
    def landmarks(self) -> tuple[str, str, str]:
        """What every match begins with, ends with, and has somewhere: looking for these spares most of the matching."""
        if self.is_regex:
            return "", "", ""
        first, last = self.parts[0], self.parts[-1]
        inner = max((part for part in self.parts[1:-1] if isinstance(part, str)), key=len, default="")
        return first if isinstance(first, str) else "", last if isinstance(last, str) else "", inner

    def match(self, name: str) -> dict[str, str] | None:
        """The captures of a whole name, or None."""
        prefix, suffix, inner = self.landmarks
        if not (inner in name and name.startswith(prefix) and name.endswith(suffix)):
            return None
        return self.captured(name)

    def captured(self, name: str) -> dict[str, str] | None:
        """The captures of a whole name that has the landmarks, or None."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        for key, choices in self._choices:
            if found[key] not in choices:
                return None
        captures = found.groupdict()
        if None in captures.values():
            captures = {key: value for key, value in captures.items() if value is not None}
        return self._solved(captures) if self.has_affine else captures

    @cached_property
    def _choices(self) -> list[tuple[str, frozenset[str]]]:
        return [(name, frozenset(choices)) for name, choices in self.captures.items() if choices is not None]

    @cached_property
    def has_affine(self) -> bool:
        """Whether an index is computed."""
        return any(isinstance(part, _Affine) for part in self.parts)

    def _solved(self, found: Mapping[str, str]) -> dict[str, str] | None:
        """The captures behind the affine indices; None where no integer of at least 0 gives them."""
        captures = {key: value for key, value in found.items() if not key.startswith("_")}
        for index, part in enumerate(self.parts):
            if isinstance(part, _Affine):
                text = found[f"_{index}"]
                value, rest = divmod(int(text) - part.shift, part.scale)
                if rest or value < 0 or not _CANONICAL.fullmatch(text):
                    return None
                if captures.setdefault(part.name, str(value)) != str(value):
                    return None
        return captures

    def produce(self, captures: Mapping[str, str]) -> Iterator[str]:
        """The names it spells: one, or one per combination of the enumerations that `captures` leave open.

        Raises:
            PlanSyntaxError: A capture is open and enumerates nothing, or arithmetic meets a word.
        """
        for spelled in self.spellings(captures):
            yield spelled(captures)

    def spellings(self, known: Iterable[str]) -> list[Callable[[Mapping[str, str]], str]]:
        """What spells each of the names, once these captures have values.

        Raises:
            PlanSyntaxError: A capture is open and enumerates nothing.
        """
        free = {key: choices for key, choices in self.captures.items() if key not in known}
        for key, choices in free.items():
            if choices is None:
                raise PlanSyntaxError(f"template {describe(self.text)}: nothing gives {{{key}}} a value")
        chosen = [
            dict(zip(free, values, strict=True)) for values in itertools.product(*(c or () for c in free.values()))
        ]
        if self.has_affine or self.has_wildcard:
            return [partial(self._computed, values) for values in chosen]
        return ["".join(self._formatted(part, values) for part in self.parts).__mod__ for values in chosen]

    def _formatted(self, part: _Part, values: Mapping[str, str]) -> str:
        if isinstance(part, _Capture) and part.name not in values:
            return f"%({part.name})s"
        assert not isinstance(part, _Affine | _Wildcard)
        return (part if isinstance(part, str) else values[part.name]).replace("%", "%%")

    def _computed(self, values: Mapping[str, str], others: Mapping[str, str]) -> str:
        captures = {**others, **values}
        pieces: list[str] = []
        for part in self.parts:
            if isinstance(part, str):
                pieces.append(part)
            elif isinstance(part, _Capture):
                pieces.append(captures[part.name])
            elif isinstance(part, _Affine):
                value = captures[part.name]
                if not value.isdigit() or not _CANONICAL.fullmatch(value):
                    raise PlanSyntaxError(
                        f"template {describe(self.text)}: {{{part.name}}} is {describe(value)}, "
                        "not an integer to compute with",
                        hint=f"Write {{{part.name}:int}} where it is matched.",
                    )
                index = part.scale * int(value) + part.shift
                if index < 0:
                    raise PlanSyntaxError(
                        f"template {describe(self.text)}: {{{part.name}}} = {value} gives the index {index}"
                    )
                pieces.append(str(index))
            else:
                raise PlanSyntaxError(
                    f"template {describe(self.text)}: * has no name to produce from", hint="Name it: {rest**}."
                )
        return "".join(pieces)


def constrained(template: Template, others: Iterable[Template]) -> Template:
    """The template with what others say of the captures it leaves open: `{x}` and `{x=a|b}` make `{x=a|b}`."""
    written: dict[str, str] = {}
    for other in others:
        for match in _TOKEN.finditer(other.text):
            found = _CAPTURE.fullmatch((match[1] or "").strip())
            if found is not None and found["kind"]:
                written.setdefault(found["name"], found[0])
    if template.is_literal:
        return template

    def spelled(match: re.Match[str]) -> str:
        found = _CAPTURE.fullmatch((match[1] or "").strip())
        if found is None or found["kind"] or found["name"] not in written:
            return match[0]
        return "{" + written[found["name"]] + "}"

    return Template(_TOKEN.sub(spelled, template.text))
