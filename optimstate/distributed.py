"""Functions for sharded runs, whose state is distributed over several processes.

`optimstate.resume` loads any checkpoint into a live model and optimizer whose parameters are `DTensor`s (FSDP2, tensor
parallelism). Every process reads the metadata and then only the bytes of its own shards. The whole state is never in
memory, and processes exchange only whether each has succeeded. With `NamedSavePlanner`,
`torch.distributed.checkpoint.save` writes optimizers by parameter name; with `PlanLoadPlanner`, its `load` follows a
plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from optimstate.installed_torch import require_named_parameters, torch  # isort: split

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan

from optimstate.errors import OptimStateError, StateMismatchError
from optimstate.io.location import Place
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.filling import Filling, put
from optimstate.resuming.identity import refuse_different
from optimstate.resuming.shards import is_fsdp1, together
from optimstate.state.names import names_in, unwrapped
from optimstate.state.optimizer import OptimizerState

require_named_parameters()

__all__ = ["NamedSavePlanner", "PlanLoadPlanner", "fill_state_dict", "load", "optimizer_names"]


def load(
    checkpoint: Place,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Resumed:
    """Resume a model and an optimizer as `optimstate.resume` does; in FSDP1, through their own state dicts.

    FSDP1's state dicts are filled by name, so the checkpoint must have them at `model` and `optimizer`, where
    `torch.distributed.checkpoint.save` is usually given them. If that fails, model and optimizer are as before.
    """
    if is_fsdp1(model):
        return _load_fsdp1(checkpoint, model, optimizer, plan, process_group)
    return resume(checkpoint, model=model, optimizer=optimizer, plan=plan, process_group=process_group)


def optimizer_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Iterator[str]:
    """The names of an optimizer's parameters in the model that it was built from, in the order of its param groups.

    Raises:
        StateMismatchError: A parameter is not in the model.
    """
    for group in names_in(optimizer, model, unwrapped(name for name, _ in model.named_parameters())):
        yield from group


# --- loading ----------------------------------------------------------------------------------------------------------


class PlanLoadPlanner(DefaultLoadPlanner):
    """A planner for `torch.distributed.checkpoint.load` whose state dict has changed since the checkpoint was written.

    Each process reads the bytes of its own shards. The state dict may be sharded as `DTensor`s, as FSDP1's
    `ShardedTensor`s, or not at all. Options of param groups are matched by the parameters in them, and the live groups
    keep their parameters. Torch wraps errors of a planner in a `CheckpointException`.

    Args:
        checkpoint: The folder that `load` is given; another one is refused.
        plan: What has changed, as a plan or the path of a plan file.
        options: As for `DefaultLoadPlanner`. With `allow_partial_load`, items that the checkpoint does not have keep
            their values; without it, only those do that `fresh` rules declare new.

    Attributes:
        notes: Remarks that need attention although nothing is wrong.
        nbytes: Bytes of tensors that this process has read.
    """

    def __init__(
        self,
        checkpoint: Place,
        plan: Plan | str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(flatten_sharded_tensors=False, **options)
        self._checkpoint, self._plan = checkpoint, plan
        self._filling: Filling | None = None
        self._names: list[str] = []
        self.notes: list[str] = []
        self.nbytes = 0

    def create_local_plan(self) -> LoadPlan:
        """Check that the checkpoint has every item, and compare the checksums of what this process reads completely.

        Raises:
            CheckpointError: The checkpoint cannot be read.
            CorruptCheckpointError: Bytes do not match their checksum.
            MigrationError: The plan does not fit, or the options of a param group are not determined.
            StateMismatchError: An item of the state dict is not in the checkpoint, or cannot have its value; the
                checkpoint is another one than `load` was given.
        """
        self._filling = Filling(self._checkpoint, self._plan)
        if self.metadata is not None:  # from the storage reader of torch's load
            save_id = getattr(self.metadata.storage_meta, "save_id", None)
            self._filling.refuse_another(save_id, self.metadata.state_dict_metadata)
        self._names = self._filling.check(
            self.state_dict, self.mappings if self.flatten_state_dict else {}, partial=self.allow_partial_load
        )
        return LoadPlan([], planner_data=self._filling.identity())

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all processes load the same checkpoint.

        Raises:
            StateMismatchError: They were given different ones.
        """
        refuse_different([plan.planner_data for plan in global_plan])
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Read this process's part of every item.

        Raises:
            CheckpointError: Bytes that could be read before can no longer be read; some items are then filled.
        """
        filling = self._filling
        assert filling is not None
        for name in self._names:
            live = self.state_dict[name]
            if hasattr(live, "shape") and hasattr(live, "dtype"):
                filling.fill(name, live)
            elif self.flatten_state_dict:
                put(self.original_state_dict, self.mappings[name], filling.value(name))
            else:
                self.original_state_dict[name] = filling.value(name)
        self.notes, self.nbytes = [*filling.notes, *filling.casts()], filling.nbytes
        self._filling = None
        return new_plan


def fill_state_dict(
    state_dict: dict[str, Any],
    checkpoint: Place,
    plan: Plan | str | PathLike[str] | None = None,
    *,
    allow_partial_load: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> PlanLoadPlanner:
    """Load a state dict in place, as `torch.distributed.checkpoint.load` does, from a checkpoint in any format.

    All processes check everything, including the checksums of what they read completely, before any of them fills its
    items. The state dict is filled in part only if bytes that were checked can no longer be read.

    Returns:
        The planner, with its notes and the number of bytes that were read.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        MigrationError: The plan does not fit.
        StateMismatchError: An item is not in the checkpoint, another process failed, or processes were given different
            checkpoints.
        CorruptCheckpointError: Bytes do not match their checksum; nothing was filled.
    """
    planner = PlanLoadPlanner(checkpoint, plan, allow_partial_load=allow_partial_load)
    with together(process_group, sharded=True) as loads:
        planner.set_up_planner(state_dict)
        loads.append(planner.create_local_plan().planner_data)
    with together(process_group, sharded=True):
        planner.finish_plan(LoadPlan([]))
    return planner


def _load_fsdp1(
    checkpoint: Place,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    plan: Plan | str | PathLike[str] | None,
    process_group: dist.ProcessGroup | None,
) -> Resumed:
    """Load through FSDP1's own state dicts, which have the names of its parameters before they were flattened."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=False)
    with _unchanged(model, optimizer):
        weights, state = get_state_dict(model, optimizer or [], options=options)
        whole: dict[str, Any] = {"model": weights}
        if optimizer is not None:
            whole["optimizer"] = state
        done = fill_state_dict(whole, checkpoint, plan, process_group=process_group)
        set_state_dict(
            model,
            optimizer or [],
            model_state_dict=weights,
            optim_state_dict=whole.get("optimizer", {}),
            options=options,
        )
    return Resumed({}, tuple(done.notes), (), done.nbytes)


@contextmanager
def _unchanged(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Restore what a block has changed in a model and an optimizer if it raises."""
    tensors = [*model.parameters(), *model.buffers()]
    state = {} if optimizer is None else {parameter: dict(slots) for parameter, slots in optimizer.state.items()}
    tensors += [value for slots in state.values() for value in slots.values() if isinstance(value, torch.Tensor)]
    groups = [] if optimizer is None else [dict(group) for group in optimizer.param_groups]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(own)
        raise


# --- saving ---------------------------------------------------------------------------------------------------------


class NamedSavePlanner(DefaultSavePlanner):
    """A planner for `torch.distributed.checkpoint.save` that writes optimizers by parameter name.

    `Optimizer.state_dict()` numbers its parameters, and after a change of model or groups the numbers mean other
    parameters. With this planner the items are `<path>.state.<name>.<slot>`, as `get_optimizer_state_dict` would name
    them. State that is keyed by names already is saved unchanged. Torch wraps errors of a planner in a
    `CheckpointException`.

    Args:
        names: The names of the parameters in the order of the param groups, for an optimizer that was built without
            names (`optimizer_names(optimizer, model)`).
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
            StateMismatchError: An optimizer's parameters have no names, or the number of names is wrong.
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
