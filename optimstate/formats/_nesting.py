"""Tuples within tuples within tuples: a few kilobytes of pickle can nest them deeper than the C stack.

Python hashes a tuple by going down all of it, and unlike every other recursion of its own it does not look where the
stack ends: a deeply nested key of a dict kills the process. How deep a pickle can nest is at most the number of its
opcodes that make tuples. Where that could be too much, the pickle is read on a stack with room for it, and refused
afterwards if it did nest that deep, so that nothing hashes such a tuple again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from optimstate.errors import LimitExceededError
from optimstate.tensors import LazyTensor
from optimstate.tree import MAX_DEPTH, Opaque

__all__ = ["read_with_room"]

_TUPLE_OPCODES = (b"t", b"\x85", b"\x86", b"\x87")
_HARMLESS = 16_384  # levels; every stack has room for them
_BYTES_PER_LEVEL = 128  # measured: below 70
_MOST = 1 << 27  # more than any honest pickle of the largest size that is read could have
_LEAVES = frozenset({LazyTensor, str, int, float, bool, bytes, type(None)})


def read_with_room(data: bytes, read: Callable[[], Any]) -> Any:
    """What `read` makes of the pickle `data`.

    Raises:
        LimitExceededError: Tuples are nested more than `MAX_DEPTH` deep.
    """
    levels = sum(map(data.count, _TUPLE_OPCODES))
    if levels <= _HARMLESS:
        return read()
    if levels > _MOST:
        raise LimitExceededError(f"a pickle that could nest {levels} tuples")

    def read_and_check() -> Any:
        tree = read()
        _refuse_deep_tuples(tree)  # here as well: going over an OrderedDict hashes its keys
        return tree

    return _on_a_stack_of(levels * _BYTES_PER_LEVEL + (8 << 20), read_and_check)


def _on_a_stack_of(size: int, read: Callable[[], Any]) -> Any:
    """Call in a thread with a stack of `size` bytes; memory is used only as far as the stack really grows."""
    import threading

    made: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(read())
        except BaseException as error:  # noqa: BLE001  # raised again where it belongs
            failed.append(error)

    before = threading.stack_size(-(-size // 4096) * 4096)
    try:
        thread = threading.Thread(target=run, name="optimstate-unpickler", daemon=True)
        thread.start()
    except RuntimeError:
        message = f"a pickle that could nest tuples so deep that a stack of {size} bytes is needed"
        raise LimitExceededError(message, hint="Allow the process more virtual memory (ulimit -v).") from None
    finally:
        threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _refuse_deep_tuples(tree: Any) -> None:
    """Measure every tuple there is; other containers begin anew, for their hash is not that of their items."""
    depths: dict[int, int] = {}
    seen: set[int] = set()
    stack = [tree]
    while stack:
        node = stack[-1]
        if type(node) is not tuple:
            stack.pop()
            if id(node) not in seen:
                seen.add(id(node))
                stack.extend(_inside(node))
            continue
        if id(node) in depths:
            stack.pop()
            continue
        waiting = [item for item in node if type(item) is tuple and id(item) not in depths]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        depths[id(node)] = 1 + max((depths[id(item)] for item in node if type(item) is tuple), default=0)
        if depths[id(node)] > MAX_DEPTH:
            raise LimitExceededError(f"tuples nested more than {MAX_DEPTH} deep")
        stack.extend(item for item in node if type(item) is not tuple)


def _inside(node: Any) -> list[Any]:
    """What could hold or be a tuple, directly inside a container; keys too."""
    kind = type(node)
    if kind is dict or kind is OrderedDict:
        found = [key for key in node if type(key) is tuple] if tuple in map(type, node) else []
        if not _LEAVES.issuperset(map(type, dict.values(node))):
            found += dict.values(node)
        return [*found, *vars(node).values()] if kind is OrderedDict else found
    if kind in (list, set, frozenset):
        return [] if _LEAVES.issuperset(map(type, node)) else list(node)
    if isinstance(node, Opaque):
        entries = [part for entry in node.entries for part in entry]
        return [*node.arguments, *node.keywords.values(), *node.items, *entries, node.state]
    return []
