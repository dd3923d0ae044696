"""Elements of lazy tensors as numbers, a block at a time, through torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optimstate.errors import UnsupportedCheckpointError
from optimstate.files import chunks
from optimstate.tensors import LazyTensor

__all__ = ["blocks"]

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
