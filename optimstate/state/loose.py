"""Weights in the same mapping as an optimizer, not in a mapping of their own, as torchtitan saves them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.state.records import is_tensor

__all__ = ["gathered", "loose_weights", "spread"]

_MODEL = "model"


def loose_weights(fields: Any) -> dict[str, Any]:
    """The weights in a mapping that also holds an optimizer; empty if it holds none.

    Weights are the tensors with a dot in their name, and those with the name of an optimizer's parameter.
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


def gathered(fields: Any) -> dict[str, Any] | None:
    """The mapping with its loose weights moved to the key `model`; None if it has none, or has that key already."""
    weights = loose_weights(fields)
    if not weights or _MODEL in fields:
        return None
    return {_MODEL: weights, **{key: value for key, value in fields.items() if key not in weights}}


def spread(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the weights at `model` moved back among the other entries: the inverse of `gathered`.

    Raises:
        MigrationError: A weight has the name of another entry.
    """
    weights: Mapping[str, Any] = fields[_MODEL]
    rest = {key: value for key, value in fields.items() if key != _MODEL}
    if taken := sorted(weights.keys() & rest.keys()):
        message = f"a weight is called {describe(taken[0])}, and so is another entry of the same mapping"
        raise MigrationError.of("name", message, names=tuple(taken[:4]), remedy="give the weight another name")
    return {**weights, **rest}


def _listed(optimizer: Mapping[Any, Any]) -> Iterator[Any]:
    """The names of an optimizer's parameters, or their numbers."""
    groups = optimizer["param_groups"]
    for group in groups if isinstance(groups, list | tuple) else ():
        for key in ("param_names", "params") if isinstance(group, Mapping) else ():
            listed = group.get(key)
            yield from listed if isinstance(listed, list | tuple) else ()
