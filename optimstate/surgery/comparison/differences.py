"""What `diff` reports: every difference, and the same folded for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from optimstate.record import Record, field
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import collapsed, joined, plural, readable, shown

__all__ = ["Change", "ChangeKind", "DiffReport", "counted_kinds"]

ChangeKind = Literal[
    "added", "removed", "renamed", "reshaped", "retyped", "changed", "option", "sharing", "prefix", "moved"
]

KINDS_SHOWN = 40  # folded lines of a part


class Change(Record):
    """One difference.

    Attributes:
        section: Which part of the checkpoints: `model`, `optimizer`, ... with its path, or `other entries`.
        kind: `renamed` is a tensor of equal content under another name; `reshaped` and `retyped` differ in shape and
            dtype; `changed` in content; `option` is a hyperparameter or another plain value; `sharing` is memory that
            tensors share on one side only; `prefix` is a wrapper's name before all names of one side; `moved` is a part
            that stands at another path.
        name: The name, on the left side where it is there, with its slot; the path of another entry.
        left: What the left side has.
        right: What the right side has.
        relative: Norm of the difference over norm of the left tensor, for `changed` tensors where it was computed.
        slot: The slot, which `name` ends with; empty where it has none.
    """

    section: str
    kind: ChangeKind
    name: str
    left: str
    right: str
    relative: float | None = None
    slot: str = ""

    def __str__(self) -> str:
        relative = "" if self.relative is None else f", relative difference {self.relative:.3g}"
        if self.kind == "added":
            return f"+ {self.name}  {self.right}"
        if self.kind == "removed":
            return f"- {self.name}  {self.left}"
        if self.kind == "renamed":
            return f"> {self.left} -> {self.right}  (equal content)"
        if self.kind == "changed" and self.left == self.right:
            return f"~ {self.name}  {self.left} changed{relative}"
        kind = "" if self.kind == "option" else f"{self.kind}: "
        return f"~ {self.name}  {kind}{shown(self.left)} -> {shown(self.right)}{relative}"


class DiffReport(VerbReport):
    """Every difference, and how many tensors are equal.

    Attributes:
        equal: How many tensors are equal.
        compared_contents: Whether tensors were read; else `equal` counts those whose dtypes and shapes are.
        notes: What was concluded, and what differs without being a difference of contents.
        within: How many tensors and numbers differ by no more than the tolerance that was given.
        equal_in: Of each part, how many tensors are equal.
    """

    left: str
    right: str
    equal: int
    compared_contents: bool
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    within: int = 0
    equal_in: Mapping[str, int] = field(default_factory=dict)

    VERB = "diff"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, params: bool = False, stat: bool = False) -> str:
        """The report for people: layers together, what differs most first.

        Args:
            params: A line for every difference, in the order of the files.
            stat: Only how many differences of each kind there are, a line for each part.
        """
        return joined(readable(self)._rows(params, stat))

    def _rows(self, params: bool, stat: bool) -> list[str]:
        lines: list[str] = []
        for section, changes in self._by_section().items():
            if stat:
                lines.append(f"{section}: {_counted(changes)}, {plural(self.equal_in.get(section, 0), 'tensor')} equal")
                continue
            if not changes:
                continue
            lines.append(section)
            if params:
                lines += [f"  {change}" for change in changes]
                continue
            folded = _folded(changes)
            lines += [f"  {line}" for line in folded[:KINDS_SHOWN]]
            if len(folded) > KINDS_SHOWN:
                lines.append(f"  ... and {len(folded) - KINDS_SHOWN} more kinds of differences (--params lists all)")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(self._summary())
        return lines

    def _by_section(self) -> dict[str, list[Change]]:
        found: dict[str, list[Change]] = {section: [] for section in self.equal_in}
        for change in self.changes:
            found.setdefault(change.section, []).append(change)
        return found

    def _summary(self) -> str:
        within = f", {self.within:,} within the tolerance" if self.within else ""
        equal = f"{plural(self.equal, 'tensor')} {'equal' if self.compared_contents else 'alike'}{within}"
        unread = "" if self.compared_contents else "; contents were not compared"
        return f"{equal}, {_counted(self.changes)}{unread}"


def counted_kinds(changes: Sequence[Change]) -> list[str]:
    """How many differences of each kind there are, in words."""
    kinds = Counter(change.kind for change in changes)
    words = {"option": "other values changed", "sharing": "shared differently"}
    return [f"{count:,} {words.get(kind, kind)}" for kind, count in kinds.items()]


def _counted(changes: Sequence[Change]) -> str:
    return ", ".join(counted_kinds(changes)) or "no differences"


_FIRST = ("moved", "prefix", "removed", "added", "renamed", "reshaped", "retyped", "changed", "sharing", "option")


def _folded(changes: list[Change]) -> list[str]:
    """Changes of names that differ in their indices alone, as one line; of contents the largest first.

    Equal changes of a slot, as steps that went on, are one line for all names.
    """
    together: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        key: tuple[str, ...]
        if change.kind == "renamed":
            key = (change.kind, collapsed(change.name), collapsed(change.right))
        elif change.kind == "option" and change.slot:
            key = (change.kind, change.slot, change.left, change.right)
        else:
            key = (change.kind, collapsed(change.name))
        together.setdefault(key, []).append(change)
    ranked = sorted(together.values(), key=lambda found: (_FIRST.index(found[0].kind), -_largest(found)))
    return [line for found in ranked for line in _together(found)]


def _largest(changes: list[Change]) -> float:
    return max((change.relative for change in changes if change.relative is not None), default=0.0)


def _together(changes: list[Change]) -> Iterator[str]:
    first = changes[0]
    if len(changes) == 1:
        yield str(first)
        return
    name, times = collapsed(first.name), f"x {len(changes):,}"
    if len({collapsed(change.name) for change in changes}) > 1:
        name = first.slot
    if first.kind == "renamed":
        yield f"> {collapsed(first.left)} -> {collapsed(first.right)}  {times}  (equal content)"
    elif first.kind in ("added", "removed"):
        sides = [change.left or change.right for change in changes]
        yield f"{'+' if first.kind == 'added' else '-'} {name}  {times}  {_alike(sides)}"
    elif first.kind == "changed":
        yield f"~ {name}  {times}  {_alike([change.left for change in changes])} changed{_range(changes)}"
    else:
        pairs = Counter((shown(change.left), shown(change.right)) for change in changes)
        kind = "" if first.kind == "option" else f"{first.kind}: "
        for (left, right), count in pairs.most_common(3):
            yield f"~ {name}  x {count:,}  {kind}{left} -> {right}{_range(changes) if len(pairs) == 1 else ''}"
        if len(pairs) > 3:
            yield f"~ {name}  x {len(changes) - sum(n for _, n in pairs.most_common(3)):,}  {kind}other values"


def _alike(sides: list[str]) -> str:
    """What all have in common, or the first, with a note that others differ."""
    kinds = dict.fromkeys(sides)
    return sides[0] if len(kinds) == 1 else f"{sides[0]} and {plural(len(kinds) - 1, 'other shape')}"


def _range(changes: list[Change]) -> str:
    numbers = [change.relative for change in changes if change.relative is not None]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return f", relative difference {high:.3g}" + ("" if f"{low:.3g}" == f"{high:.3g}" else f" to {low:.3g}")
