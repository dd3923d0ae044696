"""The size of a tree when everything that occurs in it several times is written out each time.

Containers and texts of a pickle may stand in many places, so a file of some hundred bytes can hold a tree that no other
container could hold. Who writes a tree out asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimstate.errors import LimitExceededError
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree.objects import Opaque
from optimstate.tree.walking import children

__all__ = ["MAX_UNFOLDED", "check_unfolded"]

MAX_UNFOLDED = 1_000_000
"""Values, and one more for every 8 characters of a long text. Up to 8 times what a tree holds is never refused."""

_GROWTH = 8
_SHORT = 64  # texts up to here are one value
_Inner = Sequence[Any]


def check_unfolded(tree: Any) -> None:
    """Refuse a tree that grows beyond any honest checkpoint's when it is written out; this takes time by what it holds.

    Raises:
        LimitExceededError: It does.
    """
    sizes: dict[int, int] = {}  # of what is open 0: who writes a container within itself says so
    texts: dict[int, Any] = {}  # those that are long; they are kept, so that no other has their identity
    held = 0
    stack: list[tuple[Any, tuple[int, _Inner] | None]] = [(tree, None)]
    while stack:
        node, entered = stack.pop()
        if entered is not None:
            own, inner = entered
            sizes[id(node)] = own + sum(sizes[id(child)] for child in inner)
        elif id(node) not in sizes:
            sizes[id(node)] = 0
            values = [*(node if isinstance(node, dict) else ()), *(child for _, child in children(node))]
            notable = [each for each in values if type(each) not in _SMALL]
            long = [each for each in notable if _length(each) > _SHORT]
            inner = [each for each in notable if isinstance(each, _CONTAINERS)]
            own = 1 + len(values) + sum(_length(text) // 8 for text in long)
            new = {id(text): text for text in long if id(text) not in texts}
            texts |= new
            held += 1 + len(values) + sum(_length(text) // 8 for text in new.values())
            stack.append((node, (own, inner)))
            for child in inner:
                if id(child) in sizes:
                    continue
                if _is_small(child):  # the slots of a parameter, of which there may be a million
                    sizes[id(child)] = 1 + 2 * len(child)
                    held += sizes[id(child)]
                else:
                    stack.append((child, None))
    size = sizes[id(tree)]
    if size > max(MAX_UNFOLDED, _GROWTH * held):
        shown = f"{size:,}" if size < 1 << 64 else "more than 2**64"
        raise LimitExceededError(
            f"{held:,} values are {shown} when what stands in several places is written in each, "
            f"and the limit is {max(MAX_UNFOLDED, _GROWTH * held):,}",
            hint="Leave it out; to keep it as it is, write a torch container, which keeps what is shared.",
        )


_CONTAINERS = (dict, list, tuple, set, frozenset, Opaque)
_SMALL = frozenset({LazyTensor, float, bool, type(None)})


def _is_small(node: Any) -> bool:
    """Whether this is a dict of tensors and small numbers under short names."""
    if type(node) is not dict or not _SMALL.issuperset(map(type, node.values())):
        return False
    try:
        return len("".join(node)) <= 8 * _SHORT
    except TypeError:  # keys of other kinds
        return False


def _length(value: Any) -> int:
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0
