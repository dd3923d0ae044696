"""Copies of trees: with some containers replaced, or with memory of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from optimstate.errors import UnsupportedCheckpointError
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree.objects import Opaque, OpaqueFile

__all__ = ["cloned", "rebuilt_mapping", "replaced"]


def replaced(tree: Any, nodes: Mapping[int, Any]) -> Any:
    """The tree with some containers replaced.

    Args:
        tree: A tree. It is not changed, and its unchanged parts are shared with the result.
        nodes: The replacements, by the `id` of the container to replace.

    Raises:
        UnsupportedCheckpointError: A container to replace is inside a container that contains itself.
    """
    done: dict[int, Any] = dict(nodes)
    entered: set[int] = set()
    recursive: set[int] = set()

    def visit(node: Any) -> Any:
        key = id(node)
        if key in done:
            return done[key]
        if not isinstance(node, dict | list | tuple) or isinstance(node, OpaqueFile):
            return node
        if key in entered:
            recursive.add(key)
            return node
        entered.add(key)
        made = _with_children(node, visit)
        if made is not node and key in recursive:
            raise UnsupportedCheckpointError("a container that contains itself would have to change")
        done[key] = made
        return made

    return visit(tree)


def _with_children(node: Any, visit: Callable[[Any], Any]) -> Any:
    """The container with each child visited, or the container itself if no child changes."""
    if isinstance(node, dict):
        items = {key: visit(value) for key, value in node.items()}
        return node if all(items[key] is value for key, value in node.items()) else rebuilt_mapping(node, items)
    children = [visit(item) for item in node]
    if all(new is old for new, old in zip(children, node, strict=True)):
        return node
    return children if isinstance(node, list) else tuple(children)


def cloned(node: Any) -> Any:
    """A copy whose tensors share memory with nothing else; plain values and names are shared.

    A container that occurs several times is copied once.
    """
    return _cloned(node, {})


def _cloned(node: Any, done: dict[int, Any]) -> Any:
    if isinstance(node, LazyTensor):
        return node.clone()
    if isinstance(node, Storage):
        return Storage(node.pieces, node.nbytes, node.kind, node.location)
    if not isinstance(node, Mapping | list | tuple | Opaque):
        return node
    if id(node) not in done:
        done[id(node)] = _cloned_container(node, done)
    return done[id(node)]


def _cloned_container(node: Any, done: dict[int, Any]) -> Any:
    if isinstance(node, Mapping):
        return rebuilt_mapping(node, {key: _cloned(value, done) for key, value in node.items()})
    if isinstance(node, list | tuple):
        items = [_cloned(item, done) for item in node]
        return items if isinstance(node, list) else tuple(items)
    made = node.type.record(*_cloned(node.arguments, done), **_cloned(node.keywords, done))
    made.called = node.called
    made.items = _cloned(node.items, done)
    made.entries = [(key, _cloned(value, done)) for key, value in node.entries]
    made.state = _cloned(node.state, done)
    return made


def rebuilt_mapping(like: Mapping[Any, Any], items: Mapping[Any, Any]) -> dict[Any, Any]:
    """`items` as a mapping of the same type and with the same attributes as `like`."""
    if isinstance(like, OrderedDict):
        made: dict[Any, Any] = OrderedDict(items)
        vars(made).update(vars(like))
        return made
    return dict(items)
