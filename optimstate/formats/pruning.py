"""Trees of damaged checkpoints without the tensors that are lost."""

from __future__ import annotations

from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.io.location import Location
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import Opaque, OpaqueFile, format_path, path_key, rebuilt_mapping
from optimstate.tree import Path as TreePath

__all__ = ["LostStorage", "without_lost"]


class LostStorage(Storage):
    """A storage of which not all bytes are there."""

    __slots__ = ()


def without_lost(tree: Any, path: Location) -> tuple[Any, list[str]]:
    """A tree without the tensors over a `LostStorage`, and where they stood.

    An entry of a dict goes, in a list None keeps the place, and an object with a lost tensor in it is lost as a whole.

    Raises:
        CorruptCheckpointError: All are lost.
    """
    kept = _Kept()
    made = kept.visit((), tree)
    if kept.lost and not kept.tensors:
        raise CorruptCheckpointError(f"nothing can be read: none of its {len(kept.lost)} tensors is whole", path=path)
    return made, kept.lost


class _Gone:
    pass


_GONE = _Gone()


class _Kept:
    """A tree without the tensors that are lost: an entry of a dict goes, in a list None keeps the place."""

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
            self._done[id(node)] = node  # what a container within itself is
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
