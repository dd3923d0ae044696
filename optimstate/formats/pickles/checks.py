"""Refusing pickles that build dangerous objects: very deeply nested tuples, and mappings with replaced methods.

Python hashes a tuple recursively and, unlike in its other recursions, without checking the stack: a deeply nested key
of a dict kills the process. The nesting of a pickle is at most the number of its opcodes that make tuples. If that
could be too deep, the pickle is read on a stack with room for it, and refused afterwards if it really is that deep, so
that nothing hashes such a tuple again.
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
_BLOCK = 1 << 16  # bytes in which opcodes are counted at once, to save memory
_HARMLESS = 16_384  # levels, for which every stack has room
_BYTES_PER_LEVEL = 128  # of stack; measured: below 70
_MOST = 1 << 27  # levels; no honest pickle of the largest size has as many
_METHODS = frozenset(dir(OrderedDict))
_LEAVES = frozenset({LazyTensor, str, int, float, bool, bytes, type(None)})


def read_soundly(data: bytes, read: Callable[[], Any]) -> Any:
    """The tree that `read` makes of the pickle `data`.

    Raises:
        LimitExceededError: Tuples are nested more than `MAX_DEPTH` deep.
        CorruptCheckpointError: An OrderedDict has an attribute that replaces one of its methods.
    """

    def read_and_check() -> Any:
        tree = read()
        _check(tree)
        return tree

    blocks = (data[at : at + _BLOCK] for at in range(0, len(data), _BLOCK))
    levels = sum(len(block) - len(block.translate(None, _TUPLE_OPCODES)) for block in blocks)
    if levels <= _HARMLESS:
        return read_and_check()
    if levels > _MOST:
        raise LimitExceededError(f"a pickle that could nest {levels} tuples")
    return _on_a_stack_of(levels * _BYTES_PER_LEVEL + (8 << 20), read_and_check)


def _on_a_stack_of(size: int, read: Callable[[], Any]) -> Any:
    """The result of `read` in a thread with a stack of `size` bytes, which takes memory only as it grows."""
    import threading

    made: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(read())
        except BaseException as error:  # noqa: BLE001  # raised again in the calling thread
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
    """Check every container of a tree once; leaves, which are most of a checkpoint, are skipped."""
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
    """Refuse tuples that are nested too deeply; only tuples hash their items recursively."""
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
