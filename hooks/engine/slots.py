"""Slots made or cast for live parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from optimstate.describe import describe
from optimstate.errors import MigrationError, PlanError, StateMismatchError
from optimstate.installed_torch import torch
from optimstate.plan.expressions.evaluate import copied, number_of, shape_of
from optimstate.plan.slots.outcomes import SlotPath, flat_slots, slot_name
from optimstate.state.algorithms.registry import conventional, recognise_state
from optimstate.state.optimizer import Slots

__all__ = ["Casts", "as_dtype", "zeros_like_others"]


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by its name.

    Raises:
        PlanError: There is none of that name.
    """
    found = name if isinstance(name, torch.dtype) else getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise PlanError(f"no dtype is called {describe(name)}", hint="For example: float32, bfloat16.")
    return found


def zeros_like_others(
    name: str, parameter: torch.Tensor, slots: Mapping[str, Slots | None], options: Mapping[str, Any]
) -> tuple[Slots, str] | None:
    """The slots that the other parameters have, filled with zeros, and the others' step count.

    Raises:
        MigrationError: What zero is for a slot is not known, or the others' counts differ.
    """
    others = {other: found for other, found in slots.items() if found}
    if not others:
        return None
    algorithm = recognise_state(others.values(), options)
    donor, pattern = next(iter(others.items()))
    made: dict[Any, Any] = {}
    for path, value in flat_slots(pattern):
        key, last = path[-1], str(path[-1])
        slot = algorithm.slot(last) if algorithm is not None else None
        slot = slot or conventional(last, shape_of(value), shape_of(value))
        node = made
        for step in path[:-1]:  # some libraries nest slots
            node = node.setdefault(step, {})
        if value is None:
            node[key] = None
        elif slot is not None and slot.kind == "like_param" and torch.is_tensor(value) and value.is_floating_point():
            node[key] = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        elif slot is not None and slot.kind == "scalar":
            node[key] = _agreed(name, path, donor, others)
        else:
            raise MigrationError.of(
                "slot",
                f"it is not known what zero is for the slot {describe(slot_name(path))} of {describe(donor)}",
                "fill_missing",
                hint='Leave it fresh: fill_missing("fresh").',
            )
    return made, "zeros, at the others' step"


def _agreed(name: str, path: SlotPath, donor: str, others: Mapping[str, Slots]) -> Any:
    """A copy of a number that all others have."""
    found = {other: dict(flat_slots(slots)).get(path) for other, slots in others.items()}
    value = found[donor]
    for other, its in found.items():
        if number_of(its) != number_of(value):
            raise MigrationError.of(
                "disagreement",
                f"{describe(name)} is to get the others' {slot_name(path)}, but {describe(donor)} has "
                f"{number_of(value)} and {describe(other)} has {number_of(its)}",
                "fill_missing",
                (name, donor, other),
                hint='Name the parameter it is to be like: fill_missing({"new": "other"}), or leave it fresh.',
            )
    return copied(value)


class Casts:
    """A dtype policy for slots, applied after torch has cast them to their parameter's dtype.

    Args:
        dtypes: For every slot, or by name with `*` for the rest.

    Raises:
        PlanError: A dtype does not exist.
    """

    def __init__(self, dtypes: Mapping[str, str | torch.dtype] | str | torch.dtype) -> None:
        given = dict(dtypes) if isinstance(dtypes, Mapping) else {"*": dtypes}
        self._kept = {slot for slot, dtype in given.items() if dtype == "file"}
        self._dtypes = {slot: None if dtype in ("file", "param") else as_dtype(dtype) for slot, dtype in given.items()}
        self._loading: WeakKeyDictionary[torch.optim.Optimizer, dict[str, Any]] = WeakKeyDictionary()
        self._followed: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()

    def expect(self, optimizer: torch.optim.Optimizer, made: dict[str, Any]) -> None:
        """Remember to cast what this optimizer is about to load, once it has loaded.

        Raises:
            StateMismatchError: No parameter has a slot that is named.
        """
        there = {str(slot) for slots in made["state"].values() if isinstance(slots, Mapping) for slot in slots}
        if there and (unknown := sorted(self._dtypes.keys() - there - {"*"})):
            raise StateMismatchError(
                f"no parameter has the slot {describe(unknown[0])}", hint=f"There are {', '.join(sorted(there))}."
            )
        self._loading[optimizer] = made
        if optimizer not in self._followed:
            self._followed[optimizer] = True
            optimizer.register_load_state_dict_post_hook(self._loaded)

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        made = self._loading.pop(optimizer, None)
        if made is None:
            return
        keys = [key for group in made["param_groups"] for key in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            slots = optimizer.state.get(parameter)
            if slots:
                given = made["state"].get(key, {})
                slots.update({name: self._cast(name, value, given.get(name)) for name, value in slots.items()})

    def _cast(self, name: str, value: Any, given: Any) -> Any:
        slot = name if name in self._dtypes or name == "step" else "*"
        if not torch.is_tensor(given) or not given.is_floating_point():
            return value
        dtype = given.dtype if slot in self._kept else self._dtypes.get(slot)
        return value if dtype is None else given.to(device=value.device, dtype=dtype)
