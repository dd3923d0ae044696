"""Callables in a scheduler's state: torch saves the attributes of an object, and nothing of a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

Function = Callable[..., Any]


def export_function(function: Function) -> dict[str, Any] | None:
    """The part of a callable that torch saves: a copy of an object's attributes, None for a function."""
    attributes = getattr(function, "__dict__", None)
    if isinstance(function, FunctionType) or not isinstance(attributes, dict):
        return None
    return attributes.copy()


def not_saved(function: Function) -> str:
    """A description of what `export_function` leaves out; empty for an object, whose attributes are saved."""
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
        A description of what could not be restored; empty if everything was.
    """
    if not saved:
        # An object without attributes saves an empty dict, and is complete as soon as it is constructed.
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
    """A scheduler's state with its annealing strategy; older torch saves the annealing function instead.

    Args:
        state: A scheduler's state.
        key: The key of the strategy.
        functions: The annealing functions for `cos` and `linear`, in this order.
    """
    names = dict(zip((function.__name__ for function in functions), ("cos", "linear"), strict=True))
    strategy = names.get(getattr(state.get("anneal_func"), "__name__", ""))
    if strategy is None or key in state:
        return state
    return {**{name: value for name, value in state.items() if name != "anneal_func"}, key: strategy}


def check_strategy(strategy: str) -> None:
    """Raise ValueError, with torch's message, for an unknown annealing strategy."""
    if strategy not in ("cos", "linear"):
        raise ValueError(f"anneal_strategy must be one of 'cos' or 'linear', instead got {strategy}")


def by_group(remarks: list[str]) -> str:
    """Join the remarks on the groups' callables, equal ones once: `param group 0, 1: ...; param group 2: ...`."""
    groups: dict[str, list[str]] = {}
    for index, remark in enumerate(remarks):
        if remark:
            groups.setdefault(remark, []).append(str(index))
    return "; ".join(f"param group {', '.join(indices)}: {remark}" for remark, indices in groups.items())


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"
