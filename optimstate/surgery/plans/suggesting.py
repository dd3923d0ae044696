"""Suggest: the plan that turns one checkpoint's names and shapes into another's. Torch is not imported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from optimstate.errors import CheckpointError, MigrationError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Progress
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve import suggest as solve
from optimstate.plan.solve.deciding import decided
from optimstate.plan.solve.known import read as read_layouts
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.sections import find_sections
from optimstate.surgery.comparison.comparing import model_tensors
from optimstate.surgery.comparison.contents import by_content
from optimstate.surgery.opening import opening
from optimstate.surgery.plans.beyond_names import also_different, other_optimizers
from optimstate.surgery.plans.head_sizes import head_size
from optimstate.surgery.plans.inverting import kind_of, merged, names_of
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import families, plural
from optimstate.surgery.writing.ordering import wrong_positions
from optimstate.tensors.lazy import LazyTensor

__all__ = ["Alternatives", "SuggestReport", "SuggestedChoice", "SuggestedRule", "suggest"]

_SHOWN = 4
"""So many possibilities are printed; JSON has all."""


_ROWS_UP_TO = 1 << 28
"""Bytes of a tensor whose rows are compared one by one."""
_PIECES_UP_TO = 1 << 20
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class SuggestedRule(Record):
    """A rule as text, how sure it is (from 0 to 1), why, and its table in a plan file."""

    rule: str
    confidence: float
    reason: str
    toml: str


class SuggestedChoice(Record):
    """One of the possibilities of something open: its rules as a plan file, how likely it is, and why."""

    toml: str
    confidence: float
    reason: str


class Alternatives(Record):
    """Something that names and shapes leave open.

    Attributes:
        about: What, and what would decide.
        choices: The possibilities, the likeliest first. One without rules leaves names as they are.
        proposed: Whether the first of them is in the plan; otherwise none is.
    """

    about: str
    choices: tuple[SuggestedChoice, ...]
    proposed: bool


class SuggestReport(VerbReport):
    """A proposed plan.

    Attributes:
        rules: In order.
        missing: Names of the target that nothing explains.
        unused: Names of the source that nothing takes; the plan leaves them as they are.
        problems: Why the plan does not fit the source as it stands; empty where it does.
        positions: Where an optimizer stands in another order or other param groups than the target: torch loads it by
            position, and would give state to the wrong parameters or refuse.
        optimizers: Optimizers of the target with another algorithm or other options, or another number of them.
        also: Other differences, which a plan does not have to remove.
        options: What names and shapes leave open, and what would decide.
        alternatives: Those of them whose possibilities can be listed.
        plan: The plan as a file, with the confidence and the reason of each rule beside it.
    """

    source: str
    target: str
    rules: tuple[SuggestedRule, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    problems: tuple[Problem, ...]
    positions: tuple[Problem, ...]
    options: tuple[str, ...]
    alternatives: tuple[Alternatives, ...]
    plan: str
    optimizers: tuple[Problem, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the plan makes every name of the target, in its order and groups as far as they are known."""
        return not (self.missing or self.problems or self.positions or self.optimizers)

    VERB = "plan suggest"

    def _json(self) -> dict[str, Any]:
        return {**self._asdict(), "complete": self.complete}

    def _lines(self) -> Iterator[str]:
        for rule in self.rules:
            yield f"{rule.confidence:.2f}  {rule.rule}"
            yield f"      {rule.reason}"
        for names, message in (
            (self.missing, f"nothing explains these of {self.target}:"),
            (self.unused, f"nothing takes these of {self.source}; they stay, unless a rule drops them:"),
        ):
            if names:
                yield message
                for line in families(names):
                    yield f"  {line}"
        for problem in self.problems:
            yield f"does not fit: {problem}"
        for problem in self.positions:
            yield f"by position: {problem}"
        for problem in self.optimizers:
            yield f"other: {problem}"
        for line in self.also:
            yield f"other: {line}"
        listed = {item.about: item for item in self.alternatives}
        for option in self.options:
            yield f"open: {option}"
            if option in listed:
                yield from _shown(listed[option])
        if not self.rules and not self.missing and not self.unused:
            nothing = not (self.positions or self.options or self.optimizers or self.also)
            yield "the same names and shapes" + (": nothing to do" if nothing else "")
        else:
            yield f"{plural(len(self.rules), 'rule')}, {plural(len(self.missing), 'name')} not explained"


def _shown(item: Alternatives) -> Iterator[str]:
    """The likeliest possibilities, as a plan has them."""
    for place, choice in enumerate(item.choices[:_SHOWN]):
        proposed = ", proposed" if item.proposed and not place else ""
        yield f"  {choice.confidence:.2f}  {choice.reason}{proposed}"
        lines = [line for line in choice.toml.splitlines() if line and line != "[[rule]]"]
        yield from (f"        {line}" for line in lines or ["(no rule)"])
    if len(item.choices) > _SHOWN:
        yield f"  and {len(item.choices) - _SHOWN} more (--json lists them)"


def suggest(
    source: Place,
    target: Place,
    *,
    headers: bool = False,
    layouts: str | PathLike[str] | None = None,
    keeps: Callable[[Plan], bool] | None = None,
    progress: Progress | None = None,
) -> SuggestReport:
    """Propose the plan that turns the names and shapes of one checkpoint into those of another.

    Args:
        source: The checkpoint to be moved: a file or folder.
        target: One of the new model; its weights alone are enough.
        headers: Compare names and shapes only. Otherwise tensors are read too, and those of equal content that no other
            has are taken for each other, which tells renames that shapes cannot tell.
        layouts: A file of further known layouts, of the form of `optimstate/plan/solve/known_layouts.toml`.
        keeps: Whether the new model computes with a plan what the old one does; it decides what names, shapes and
            contents leave open.
        progress: Called with the bytes read since the last call.

    Raises:
        CheckpointError: One of them cannot be read, or names no parameters.
        PlanError: There are too many possibilities for `keeps`.
        PlanSyntaxError: The file of layouts is not one.
    """
    known = read_layouts(Path(layouts)) if layouts is not None else None
    source, target = located(source), located(target)
    with opening(source, target):
        trees = [open_checkpoint(path).tree for path in (source, target)]
        old, new = (_model(tree, path) for tree, path in zip(trees, (source, target), strict=True))
        contents: list[dict[str, str]] = [{}, {}] if headers else _contents(trees, progress)
        rows = None if headers else _Rows(trees)
        sizes = {size for size in map(head_size, (source, target)) if size is not None}
        found = solve.suggest(
            old,
            new,
            old_contents=contents[0],
            new_contents=contents[1],
            rows=rows,
            head_dim=sizes.pop() if len(sizes) == 1 else None,
            known=known,
        )
        if keeps is not None:
            found = decided(found, old, keeps)
        rules = tuple(
            SuggestedRule(str(item.rule), item.confidence, item.reason, Plan((item.rule,)).to_toml())
            for item in found.rules
        )
        problems: tuple[Problem, ...] = ()
        positions: tuple[Problem, ...] = ()
        try:
            _, migration, _ = apply_plan(found.plan, trees[0])
            positions = tuple(wrong_positions(migration, trees[0], trees[1], set(found.missing), found.unused))
        except MigrationError as error:
            problems = error.problems
    sections = [find_sections(tree) for tree in trees]
    text = _suggested_file(source, target, rules, found, positions)
    alternatives = tuple(
        Alternatives(
            decision.about,
            tuple(
                SuggestedChoice(Plan(c.rules).to_toml() if c.rules else "", c.confidence, c.reason)
                for c in decision.choices
            ),
            decision.proposed,
        )
        for decision in found.decisions
    )
    return SuggestReport(
        str(source),
        str(target),
        rules,
        found.missing,
        found.unused,
        problems,
        positions,
        found.options,
        alternatives,
        text,
        tuple(other_optimizers(*sections)),
        tuple(also_different(*sections)),
    )


def _model(tree: Any, path: Place) -> dict[str, Shape]:
    """The parameters of the models in a checkpoint, or else of its optimizers, whose shapes are known."""
    names = names_of(tree)
    for kind in ("model", "optimizer"):
        found = merged({key: shapes for key, shapes in names.items() if kind_of(key) == kind})
        known = {name: shape for name, shape in found.items() if shape is not None}
        if known:
            return known
    what = "the shapes of its parameters are not known" if any(names.values()) else "it names no parameters"
    raise CheckpointError(what, path=path, hint="`optimstate inspect` shows what it holds.")


def _contents(trees: Sequence[Any], progress: Progress | None) -> list[dict[str, str]]:
    """For each side, digests by name of contents that exactly one name on each side has, whatever its shape."""
    found: list[dict[tuple[str, bytes], list[str]]] = []
    for tree in trees:
        side: dict[tuple[str, bytes], list[str]] = {}
        for (dtype, shape, digest), names in by_content(model_tensors(tree), progress).items():
            if prod(shape):
                side.setdefault((dtype, digest), []).extend(names)
        found.append(side)
    alike = [key for key, names in found[0].items() if len(names) == 1 and len(found[1].get(key, ())) == 1]
    return [{side[key][0]: key[1].hex() for key in alike} for side in found]


class _Rows:
    """Digests of the rows of the models' tensors."""

    def __init__(self, trees: Sequence[Any]) -> None:
        self._tensors = [model_tensors(tree) for tree in trees]
        self._known: dict[tuple[int, str, int], list[bytes] | None] = {}

    def __call__(self, side: int, name: str, dim: int) -> list[bytes] | None:
        """Digests of the rows of a tensor along a dimension; None for one that has none, or too many bytes."""
        key = side, name, dim
        if key not in self._known:
            tensor = self._tensors[side].get(name)
            self._known[key] = None if tensor is None else _row_digests(tensor, dim)
        return self._known[key]


def _row_digests(tensor: LazyTensor, dim: int) -> list[bytes] | None:
    shape = tensor.shape
    if dim >= len(shape) or not tensor.numel or tensor.nbytes > _ROWS_UP_TO:
        return None
    content = b"".join(tensor.chunks())
    size = len(content) // tensor.numel
    outer, count, inner = prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :]) * size
    rows: Iterator[bytes]
    if outer == 1:
        rows = (content[start : start + inner] for start in range(0, len(content), inner))
    elif inner in _FORMATS:
        elements = memoryview(content).cast(_FORMATS[inner])
        rows = (elements[start::count].tobytes() for start in range(count))
    elif outer * count <= _PIECES_UP_TO:
        starts = [range(start * inner, len(content), count * inner) for start in range(count)]
        rows = (b"".join(content[place : place + inner] for place in places) for places in starts)
    else:
        return None
    return [hashlib.blake2b(row, digest_size=16, person=tensor.dtype.encode()[:16]).digest() for row in rows]


def _suggested_file(
    source: Place,
    target: Place,
    rules: Sequence[SuggestedRule],
    found: solve.Suggestion,
    positions: Sequence[Problem],
) -> str:
    blocks = [
        _comment(f"From {source} to {target}."),
        *(_comment(f"{rule.confidence:.2f}: {rule.reason}") + rule.toml for rule in rules),
    ]
    for names, message in (
        (found.missing, "Nothing explains these of the target:"),
        (found.unused, "Nothing takes these of the source; they stay, unless a rule drops them:"),
        ([str(problem) for problem in positions], "Torch loads by position:"),
        (found.options, "Names and shapes leave open:"),
    ):
        if names:
            blocks.append(_comment(message) + "".join(_comment(f"  {name}") for name in names))
    return "\n".join(blocks)


def _comment(text: str) -> str:
    """A comment line of a TOML file; characters that comments may not contain are escaped."""
    return "# " + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) + "\n"
