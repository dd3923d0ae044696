"""Reading one rank's part of a tensor from the pickled record of a `DTensor` or `ShardedTensor`.

Nothing is unpickled: shapes, placements and the mesh are read from inert records. Placements are applied in the order
in which torch applied them, each like `torch.chunk`: parts of equal size, rounded up, the last ones shorter or empty.

Sources: `torch.distributed.tensor` (DTensor, placements, shard order), `torch.distributed._shard.sharded_tensor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.ranks.tiles import Box, region
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName, Opaque

__all__ = ["SHARDED_CLASSES", "ShardRecord", "is_sharded", "shard_record"]

SHARDED_CLASSES = ("DTensor", "ShardedTensor")
_MAX_DEVICES = 1 << 20  # in one mesh; the largest clusters have a tenth of it


class ShardRecord(NamedTuple):
    """One rank's record of a sharded tensor.

    Attributes:
        dtype: The dtype, a key of `DTYPES`.
        shape: The shape of the whole tensor.
        parts: The parts that this rank holds.
        boxes: The parts of all ranks, each with the rank or the position in the mesh that holds it.
        requires_grad: As saved.
        is_parameter: Whether it was an `nn.Parameter`.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Box, LazyTensor], ...]
    boxes: Mapping[Box, str]
    requires_grad: bool
    is_parameter: bool


def is_sharded(node: Any) -> bool:
    """Whether a node is a record of a sharded tensor."""
    return _inner(node) is not None


def _inner(node: Any) -> tuple[GlobalName, Any, Any] | None:
    """Class, arguments and state of the record of a sharded tensor or parameter; None for any other node."""
    if not isinstance(node, Opaque):
        return None
    if node.type.path == "torch._utils._rebuild_parameter" and node.arguments:
        return _inner(node.arguments[0])
    if node.type.qualname != "_rebuild_from_type_v2" or len(node.arguments) != 4:
        return None
    _, kind, arguments, state = node.arguments
    known = isinstance(kind, GlobalName) and kind.module.startswith("torch.distributed.")
    return (kind, arguments, state) if known and kind.qualname in SHARDED_CLASSES else None


def shard_record(node: Any) -> ShardRecord | None:
    """The record of a sharded tensor in a node, or None if the node is something else.

    Raises:
        CorruptCheckpointError: The record contradicts itself.
        UnsupportedCheckpointError: Its form is unknown, or the tensor has a partial placement.
    """
    found = _inner(node)
    if found is None:
        return None
    kind, arguments, state = found
    try:
        dtype, shape, grad = arguments[1].qualname, _numbers(arguments[2]), arguments[-1] is True
        if dtype not in DTYPES:
            raise UnsupportedCheckpointError(f"a {kind.qualname} of dtype {dtype}")
        parts, boxes = _dtensor(shape, state) if kind.qualname == "DTensor" else _sharded_tensor(shape, state)
        for box, tensor in parts:
            if box not in boxes or tensor.shape != box[1] or tensor.dtype != dtype:
                raise CorruptCheckpointError(f"the part {region(*box)} of a {dtype}{list(shape)} is {describe(tensor)}")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        message = f"the record of a {kind.qualname} has an unknown form: {describe(error)}"
        hint = "Save it with a newer torch, or as a full state."
        raise UnsupportedCheckpointError(message[:300], hint=hint) from None
    is_parameter = node.type.path == "torch._utils._rebuild_parameter"
    return ShardRecord(dtype, shape, parts, boxes, node.arguments[1] is True if is_parameter else grad, is_parameter)


def _numbers(value: Any) -> tuple[int, ...]:
    if isinstance(value, Opaque):  # a torch.Size
        (value,) = value.arguments
    if not isinstance(value, tuple | list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{describe(value)} is not a list of sizes")
    return tuple(value)


def _fields(record: Any) -> Mapping[str, Any]:
    """The attributes of a pickled object, whose class may have slots."""
    fields = _attributes(record.state)
    if not isinstance(fields, Mapping):
        raise TypeError(f"{describe(record)} has no attributes")
    return fields


def _attributes(state: Any) -> Any:
    """The attributes in an object's state: a dict, or a pair of one and those of slots."""
    return {**(state[0] or {}), **(state[1] or {})} if isinstance(state, tuple) and len(state) == 2 else state


# --- ShardedTensor (FSDP1) ------------------------------------------------------------------------------------------


def _sharded_tensor(shape: tuple[int, ...], state: Any) -> tuple[tuple[tuple[Box, LazyTensor], ...], Mapping[Box, str]]:
    local, metadata = state[0], _fields(state[1])
    if _numbers(metadata["size"]) != shape:
        raise ValueError(f"its metadata has the size {describe(metadata['size'])}")
    boxes = {}
    for shard in metadata["shards_metadata"]:
        rank = _fields(_fields(shard)["placement"]).get("_rank")
        boxes[_box(shard)] = f"rank {rank}"
    parts = tuple((_box(_fields(shard)["metadata"]), _fields(shard)["tensor"]) for shard in local)
    return parts, boxes


def _box(shard: Any) -> Box:
    fields = _fields(shard)
    return _numbers(fields["shard_offsets"]), _numbers(fields["shard_sizes"])


# --- DTensor (FSDP2, tensor parallelism) ----------------------------------------------------------------------------


def _dtensor(shape: tuple[int, ...], state: Any) -> tuple[tuple[tuple[Box, LazyTensor], ...], Mapping[Box, str]]:
    fields = _attributes(state)
    spec = _fields(fields["_spec"])
    mesh = _fields(spec["mesh"])
    sizes, here = _mesh_shape(mesh), mesh["_coordinate_on_dim"]
    order = _shard_order(spec, sizes)
    boxes = _boxes(shape, sizes, tuple((dim, tuple(axes)) for dim, axes in order.items()))
    if here is None:  # this rank is not in the mesh
        return (), boxes
    here = _numbers(here)
    if len(here) != len(sizes) or any(at >= size for at, size in zip(here, sizes, strict=True)):
        raise ValueError(f"position {here} in a mesh of {sizes}")
    return ((_box_at(shape, here, sizes, order), fields["_local_tensor"]),), boxes


@lru_cache(maxsize=1024)  # a checkpoint has few shapes, and every tensor is in the files of all ranks
def _boxes(
    shape: tuple[int, ...], mesh: tuple[int, ...], order: tuple[tuple[int, tuple[int, ...]], ...]
) -> Mapping[Box, str]:
    if prod(mesh) > _MAX_DEVICES:
        raise ValueError(f"a mesh of {mesh}")
    boxes: dict[Box, str] = {}
    for position in product(*map(range, mesh)):
        boxes.setdefault(_box_at(shape, position, mesh, dict(order)), f"position {position} in the mesh {mesh}")
    return boxes


def _mesh_shape(mesh: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes of a mesh, which torch versions have saved as a tensor of ranks, as one layout or one per dimension."""
    if "_layout" not in mesh:
        return tuple(mesh["mesh"].shape)
    layout = _fields(mesh["_layout"])
    if "axes" in layout:
        return tuple(prod(_numbers(_fields(axis)["shape"])) for axis in layout["axes"])
    found = layout["shape"]
    return tuple(
        prod(_numbers(n)) if isinstance(n, tuple) else n for n in (found if type(found) is tuple else (found,))
    )


def _shard_order(spec: Mapping[str, Any], mesh: tuple[int, ...]) -> dict[int, list[int]]:
    """For each sharded dimension of the tensor the dimensions of the mesh, in the order in which they shard it."""
    placements = spec["placements"]
    if len(placements) != len(mesh):
        raise ValueError(f"{len(placements)} placements on a mesh of {mesh}")
    order: dict[int, list[int]] = {}
    for axis in reversed(range(len(mesh))):
        placement = placements[axis]
        kind = placement.type.qualname
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard"):
            raise UnsupportedCheckpointError(
                f"a DTensor placed as {kind}: its value is not known before a reduction over the ranks",
                hint="Reduce it before saving (`redistribute` to Replicate or Shard).",
            )
        fields = _fields(placement)
        cuts = order.setdefault(fields["dim"], [])
        # The split factor of a strided shard is the number of parts into which later dimensions had cut before.
        before = fields.get("split_factor", 1) if kind == "_StridedShard" else 1
        at = next((n for n in range(len(cuts) + 1) if prod(mesh[cut] for cut in cuts[:n]) == before), None)
        if at is None:
            raise ValueError(f"a split factor of {before} on a mesh of {mesh}")
        cuts.insert(at, axis)
    for entry in spec.get("shard_order") or ():
        dim, axes = entry.arguments
        order[dim] = list(_numbers(axes))
    return order


def _box_at(
    shape: tuple[int, ...], position: tuple[int, ...], mesh: tuple[int, ...], order: Mapping[int, Sequence[int]]
) -> Box:
    offsets, sizes = [0] * len(shape), list(shape)
    for dim, axes in order.items():
        for axis in axes:
            part = -(-sizes[dim] // mesh[axis])
            start = min(part * position[axis], sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(part, sizes[dim] - start)
    return tuple(offsets), tuple(sizes)
