"""Loading the parts of a run, and undoing it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.errors import StateMismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["Step", "carry_out", "load_state", "restoring"]


@dataclass
class Step:
    """A part that is ready to be loaded, and how to undo loading it."""

    load: Callable[[], object]
    undo: Callable[[], object]


def carry_out(
    steps: Sequence[Step], check: Callable[[], object], together: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Load every part and check the result, or undo all of it.

    Args:
        steps: The parts, in the order in which they are loaded.
        check: Checks the result; processes exchange data in it.
        together: Runs a block in every process, and raises in all of them if it fails in one.
    """
    with ExitStack() as undoing:
        with together():
            for step in steps:
                undoing.callback(step.undo)
                step.load()
        with together():
            check()
        undoing.pop_all()


def restoring(scheduler: Any) -> Callable[[], None]:
    """A function that restores the current state of a scheduler and the schedulers inside it."""
    before = {key: _own(value) for key, value in vars(scheduler).items()}
    inner = [restoring(each) for each in getattr(scheduler, "_schedulers", ())]

    def undo() -> None:
        vars(scheduler).clear()
        vars(scheduler).update(before)
        for each in inner:
            each()

    return undo


def _own(node: Any) -> Any:
    """A copy with new containers around the same values."""
    if isinstance(node, Counter):
        return copy.copy(node)
    if type(node) is dict:
        return {key: _own(value) for key, value in node.items()}
    return type(node)(map(_own, node)) if type(node) in (list, tuple) else node


def load_state(optimizer: torch.optim.Optimizer, made: dict[str, Any]) -> None:
    """Load a state dict.

    Raises:
        StateMismatchError: It lacks a slot that the optimizer cannot load without.
    """
    try:
        optimizer.load_state_dict(made)
    except KeyError as error:
        slot = str(error.args[0]) if error.args else ""
        names = [
            str(name)
            for group in made["param_groups"]
            for key, name in zip(group["params"], group.get("param_names", group["params"]), strict=False)
            if slot not in made["state"].get(key, {slot: None})
        ]
        raise StateMismatchError(
            f"the state of {', '.join(map(describe, names[:3])) or 'a parameter'} has no {describe(slot)}, without "
            f"which {type(optimizer).__name__} cannot go on",
            hint="`optimstate verify` shows which state is missing. Drop all state of a parameter to start it fresh.",
        ) from error
