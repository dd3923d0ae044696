"""Diff: what differs between two checkpoints, by name and across containers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Progress
from optimstate.state.names import wrapper_prefix
from optimstate.state.sections import Section, find_sections, tied_names
from optimstate.surgery.inspecting import describe, plain
from optimstate.surgery.reports import opening, to_json
from optimstate.surgery.text import plural, shown
from optimstate.tensors.lazy import LazyTensor

__all__ = ["Change", "DiffReport", "by_content", "diff", "model_tensors"]

ChangeKind = Literal["added", "removed", "renamed", "reshaped", "retyped", "changed", "option", "sharing"]


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        section: Which part of the checkpoints: `model`, `optimizer`, ... with its path.
        kind: `renamed` is a tensor of equal content under another name; `reshaped` and `retyped` differ in shape and
            dtype; `changed` in content; `option` is a hyperparameter or another plain value; `sharing` is memory that
            tensors share on one side only.
        name: The name, on the left side where it is there.
        left: What the left side has.
        right: What the right side has.
        relative: Norm of the difference over norm of the left tensor, for `changed` tensors where it was computed.
    """

    section: str
    kind: ChangeKind
    name: str
    left: str
    right: str
    relative: float | None = None


@dataclass(frozen=True)
class DiffReport:
    """Every difference, and how many tensors are equal."""

    left: str
    right: str
    equal: int
    compared_contents: bool
    changes: tuple[Change, ...]

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("diff", asdict(self))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        section = ""
        for change in self.changes:
            if change.section != section:
                section = change.section
                yield section
            relative = "" if change.relative is None else f", relative difference {change.relative:.3g}"
            sides = {
                "added": f"+ {change.name}  {change.right}",
                "removed": f"- {change.name}  {change.left}",
                "renamed": f"> {change.left} -> {change.right}  (equal content)",
            }
            other = f"~ {change.name}  {change.kind}: {shown(change.left)} -> {shown(change.right)}{relative}"
            yield f"  {sides.get(change.kind, other)}"
        kinds = Counter(change.kind for change in self.changes)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no differences"
        yield f"{plural(self.equal, 'tensor')} {'equal' if self.compared_contents else 'alike'}, {counts}"


def diff(left: str | Path, right: str | Path, *, headers: bool = False, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints by name.

    Parts are paired by kind and path, else by kind and order. Wrapper prefixes that all names share are ignored.

    Args:
        left: A file or folder.
        right: Another, of any container.
        headers: Compare names, shapes, dtypes and plain values only; tensors of equal name are then not read.
        progress: Called with the bytes of both sides compared since the last call.

    Raises:
        CheckpointError: One of them cannot be read.
    """
    with opening(left):
        a, b = open_checkpoint(left), open_checkpoint(right)
        comparison = _Comparison(headers, progress)
        for mine, theirs in _pairs(find_sections(a.tree), find_sections(b.tree)):
            comparison.compare(mine, theirs)
        return DiffReport(str(left), str(right), comparison.equal, not headers, tuple(comparison.changes))


def _pairs(left: list[Section], right: list[Section]) -> Iterator[tuple[Section | None, Section | None]]:
    rest = list(right)
    unpaired: list[Section] = []
    for section in left:
        same = next((other for other in rest if (other.kind, other.path) == (section.kind, section.path)), None)
        if same is None:
            unpaired.append(section)
        else:
            rest.remove(same)
            yield section, same
    for section in unpaired:
        alike = next((other for other in rest if other.kind == section.kind), None)
        if alike is not None:
            rest.remove(alike)
        yield section, alike
    for other in rest:
        yield None, other


class _View:
    """A section as named tensors and plain values."""

    def __init__(self, section: Section | None) -> None:
        self.tensors: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        if section is None:
            return
        if section.kind == "optimizer":
            self._read_optimizer(section)
        elif section.kind == "scheduler":
            fields = section.node if isinstance(section.node, Mapping) else section.node.state
            self.values = {str(key): plain(value) for key, value in fields.items()}
        else:
            found = section.tensors()
            prefix = wrapper_prefix([name for name in found if name != "n_averaged"])
            self.tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def _read_optimizer(self, section: Section) -> None:
        state = section.optimizer()
        names = [name for _, name, _ in state.parameters() if name is not None]
        prefix = wrapper_prefix(names)
        for position, (_, name, slots) in enumerate(state.parameters()):
            label = f"#{position}" if name is None else name.removeprefix(prefix)
            for slot, value in (slots or {}).items():
                if isinstance(value, LazyTensor) and value.numel != 1:
                    self.tensors[f"{label} {slot}"] = value
                else:
                    self.values[f"{label} {slot}"] = plain(value)
        for index, group in enumerate(state.groups):
            for key, value in group.options.items():
                self.values[f"group {index} {key}"] = plain(value)


class _Comparison:
    def __init__(self, headers: bool, progress: Progress | None) -> None:
        self.headers, self.progress = headers, progress or (lambda _: None)
        self.changes: list[Change] = []
        self.equal = 0

    def compare(self, left: Section | None, right: Section | None) -> None:
        shown = left or right
        assert shown is not None
        label = f"{shown.kind} at {shown.label}"
        mine, theirs = _View(left), _View(right)
        renamed = self._compare_tensors(label, mine.tensors, theirs.tensors)
        self._compare_values(label, _followed(mine.values, renamed), theirs.values)
        if left is not None and right is not None and left.kind == "model":
            self._compare_sharing(label, mine.tensors, theirs.tensors)

    def _compare_tensors(self, label: str, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
        """Note the differences; gives the renamed ones."""
        removed = [name for name in mine if name not in theirs]
        added = [name for name in theirs if name not in mine]
        renamed = (
            {}
            if self.headers
            else _renames({n: mine[n] for n in removed}, {n: theirs[n] for n in added}, self.progress)
        )
        for name, tensor in mine.items():
            if name in renamed:
                self.changes.append(Change(label, "renamed", name, name, renamed[name]))
            elif name not in theirs:
                self.changes.append(Change(label, "removed", name, describe(tensor), ""))
            else:
                self._compare_tensor(label, name, tensor, theirs[name])
                self.progress(getattr(tensor, "nbytes", 0) + getattr(theirs[name], "nbytes", 0))
        for name in added:
            if name not in renamed.values():
                self.changes.append(Change(label, "added", name, "", describe(theirs[name])))
        return renamed

    def _compare_tensor(self, label: str, name: str, a: Any, b: Any) -> None:
        if not isinstance(a, LazyTensor) or not isinstance(b, LazyTensor):
            if plain(a) != plain(b):
                self.changes.append(Change(label, "changed", name, describe(a), describe(b)))
            return
        if a.shape != b.shape:
            self.changes.append(Change(label, "reshaped", name, describe(a), describe(b)))
        elif a.dtype != b.dtype:
            self.changes.append(Change(label, "retyped", name, describe(a), describe(b), _relative(a, b, self.headers)))
        elif not self.headers and any(x != y for x, y in zip(a.chunks(), b.chunks(), strict=True)):
            self.changes.append(Change(label, "changed", name, describe(a), describe(b), _relative(a, b)))
        else:
            self.equal += 1

    def _compare_values(self, label: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            absent = object()
            a, b = mine.get(name, absent), theirs.get(name, absent)
            if a != b and not (a != a and b != b):
                left, right = ("(absent)" if value is absent else str(value) for value in (a, b))
                self.changes.append(Change(label, "option", name, left, right))

    def _compare_sharing(self, label: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
        for names, other in ((tied_names(mine), theirs), (tied_names(theirs), mine)):
            for first, *rest in names:
                for name in rest:
                    if first in other and name in other and not _share(other[first], other[name]):
                        left, right = ("shared", "separate") if other is theirs else ("separate", "shared")
                        self.changes.append(Change(label, "sharing", f"{first}, {name}", left, right))


def _followed(values: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The values of an optimizer's slots under the new names of parameters whose other slots were renamed."""
    names: dict[str, str] = {}
    for old, new in renamed.items():
        parameter, _, slot = old.rpartition(" ")
        if parameter and new.endswith(f" {slot}"):
            names[parameter] = new.removesuffix(f" {slot}")
    moved: dict[str, Any] = {}
    for key, value in values.items():
        parameter, _, slot = key.rpartition(" ")
        moved[f"{names[parameter]} {slot}" if parameter in names else key] = value
    return moved


def _share(a: Any, b: Any) -> bool:
    return isinstance(a, LazyTensor) and isinstance(b, LazyTensor) and a.storage is b.storage


def _renames(removed: dict[str, Any], added: dict[str, Any], progress: Progress) -> dict[str, str]:
    """Pairs of equal type, shape and content; content that several tensors have (zeros, ones) decides nothing."""
    kinds = {(t.dtype, t.shape) for t in added.values() if isinstance(t, LazyTensor)}
    mine = by_content(_of_kinds(removed, kinds), progress)
    if not mine:
        return {}
    kinds = {(removed[name].dtype, removed[name].shape) for names in mine.values() for name in names}
    theirs = by_content(_of_kinds(added, kinds), progress)
    return {
        names[0]: theirs[key][0] for key, names in mine.items() if len(names) == 1 and len(theirs.get(key, ())) == 1
    }


def _of_kinds(tensors: dict[str, Any], kinds: set[tuple[str, tuple[int, ...]]]) -> dict[str, LazyTensor]:
    return {n: t for n, t in tensors.items() if isinstance(t, LazyTensor) and (t.dtype, t.shape) in kinds}


def model_tensors(tree: Any) -> dict[str, LazyTensor]:
    """The tensors of the models in a checkpoint, without wrapper prefixes."""
    views = [_View(section) for section in find_sections(tree) if section.kind == "model"]
    return {n: t for view in views for n, t in view.tensors.items() if isinstance(t, LazyTensor)}


def by_content(
    tensors: dict[str, LazyTensor], progress: Progress | None = None
) -> dict[tuple[str, tuple[int, ...], bytes], list[str]]:
    """The names of each content: a dtype, a shape and a digest of the elements.

    Args:
        tensors: By name; all are read.
        progress: Called with the bytes read since the last call.
    """
    found: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    for name, tensor in tensors.items():
        digest = hashlib.blake2b(digest_size=16)
        for block in tensor.chunks():
            digest.update(block)
            if progress is not None:
                progress(len(block))
        found.setdefault((tensor.dtype, tensor.shape, digest.digest()), []).append(name)
    return found


def _relative(a: LazyTensor, b: LazyTensor, skip: bool = False) -> float | None:
    """|a - b| / |a| in double precision, block by block; None where elements are no numbers torch can subtract."""
    if skip or not a.numel:
        return None
    from optimstate.surgery.statistics import blocks

    difference = norm = 0.0
    pairs = zip(blocks(a), blocks(b), strict=True)
    for x, y in pairs:
        difference += float(((x - y).abs() ** 2).sum())
        norm += float((x.abs() ** 2).sum())
    return float((difference / norm) ** 0.5) if norm else float("inf")
