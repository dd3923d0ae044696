"""What only sharded runs need: saving with names where the state is spread over many processes.

`optimstate.resume` loads any checkpoint into a live model and optimizer whose parameters are `DTensor`s (FSDP2, tensor
parallelism). Every process reads the metadata and then only the bytes of its own shards; the whole state is nowhere in
memory, and nothing is sent between processes but whether each has succeeded. `NamedSavePlanner` lets
`torch.distributed.checkpoint.save` write optimizers by parameter name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from optimstate.installed_torch import require_named_parameters, torch  # isort: split

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta

from optimstate.errors import OptimStateError, StateMismatchError
from optimstate.io.location import Place
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.state.names import names_in, unwrapped
from optimstate.state.optimizer import OptimizerState

require_named_parameters()

__all__ = ["NamedSavePlanner", "load", "optimizer_names"]


def load(
    checkpoint: Place,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    plan: Plan | str | PathLike[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Resumed:
    """`optimstate.resume` of a model and an optimizer, by position."""
    return resume(checkpoint, model=model, optimizer=optimizer, plan=plan, process_group=process_group)


def optimizer_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Iterator[str]:
    """The names of an optimizer's parameters in the model that it was built from, in the order of its param groups.

    Raises:
        StateMismatchError: The model does not have a parameter.
    """
    for group in names_in(optimizer, model, unwrapped(name for name, _ in model.named_parameters())):
        yield from group


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
