"""The valid values of common hyperparameters, as the constructors of torch.optim check them."""

from __future__ import annotations

from math import inf
from typing import Any

from optimstate.describe import describe

__all__ = ["unusable"]

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
