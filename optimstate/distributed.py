"""Loading under a plan, and saving with names, where the state is spread over many processes.

`load` reads any checkpoint into a live model and optimizer whose parameters are `DTensor`s (FSDP2, tensor parallelism)
or plain tensors. Every process reads the metadata and then only the bytes of its own shards; the whole state is nowhere
in memory, and nothing is sent between processes but whether each has succeeded. `NamedSavePlanner` lets
`torch.distributed.checkpoint.save` write optimizers by parameter name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any

from optimstate.installed_torch import require_named_parameters, torch  # isort: split

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from optimstate.errors import MigrationError, OptimStateError, StateMismatchError
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Inventory, Migration, Target
from optimstate.plan.solve.planner import model_inventory, optimizer_inventory, plan_migration
from optimstate.problems import Problem
from optimstate.state.names import names_in, unwrapped
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor

require_named_parameters()

__all__ = ["Loaded", "NamedSavePlanner", "load", "optimizer_names"]


@dataclass(frozen=True)
class Loaded:
    """What a load did.

    Attributes:
        migration: Every decision, by section: `model`, `optimizer`.
        nbytes: Bytes of tensors that this process read.
        notes: What deserves attention though nothing is wrong.
    """

    migration: Migration
    nbytes: int
    notes: tuple[str, ...]


def load(
    checkpoint: str | PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Loaded:
    """Load weights and optimizer state by name into a model that may be sharded, and may have changed.

    Call it in every process, after the model was sharded and the optimizer built. All processes must see the
    checkpoint. A tensor that is sharded in another dimension than its first is read whole, one at a time. Nothing is
    changed in any process before every one has read its part.

    Args:
        checkpoint: A file or folder in any format that optimstate reads: a folder of `torch.distributed.checkpoint`
            from any number of processes, a full checkpoint of one, files of DeepSpeed.
        model: Gets the weights; a parameter that the plan calls new keeps its value.
        optimizer: Gets its state; it may be built with or without names. Parameters that are new have none.
        plan: What has changed, as a plan or the path of a plan file.
        process_group: The processes that load together; all by default.

    Returns:
        What was decided and read.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint lacks a part or has several that could be meant, a slot cannot be cut like
            its parameter, or another process failed.
    """
    given = Plan() if plan is None else plan if isinstance(plan, Plan) else Plan.from_file(Path(plan))
    failure: Exception | None = None
    run: _Load | None = None
    try:
        run = _Load(Path(checkpoint), model, optimizer, given)
    except Exception as error:  # noqa: BLE001  # the others wait to be told
        failure = error
    _agree(failure, process_group)
    assert run is not None
    run.carry_out()
    return Loaded(run.migration, run.nbytes, tuple(run.notes))


def _agree(failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise in every process if one has failed: the others would wait for it at their next step."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        if failure is not None:
            raise failure
        return
    said: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, None if failure is None else str(failure) or repr(failure), group=group)
    if failure is not None:
        raise failure
    for rank, message in enumerate(said):
        if message is not None:
            raise StateMismatchError(
                f"rank {rank} could not load: {message}", hint="Nothing was changed in this process either."
            )


class _Load:
    """Everything that one process needs, planned and read; nothing is changed before `carry_out`."""

    def __init__(
        self, checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, plan: Plan
    ) -> None:
        self.nbytes = 0
        self.notes: list[str] = []
        self._casts: dict[tuple[str, str], list[str]] = {}
        self._optimizer = optimizer
        self._state: dict[str, Any] | None = None
        document = open_checkpoint(checkpoint)
        self.notes += document.notes
        sections = find_sections(document.tree)
        live = _live_tensors(model)
        tensors = _plain_names(_one(sections, "model", checkpoint).tensors())
        inventories: dict[str, Inventory] = {
            "model": model_inventory(tensors, target=Target.of_names({n: tuple(t.shape) for n, t in live.items()}))
        }
        groups: list[list[str]] = []
        saved: OptimizerState | None = None
        if optimizer is not None:
            groups = _names_of(optimizer, model)
            saved = _named(_one(sections, "optimizer", checkpoint).optimizer())
            inventories["optimizer"] = _optimizer_inventory(saved, optimizer, groups, tensors)
        self.migration = plan_migration(plan, inventories)
        self.notes += self.migration.notes
        weights = execute_model(self.migration.sections["model"], tensors)
        self._weights: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, value in weights.items():
            self._weights.append((_local(live[name])[0], self._read(name, live[name], value)))
            self._note_cast(name, value, live[name])
        if optimizer is not None and saved is not None:
            moved = execute_optimizer(self.migration.sections["optimizer"], saved)
            self._state = self._optimizer_dict(moved, optimizer, groups)
        for (old, new), names in self._casts.items():
            self.notes.append(f"{len(names)} tensors are {old} in the checkpoint and become {new}: {names[0]!r}, ...")

    def carry_out(self) -> None:
        """Change the live objects; the optimizer first, which may refuse what it is given."""
        if self._optimizer is not None and self._state is not None:
            self._optimizer.load_state_dict(self._state)
        with torch.no_grad():
            for local, value in self._weights:
                local.copy_(value)

    def _optimizer_dict(
        self, moved: OptimizerState, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        """What `optimizer.load_state_dict` takes: this process's part of every slot, by position."""
        by_name = {str(name): slots for _, name, slots in moved.parameters()}
        state: dict[int, Any] = {}
        made: list[dict[str, Any]] = []
        position = count()
        for names, found, own in zip(groups, moved.groups, optimizer.param_groups, strict=True):
            keys = [next(position) for _ in names]
            for key, name, parameter in zip(keys, names, own["params"], strict=True):
                slots = by_name.get(name)
                if slots is not None:
                    state[key] = {slot: self._slot(name, slot, parameter, value) for slot, value in slots.items()}
            options = {key: _whole(value) for key, value in found.options.items()}
            kept = {"param_names": own["param_names"]} if "param_names" in own else {}
            made.append({**options, **kept, "params": keys})
        return {"state": state, "param_groups": made}

    def _slot(self, name: str, slot: str, parameter: torch.Tensor, value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return _whole(value)
        alone = value.numel == 1 and value.shape != tuple(parameter.shape)  # the count of steps
        if not alone and parameter.is_floating_point():
            self._note_cast(f"{name} {slot}", value, parameter)  # torch gives slots the dtype of their parameter
        if alone or not isinstance(parameter, DTensor):
            self.nbytes += value.nbytes
            return _whole(value)
        if value.shape != tuple(parameter.shape):
            raise StateMismatchError(
                f"slot {slot!r} of {name!r} has the shape {list(value.shape)} and its parameter "
                f"{list(parameter.shape)}: it cannot be cut into the same shards",
                hint=f'Start it anew with `fresh = "{name}"` in the plan, or load it in one process.',
            )
        part = self._read(f"{name} {slot}", parameter, value)
        return DTensor.from_local(
            part.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _note_cast(self, name: str, value: LazyTensor, like: torch.Tensor) -> None:
        dtype = str(like.dtype).removeprefix("torch.")
        if value.dtype != dtype:
            self._casts.setdefault((value.dtype, dtype), []).append(name)

    def _read(self, name: str, like: torch.Tensor, value: Any) -> torch.Tensor:
        """The part of a tensor in a file that this process has of `like`."""
        if not isinstance(value, LazyTensor) or value.shape != tuple(like.shape):
            raise StateMismatchError(f"{name!r} is {value!r}, and {list(like.shape)} is needed")
        local, offsets = _local(like)
        for dim, (start, size) in enumerate(zip(offsets, local.shape, strict=True)):
            if size != value.shape[dim]:
                value = value.narrow(dim, start if size else 0, size)
        self.nbytes += value.nbytes
        made: torch.Tensor = to_torch(value.contiguous()).clone()
        return made


# --- the live side --------------------------------------------------------------------------------------------------


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this process has of a tensor, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    if any(placement.is_partial() for placement in tensor.placements):
        raise StateMismatchError(f"a DTensor placed as {tensor.placements} waits for a reduction and cannot be loaded")
    local = tensor.to_local()
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in local.shape or not offsets:
        return local, (0,) * tensor.dim()
    assert tuple(local.shape) == tuple(sizes)
    return local, tuple(offsets)


def _live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict by plain name, each as it is in this process."""
    found = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor) or (type(value) is not torch.Tensor and not isinstance(value, DTensor)):
            raise StateMismatchError(
                f"{name!r} is a {type(value).__name__}, of which the shards are not known",
                hint="FSDP1 models are loaded with torch.distributed.checkpoint from what `optimstate remap` writes.",
            )
    return _plain_names(found)


def _plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """By the names without what wrappers put into them.

    Raises:
        MigrationError: Two become the same.
    """
    rename = unwrapped(tensors)
    made = {rename(name): value for name, value in tensors.items()}
    if len(made) != len(tensors):
        raise MigrationError([Problem("name", "two parameters have the same name when wrapper prefixes are taken off")])
    return made


def _names_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[list[str]]:
    """The plain names of an optimizer's parameters, group by group."""
    return names_in(optimizer, model, unwrapped(name for name, _ in model.named_parameters()))


def optimizer_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Iterator[str]:
    """The names of an optimizer's parameters in the model that it was built from, in the order of its param groups.

    Raises:
        StateMismatchError: The model does not have a parameter.
    """
    for group in _names_of(optimizer, model):
        yield from group


# --- the checkpoint's side ------------------------------------------------------------------------------------------


def _one(sections: Sequence[Section], kind: str, checkpoint: Path) -> Section:
    found = [section for section in sections if section.kind == kind]
    if len(found) == 1:
        return found[0]
    labels = ", ".join(f"{section.kind} {section.label}" for section in found or sections) or "nothing that is known"
    if found:
        raise StateMismatchError(f"{checkpoint} has several parts that could be the {kind}: {labels}")
    raise StateMismatchError(f"{checkpoint} has no {kind}; it has {labels}")


def _named(state: OptimizerState) -> OptimizerState:
    """The optimizer of a checkpoint by plain names."""
    if not state.is_named:
        raise StateMismatchError(
            "the parameters of the checkpoint's optimizer have no names, so they cannot be matched",
            hint="`optimstate name` finds them in what was saved; NamedSavePlanner saves them.",
        )
    names = [[str(name) for name in group.names or ()] for group in state.groups]
    rename = unwrapped(name for group in names for name in group)
    return state.named([[rename(name) for name in group] for group in names])


def _optimizer_inventory(
    state: OptimizerState,
    optimizer: torch.optim.Optimizer,
    names: Sequence[Sequence[str]],
    tensors: Mapping[str, Any],
) -> Inventory:
    """What the planner is told of the optimizer; shapes come from the weights beside it."""
    options = tuple(
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    )
    wanted = {
        name: tuple(parameter.shape)
        for group, own in zip(names, optimizer.param_groups, strict=True)
        for name, parameter in zip(group, own["params"], strict=True)
    }
    shapes = {name: value.shape for name, value in tensors.items() if isinstance(value, LazyTensor)}
    return optimizer_inventory(state, target=Target(tuple(map(tuple, names)), options, wanted), shapes=shapes)


def _whole(value: Any) -> Any:
    """A value that every process has alike."""
    if isinstance(value, LazyTensor):
        return to_torch(value).clone()
    if isinstance(value, Mapping):
        return {key: _whole(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_whole, value))
    return value


# --- saving ---------------------------------------------------------------------------------------------------------


class NamedSavePlanner(DefaultSavePlanner):
    """A planner for `torch.distributed.checkpoint.save` that writes optimizers by parameter name.

    `Optimizer.state_dict()` numbers its parameters, and after a change of model or groups the numbers mean others. With
    this planner the items are `<path>.state.<name>.<slot>`, as `get_optimizer_state_dict` would name them. What has
    names already is saved as it is. Torch puts an error of a planner into a `CheckpointException`.

    Args:
        names: Of the parameters in the order of the param groups, for an optimizer that was built without them
            (`optimizer_names(optimizer, model)`).
        options: As for `DefaultSavePlanner`.
    """

    def __init__(self, names: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._names = names

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Name the optimizers of a state dict, which is not changed.

        Raises:
            StateMismatchError: An optimizer's parameters have no names, or there are more or fewer than it has.
        """
        super().set_up_planner(self._by_name(state_dict, ()), storage_meta, is_coordinator)

    def _by_name(self, node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        if "param_groups" not in node or not isinstance(node.get("state"), Mapping):
            return {key: self._by_name(value, (*path, str(key))) for key, value in node.items()}
        try:
            state = OptimizerState.from_node(node)
            if all(type(key) is str for group in state.groups for key in group.params):
                return node
            return (state if self._names is None else state.named(self._names)).by_name().to_node()
        except OptimStateError as error:
            where = ".".join(path) or "the state dict"
            hint = "Build the optimizer from model.named_parameters(), or give NamedSavePlanner the names."
            raise StateMismatchError(f"the optimizer at {where}: {error.message}", hint=hint) from error
