"""Whether two trees are equal in every way that a loader could notice."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from optimstate.describe import describe
from optimstate.io.extents import chunks
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree.objects import GlobalName, Opaque, path_key
from optimstate.tree.walking import Path, children, format_path

__all__ = ["difference"]


def difference(a: Any, b: Any, *, strides: bool = True, aliases: bool = True) -> str | None:
    """A description of the first difference of two trees, or None if types, keys, order, values and sharing are equal.

    Args:
        a: A tree; its tensors are compared by dtype, shape and bytes.
        b: The other tree.
        strides: Compare the strides of tensors too.
        aliases: Compare which tensors share a storage.
    """
    return _Comparison(strides, aliases).differ((), a, b)


class _Comparison:
    def __init__(self, strides: bool, aliases: bool) -> None:
        self.strides = strides
        self.aliases = aliases
        self.storage_of: dict[int, int] = {}
        self.visited: set[tuple[int, int]] = set()
        self.keep: list[Any] = []

    def differ(self, path: Path, a: Any, b: Any) -> str | None:
        where = format_path(path)
        if isinstance(a, LazyTensor) and isinstance(b, LazyTensor):
            return self._differ_tensor(where, a, b)
        if isinstance(a, GlobalName) and isinstance(b, GlobalName):
            return None if a.path == b.path else f"{where}: {describe(a)} != {describe(b)}"
        if isinstance(a, Opaque) and isinstance(b, Opaque):
            if a.type.path != b.type.path or a.called != b.called:
                return f"{where}: {describe(a)} != {describe(b)}"
        elif isinstance(a, Storage) and isinstance(b, Storage):
            return self._differ_storage(where, a, b)
        elif type(a) is not type(b):
            return f"{where}: {type(a).__name__} != {type(b).__name__}"
        if isinstance(a, set | frozenset):
            return None if self._same_members(a, b) else f"{where}: {describe(a)} != {describe(b)}"
        if not isinstance(a, dict | list | tuple | Opaque):
            same = a == b or (a != a and b != b)
            return None if same else f"{where}: {describe(a)} != {describe(b)}"
        return self._differ_parts(path, a, b)

    def _differ_parts(self, path: Path, a: Any, b: Any) -> str | None:
        """How two containers or records of one type differ in what they hold."""
        if (id(a), id(b)) in self.visited:
            return None
        self.visited.add((id(a), id(b)))
        where = format_path(path)
        left, right = list(children(a)), list(children(b))
        self.keep.append((left, right))
        if isinstance(a, dict):  # keys that look the same in a path may differ in type
            left_keys, right_keys = [list(map(path_key, side)) for side in (a, b)]
            types = [list(map(type, side)) for side in (a, b)]
            if left_keys != right_keys or types[0] != types[1]:
                return f"{where}: keys differ: {_first_difference(left_keys, right_keys)}"
        if [key for key, _ in left] != [key for key, _ in right]:
            return f"{where}: parts differ: {_first_difference([k for k, _ in left], [k for k, _ in right])}"
        for (key, x), (_, y) in zip(left, right, strict=True):
            found = self.differ((*path, key), x, y)
            if found:
                return found
        return None

    def _same_members(self, a: Set[Any], b: Set[Any]) -> bool:
        """Whether two sets have equal members; objects and tensors are compared by their contents."""
        rest = [item for item in b if item not in a]
        for item in a:
            if item not in b:
                equal = next((n for n, other in enumerate(rest) if self.differ((), item, other) is None), None)
                if equal is None:
                    return False
                del rest[equal]
        return not rest

    def _differ_tensor(self, where: str, a: LazyTensor, b: LazyTensor) -> str | None:
        kinds = ("dtype", "shape", "requires_grad", "is_parameter", "flags") + (("stride",) if self.strides else ())
        for name in kinds:
            x, y = getattr(a, name), getattr(b, name)
            if x != y:
                return f"{where}: {name} {x} != {y}"
        one, other = getattr(a, "attributes", {}), getattr(b, "attributes", {})
        if one != other:
            return f"{where}: attributes {describe(one)} != {describe(other)}"
        if any(x != y for x, y in zip(a.chunks(), b.chunks(), strict=True)):
            return f"{where}: contents differ"
        return self._differ_sharing(where, a.storage, b.storage)

    def _differ_storage(self, where: str, a: Storage, b: Storage) -> str | None:
        if (a.kind, a.nbytes) != (b.kind, b.nbytes):
            return f"{where}: storage {a.kind} of {a.nbytes} bytes != {b.kind} of {b.nbytes}"
        if any(x != y for x, y in zip(chunks(a.pieces), chunks(b.pieces), strict=True)):
            return f"{where}: contents differ"
        return self._differ_sharing(where, a, b)

    def _differ_sharing(self, where: str, a: Storage, b: Storage) -> str | None:
        if self.aliases and self.storage_of.setdefault(id(a), id(b)) != id(b):
            return f"{where}: shares its storage with another tensor on one side only"
        return None


def _first_difference(a: list[Any], b: list[Any]) -> str:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y or type(x) is not type(y):
            return f"{describe(x)} != {describe(y)} at position {index}"
    return f"{len(a)} != {len(b)} entries"
