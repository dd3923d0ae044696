"""Walking a tree: its nodes, their paths as text, and the number of tensors."""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from optimstate.describe import describe
from optimstate.errors import LimitExceededError
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree.objects import AttributedTensor, Opaque, OpaqueFile, path_key

__all__ = [
    "MAX_DEPTH",
    "Path",
    "census",
    "children",
    "format_path",
    "no_garbage_collection",
    "nodes",
    "tensors",
    "walk",
]

MAX_DEPTH = 1000
"""The limit on nesting where a tree is walked with paths; real checkpoints have less than a twentieth of it."""

Path = tuple[str | int, ...]
"""Keys from the root to a node. Keys that are neither str nor int appear as their repr."""


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off while a tree is built, when all objects are in use and collecting only costs time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def format_path(path: Path) -> str:
    """A path as it is shown to people: `optimizer['state'][0]['exp_avg']`, or `(root)`."""
    if not path:
        return "(root)"
    first, *rest = path
    head = str(first) if isinstance(first, str) else f"[{describe(first)}]"
    return head + "".join(f"[{describe(key)}]" for key in rest)


def children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """The nodes directly inside `node`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield path_key(key), value
        attributes = vars(node) if isinstance(node, OrderedDict) else None
        if attributes:
            for name, value in attributes.items():
                yield f".{name}", value
    elif isinstance(node, list | tuple | set | frozenset) and not isinstance(node, OpaqueFile):
        yield from enumerate(node)
    elif isinstance(node, Opaque):
        yield from node.parts()


def walk(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every container and leaf, parents first, in order. A container met twice is entered once, so cycles end.

    Raises:
        LimitExceededError: Containers are nested more than `MAX_DEPTH` deep.
    """
    seen: set[int] = set()
    stack: list[Iterator[tuple[Path, Any]]] = [iter([(path, node)])]
    while stack:
        for place, found in stack[-1]:
            yield place, found
            if isinstance(found, dict | list | tuple | set | frozenset | Opaque) and id(found) not in seen:
                if len(stack) > MAX_DEPTH:
                    raise LimitExceededError(f"containers nested more than {MAX_DEPTH} deep")
                seen.add(id(found))
                stack.append(iter([((*place, key), child) for key, child in children(found)]))
                break
        else:
            stack.pop()


def nodes(node: Any) -> Iterator[Any]:
    """Every container and leaf, without paths, in no particular order."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        yield found
        if isinstance(found, dict | list | tuple | set | frozenset | Opaque) and id(found) not in seen:
            seen.add(id(found))
            if type(found) is dict:
                stack.extend(found.values())
            else:
                stack.extend(child for _, child in children(found))


def census(node: Any, is_tensor: Callable[[Any], bool] = lambda _: False) -> tuple[int, Counter[str]]:
    """The number of tensors, and the number of opaque objects of each class.

    Args:
        node: A tree.
        is_tensor: Whether an opaque object is the record of one tensor, and counts as that.
    """
    tensor_count = 0
    records: Counter[str] = Counter()
    seen: set[int] = {id(node)}
    stack: list[Any] = [node]
    while stack:
        found = stack.pop()
        if isinstance(found, Opaque):
            records[found.type.path] += 1
        inner = found.values() if type(found) is dict else [child for _, child in children(found)]
        kinds = list(map(type, inner))
        plain_tensors = kinds.count(LazyTensor)
        tensor_count += plain_tensors
        if plain_tensors == len(kinds):
            continue
        tensor_count += kinds.count(AttributedTensor)
        for child, kind in zip(inner, kinds, strict=True):
            if kind not in _LEAVES and isinstance(child, dict | list | tuple | set | frozenset | Opaque):
                if isinstance(child, Opaque) and is_tensor(child):
                    tensor_count += 1
                    records[child.type.path] += id(child) not in seen
                    seen.add(id(child))
                elif id(child) not in seen:
                    seen.add(id(child))
                    stack.append(child)
    return tensor_count + isinstance(node, LazyTensor), records


_LEAVES = frozenset({LazyTensor, AttributedTensor, int, float, str, bool, type(None), bytes})


def tensors(node: Any) -> Iterator[tuple[Path, LazyTensor]]:
    """Every tensor with its path."""
    return ((path, found) for path, found in walk(node) if isinstance(found, LazyTensor))
