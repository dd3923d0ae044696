"""What a pickle may have built that must not be touched: tuples as deep as the stack, and disguised mappings.

Python hashes a tuple by going down all of it, and unlike every other recursion of its own it does not look where the
stack ends: a deeply nested key of a dict kills the process. How deep a pickle can nest is at most the number of its
opcodes that make tuples. Where that could be too much, the pickle is read on a stack with room for it, and refused
afterwards if it did nest that deep, so that nothing hashes such a tuple again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from optimstate.errors import CorruptCheckpointError, LimitExceededError
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import MAX_DEPTH, Opaque

__all__ = ["read_soundly"]

_TUPLE_OPCODES = b"t\x85\x86\x87"
_BLOCK = 1 << 16  # bytes that are counted in at once, without memory for the whole again
_HARMLESS = 16_384  # levels; every stack has room for them
_BYTES_PER_LEVEL = 128  # measured: below 70
_MOST = 1 << 27  # more than any honest pickle of the largest size that is read could have
_METHODS = frozenset(dir(OrderedDict))
_LEAVES = frozenset({LazyTensor, str, int, float, bool, bytes, type(None)})


def read_soundly(data: bytes, read: Callable[[], Any]) -> Any:
    """What `read` makes of the pickle `data`.

    Raises:
        LimitExceededError: Tuples are nested more than `MAX_DEPTH` deep.
        CorruptCheckpointError: An OrderedDict has an attribute named like one of its methods: who calls the method
            would meet the attribute.
    """

    def read_and_check() -> Any:
        tree = read()
        _check(tree)
        return tree

    levels = sum(_tuples_in(data[at : at + _BLOCK]) for at in range(0, len(data), _BLOCK))
    if levels <= _HARMLESS:
        return read_and_check()
    if levels > _MOST:
        raise LimitExceededError(f"a pickle that could nest {levels} tuples")
    return _on_a_stack_of(levels * _BYTES_PER_LEVEL + (8 << 20), read_and_check)


def _tuples_in(data: bytes) -> int:
    """At most how many opcodes of tuples there are."""
    return len(data) - len(data.translate(None, _TUPLE_OPCODES))


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


def _check(tree: Any) -> None:
    """Go over every container once; leaves, which are most of a checkpoint, are passed over in their containers."""
    seen: set[int] = set()
    depths: dict[int, int] = {}
    stack = [tree]
    while stack:
        node = stack.pop()
        kind = type(node)
        if kind in _LEAVES or id(node) in seen:
            continue
        seen.add(id(node))
        if kind is dict:
            inner = node.values() if tuple not in map(type, node) else [*node, *node.values()]
        elif kind is tuple:
            if tuple in map(type, node):
                _measure(node, depths)
            inner = node
        elif kind in (list, set, frozenset):
            inner = node
        elif kind is OrderedDict:
            attributes = vars(node)
            if not _METHODS.isdisjoint(attributes):
                raise CorruptCheckpointError("a pickle that hides a method of an OrderedDict")
            inner = [*dict.keys(node), *dict.values(node), *attributes.values()]
        elif isinstance(node, Opaque):
            parts = [part for entry in node.entries for part in entry]
            inner = [*node.arguments, *node.keywords.values(), *node.items, *parts, node.state]
        else:
            continue
        if not _LEAVES.issuperset(map(type, inner)):
            stack.extend([child for child in inner if type(child) not in _LEAVES])


def _measure(outer: tuple[Any, ...], depths: dict[int, int]) -> None:
    """Refuse a tuple of tuples that is too deep; the hash of other containers is not that of their items."""
    stack = [outer]
    while stack:
        node = stack[-1]
        inner = [item for item in node if type(item) is tuple]
        waiting = [item for item in inner if id(item) not in depths]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        depths[id(node)] = 1 + max((depths[id(item)] for item in inner), default=0)
        if depths[id(node)] > MAX_DEPTH:
            raise LimitExceededError(f"tuples nested more than {MAX_DEPTH} deep")
