"""What a checkpoint holds beside its sections, folded: epoch, metrics, configuration, random state, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Any

from optimstate.record import Record
from optimstate.surgery.leaves import is_leaf, opened_file
from optimstate.tree import Opaque, OpaqueFile, Path, children, format_path

__all__ = ["Entry", "rest_of"]

MAX_ENTRIES = 100
MAX_IN_ONE = 20  # entries of one container
MAX_TEXT = 200
SHOWN_OF_LIST = 8
MAX_DEPTH = 20
MAX_JSON = 1 << 20


class Entry(Record):
    """A value, or a container whose contents are not listed.

    Attributes:
        path: Where it is, as text.
        keys: The same as keys and places of lists.
        value: A number, a text, or in words what is there: `float32[12, 8]`, `list of 4000: 0.5, 0.5, ...`.
    """

    path: str
    keys: Path
    value: Any


class _Folder:
    """Walks the tree up to its limits; what is left out is only counted where that costs nothing."""

    def __init__(self, skip: Collection[int], everything: bool) -> None:
        self.skip, self.everything = skip, everything
        self.hidden = 0
        self.around: set[int] = set()

    def visit(self, path: Path, node: Any, depth: int) -> Iterator[tuple[Path, Any]]:
        if id(node) in self.skip:
            return
        if isinstance(node, OpaqueFile):
            node = opened_file(node) if node.nbytes <= MAX_JSON else node
        if is_leaf(node) or id(node) in self.around or depth > MAX_DEPTH:
            yield path, node
            return
        if isinstance(node, Opaque):
            fields = _fields_of(node)
            if not fields:
                yield path, node
                return
            inner: Iterator[tuple[str | int, Any]] = iter(fields)
            count = len(fields)
        else:
            count = len(node)
            if not count or (path and not self.everything and self._is_folded(node)):
                yield path, node
                return
            inner = children(node)
        self.around.add(id(node))
        limit = None if self.everything or not path else MAX_IN_ONE
        for key, child in islice(inner, limit):
            yield from self.visit((*path, key), child, depth + 1)
        self.hidden += max(0, count - limit) if limit is not None else 0
        self.around.discard(id(node))

    @staticmethod
    def _is_folded(node: Any) -> bool:
        """Whether a container is shown in one line: a list of plain values, or a long one."""
        if isinstance(node, Mapping):
            return len(node) > 1000
        return len(node) > SHOWN_OF_LIST or all(map(is_leaf, node))


def _fields_of(node: Opaque) -> list[tuple[str | int, Any]]:
    """The attributes and entries of an object that are worth listing."""
    fields = list(node.state.items()) if isinstance(node.state, Mapping) else []
    return [(str(key), value) for key, value in (*fields, *node.entries)]


def rest_of(
    tree: Any, skip: Collection[int], plain: Callable[[Any], Any], *, everything: bool = False
) -> tuple[tuple[Entry, ...], int]:
    """What is in no section, in order, and how many more entries there are at least.

    Args:
        tree: The checkpoint.
        skip: The `id`s of its sections.
        plain: A leaf as JSON holds it.
        everything: Leave nothing out.
    """
    folder = _Folder(skip, everything)
    visited = folder.visit((), tree, 0)
    found = list(visited if everything else islice(visited, MAX_ENTRIES))
    if not everything and next(visited, None) is not None:
        folder.hidden += 1
    made = [Entry(format_path(path), path, _in_words(node, plain)) for path, node in found if path or is_leaf(node)]
    return tuple(made), folder.hidden


def _in_words(node: Any, plain: Callable[[Any], Any]) -> Any:
    """A leaf, or a container that is not listed, as a short value."""
    if is_leaf(node) or isinstance(node, Opaque):
        value = plain(node)
        long = isinstance(value, str) and len(value) > MAX_TEXT
        return f"{value[:MAX_TEXT]}... ({len(value):,} characters)" if long else value
    word = "dict" if isinstance(node, Mapping) else type(node).__name__
    if not node:
        return f"empty {word}"
    if isinstance(node, Mapping) or not all(map(is_leaf, node[:SHOWN_OF_LIST])):
        return f"{word} of {len(node)}"
    if len(node) <= SHOWN_OF_LIST:
        return [_in_words(item, plain) for item in node]
    first = ", ".join(str(_in_words(item, plain))[:40] for item in node[:3])
    return f"{word} of {len(node)}: {first}, ..."
