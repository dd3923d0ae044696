"""Optimizer state that stands flat in a mapping of names to tensors, often beside the model's own names.

Torch's flattened optimizer state dicts have the keys `state.<name>.<slot>` and `param_groups.<name>.<option>`; writers
of safetensors keep them in one mapping with the weights. Here such a mapping is taken apart into the nested form that
everything else works with, and put together again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.record import Record
from optimstate.state.algorithms.registry import ALGORITHMS
from optimstate.state.optimizer import OptimizerState
from optimstate.tree import rebuilt_mapping

__all__ = ["FlatState", "find_flat_state"]

_KEY = re.compile(r"((?:optim\w*\.)?)(state|param_groups)\.(.+)\.([^.]+)", re.DOTALL)


class FlatState(Record):
    """A mapping whose flattened optimizer state was taken out of it.

    Attributes:
        host: The mapping as it is in the file.
        prefix: What stands before `state.`: nothing, `optim.` or `optimizer.`.
        rest: Its other entries, in order; of the mapping's type.
        optimizer: The state in nested form, keyed by names.
    """

    host: Mapping[str, Any]
    prefix: str
    rest: Mapping[str, Any]
    optimizer: Mapping[str, Any]

    def joined(self, rest: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mapping again, of other entries; each in the place of one of its kind, as far as there are places.

        Args:
            rest: In the place of `rest`; may be empty.
            optimizer: In the place of `optimizer`; may be empty.
        """
        state = OptimizerState.from_node(optimizer).to_flat() if optimizer else {}
        flat = iter([(self.prefix + key, value) for key, value in state.items()])
        others = iter(rest.items())
        made: dict[str, Any] = {}
        for key in self.host:
            made.update([entry] if (entry := next(others if key in self.rest else flat, None)) is not None else [])
        made.update(others)
        made.update(flat)
        return rebuilt_mapping(self.host, made)


def find_flat_state(fields: Mapping[str, Any]) -> FlatState | None:
    """The optimizer state in a mapping of names to tensors, or None.

    Keys count as state where the names in them are those of the other tensors, where options stand beside them, or
    where every slot is one that some optimizer has: a module may be called `state` too.
    """
    first = next(_keys(fields), None)
    if first is None:
        return None
    prefix = first[1]
    matches = {key: match for key, match in ((m[0], m) for m in _keys(fields)) if match[1] == prefix}
    names = {match[3] for match in matches.values() if match[2] == "state"}
    slots = {match[4] for match in matches.values() if match[2] == "state"}
    rest = {key: value for key, value in fields.items() if key not in matches}
    known = names <= rest.keys() or any(match[2] == "param_groups" for match in matches.values())
    if not names or not (known or slots <= _SLOTS):
        return None
    state = OptimizerState.from_flat({key.removeprefix(prefix): fields[key] for key in matches})
    return FlatState(fields, prefix, rebuilt_mapping(fields, rest), state.to_node())


def _keys(fields: Mapping[str, Any]) -> Iterator[re.Match[str]]:
    return (match for key in fields if ("state." in key or "groups." in key) and (match := _KEY.fullmatch(key)))


_SLOTS = frozenset(slot for algorithm in ALGORITHMS for slot in algorithm.slots)
