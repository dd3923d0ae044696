"""Large CPU tensors updated block by block, with the bits of the update in one piece.

A rule is several passes over memory. Run block by block, each block stays in a core's cache between passes; the bits
are the same, because every operation is elementwise and block boundaries are multiples of any vector width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from optimstate.optim._ops import Op, one
from optimstate.optim.optimizer import PLAIN

__all__ = ["Scratch", "block_size", "fits", "split"]

BLOCK = 1 << 17  # elements per thread where a rule has one slot, half of it where it has more
WORTH_BLOCKING = 1 << 18


def block_size(params: Sequence[Tensor], slots: int) -> int | None:
    """How many elements to update at a time, or None where no parameter gains."""
    if not any(p.numel() >= WORTH_BLOCKING for p in params):
        return None
    return (BLOCK >> (slots > 1)) * torch.get_num_threads()


def split(tensors: Sequence[Tensor | None], size: int) -> list[Any] | None:
    """Each tensor in flat blocks over the same elements, or None where it has to be updated whole."""
    p = tensors[0]
    assert p is not None
    if p.numel() < max(WORTH_BLOCKING, 2 * size) or p.device.type != "cpu" or type(p) not in PLAIN:
        return None
    # Half-precision kernels compute a vector's leftovers differently, so blocks must end where torch's threads would.
    if p.dtype not in (torch.float32, torch.float64) and (torch.get_num_threads() > 1 or not p.is_floating_point()):
        return None
    if not all(t is None or fits(t, p) for t in tensors):
        return None
    if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
        return None
    return [repeat(None) if t is None else torch.split(t.as_strided((t.numel(),), (1,)), size) for t in tensors]


def fits(t: Tensor, p: Tensor) -> bool:
    """Whether a tensor has its elements where the parameter has them."""
    return t.layout is torch.strided and t.dtype is p.dtype and t.shape == p.shape and t.stride() == p.stride()


_WITH_RESULT = ("abs", "add", "addcmul", "div", "mul", "neg", "sign", "sqrt", "sub")
_WITH_NUMBER = ("add_", "div_", "mul_", "sub_")


class Scratch:
    """A pool of temporaries, and `one` with its results in them: memory that stays in the cache from block to block.

    Numbers become 0-d tensors once: each call would make them anew, which takes as long as a short kernel.

    Args:
        dtype: The blocks' dtype; they are on the CPU.
        size: The elements of a block, at most.
    """

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self._dtype = dtype
        self._size = size
        self._buffers: list[Tensor] = []
        self._used = 0
        self._numbers: dict[float, Tensor] = {}
        changed: dict[str, Any] = {name: self._writing(getattr(torch, name)) for name in _WITH_RESULT}
        changed |= {name: self._overwriting(getattr(one, name)) for name in _WITH_NUMBER}
        self.ops = replace(one, **changed)

    def _operand(self, value: Any) -> Any:
        if type(value) is not float or value == 0.0:  # 0.0 and -0.0 are one key and two numbers
            return value
        if value not in self._numbers:
            # Kernels compute with float32 or float64, and a 0-d tensor does not change the dtype of the result.
            wide = torch.float64 if self._dtype == torch.float64 else torch.float32
            self._numbers[value] = torch.tensor(value, dtype=wide, device="cpu")
        return self._numbers[value]

    def _overwriting(self, function: Op) -> Op:
        def call(x: Tensor, y: Any, **named: Any) -> Any:
            return function(x, self._operand(y), **named)

        return call

    def _writing(self, function: Op) -> Op:
        def call(x: Tensor, *operands: Any, **named: Any) -> Any:
            if self._used == len(self._buffers):
                self._buffers.append(torch.empty(self._size, dtype=self._dtype, device="cpu"))
            buffer = self._buffers[self._used]
            self._used += 1
            out = buffer if x.numel() == self._size else buffer[: x.numel()]
            return function(x, *map(self._operand, operands), **named, out=out)

        return call

    def fresh(self, update: Op) -> Op:
        """The update, with all temporaries free again at each call."""

        def call(*operands: Any) -> None:
            self._used = 0
            update(*operands)

        return call
