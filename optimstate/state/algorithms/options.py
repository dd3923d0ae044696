"""The values that common hyperparameters can take, as the constructors of torch.optim check them."""

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
    """Why an optimizer could not be built, or could not step, with a value; empty where there is no objection.

    Args:
        option: Its name in a param group.
        value: A number, a truth value, None, or a list of them; of anything else nothing is said.
    """
    numbers = [item for item in (value if isinstance(value, list | tuple) else [value]) if _is_number(item)]
    if option in _FLAGS and not (value is None or isinstance(value, bool)):
        return f"{option} is true or false, not {describe(value)}"
    if option == "betas":
        if len(numbers) < 2 or isinstance(value, bool):
            return f"betas are two numbers, not {describe(value)}"
        if not all(0 <= number < 1 for number in numbers):
            return f"betas lie between 0 and 1, and {describe(value)} does not"
    if option in _NOT_NEGATIVE and not all(0 <= number < inf for number in numbers):
        return f"{option} is a number from 0 up, not {describe(value)}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
