"""Comparing two checkpoints as torch loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from optimstate.errors import MigrationError

__all__ = ["prove", "tensors_by_name"]

Place = tuple[str, str, str]
"""(section, parameter, slot); the slot of a weight is empty."""


def prove(before: Path, after: Path, expected: Callable[[str], Iterable[str]]) -> int:
    """Compare the tensors of two checkpoints bit by bit, name by name: weights, and every slot of every parameter.

    Args:
        before: A file saved by torch: a dict with `model` and `optimizer`, which has parameter names.
        after: The file that was made from it.
        expected: Returns the new names of a name in `before`.

    Returns:
        The number of comparisons.

    Raises:
        MigrationError: A tensor differs, is missing, or has no origin.
    """
    old, new = tensors_by_name(before), tensors_by_name(after)
    compared, rest = 0, set(new)
    for (section, name, slot), tensor in old.items():
        for target in expected(name):
            found = new.get((section, target, slot))
            if found is None or found.dtype != tensor.dtype or not _same_bits(found, tensor):
                raise MigrationError.of("content", f"not the tensor that {name} had", f"{section} {target} {slot}")
            rest.discard((section, target, slot))
            compared += 1
    if rest:
        raise MigrationError.of("content", f"{after} holds {min(rest)}, which {before} does not")
    return compared


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def tensors_by_name(path: Path) -> dict[Place, torch.Tensor]:
    """Weights and slots as torch loads them; scalars as one-dimensional tensors."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    found = {("model", name, ""): tensor.reshape(tensor.shape or (1,)) for name, tensor in checkpoint["model"].items()}
    for group in checkpoint["optimizer"]["param_groups"]:
        for key, name in zip(group["params"], group["param_names"], strict=True):
            for slot, value in checkpoint["optimizer"]["state"].get(key, {}).items():
                found["optimizer", name, slot] = value.reshape(value.shape or (1,))
    return found
