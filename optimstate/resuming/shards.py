"""The part of a tensor that each process has, and reading it from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.io.extents import Extent
from optimstate.resuming.identity import Identity, refuse_different
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = [
    "Reader",
    "innermost",
    "is_fsdp1",
    "is_sharded",
    "kept",
    "notes_on_casts",
    "refuse_fsdp1",
    "together",
    "whole",
]


def innermost(optimizer: Any) -> Any:
    """The optimizer inside a trainer's wrapper (Accelerate's, Lightning's)."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "param_groups") and hasattr(inner, "load_state_dict") else optimizer


def _is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(modules: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether any parameter is sharded over processes."""
    own = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return any(map(_is_dtensor, own)) or any(_is_dtensor(p) for module in modules for p in module.parameters())


def is_fsdp1(module: torch.nn.Module) -> bool:
    """Whether a module is sharded by FSDP1, whose parameters are parts of flattened ones."""
    return any(type(inner).__name__ == "FullyShardedDataParallel" for inner in module.modules())


def refuse_fsdp1(key: str, module: torch.nn.Module) -> None:
    """Refuse a module whose parameters cannot be matched one by one.

    Raises:
        StateMismatchError: It is sharded by FSDP1.
    """
    if is_fsdp1(module):
        raise StateMismatchError(
            f"the live {key} is sharded by FSDP1 (FullyShardedDataParallel), which flattens its parameters",
            hint="Call optimstate.distributed.load(checkpoint, model, optimizer, plan=...), which loads through the "
            "state dicts of FSDP1.",
        )


@contextmanager
def together(group: dist.ProcessGroup | None, *, sharded: bool) -> Iterator[list[Identity | None]]:
    """Run a block in every process; if it fails in one of them, raise in all, because the others would wait for it.

    The block can add the checkpoint that this process loads to the list that it gets.

    Raises:
        StateMismatchError: The block failed in another process, or their checkpoints differ.
    """
    failure: Exception | None = None
    loads: list[Identity | None] = []
    try:
        yield loads
    except Exception as error:  # noqa: BLE001  # the other processes have to be informed first
        failure = error
    _agree(failure, loads, group, sharded=sharded)


def _agree(
    failure: Exception | None, loads: list[Identity | None], group: dist.ProcessGroup | None, *, sharded: bool
) -> None:
    """Raise in every process if one has failed."""
    import torch.distributed as dist

    alone = not sharded and group is None
    if alone or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        if failure is not None:
            raise failure
        return
    told: list[Any] = [None] * dist.get_world_size(group)
    message = None if failure is None else str(failure) or describe(failure)
    dist.all_gather_object(told, (message, loads[0] if loads else None), group=group)
    if failure is not None:
        raise failure
    for rank, (message, _) in enumerate(told):
        if message is not None:
            raise StateMismatchError(
                f"rank {rank} could not load: {message}", hint="Nothing was changed in this process either."
            )
    refuse_different([identity for _, identity in told])


def kept(value: Any) -> Any:
    """A copy of a value of a state dict, with which loading can be undone."""
    import copy

    from optimstate.installed_torch import torch

    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    return value.detach().clone() if _is_dtensor(value) else value.to("cpu", copy=True)


class Reader:
    """Reads this process's parts of tensors.

    Args:
        casts: The names of tensors whose dtype changes are added here, by old and new dtype.
        read: The byte ranges of files that are read are added here.

    Attributes:
        nbytes: Bytes of tensors in files that were read.
    """

    def __init__(self, casts: dict[tuple[str, str], list[str]], read: list[Extent]) -> None:
        self.nbytes = 0
        self._read = read
        self._casts = casts
        self._by_memory: dict[tuple[Any, ...], tuple[str, Any]] = {}

    def part(self, name: str, like: Any, value: Any, *, copied: bool = True) -> Any:
        """This process's part of a value, with the placements of `like`.

        Args:
            name: The name for messages.
            like: What it is sharded like.
            value: The whole tensor.
            copied: Whether it is copied into `like`; slots are not, and may have a dtype of their own.
        """
        if _is_dtensor(like) and (value is like or _is_dtensor(value)):
            return value
        part = self.cut(name, like, value, copied=copied)
        if not _is_dtensor(like):
            return whole(part)
        return _placed(to_torch(part.contiguous()).clone() if isinstance(part, LazyTensor) else part, like)

    def cut(self, name: str, like: Any, value: Any, *, copied: bool = True) -> Any:
        """The part of a value that corresponds to this process's part of `like`, without reading it.

        Raises:
            StateMismatchError: `like` has no memory, or cannot hold the value.
        """
        self.check_copy(name, like, value, copied=copied)
        if _is_dtensor(like) and (copied or not _is_replicated(like) or tuple(value.shape) == tuple(like.shape)):
            if tuple(value.shape) != tuple(like.shape):
                raise StateMismatchError(
                    f"{describe(name)} has the shape {list(value.shape)} and its parameter {list(like.shape)}, so it "
                    "cannot be sharded in the same way",
                    hint="Start it without state by `fresh` in the plan, or load it in one process.",
                )
            local, offsets = _local(name, like)
            for dim, (start, size) in enumerate(zip(offsets, local, strict=True)):
                if size != value.shape[dim]:
                    value = value.narrow(dim, start if size else 0, size)
        if copied:
            refuse_lost(name, value, like.dtype)
            self._refuse_untied(name, like, value)
        self.count(value)
        return value

    def _refuse_untied(self, name: str, like: Any, value: Any) -> None:
        """Refuse two values for one live tensor, of which the second would replace the first.

        Raises:
            StateMismatchError: The live tensor has another name too, under which the checkpoint has another value.
        """
        local = like.to_local() if _is_dtensor(like) else like
        try:
            place = local.untyped_storage().data_ptr() if local.numel() else 0
        except (NotImplementedError, RuntimeError):  # sparse, or of a subclass without a storage
            return
        if not place:
            return
        key = (place, local.storage_offset(), tuple(local.shape), local.stride())
        first, known = self._by_memory.setdefault(key, (name, value))
        if first != name and known is not value and not _equal(known, value, like.dtype):
            raise StateMismatchError(
                f"{describe(first)} and {describe(name)} are one tensor in the live model, but not in the checkpoint, "
                "where their values differ",
                hint="Give both the values of one of them in the plan, or build the model without tied parameters.",
            )

    def check_copy(self, name: str, like: Any, value: Any, *, copied: bool = True) -> None:
        """Check that a live tensor has memory, and note if its dtype differs from the value's.

        Raises:
            StateMismatchError: It has none.
        """
        if _is_meta(like):
            raise StateMismatchError(
                f"{describe(name)} cannot be loaded, because the live tensor is on the meta device and has no memory",
                hint='Call model.to_empty(device="...") before the optimizer is built.',
            )
        saved, live = map(_dtype_name, (value.dtype, like.dtype))
        # Codes of quantized slots are not cast.
        if saved != live and (copied or ("float" in saved and "float" in live)):
            self._casts.setdefault((saved, live), []).append(name)

    def optimizer(
        self, optimizer: torch.optim.Optimizer, made: dict[str, Any], names: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """An optimizer's dict with this process's part of every slot.

        Args:
            optimizer: The live optimizer.
            made: The dict that it is about to load, with whole tensors.
            names: The names of its parameters by group, for messages.
        """
        parameters = {
            key: (name, parameter)
            for group, own, known in zip(made["param_groups"], optimizer.param_groups, names, strict=True)
            for key, name, parameter in zip(group["params"], known, own["params"], strict=True)
        }
        state = {
            key: {slot: self._slot(slot, *parameters.get(key, ("", None)), value) for slot, value in slots.items()}
            if isinstance(slots, Mapping)
            else whole(slots)
            for key, slots in made["state"].items()
        }
        return {**{key: whole(value) for key, value in made.items() if key != "state"}, "state": state}

    def _slot(self, slot: str, name: str, parameter: Any, value: Any) -> Any:
        if parameter is not None and isinstance(value, Mapping):
            return {key: self._slot(f"{slot}.{key}", name, parameter, inner) for key, inner in value.items()}
        if parameter is not None and type(value) in (list, tuple):
            return type(value)(self._slot(f"{slot}.{at}", name, parameter, inner) for at, inner in enumerate(value))
        shape = getattr(value, "shape", None)
        if parameter is None or shape is None:
            return whole(value)
        if prod(shape) == 1 and tuple(shape) != tuple(parameter.shape):  # the count of steps
            self.count(value)
            return whole(value)
        return self.part(f"{name} {slot}", parameter, value, copied=False)

    def count(self, value: Any) -> None:
        """Record that a tensor of a file is read."""
        if isinstance(value, LazyTensor) and value.numel:
            self.nbytes += value.nbytes
            self._read += value.storage.cut(*value.span())


def notes_on_casts(casts: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    """Notes on tensors whose dtype changes, from their names by old and new dtype."""
    return [
        f"{len(names)} tensors are {old} in the checkpoint and become {new}: {describe(names[0])}, ..."
        for (old, new), names in casts.items()
    ]


def refuse_lost(name: str, value: Any, live: torch.dtype) -> None:
    """Refuse values that a live tensor cannot hold: fractions or larger integers as integers, complex numbers as real.

    Floating-point numbers become others with the usual rounding. In the cases above, the values are read.

    Raises:
        StateMismatchError: A value would become another one.
    """
    from optimstate.installed_torch import torch

    if not isinstance(value, LazyTensor):
        value = torch.as_tensor(value)
    saved, wanted = map(_dtype_name, (value.dtype, live))
    if saved == wanted or _kind(saved) < _kind(wanted) or _kind(saved) == _kind(wanted) != 1:
        return
    part = to_torch(value.contiguous()) if isinstance(value, LazyTensor) else value
    if part.is_complex() or not torch.equal(part.to(live).to(part.dtype), part):
        raise StateMismatchError(
            f"{describe(name)} is {saved} in the checkpoint and {wanted} in the live state, which cannot hold it",
            hint=f'Build the live one as {saved}, or convert it in the plan: cast = "{wanted}".',
        )


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(dtype: str) -> int:
    """0 for truth values, 1 for integers, 2 for real and 3 for complex numbers."""
    return 3 if "complex" in dtype else 2 if "float" in dtype else 0 if dtype == "bool" else 1


def _is_meta(tensor: Any) -> bool:
    if hasattr(tensor, "local_shards"):  # FSDP1's ShardedTensor, which answers only if it has exactly one shard
        return any(shard.tensor.is_meta for shard in tensor.local_shards())
    return bool(getattr(tensor, "is_meta", False))


def _equal(one: Any, other: Any, dtype: torch.dtype) -> bool:
    """Whether two tensors have the same bits in a dtype."""
    from optimstate.installed_torch import torch

    a, b = (to_torch(value.contiguous()) if isinstance(value, LazyTensor) else value for value in (one, other))
    bits = [each.to(dtype).contiguous().flatten().view(torch.uint8) for each in (a, b)]
    return torch.equal(*bits)


def whole(value: Any) -> Any:
    """A value that is not sharded, with its tensors in memory."""
    if isinstance(value, LazyTensor):
        return to_torch(value).clone()
    if type(value) is dict:
        return {key: whole(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(whole, value))
    return value


def _local(name: str, tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of this process's part of a DTensor, and its offsets in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise StateMismatchError(
            f"the live tensor of {describe(name)} is a partial sum ({tensor.placements}) and cannot be loaded",
            hint="Redistribute it first.",
        )
    if tensor.device_mesh.get_coordinate() is None:  # of other processes
        return (0,) * tensor.dim(), (0,) * tensor.dim()
    local = tuple(tensor.to_local().shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in local or not offsets:
        return local, (0,) * tensor.dim()
    if local != tuple(sizes):
        raise StateMismatchError(
            f"the live tensor of {describe(name)} is placed as {tensor.placements}: a process does not have one region "
            f"of it, because its part has the shape {list(local)} and the region {list(sizes)}",
            hint="Redistribute it first.",
        )
    return local, tuple(offsets)


def _is_replicated(tensor: Any) -> bool:
    """Whether every process of a DTensor's mesh has all of it."""
    return all(placement.is_replicate() for placement in tensor.placements)


def _placed(part: Any, like: Any) -> Any:
    """A DTensor of this process's part, whose whole has the shape of `like`; replicated ones may have another shape."""
    from torch.distributed.tensor import DTensor

    other = _is_replicated(like) and tuple(part.shape) not in (tuple(like.shape), (0,) * like.dim())
    whole = {} if other else {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part.to(like.device), like.device_mesh, like.placements, run_check=False, **whole)
