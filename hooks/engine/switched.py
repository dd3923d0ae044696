"""Slots that an optimizer has only while an option is on, which it misses where the option came on with this load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.plan.expressions.evaluate import copied
from optimstate.state.optimizer import Slots

if TYPE_CHECKING:
    import torch

__all__ = ["with_switched_slots"]

_ADAM = {"max_exp_avg_sq": "amsgrad"}
# Slot by the option that turns it on; an optimizer makes them with a parameter's first state alone, and fails later.
_SWITCHED: Mapping[str, Mapping[str, str]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "RMSprop": {"grad_avg": "centered", "momentum_buffer": "momentum"},
    "Adafactor (transformers)": {"exp_avg": "beta1"},
}

_AT = {"max_exp_avg_sq": "at exp_avg_sq"}


def with_switched_slots(
    algorithm: str,
    slots: Mapping[str, Slots | None],
    names: Sequence[Sequence[str]],
    options: Sequence[Mapping[str, Any]],
    parameters: Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, Slots | None], tuple[str, ...]]:
    """The state with the slots that the options ask for.

    Args:
        algorithm: What the live optimizer is.
        slots: By parameter.
        names: The parameters of each group.
        options: Of each group, as they will be.
        parameters: The live ones.

    Returns:
        The state, and a note for each slot that starts now.
    """
    from optimstate.installed_torch import torch

    switched = _SWITCHED.get(algorithm, {})
    made = dict(slots)
    started: dict[str, list[str]] = {}
    for group, chosen in zip(names, options, strict=True):
        for slot in (slot for slot, option in switched.items() if chosen.get(option)):
            for name in group:
                own = made.get(name)
                if own and slot not in own:
                    first = own.get("exp_avg_sq") if slot == "max_exp_avg_sq" else None  # the largest one so far
                    made[name] = {**own, slot: torch.zeros_like(parameters[name]) if first is None else copied(first)}
                    started.setdefault(slot, []).append(name)
    notes = tuple(
        f"{slot} of {len(own)} parameter{'s' if len(own) > 1 else ''} starts {_AT.get(slot, 'at zero')}: "
        f"{switched[slot]} is on, and the checkpoint has none that fits"
        for slot, own in started.items()
    )
    return (made if started else slots), notes
