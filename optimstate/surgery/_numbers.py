"""Elements of lazy tensors as numbers, a block at a time, through torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from optimstate.errors import UnsupportedCheckpointError
from optimstate.files import chunks
from optimstate.tensors import LazyTensor

__all__ = ["Statistics", "blocks", "statistics"]

BLOCK_ELEMENTS = 1 << 20


def blocks(tensor: LazyTensor) -> Iterator[Any]:
    """The elements in row-major order as one-dimensional float64 (or complex128) tensors of at most 2**20 elements.

    Raises:
        UnsupportedCheckpointError: Torch has no conversion from the dtype.
    """
    import torch

    dtype = getattr(torch, tensor.dtype)
    wide = torch.complex128 if tensor.dtype.startswith("complex") else torch.float64
    for data in chunks(tensor.extents(), BLOCK_ELEMENTS * tensor.itemsize):
        try:
            yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).to(wide)
        except RuntimeError as error:
            raise UnsupportedCheckpointError(f"elements of dtype {tensor.dtype} cannot be computed with") from error


class Statistics(NamedTuple):
    """Of the elements of a tensor; `minimum` is of real parts, and NaN is left out of `norm` and `minimum`."""

    elements: int
    nonfinite: int
    zeros: int
    norm: float
    minimum: float
    maximum: float


def statistics(tensor: LazyTensor) -> Statistics:
    """Counts, 2-norm and range of a tensor, streamed."""
    import torch

    count = nonfinite = zeros = 0
    square, low, high = 0.0, float("inf"), float("-inf")
    for block in blocks(tensor):
        finite = block[torch.isfinite(block)]
        count += block.numel()
        nonfinite += block.numel() - finite.numel()
        zeros += int((block == 0).sum())
        square += float((finite.abs() ** 2).sum())
        if finite.numel():
            real = finite.real if finite.is_complex() else finite
            low, high = min(low, float(real.min())), max(high, float(real.max()))
    return Statistics(count, nonfinite, zeros, square**0.5, low, high)
