"""The valid values of common hyperparameters, as the constructors of torch.optim check them."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from optimstate.describe import describe

__all__ = ["comparable", "unusable"]

# Entries of a group that differ between equal runs: schedules change rates, the others do not change results.
_OF_THE_RUN = {"params", "param_names", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}

_NOT_NEGATIVE = frozenset({"lr", "initial_lr", "weight_decay", "eps", "momentum"})
_FLAGS = frozenset(
    {
        "amsgrad",
        "capturable",
        "centered",
        "decoupled_weight_decay",
        "differentiable",
        "foreach",
        "fused",
        "maximize",
        "nesterov",
    }
)


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The options of two groups that are equal in runs that train alike; of rates the one before any schedule.

    Args:
        one: The options of a group.
        other: Those of another.
    """
    cycled = {"betas", "momentum"} if "max_momentum" in one or "max_momentum" in other else set()
    keys = [key for key in one if key in other and key not in _OF_THE_RUN and key not in cycled]
    scheduled = ["initial_lr" in options for options in (one, other)]
    rate = "initial_lr" if all(scheduled) else "lr"
    return [*keys, rate] if scheduled[0] == scheduled[1] and rate in one and rate in other else keys


def unusable(option: str, value: Any) -> str:
    """Why a value is not valid for an option; empty if it is valid, or nothing is known about it.

    Args:
        option: Its name in a param group.
        value: A number, a bool, None, or a list of them; values of other types are not judged.
    """
    numbers = [item for item in (value if isinstance(value, list | tuple) else [value]) if _is_number(item)]
    if option in _FLAGS and not (value is None or isinstance(value, bool)):
        return f"{option} must be true or false, not {describe(value)}"
    if option == "betas":
        if len(numbers) < 2 or isinstance(value, bool):
            return f"betas must be two numbers, not {describe(value)}"
        if not all(0 <= number < 1 for number in numbers):
            return f"betas must be between 0 and 1, not {describe(value)}"
    if option in _NOT_NEGATIVE and not all(0 <= number < inf for number in numbers):
        return f"{option} must be a number from 0 up, not {describe(value)}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
