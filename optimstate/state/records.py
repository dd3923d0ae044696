"""Tensors that a pickle keeps as records of their classes: what dtype and shape they have.

Distributed tensors hold one rank's part and describe the whole; quantized ones hold codes and describe what they stand
for. None is turned into a plain tensor here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimstate.tensors import LazyTensor
from optimstate.tree import GlobalName, Opaque

__all__ = ["TensorRecord", "tensor_record"]

_SHARDED = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"


@dataclass(frozen=True)
class TensorRecord:
    """What a record says of the tensor it stands for.

    Attributes:
        kind: Its class, without the module: `DTensor`.
        dtype: Of the whole tensor.
        shape: Of the whole tensor.
        parts: Plain tensors inside the record, by name: the local part, or codes and scales.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, LazyTensor]

    def __str__(self) -> str:
        inside = ", ".join(f"{name} {part.dtype}{list(part.shape)}" for name, part in self.parts.items())
        return f"{self.kind} {self.dtype}{list(self.shape)} ({inside})" if inside else f"{self.kind} {self.dtype}"


def tensor_record(value: Any) -> TensorRecord | None:
    """What a record of a tensor subclass says, or None for everything else."""
    if not isinstance(value, Opaque):
        return None
    if value.type.path == "torch._tensor._rebuild_from_type_v2" and len(value.arguments) == 4:
        return _wrapper_subclass(*value.arguments)
    if value.type.path == _SHARDED:
        return _sharded(value.state)
    return None


def _wrapper_subclass(build: Any, kind: Any, arguments: Any, state: Any) -> TensorRecord | None:
    """`_rebuild_wrapper_subclass(class, dtype, size, ...)` and the attributes set afterwards."""
    named = isinstance(build, GlobalName) and isinstance(kind, GlobalName)
    if not named or build.qualname != "_rebuild_wrapper_subclass" or not isinstance(arguments, tuple):
        return None
    if len(arguments) < 3 or not isinstance(arguments[1], GlobalName):
        return None
    shape = _numbers(arguments[2])
    if isinstance(state, tuple) and len(state) == 2:  # attributes from __dict__ and from slots
        state = {**(state[0] or {}), **(state[1] or {})}
    parts = {name: part for name, part in _entries(state) if isinstance(part, LazyTensor)}
    return None if shape is None else TensorRecord(kind.qualname, arguments[1].qualname, shape, parts)


def _sharded(state: Any) -> TensorRecord | None:
    """(local shards, metadata, process group, sharding spec, references)."""
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[1], Opaque):
        return None
    about = dict(_entries(state[1].state))
    shape = _numbers(about.get("size"))
    properties = about.get("tensor_properties")
    dtypes = properties.state if isinstance(properties, Opaque) else ()
    dtype = next((item for item in dtypes if isinstance(item, GlobalName)), None) if isinstance(dtypes, tuple) else None
    if shape is None or dtype is None:
        return None
    shards = state[0] if isinstance(state[0], list) else []
    tensors = [dict(_entries(shard.state)).get("tensor") for shard in shards if isinstance(shard, Opaque)]
    parts = {f"shard {index}": part for index, part in enumerate(tensors) if isinstance(part, LazyTensor)}
    return TensorRecord("ShardedTensor", dtype.qualname, shape, parts)


def _entries(state: Any) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in state.items()] if isinstance(state, Mapping) else []


def _numbers(size: Any) -> tuple[int, ...] | None:
    numbers = size.arguments[0] if isinstance(size, Opaque) and size.arguments else size
    return numbers if isinstance(numbers, tuple) and all(type(n) is int for n in numbers) else None
