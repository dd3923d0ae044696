"""Callables inside a scheduler's state: torch saves an object's attributes, and nothing of a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

Function = Callable[..., Any]


def export_function(function: Function) -> dict[str, Any] | None:
    """The part of a callable that is saved, in torch's form: a copy of an object's attributes, None for a function."""
    attributes = getattr(function, "__dict__", None)
    if isinstance(function, FunctionType) or not isinstance(attributes, dict):
        return None
    return attributes.copy()


def not_saved(function: Function) -> str:
    """What `export_function` leaves out, in words; empty for an object whose attributes carry it."""
    if isinstance(function, FunctionType):
        return f"the function {_name(function)}"
    if isinstance(function, MethodType):
        return f"the method {_name(function.__func__)} and the object it is bound to"
    if isinstance(function, partial):
        return f"the function and arguments of partial({_name(function.func)}, ...)"
    if isinstance(function, type) or not hasattr(function, "__dict__"):
        return f"the callable {_name(function)}, which has no attributes to save"
    return ""


def import_function(function: Function, saved: dict[str, Any] | None) -> str:
    """Give a live callable its saved attributes.

    Returns:
        What could not be restored, in words; empty when all of it was.
    """
    if not saved:
        # An object without attributes saves an empty dict, and is whole again once it is constructed.
        unsaved = not_saved(function)
        if saved is None or unsaved:
            return f"the state holds nothing of it, so {unsaved or _name(function)} stays as it was given"
        return ""
    attributes = getattr(function, "__dict__", None)
    if isinstance(function, (FunctionType, MethodType)) or not isinstance(attributes, dict):
        return (
            f"the state holds the attributes of an object ({', '.join(sorted(saved))}), "
            f"which {_name(function)} cannot take; give an object of the class that was saved"
        )
    attributes.update(saved)
    return ""


def with_strategy(state: dict[str, Any], key: str, *functions: Function) -> dict[str, Any]:
    """A state in today's form: older torch keeps the annealing function itself, of which the name tells.

    Args:
        state: A scheduler's state.
        key: Under which newer ones keep the strategy.
        functions: Those for `cos` and `linear`.
    """
    names = dict(zip((function.__name__ for function in functions), ("cos", "linear"), strict=True))
    strategy = names.get(getattr(state.get("anneal_func"), "__name__", ""))
    if strategy is None or key in state:
        return state
    return {**{name: value for name, value in state.items() if name != "anneal_func"}, key: strategy}


def by_group(remarks: list[str]) -> str:
    """Join the remarks on each group's callable, saying equal ones once: `group 0, 1: …; group 2: …`."""
    groups: dict[str, list[str]] = {}
    for index, remark in enumerate(remarks):
        if remark:
            groups.setdefault(remark, []).append(str(index))
    return "; ".join(f"param group {', '.join(indices)}: {remark}" for remark, indices in groups.items())


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"
