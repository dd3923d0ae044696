"""What only sharded runs need: saving with names where the state is spread over many processes.

`optimstate.resume` loads any checkpoint into a live model and optimizer whose parameters are `DTensor`s (FSDP2, tensor
parallelism). Every process reads the metadata and then only the bytes of its own shards; the whole state is nowhere in
memory, and nothing is sent between processes but whether each has succeeded. `NamedSavePlanner` lets
`torch.distributed.checkpoint.save` write optimizers by parameter name, `PlanLoadPlanner` lets its `load` follow a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from optimstate.resuming.shards import agree
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
    """`optimstate.resume` of a model and an optimizer, by position; of FSDP1's by their own state dicts.

    The latter are filled by name, so a checkpoint must have them at `model` and `optimizer`, as those who call
    `torch.distributed.checkpoint.save` put them there.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return _load_fsdp1(checkpoint, model, optimizer, plan, process_group)
    return resume(checkpoint, model=model, optimizer=optimizer, plan=plan, process_group=process_group)


def optimizer_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Iterator[str]:
    """The names of an optimizer's parameters in the model that it was built from, in the order of its param groups.

    Raises:
        StateMismatchError: The model does not have a parameter.
    """
    for group in names_in(optimizer, model, unwrapped(name for name, _ in model.named_parameters())):
        yield from group


# --- loading ----------------------------------------------------------------------------------------------------------


class PlanLoadPlanner(DefaultLoadPlanner):
    """A planner for `torch.distributed.checkpoint.load` whose state dict has changed since the checkpoint was written.

    Each process reads the bytes of its own shards; the state dict may be sharded in any way: `DTensor`, FSDP1's
    `ShardedTensor`, or not at all. Torch puts an error of a planner into a `CheckpointException`.

    Args:
        checkpoint: The folder that `load` is given.
        plan: What has changed, as a plan or the path of a plan file.
        options: As for `DefaultLoadPlanner`; with `allow_partial_load` what the checkpoint does not have is left alone,
            as what `fresh` rules declare new is without.

    Attributes:
        notes: What deserves attention though nothing is wrong.
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
        """Check that everything is there, and compare the checksums of what this process is to read.

        Raises:
            CheckpointError: The checkpoint cannot be read.
            CorruptCheckpointError: Bytes do not match their checksum.
            MigrationError: The plan does not fit.
            StateMismatchError: Something of the state dict is not in the checkpoint.
        """
        self._filling = Filling(self._checkpoint, self._plan)
        self._names = self._filling.check(
            self.state_dict, self.mappings if self.flatten_state_dict else {}, partial=self.allow_partial_load
        )
        return LoadPlan([])

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Read this process's part of everything.

        Raises:
            CheckpointError: Bytes could be read before and cannot now; the state dict is then filled in part.
        """
        filling = self._filling
        assert filling is not None
        for name in self._names:
            live = self.state_dict[name]
            if hasattr(live, "shape") and hasattr(live, "dtype"):
                filling.fill(name)
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
    """Load a state dict in place, as `torch.distributed.checkpoint.load` does, from a checkpoint in any container.

    Every process checks everything, checksums included, before any fills its own. Only where bytes that could be read
    then cannot be read again is the state dict filled in part.

    Returns:
        The planner, with its notes and the bytes that were read.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        MigrationError: The plan does not fit.
        StateMismatchError: Something is not in the checkpoint, or another process failed.
        CorruptCheckpointError: Bytes do not match their checksum; nothing was filled.
    """
    planner = PlanLoadPlanner(checkpoint, plan, allow_partial_load=allow_partial_load)
    failure: Exception | None = None
    try:
        planner.set_up_planner(state_dict)
        planner.create_local_plan()
    except Exception as error:  # noqa: BLE001  # the other processes wait to be told
        failure = error
    agree(failure, process_group, sharded=True)
    planner.finish_plan(LoadPlan([]))
    return planner


def _load_fsdp1(
    checkpoint: Place,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    plan: Plan | str | PathLike[str] | None,
    process_group: dist.ProcessGroup | None,
) -> Resumed:
    """Through FSDP1's own state dicts, which name its parameters as they were before they were made flat."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=False)
    weights, state = get_state_dict(model, optimizer or [], options=options)
    whole: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        whole["optimizer"] = state
    done = fill_state_dict(whole, checkpoint, plan, process_group=process_group)
    set_state_dict(
        model, optimizer or [], model_state_dict=weights, optim_state_dict=whole.get("optimizer", {}), options=options
    )
    return Resumed({}, tuple(done.notes), (), done.nbytes)


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
