"""The valid values of common hyperparameters, as the constructors of torch.optim check them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf, isfinite
from typing import Any

from optimstate.describe import describe

__all__ = ["comparable", "unread", "unusable"]

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


_WORDS = {"line_search_fn": {"strong_wolfe"}}
_LENGTHS = {"betas": 2, "etas": 2, "step_sizes": 2, "eps": 2, "ns_coefficients": 3}


def unread(reads: Mapping[str, str], options: Mapping[str, Any]) -> Iterator[str]:
    """Why the next step cannot read the options of a group, one sentence for each option.

    Args:
        reads: The options that it reads, each with its form, see `Algorithm`.
        options: The options of the group, with numbers as Python has them.
    """
    for option, form in reads.items():
        if option not in options:
            if form != "optional":
                yield f"there is no {option}, which the next step reads"
            continue
        value = options[option]
        if form == "text" and not (value is None or (isinstance(value, str) and value in _WORDS.get(option, {value}))):
            words = " or ".join(map(describe, sorted(_WORDS.get(option, ())))) or "a word"
            yield f"{option} must be {words} or None, not {describe(value)}"
        elif form in ("number", "optional") and not _is_finite(value):
            yield f"{option} must be a finite number, not {describe(value)}"
        elif form == "numbers":
            items = value if isinstance(value, list | tuple) else ()
            usable = all(_is_finite(item) or (item is None and option == "eps") for item in items)
            if len(items) != _LENGTHS[option] or not usable:
                yield f"{option} must be {_LENGTHS[option]} finite numbers, not {describe(value)}"


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
