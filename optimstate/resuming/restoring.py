"""Parts that are ready to be loaded, and how that is undone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

__all__ = ["Step", "restoring"]


@dataclass
class Step:
    """A part that is ready to be loaded, and how that is undone."""

    load: Callable[[], object]
    undo: Callable[[], object]


def restoring(scheduler: Any) -> Callable[[], None]:
    """How a scheduler gets back what it has now, with the schedulers inside it."""
    before = {key: _own(value) for key, value in vars(scheduler).items()}
    inner = [restoring(each) for each in getattr(scheduler, "_schedulers", ())]

    def undo() -> None:
        vars(scheduler).clear()
        vars(scheduler).update(before)
        for each in inner:
            each()

    return undo


def _own(node: Any) -> Any:
    """The same values in containers of their own."""
    if isinstance(node, Counter):
        return copy.copy(node)
    if type(node) is dict:
        return {key: _own(value) for key, value in node.items()}
    return type(node)(map(_own, node)) if type(node) in (list, tuple) else node
