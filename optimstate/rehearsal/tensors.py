"""Tensors in nested values, and the difference of two tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["converted", "difference", "leaves", "module_outputs", "overlap"]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The tensors and numbers in a nested value, by their keys joined with dots; numbers as tensors."""
    from optimstate.installed_torch import torch

    if isinstance(value, torch.Tensor):
        return {path: value}
    if type(value) in (int, float):
        return {path: torch.tensor(float(value), dtype=torch.float64)}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, Any] = {}
    for key, item in items:
        found |= leaves(item, f"{path}.{key}".strip("."))
    return found


def converted(value: Any) -> Any:
    """A batch with its floating-point tensors in float64."""
    from optimstate.installed_torch import torch

    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: converted(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(converted(item) for item in value)
    return value


def overlap(one: Any, other: Any) -> tuple[Any, Any]:
    """The common part of two tensors: the first indices of each dimension, up to the smaller size.

    Tensors with different numbers of dimensions are returned as they are.
    """
    if one.shape == other.shape or one.dim() != other.dim():
        return one, other
    common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
    return one[common], other[common]


def difference(mine: Any, expected: Any, least: float = 1e-12) -> float:
    """The largest difference divided by the largest expected value; infinite if the two cannot be compared.

    Args:
        mine: A tensor.
        expected: Its expected value.
        least: A lower bound for the divisor, for values that are only rounding.
    """
    from optimstate.installed_torch import torch

    if not isinstance(mine, torch.Tensor) or not isinstance(expected, torch.Tensor) or mine.shape != expected.shape:
        return float("inf")
    if not mine.numel():
        return 0.0
    one, other = mine.detach(), expected.detach()
    if not (one.is_complex() or other.is_complex()):
        one, other = one.double(), other.double()
    if not bool(torch.isfinite(one).all()) or not bool(torch.isfinite(other).all()):
        return 0.0 if bool(torch.equal(one.nan_to_num(), other.nan_to_num())) else float("inf")
    largest = max(float(other.abs().max()), least)
    return float((one - other).abs().max()) / largest


@contextmanager
def module_outputs(model: Any) -> Iterator[dict[str, Any]]:
    """Collect the first output of each module at its first call, by name, in the order of the calls."""
    found: dict[str, Any] = {}
    handles = []

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, made: Any) -> None:
            tensors = leaves(made)
            if name not in found and tensors:
                found[name] = next(iter(tensors.values())).detach().clone()

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(keep(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
