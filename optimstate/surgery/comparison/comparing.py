"""Diff: what differs between two checkpoints, by name and across containers. Every leaf of both trees is compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import eq
from typing import TYPE_CHECKING, Any, cast

from optimstate.describe import describe, few
from optimstate.errors import UsageError
from optimstate.formats.protocol import Document
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Progress
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.state.tied import tied_names
from optimstate.surgery.comparison.contents import relative_difference, renames
from optimstate.surgery.comparison.differences import Change, ChangeKind, DiffReport
from optimstate.surgery.comparison.sides import Side, pairs
from optimstate.surgery.comparison.views import MEMBERS, OTHER, Key, View
from optimstate.surgery.leaves import Shape, checksum_of_number, same
from optimstate.surgery.opening import opening
from optimstate.surgery.shown import form_of, plain
from optimstate.surgery.viewing import template_of
from optimstate.tensors.lazy import LazyTensor, announced, read_numbers
from optimstate.tree import nodes

if TYPE_CHECKING:
    from optimstate.plan.language.template import Template

__all__ = ["Change", "DiffReport", "diff", "model_tensors"]


def diff(
    left: Place | Document,
    right: Place | Document,
    *,
    headers: bool = False,
    name: str | None = None,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare everything in two checkpoints, by name.

    Sections are paired by kind and path, else by kind and order. Parameters of an optimizer without names get those
    that the weights beside it determine. What is in no section is compared by path.

    Args:
        left: A file or folder, or what `open_checkpoint` made of it.
        right: Another, of any container.
        headers: Compare names, shapes, dtypes and plain values only; tensors of equal name are then not read.
        name: Compare only parameters and entries whose names this template of the plan language matches.
        tolerance: Do not report tensors whose relative difference, by the 2-norm, is at most this, and numbers alike.
        progress: Called with the bytes of both sides compared since the last call.

    Raises:
        CheckpointError: One of them cannot be read.
        PlanSyntaxError: The template cannot be parsed.
        UsageError: The template matches no name, or the tolerance is no finite number from 0 up.
    """
    if not 0 <= tolerance < float("inf"):
        raise UsageError(f"tolerance is {tolerance}, it must be a finite number from 0 up")
    template = template_of(name)
    paths = [side.path if isinstance(side, Document) else located(side) for side in (left, right)]
    with opening(*paths):
        documents = [
            side if isinstance(side, Document) else open_checkpoint(path)
            for side, path in zip((left, right), paths, strict=True)
        ]
        _announce(documents, headers=headers)
        comparison = _Comparison(headers, template, tolerance, progress)
        sides = Side(documents[0]), Side(documents[1])
        for mine, theirs in pairs(*sides):
            comparison.compare_sections(mine, theirs, sides)
        rest = [View.of_rest(side.document.tree, side.sections) for side in sides]
        comparison.compare(OTHER, *rest)
        if not any((rest[0].tensors, rest[1].tensors)):
            comparison.drop_if_equal(OTHER)
        comparison.refuse_unmatched()
        return comparison.report(*map(str, paths))


def _announce(documents: Sequence[Document], *, headers: bool) -> None:
    """Say what will be read of both sides: of headers alone, numbers; of these none whose checksums say the same."""
    tensors = [node for side in documents for node in nodes(side.tree) if isinstance(node, LazyTensor)]
    numbers = [tensor for tensor in tensors if tensor.numel == 1]
    if any(checksum_of_number(number) is None for number in numbers):
        announced(numbers if headers else tensors)
        read_numbers(numbers)
    elif not headers:
        announced(tensor for tensor in tensors if tensor.numel != 1)


class _Comparison:
    def __init__(self, headers: bool, template: Template | None, tolerance: float, progress: Progress | None) -> None:
        self.headers, self.tolerance = headers, tolerance
        self.template = template
        self.progress = progress or (lambda _: None)
        self.changes: list[Change] = []
        self.notes: list[str] = []
        self.equal: dict[str, int] = {}
        self.within = 0
        self.matched = False

    def report(self, left: str, right: str) -> DiffReport:
        """What was found."""
        return DiffReport(
            left,
            right,
            sum(self.equal.values()),
            not self.headers,
            tuple(self.changes),
            tuple(dict.fromkeys(self.notes)),
            self.within,
            dict(self.equal),
        )

    def drop_if_equal(self, label: str) -> None:
        """Leave out a part without tensors and differences."""
        if not any(change.section == label for change in self.changes):
            self.equal.pop(label, None)

    def compare_sections(self, left: Section | None, right: Section | None, sides: Sequence[Side]) -> None:
        """Compare two sections, one of which may be missing."""
        section = left or right
        assert section is not None
        label = f"{section.kind} at {section.label}"
        names = self._names(label, (left, right), sides) if section.kind == "optimizer" else (None, None)
        mine, theirs = View.of(left, names[0]), View.of(right, names[1])
        if left is not None and right is not None and mine.prefix != theirs.prefix and self.template is None:
            self._add(label, "prefix", ("all names", ""), _begin(mine.prefix), _begin(theirs.prefix))
        if left is not None and right is not None and left.path != right.path and self.template is None:
            self._add(label, "moved", (section.kind, ""), left.label, right.label)
        if left is not None and right is not None:
            View.add_attributes((mine, left), (theirs, right))
        self.compare(label, mine, theirs)
        if left is not None and right is not None and left.kind == "model":
            self._compare_sharing(label, mine.tensors, theirs.tensors)

    def _names(
        self, label: str, pair: Sequence[Section | None], sides: Sequence[Side]
    ) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        """The names of optimizers that have none, where the two would be compared by position otherwise."""
        anonymous = [one is not None and not one.optimizer().is_named for one in pair]
        if not any(anonymous) or None in pair:
            return None, None
        states = [one.optimizer() for one in pair if one is not None]
        found_names: list[tuple[str, ...] | str | None] = [
            side.names_of(one) if unnamed and one is not None else None
            for one, side, unnamed in zip(pair, sides, anonymous, strict=True)
        ]
        if any(isinstance(names, str) for names in found_names):
            if not all(anonymous) and _alike_by_position(*states):
                names = tuple(str(name) for state in states if state.is_named for _, name, _ in state.parameters())
                self.notes.append(f"{label}: no parameter names on one side; concluded from the order of the other's")
                return (names, None) if anonymous[0] else (None, names)
            if all(anonymous):
                self.notes.append(f"{label}: no parameter names on either side; compared by position")
            else:
                why = "; ".join(names for names in found_names if isinstance(names, str))
                self.notes.append(f"{label}: compared by position, as names are not determined: {why}")
            return None, None
        which = " and ".join(word for word, unnamed in zip(("left", "right"), anonymous, strict=True) if unnamed)
        self.notes.append(f"{label}: no parameter names on the {which} side; concluded from the weights beside it")
        return cast("tuple[tuple[str, ...] | None, tuple[str, ...] | None]", tuple(found_names))

    # --- one part ---------------------------------------------------------------------------------------------------

    def compare(self, label: str, mine: View, theirs: View) -> None:
        """Compare all leaves of a part."""
        self.equal.setdefault(label, 0)
        tensors = [self._chosen(view.tensors) for view in (mine, theirs)]
        values = [self._chosen(view.values) for view in (mine, theirs)]
        renamed = self._compare_tensors(label, *tensors)
        self._compare_values(label, _followed(values[0], renamed), values[1])

    def _chosen(self, found: dict[Key, Any]) -> dict[Key, Any]:
        if self.template is None:
            return found
        chosen = {key: value for key, value in found.items() if self.template.match(key[0]) is not None}
        self.matched = self.matched or bool(chosen)
        return chosen

    def refuse_unmatched(self) -> None:
        """Refuse a template that matched nothing on either side.

        Raises:
            UsageError: It did.
        """
        if self.template is not None and not self.matched:
            raise UsageError(f"no name on either side matches {describe(self.template.text)}")

    def _compare_tensors(self, label: str, mine: dict[Key, Any], theirs: dict[Key, Any]) -> dict[Key, Key]:
        """Note the differences; gives the renamed ones."""
        others: Iterable[Any] = theirs.values()
        removed: dict[Key, Any] = {}
        added: dict[Key, Any] = {}
        if len(mine) != len(theirs) or not all(map(eq, mine, theirs)):  # else nothing needs to be looked up by its key
            others = map(theirs.get, mine)
            removed = {key: value for key, value in mine.items() if key not in theirs}
            added = {key: value for key, value in theirs.items() if key not in mine}
        renamed = {} if self.headers else renames(removed, added, self.progress)
        taken = set(renamed.values())
        for (key, tensor), other in zip(mine.items(), others, strict=True):
            if other is not None:
                self._compare_tensor(label, key, tensor, other)
                if not self.headers:
                    self.progress(getattr(tensor, "nbytes", 0) + getattr(other, "nbytes", 0))
            elif key in renamed:
                self._add(label, "renamed", key, _named(key), _named(renamed[key]))
            else:
                self._add(label, "removed", key, form_of(tensor), "")
        for key, tensor in added.items():
            if key not in taken:
                self._add(label, "added", key, "", form_of(tensor))
        return renamed

    def _compare_tensor(self, label: str, key: Key, a: Any, b: Any) -> None:
        kind: ChangeKind
        if not isinstance(a, LazyTensor) or not isinstance(b, LazyTensor):
            if same(a, b):
                self.equal[label] += 1
            else:
                self._add(label, "changed", key, form_of(a), form_of(b))
            return
        if a.shape != b.shape:
            self._add(label, "reshaped", key, form_of(a), form_of(b))
            return
        if a.dtype != b.dtype:
            kind = "retyped"
        elif self.headers or same(a, b):
            self.equal[label] += 1
            return
        else:
            kind = "changed"
        relative = None if self.headers else relative_difference(a, b)
        if kind == "changed" and self.tolerance and relative is not None and relative <= self.tolerance:
            self.within += 1
            return
        self._add(label, kind, key, form_of(a), form_of(b), relative)

    def _compare_values(self, label: str, mine: dict[Key, Any], theirs: dict[Key, Any]) -> None:
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            absent = key not in mine or key not in theirs
            a, b = mine.get(key), theirs.get(key)
            if absent and any(isinstance(value, Shape) and value.size for value in (a, b)):
                continue  # what is in it is listed
            if not absent and same(a, b):
                self.equal[label] += isinstance(a, LazyTensor)
            elif not absent and self._is_close(a, b):
                self.within += 1
            elif not absent and isinstance(a, LazyTensor) and isinstance(b, LazyTensor) and a.dtype != b.dtype:
                self._add(label, "retyped", key, form_of(a), form_of(b))
            elif not absent and key[1] == MEMBERS:
                self._add(label, "option", key, *_members(cast("Sequence[str]", a), cast("Sequence[str]", b)))
            else:
                left, right = _texts(a, b) if not absent else (_shown(key in mine, a), _shown(key in theirs, b))
                self._add(label, "option", key, left, right)

    def _is_close(self, a: Any, b: Any) -> bool:
        if not self.tolerance:
            return False
        x, y = plain(a), plain(b)
        return type(x) is type(y) is float and abs(x - y) <= self.tolerance * abs(x)

    def _add(
        self, label: str, kind: ChangeKind, key: Key, left: str, right: str, relative: float | None = None
    ) -> None:
        self.changes.append(Change(label, kind, _named(key), left, right, relative, key[1]))

    def _compare_sharing(self, label: str, mine: Mapping[Key, Any], theirs: Mapping[Key, Any]) -> None:
        for side, opposite in ((mine, theirs), (theirs, mine)):
            for first, *rest in tied_names(side):
                for key in rest:
                    if first in opposite and key in opposite and not _share(opposite[first], opposite[key]):
                        sides = ("shared", "separate") if opposite is theirs else ("separate", "shared")
                        self._add(label, "sharing", (f"{first[0]}, {key[0]}", ""), *sides)


def _alike_by_position(a: OptimizerState, b: OptimizerState) -> bool:
    """Whether two optimizers have as many parameters in each group, with slots of the same shapes."""
    if [len(group.params) for group in a.groups] != [len(group.params) for group in b.groups]:
        return False
    return all(_shapes(x) == _shapes(y) for (_, _, x), (_, _, y) in zip(a.parameters(), b.parameters(), strict=True))


def _shapes(slots: Mapping[str, Any] | None) -> dict[str, Any]:
    return {str(slot): getattr(value, "shape", None) for slot, value in (slots or {}).items()}


def _begin(prefix: str) -> str:
    return f"begin with {prefix}" if prefix else "have no wrapper prefix"


def _named(key: Key) -> str:
    return f"{key[0]} {key[1]}" if key[1] else key[0]


def _shown(there: bool, value: Any) -> str:
    return str(plain(value) if not isinstance(value, Shape) else value) if there else "(absent)"


def _texts(a: Any, b: Any) -> tuple[str, str]:
    """Both values; where they look alike, with their types, or a note that what is not shown differs."""
    left, right = _shown(True, a), _shown(True, b)
    if left == right and type(a).__name__ == type(b).__name__:
        return left, f"{right} of other content"
    if left == right:
        return f"{left} ({type(a).__name__})", f"{right} ({type(b).__name__})"
    return left, right


def _members(a: Sequence[str], b: Sequence[str]) -> tuple[str, str]:
    """What only one of two groups has; if nothing, that their order differs."""
    sides = []
    for own, other in ((a, set(b)), (b, set(a))):
        only = [name for name in own if name not in other]
        sides.append(f"{len(own)} parameters" + (f", only here {few(only)}" if only else ""))
    if set(a) == set(b):
        first = next(index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        sides = [f"{side}, in another order: {names[first]} at {first}" for side, names in zip(sides, (a, b))]  # noqa: B905
    return sides[0], sides[1]


def _followed(values: dict[Key, Any], renamed: Mapping[Key, Key]) -> dict[Key, Any]:
    """The values of an optimizer's slots under the new names of parameters whose other slots were renamed."""
    names = {old[0]: new[0] for old, new in renamed.items() if old[1] == new[1] and old[1]}
    if not names:
        return values
    moved: dict[Key, Any] = {}
    for (owner, slot), value in values.items():
        if slot == MEMBERS and isinstance(value, tuple):
            value = tuple(names.get(name, name) for name in value)
        moved[names.get(owner, owner), slot] = value
    return moved


def _share(a: Any, b: Any) -> bool:
    return isinstance(a, LazyTensor) and isinstance(b, LazyTensor) and a.storage is b.storage


def model_tensors(tree: Any) -> dict[str, LazyTensor]:
    """The tensors of the models in a checkpoint, without wrapper prefixes."""
    views = [View.of(section) for section in find_sections(tree) if section.kind == "model"]
    return {key[0]: t for view in views for key, t in view.tensors.items() if isinstance(t, LazyTensor)}
