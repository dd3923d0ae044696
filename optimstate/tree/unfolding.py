"""A limit on trees that grow when every object is written out each time it occurs.

The objects of a pickle may occur many times in its tree, so a file of a few hundred bytes can hold a tree that no other
container could hold. Writers check a tree here first.
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
"""Values, and one more for every 8 characters of a long text. Up to 8 times the distinct values are always allowed."""

_GROWTH = 8
_SHORT = 64  # characters; a text of this length counts as one value
_Inner = Sequence[Any]


def check_unfolded(tree: Any) -> None:
    """Refuse a tree that grows far beyond its distinct values when it is written out.

    The check takes time proportional to the distinct values.

    Raises:
        LimitExceededError: The tree grows beyond the limit.
    """
    sizes: dict[int, int] = {}  # 0 for containers whose children are being counted; writers refuse cycles themselves
    texts: dict[int, Any] = {}  # long texts by id; kept so that no other object gets the same id
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
            f"{held:,} values become {shown} when shared ones are written out each time they occur; "
            f"the limit is {max(MAX_UNFOLDED, _GROWTH * held):,}",
            hint="Leave them out, or write a torch container, which keeps shared values shared.",
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
