"""Tensor subclasses in pickles, which are read as records: their dtype and shape.

Distributed tensors hold one rank's part and describe the whole; quantized tensors hold codes and describe the tensor
that they encode. Neither is converted to a plain tensor here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.record import Record
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName, Opaque

__all__ = ["TensorRecord", "is_tensor", "tensor_record"]


class TensorRecord(Record):
    """A tensor of a subclass, as its record describes it.

    Attributes:
        kind: Its class, without the module: `DTensor`.
        dtype: The dtype of the whole tensor.
        shape: The shape of the whole tensor.
        parts: The plain tensors inside the record, by name: the local part, or codes and scales.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, LazyTensor]

    def __str__(self) -> str:
        inside = ", ".join(f"{name} {part.dtype}{list(part.shape)}" for name, part in self.parts.items())
        return f"{self.kind} {self.dtype}{list(self.shape)}" + (f" ({inside})" if inside else "")


def is_tensor(value: Any) -> bool:
    """Whether a node is a lazy tensor or the record of a tensor subclass."""
    return isinstance(value, LazyTensor) or (
        isinstance(value, Opaque) and value.type.qualname.startswith(("_rebuild_", "DTensor", "ShardedTensor"))
    )


def tensor_record(value: Any) -> TensorRecord | None:
    """The tensor that a record of a tensor subclass describes; None for any other node."""
    if not isinstance(value, Opaque) or value.type.path != "torch._tensor._rebuild_from_type_v2":
        return None
    if len(value.arguments) != 4:
        return None
    build, kind, arguments, state = value.arguments
    named = isinstance(build, GlobalName) and isinstance(kind, GlobalName)
    if not named or build.qualname != "_rebuild_wrapper_subclass" or not isinstance(arguments, tuple):
        return None
    if len(arguments) < 3 or not isinstance(arguments[1], GlobalName):
        return None
    shape = _numbers(arguments[2])  # class, dtype, size, ...
    return None if shape is None else TensorRecord(kind.qualname, arguments[1].qualname, shape, _parts(state))


def _parts(state: Any) -> dict[str, LazyTensor]:
    """The plain tensors among an object's attributes, or in a ShardedTensor's list of local shards."""
    if isinstance(state, tuple) and state and isinstance(state[0], list):
        shards = [_attributes(shard.state) for shard in state[0] if isinstance(shard, Opaque)]
        found = {f"shard {index}": shard.get("tensor") for index, shard in enumerate(shards)}
    else:
        found = _attributes(state)
    return {name: part for name, part in found.items() if isinstance(part, LazyTensor)}


def _attributes(state: Any) -> dict[str, Any]:
    """An object's attributes from its state: a dict, or a pair of dicts for `__dict__` and slots."""
    parts = state if isinstance(state, tuple) else (state,)
    return {str(name): value for part in parts if isinstance(part, Mapping) for name, value in part.items()}


def _numbers(size: Any) -> tuple[int, ...] | None:
    numbers = size.arguments[0] if isinstance(size, Opaque) and size.arguments else size
    return numbers if isinstance(numbers, tuple) and all(type(n) is int for n in numbers) else None
