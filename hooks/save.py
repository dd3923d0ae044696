"""The hooks that run after `optimizer.state_dict()`: names, metadata, smaller state.

They belong to `torch.optim.Optimizer.register_state_dict_post_hook`. The live optimizer is not changed: what they hand
over is a new dict, in which only what they change is new.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from optimstate import __version__
from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.hooks.engine.hook import LOGGER
from optimstate.hooks.engine.slots import as_dtype
from optimstate.installed_torch import torch
from optimstate.plan.apply.stamps import METADATA
from optimstate.plan.language.plan import Plan
from optimstate.state.names import names_in

__all__ = ["SaveHook", "add_metadata", "cast_slots", "drop_slots", "name_params", "to_cpu"]

StateDict = dict[str, Any]


class SaveHook:
    """A hook for `torch.optim.Optimizer.register_state_dict_post_hook`.

    Attributes:
        report: What the last call did, in one line; None before.
    """

    report: str | None = None

    def __init__(self, name: str, change: Callable[[torch.optim.Optimizer, StateDict], tuple[StateDict, str]]) -> None:
        self._name, self._change = name, change

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
        """The dict to return instead; the given one is not changed.

        Raises:
            StateMismatchError: The optimizer is not what the hook was made for.
        """
        made, message = self._change(optimizer, state_dict)
        self.report = f"{self._name}: {message}"
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info(self.report)
        return made

    def __repr__(self) -> str:
        return self._name


def name_params(model: torch.nn.Module) -> SaveHook:
    """Write the parameters' names into every state dict of an optimizer that was built without them.

    Args:
        model: Which has all parameters of the optimizer.

    Example:
        `optimizer.register_state_dict_post_hook(hooks.name_params(model))`
    """

    def change(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> tuple[StateDict, str]:
        names = names_in(optimizer, model)
        groups = []
        for group, found in zip(state_dict["param_groups"], names, strict=True):
            given = group.get("param_names")
            if given is not None and list(given) != found:
                other = next(pair for pair in zip(given, found, strict=True) if pair[0] != pair[1])
                raise StateMismatchError(
                    f"the optimizer calls a parameter {describe(other[0])}, which is {describe(other[1])} in the model",
                    hint="Leave out name_params(): this optimizer has names.",
                )
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "param_names": found})
            groups[-1]["params"] = group["params"]
        return {**state_dict, "param_groups": groups}, f"{sum(map(len, names))} parameters named"

    return SaveHook("name_params", change)


def add_metadata(model: torch.nn.Module | None = None, *, plan: Plan | str | PathLike[str] | None = None) -> SaveHook:
    """Write what a later reader would otherwise have to guess, as plain values under the key `optimstate`.

    `algorithm` is the optimizer's class, `shapes` has every parameter's shape by name (without names, by key),
    `versions` those of torch and optimstate, and `plans` the digests of the plans that made this state.

    Args:
        model: Names the parameters of an optimizer that was built without names.
        plan: The plan, or the path of the plan file, that this run was resumed with; `migrate` refuses to apply it
            again if its guard says `once`.

    Example:
        `optimizer.register_state_dict_post_hook(hooks.add_metadata(model))`
    """

    def change(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> tuple[StateDict, str]:
        names = names_in(optimizer, model) if model is not None else None
        shapes: dict[Any, list[int]] = {}
        for number, (group, packed) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
            keys = names[number] if names is not None else packed.get("param_names", packed["params"])
            shapes.update((key, list(tensor.shape)) for key, tensor in zip(keys, group["params"], strict=True))
        found = {
            "algorithm": type(optimizer).__name__,
            "shapes": shapes,
            "versions": {"torch": str(torch.__version__), "optimstate": __version__},
            "plans": [Plan.of(plan).digest] if plan is not None else [],
        }
        return {**state_dict, METADATA: found}, f"{len(shapes)} shapes of {found['algorithm']}"

    return SaveHook("add_metadata", change)


def drop_slots(*slots: str) -> SaveHook:
    """Leave slots out of every state dict.

    Args:
        *slots: Their names, such as `max_exp_avg_sq`. One that no parameter has is refused once there is any state.

    Example:
        `hooks.drop_slots("max_exp_avg_sq")`
    """

    def change(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> tuple[StateDict, str]:  # noqa: ARG001
        _refuse_unknown(slots, state_dict["state"])
        state = _changed(state_dict["state"], lambda slot, value: _DROP if slot in slots else value)
        count = sum(len(old) - len(state[key]) for key, old in state_dict["state"].items() if isinstance(old, Mapping))
        return {**state_dict, "state": state}, f"{count} slots left out"

    return SaveHook("drop_slots", change)


def cast_slots(dtypes: Mapping[str, str | torch.dtype] | str | torch.dtype) -> SaveHook:
    """Write floating-point slots in another dtype; the live ones stay as they are.

    Args:
        dtypes: For every slot but `step`, or by slot name with `*` for the others.

    Raises:
        PlanError: A dtype does not exist.

    Example:
        `hooks.cast_slots({"exp_avg": "bfloat16"})`
    """
    given = dtypes if isinstance(dtypes, Mapping) else {"*": dtypes}
    wanted = {slot: as_dtype(dtype) for slot, dtype in given.items()}

    def change(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> tuple[StateDict, str]:  # noqa: ARG001
        _refuse_unknown([slot for slot in wanted if slot != "*"], state_dict["state"])
        count = 0

        def cast(slot: Any, value: Any) -> Any:
            nonlocal count
            dtype = wanted.get(slot, wanted.get("*") if slot != "step" else None)
            if dtype is None or not torch.is_tensor(value) or not value.is_floating_point() or value.dtype == dtype:
                return value
            count += 1
            return value.to(dtype)

        return {**state_dict, "state": _changed(state_dict["state"], cast)}, f"{count} slots cast"

    return SaveHook("cast_slots", change)


def to_cpu() -> SaveHook:
    """Write every tensor as a CPU tensor; those on the CPU already are not copied.

    Example:
        `hooks.to_cpu()`
    """

    def change(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> tuple[StateDict, str]:  # noqa: ARG001
        count = 0

        def moved(value: Any) -> Any:
            nonlocal count
            if not torch.is_tensor(value) or value.device.type == "cpu":
                return value
            count += 1
            return value.cpu()

        state = _changed(state_dict["state"], lambda _, value: moved(value))
        groups = [{key: moved(value) for key, value in group.items()} for group in state_dict["param_groups"]]
        return {**state_dict, "state": state, "param_groups": groups}, f"{count} tensors moved"

    return SaveHook("to_cpu", change)


_DROP = object()


def _changed(state: Any, change: Callable[[Any, Any], Any]) -> Any:
    """Slots with other values, in new dicts; nested ones too."""
    if not isinstance(state, Mapping):
        return state
    made = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            made[key] = _changed(value, change)
        elif (new := change(key, value)) is not _DROP:
            made[key] = new
    return made


def _refuse_unknown(slots: Any, state: Mapping[Any, Any]) -> None:
    found: dict[Any, None] = {}

    def note(slot: Any, value: Any) -> Any:
        found[slot] = None
        return value

    _changed(state, note)
    unknown = [slot for slot in slots if slot not in found]
    if found and unknown:
        raise StateMismatchError(
            f"no parameter has the slot {describe(unknown[0])}", hint=f"There are {', '.join(sorted(map(str, found)))}."
        )
