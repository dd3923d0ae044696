"""Removing lost tensors from the trees of damaged checkpoints."""

from __future__ import annotations

from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.io.location import Location
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import Opaque, OpaqueFile, format_path, path_key, rebuilt_mapping
from optimstate.tree import Path as TreePath

__all__ = ["LostStorage", "without_lost"]


class LostStorage(Storage):
    """A storage some of whose bytes are missing."""

    __slots__ = ()


def without_lost(tree: Any, path: Location) -> tuple[Any, list[str]]:
    """A tree without the tensors over a `LostStorage`, and the paths of these tensors.

    Dicts lose the entry, lists have None in its place, and an object with a lost tensor in it is lost as a whole.

    Raises:
        CorruptCheckpointError: All tensors are lost.
    """
    pruner = _Pruner()
    pruned = pruner.visit((), tree)
    if pruner.lost and not pruner.tensors:
        message = f"nothing can be read: none of its {len(pruner.lost)} tensors is complete"
        raise CorruptCheckpointError(message, path=path)
    return pruned, pruner.lost


_GONE = object()


class _Pruner:
    def __init__(self) -> None:
        self.lost: list[str] = []
        self.tensors = 0
        self._done: dict[int, Any] = {}

    def visit(self, path: TreePath, node: Any) -> Any:
        if isinstance(node, LazyTensor | Storage):
            storage = node.storage if isinstance(node, LazyTensor) else node
            if isinstance(storage, LostStorage):
                self.lost.append(format_path(path))
                return _GONE
            self.tensors += 1
            return node
        if isinstance(node, OpaqueFile) or not isinstance(node, dict | list | tuple | Opaque):
            return node
        if id(node) not in self._done:
            self._done[id(node)] = node  # for a container that contains itself
            self._done[id(node)] = self._container(path, node)
        return self._done[id(node)]

    def _container(self, path: TreePath, node: Any) -> Any:
        if isinstance(node, Opaque):
            before = len(self.lost)
            for key, part in node.parts():
                self.visit((*path, key), part)
            return node if len(self.lost) == before else _GONE
        if isinstance(node, dict):
            made = {key: self.visit((*path, path_key(key)), value) for key, value in node.items()}
            kept = {key: value for key, value in made.items() if value is not _GONE}
            return node if all(value is node[key] for key, value in made.items()) else rebuilt_mapping(node, kept)
        items = [None if (x := self.visit((*path, n), item)) is _GONE else x for n, item in enumerate(node)]
        if all(new is old for new, old in zip(items, node, strict=True)):
            return node
        return items if isinstance(node, list) else tuple(items)
