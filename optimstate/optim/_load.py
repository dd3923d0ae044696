"""The checks of `load_state_dict`, made before anything is changed.

As in torch, state goes to the parameter at the same position. Names, shapes and slots show whether that can be right.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from optimstate.describe import few
from optimstate.errors import ParameterNameWarning, StateMismatchError
from optimstate.state.names import unwrapped

__all__ = ["check_fit", "check_groups", "check_names", "check_options", "map_tensors", "pairs"]

Group = Mapping[str, Any]
Shape = tuple[int, ...] | None  # None for a scalar slot, which is a number or has one element
Slots = tuple[dict[str, Shape], dict[str, Shape]]  # required slots, optional slots

REMEDY = (
    "Match state to parameters by name with "
    "optimizer.register_load_state_dict_pre_hook(optimstate.hooks.match_names()), describe the change there with "
    "optimstate.hooks.migrate(plan), or rewrite the checkpoint with `optimstate remap`."
)
SHOWN = 5  # parameters named in a message, before "and n more"


def pairs(live: Sequence[Group], saved: Sequence[Group]) -> Iterator[tuple[Any, Tensor, str, Group]]:
    """For every saved parameter id: the parameter at its position, its name for messages, and its saved group."""
    for number, (group, old) in enumerate(zip(live, saved, strict=True)):
        names = group.get("param_names") or old.get("param_names") or ()
        for index, (key, p) in enumerate(zip(old["params"], group["params"], strict=True)):
            name = repr(names[index]) if index < len(names) else f"parameter {index} of group {number}"
            yield key, p, name, old


def check_groups(live: Sequence[Group], saved: Sequence[Group]) -> None:
    """Refuse another number or size of groups, with torch's sentence and then the differences."""
    if len(live) != len(saved):
        before, now = ([len(group["params"]) for group in groups] for groups in (saved, live))
        raise StateMismatchError(
            f"loaded state dict has a different number of parameter groups: {len(saved)} (of {before} parameters), "
            f"the optimizer has {len(live)} (of {now})",
            hint=REMEDY,
        )
    lines = []
    for number, (group, old) in enumerate(zip(live, saved, strict=True)):
        if len(group["params"]) == len(old["params"]):
            continue
        counts = f"{len(old['params'])} parameters were saved, {len(group['params'])} are there now"
        lines.append(f"  group {number}: {counts}{name_changes(group, old)}")
    if lines:
        summary = "loaded state dict contains a parameter group that doesn't match the size of optimizer's group:"
        raise StateMismatchError("\n".join([summary, *lines]), hint=REMEDY)


def name_changes(group: Group, old: Group) -> str:
    """The names that only one side has, as text; empty unless both sides have names."""
    now, before = group.get("param_names"), old.get("param_names")
    if not now or not before:
        return ""
    gone, new = [n for n in before if n not in set(now)], [n for n in now if n not in set(before)]
    sides = (("saved only", gone), ("new", new))
    return "".join(f"; {which}: {few([*map(repr, names)], SHOWN)}" for which, names in sides if names)


def check_options(optimizer: torch.optim.Optimizer, later: Iterable[str], saved: Sequence[Group]) -> None:
    """Refuse the groups of another algorithm: they lack options of this one and have options that it does not."""
    needed = [name for name in optimizer.defaults if name not in {*later, "fused"}]
    for number, (group, old) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        missing = [name for name in needed if name not in old]
        foreign = [name for name in old if name not in group and name not in {"params", "param_names", "initial_lr"}]
        if missing and foreign:
            raise StateMismatchError(
                f"group {number} was saved by another algorithm than {type(optimizer).__name__}: it has "
                f"{few([*map(str, foreign)], SHOWN)} and lacks {few(missing, SHOWN)}",
                hint="Load it into the optimizer that saved it, or start this optimizer without state.",
            )


def check_fit(optimizer: Any, saved: Sequence[Group], states: Mapping[Any, Any], shapes: Callable[..., Any]) -> None:
    """Refuse state whose slots or shapes do not fit the parameters that would get it.

    Args:
        optimizer: The optimizer that is to load the state.
        saved: The groups to be loaded.
        states: The state to be loaded, by parameter id.
        shapes: Returns, for a parameter and its group, the required and the optional slots as dicts of shapes.
    """
    defaults = optimizer.defaults
    lines = []
    for key, p, name, old in pairs(optimizer.param_groups, saved):
        state = states.get(key)
        if not state or not isinstance(state, Mapping) or isinstance(p, UninitializedBuffer | UninitializedParameter):
            continue
        required, optional = shapes(p, {**defaults, **optimizer._later_options, **old})
        missing = [slot for slot in required if slot not in state]
        if missing:
            found = few([*map(str, state)], SHOWN)
            lines.append(f"  {name}: the saved state has {found} and lacks {few(missing, SHOWN)}")
        for slot, shape in {**required, **optional}.items():
            value = state.get(slot)
            if isinstance(value, Tensor) and not (value.numel() == 1 if shape is None else value.shape == shape):
                wanted = "one element" if shape is None else f"shape {shape}"
                shapes_of = f"{slot} has shape {tuple(value.shape)}, a parameter of shape {tuple(p.shape)}"
                lines.append(f"  {name}: {shapes_of} needs {wanted}")
    if lines:
        summary = f"loaded state does not fit {type(optimizer).__name__}'s parameters:"
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise StateMismatchError("\n".join([summary, *lines[:SHOWN], *more]), hint=REMEDY)


def check_names(live: Sequence[Group], saved: Sequence[Group], states: Mapping[Any, Any]) -> None:
    """Warn if a parameter would get, by its position, the state of a parameter with another name."""
    moved = [
        (old_name, name)
        for group, old in zip(live, saved, strict=True)
        if len(old.get("param_names") or ()) == len(old["params"])  # else names do not tell positions
        for key, name, old_name in zip(
            old["params"], group.get("param_names") or (), old.get("param_names") or (), strict=False
        )
        if name != old_name and states.get(key)
    ]
    before, now = (unwrapped(names_of(groups)) for groups in (saved, live)) if moved else (str, str)
    swaps = [f"{old_name!r} to {name!r}" for old_name, name in moved if before(old_name) != now(name)]
    if swaps:
        message = f"the order of parameters gives the state of {few(swaps, SHOWN)}. {REMEDY}"
        warnings.warn(message, ParameterNameWarning, stacklevel=caller_level({"optimstate", "torch"}))


def names_of(groups: Sequence[Group]) -> Iterator[str]:
    """The names of all parameters that have one."""
    for group in groups:
        yield from group.get("param_names") or ()


def caller_level(skipped: Set[str]) -> int:
    """The `stacklevel` for a warning that the calling function issues, so that it shows the user's line.

    Args:
        skipped: Top-level packages whose frames are not the user's.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in skipped:
        level, frame = level + 1, frame.f_back
    return level


def map_tensors(value: Any, convert: Callable[[Tensor, Any], Tensor], key: Any = None) -> Any:
    """A nested value with its tensors converted. `convert` gets each with the key of the innermost dict around it."""
    if isinstance(value, Tensor):
        return convert(value, key)
    if isinstance(value, dict):
        return {k: map_tensors(v, convert, k) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return type(value)(map_tensors(v, convert) for v in value)  # type: ignore[call-arg]
    return value
