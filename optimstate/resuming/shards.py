"""The part of a tensor that each process has, and reading it from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.io.extents import Extent
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

__all__ = ["Reader", "agree", "innermost", "is_sharded", "kept", "notes_on_casts", "whole"]


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


def agree(failure: Exception | None, group: dist.ProcessGroup | None, *, sharded: bool) -> None:
    """Raise in every process if one has failed, because the others would wait for it later."""
    import torch.distributed as dist

    alone = not sharded and group is None
    if alone or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        if failure is not None:
            raise failure
        return
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, None if failure is None else str(failure) or describe(failure), group=group)
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise StateMismatchError(
                f"rank {rank} could not load: {message}", hint="Nothing was changed in this process either."
            )


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

    def part(self, name: str, like: Any, value: Any) -> Any:
        """This process's part of a value, with the placements of `like`."""
        if _is_dtensor(like) and (value is like or _is_dtensor(value)):
            return value
        part = self.cut(name, like, value)
        if not _is_dtensor(like):
            return whole(part)
        return _placed(to_torch(part.contiguous()).clone() if isinstance(part, LazyTensor) else part, like)

    def cut(self, name: str, like: Any, value: Any) -> Any:
        """The part of a value that corresponds to this process's part of `like`, without reading it."""
        self._note_cast(name, value, like)
        if _is_dtensor(like):
            local, offsets = _local(like)
            if tuple(value.shape) != tuple(like.shape):
                raise StateMismatchError(
                    f"{describe(name)} has the shape {list(value.shape)} and its parameter {list(like.shape)}, so it "
                    "cannot be sharded in the same way",
                    hint="Start it without state by `fresh` in the plan, or load it in one process.",
                )
            for dim, (start, size) in enumerate(zip(offsets, local.shape, strict=True)):
                if size != value.shape[dim]:
                    value = value.narrow(dim, start if size else 0, size)
        self.count(value)
        return value

    def optimizer(self, optimizer: torch.optim.Optimizer, made: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's dict with this process's part of every slot."""
        parameters = {
            key: parameter
            for group, own in zip(made["param_groups"], optimizer.param_groups, strict=True)
            for key, parameter in zip(group["params"], own["params"], strict=True)
        }
        state = {
            key: {slot: self._slot(f"{key} {slot}", parameters.get(key), value) for slot, value in slots.items()}
            if isinstance(slots, Mapping)
            else whole(slots)
            for key, slots in made["state"].items()
        }
        return {**{key: whole(value) for key, value in made.items() if key != "state"}, "state": state}

    def _slot(self, name: str, parameter: Any, value: Any) -> Any:
        shape = getattr(value, "shape", None)
        if parameter is None or shape is None:
            return whole(value)
        if prod(shape) == 1 and tuple(shape) != tuple(parameter.shape):  # the count of steps
            self.count(value)
            return whole(value)
        return self.part(name, parameter, value)

    def count(self, value: Any) -> None:
        """Record that a tensor of a file is read."""
        if isinstance(value, LazyTensor) and value.numel:
            self.nbytes += value.nbytes
            self._read += value.storage.cut(*value.span())

    def _note_cast(self, name: str, value: Any, like: Any) -> None:
        saved, live = (str(getattr(each, "dtype", "")).removeprefix("torch.") for each in (value, like))
        if saved != live and "float" in saved and "float" in live:  # 8-bit codes are not cast
            self._casts.setdefault((saved, live), []).append(name)


def notes_on_casts(casts: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    """Notes on tensors whose dtype changes, from their names by old and new dtype."""
    return [
        f"{len(names)} tensors are {old} in the checkpoint and become {new}: {describe(names[0])}, ..."
        for (old, new), names in casts.items()
    ]


def whole(value: Any) -> Any:
    """A value that is not sharded, with its tensors in memory."""
    if isinstance(value, LazyTensor):
        return to_torch(value).clone()
    if type(value) is dict:
        return {key: whole(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(whole, value))
    return value


def _local(tensor: Any) -> tuple[Any, tuple[int, ...]]:
    """This process's part of a DTensor, and its offsets in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise StateMismatchError(
            f"a DTensor placed as {tensor.placements} is a partial sum and cannot be loaded",
            hint="Redistribute it first.",
        )
    local = tensor.to_local()
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in local.shape or not offsets:
        return local, (0,) * tensor.dim()
    assert tuple(local.shape) == tuple(sizes)
    return local, tuple(offsets)


def _placed(part: Any, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
