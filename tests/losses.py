"""Ways to lose or change a run's state between saving and resuming, on the parts of any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Parts = dict[str, Any]
"""`weights`, `optimizer` and, where there is one, `scheduler`: state dicts, changed in place."""


def _slots(parts: Parts) -> list[dict[str, Any]]:
    return list(parts["optimizer"]["state"].values())


def _alike(parts: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
    """The slots of two parameters of one shape."""
    seen: dict[Any, dict[str, Any]] = {}
    for slots in _slots(parts):
        shape = tuple(slots["exp_avg"].shape)
        if shape in seen:
            return seen[shape], slots
        seen[shape] = slots
    raise AssertionError("no two parameters of one shape")


def moments_exchanged_between_parameters(parts: Parts) -> None:
    one, other = _alike(parts)
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]


def moments_of_a_parameter_exchanged(parts: Parts) -> None:
    slots = _slots(parts)[0]
    slots["exp_avg"], slots["exp_avg_sq"] = slots["exp_avg_sq"], slots["exp_avg"]


def moments_zeroed(parts: Parts) -> None:
    _slots(parts)[0]["exp_avg"].zero_()


def moments_rounded(parts: Parts) -> None:
    for slots in _slots(parts):
        slots["exp_avg_sq"] = slots["exp_avg_sq"].bfloat16().float()


def a_parameter_without_state(parts: Parts) -> None:
    state = parts["optimizer"]["state"]
    del state[next(iter(state))]


def no_state(parts: Parts) -> None:
    parts["optimizer"]["state"].clear()


def steps_counted_anew(parts: Parts) -> None:
    for slots in _slots(parts):
        slots["step"] = torch.zeros_like(torch.as_tensor(slots["step"]))


def another_rate(parts: Parts) -> None:
    parts["optimizer"]["param_groups"][0]["lr"] += 1e-3


def another_decay(parts: Parts) -> None:
    parts["optimizer"]["param_groups"][0]["weight_decay"] = 0.3


def other_betas(parts: Parts) -> None:
    parts["optimizer"]["param_groups"][0]["betas"] = (0.5, 0.9)


def weights_of_another_step(parts: Parts) -> None:
    name = next(name for name, value in parts["weights"].items() if value.dim() > 1)
    parts["weights"][name] = parts["weights"][name] + 1e-3


def a_weight_in_another_layout(parts: Parts) -> None:
    name = next(name for name, value in parts["weights"].items() if value.dim() == 2 and len(set(value.shape)) == 1)
    parts["weights"][name] = parts["weights"][name].T.contiguous()


def the_schedule_at_its_start(parts: Parts) -> None:
    parts["scheduler"]["last_epoch"] = 0


def another_schedule(parts: Parts) -> None:
    parts["scheduler"]["base_lrs"] = [7 * rate for rate in parts["scheduler"]["base_lrs"]]


WAYS: dict[str, Callable[[Parts], None]] = {
    way.__name__: way
    for way in (
        moments_exchanged_between_parameters,
        moments_of_a_parameter_exchanged,
        moments_zeroed,
        moments_rounded,
        a_parameter_without_state,
        no_state,
        steps_counted_anew,
        another_rate,
        another_decay,
        other_betas,
        weights_of_another_step,
        a_weight_in_another_layout,
        the_schedule_at_its_start,
        another_schedule,
    )
}
