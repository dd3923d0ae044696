"""The installed torch, and what depends on its release.

Whatever needs torch takes it from here, so that one place says that it is missing, too old, or newer than any that was
tested. What releases do differently is found by asking the torch that is there, not its number; each entry says which
release brought it and why it matters here. docs/versions.md has what follows from it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from functools import cache
from typing import Any

from optimstate.errors import MissingTorchError, UnsupportedTorchError, UntestedTorchWarning

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
        import torch
except ImportError as error:
    if (error.name or "torch") != "torch":
        raise  # it is there and lacks something itself
    raise MissingTorchError(
        "this needs torch, which is not installed",
        hint="pip install 'optimstate[torch]', or any torch from 2.6 on. Without it work inspect, scan, plan, name, "
        "renaming, converting between containers, diff --headers and verify --no-numbers.",
    ) from None

__all__ = ["dtype_of", "has_dtype", "require_named_parameters", "swap_in_optimizer_params_and_state", "torch"]

NEWEST_TESTED = (2, 15)


def release() -> tuple[int, int]:
    """The installed release: its first two numbers."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(found[1]), int(found[2])) if found else NEWEST_TESTED


@cache
def require_named_parameters() -> None:
    """Refuse a torch whose optimizers take no names, and say once that a newer one has not been tried.

    2.6: optimizers take `(name, parameter)` pairs and keep `param_names`, on which everything here stands.

    Raises:
        UnsupportedTorchError: It is older.

    Warns:
        UntestedTorchWarning: It is newer than any that the tests have run with.
    """
    try:
        named = torch.optim.SGD([("p", torch.zeros(1))], lr=0.1).param_groups[0].get("param_names") == ["p"]
    except TypeError:
        named = False
    if not named:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no optimizers with named parameters",
            hint="Install torch 2.6 or newer. The commands that read and rewrite files do not need it.",
        )
    if release() > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        told = f"torch {torch.__version__} is newer than {newest}, the newest that optimstate was tested with"
        warnings.warn(told, UntestedTorchWarning, stacklevel=2)


def has_dtype(name: str) -> bool:
    """Whether the installed torch knows a dtype: 2.7 brought `float8_e8m0fnu`, 2.8 `float4_e2m1fn_x2`."""
    return isinstance(getattr(torch, name, None), torch.dtype)


def dtype_of(name: str) -> Any:
    """The `torch.dtype` of a name.

    Raises:
        UnsupportedTorchError: The installed torch is older than the dtype.
    """
    if not has_dtype(name):
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no dtype {name}, which this tensor has",
            hint="Install a newer torch. Renaming, copying and converting between files do not need it.",
        )
    return getattr(torch, name)


# 2.13; before, there is nothing to take the place of.
swap_in_optimizer_params_and_state: Any = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)


def accepts(function: Any, argument: str) -> bool:
    """Whether a function or a class of the installed torch has an argument."""
    return argument in inspect.signature(function).parameters
