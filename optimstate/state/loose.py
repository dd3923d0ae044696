"""Weights that stand among other entries: the names of a model beside its optimizer, as torchtitan saves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.state.records import is_tensor

__all__ = ["loose_weights"]


def loose_weights(fields: Any) -> dict[str, Any]:
    """The weights of a mapping that holds an optimizer, too; empty where it holds none.

    They are the tensors with names of several components, and all that have the names of an optimizer's parameters.
    """
    if not isinstance(fields, Mapping):
        return {}
    optimizers = [value for value in fields.values() if isinstance(value, Mapping) and "param_groups" in value]
    if not optimizers:
        return {}
    named = {str(key) for optimizer in optimizers for key in _listed(optimizer)}
    return {
        key: value
        for key, value in fields.items()
        if isinstance(key, str) and is_tensor(value) and ("." in key or key in named)
    }


def _listed(optimizer: Mapping[Any, Any]) -> Iterator[Any]:
    """The names of an optimizer's parameters, where it has them."""
    groups = optimizer["param_groups"]
    for group in groups if isinstance(groups, list | tuple) else ():
        for key in ("param_names", "params") if isinstance(group, Mapping) else ():
            listed = group.get(key)
            yield from listed if isinstance(listed, list | tuple) else ()
