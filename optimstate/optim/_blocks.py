"""Large CPU tensors are updated block by block, which gives the same bits as updating them as a whole.

A rule makes several passes over memory. If it is run block by block, each block stays in a core's cache between passes.
The bits are the same because every operation is elementwise and blocks end at multiples of any vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from optimstate.optim._ops import Op, one
from optimstate.optim.optimizer import PLAIN
from optimstate.record import Record

__all__ = ["Program", "UnrecordedError", "block_size", "fits", "split"]

BLOCK = 1 << 17  # elements per thread where a rule has one slot, half of it where it has more
WORTH_BLOCKING = 1 << 18

# Skips autograd, which has nothing to do here but takes half of the time of each call. Versions are still counted.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def block_size(params: Sequence[Tensor], slots: int) -> int | None:
    """How many elements to update at a time, or None if no parameter is large enough to gain."""
    if not any(p.numel() >= WORTH_BLOCKING for p in params):
        return None
    return (BLOCK >> (slots > 1)) * torch.get_num_threads()


def split(tensors: Sequence[Tensor | None], size: int) -> list[Any] | None:
    """Each tensor as 1-D blocks of the same elements, or None if the parameter must be updated as a whole."""
    p = tensors[0]
    assert p is not None
    if p.numel() < max(WORTH_BLOCKING, 2 * size) or p.device.type != "cpu" or type(p) not in PLAIN:
        return None
    # Half-precision kernels compute the elements after the last full vector differently, so blocks would have to end
    # where torch's threads do.
    if p.dtype not in (torch.float32, torch.float64) and (torch.get_num_threads() > 1 or not p.is_floating_point()):
        return None
    if not all(t is None or fits(t, p) for t in tensors):
        return None
    if not p.is_contiguous() and torch.empty_like(p, device="meta").stride() != p.stride():
        return None
    return [repeat(None) if t is None else torch.split(t.as_strided((t.numel(),), (1,)), size) for t in tensors]


def fits(t: Tensor, p: Tensor) -> bool:
    """Whether a tensor has the parameter's dtype, shape and strides."""
    return t.layout is torch.strided and t.dtype is p.dtype and t.shape == p.shape and t.stride() == p.stride()


class UnrecordedError(Exception):
    """A rule uses a tensor in a way that cannot be recorded."""


class _Operand:
    """Stands for a tensor while a rule is recorded: an index into the values of a run."""

    __slots__ = ("index",)
    is_sparse = False  # blocks are dense

    def __init__(self, index: int) -> None:
        self.index = index

    def _refuse(self, *_: Any) -> Any:
        raise UnrecordedError

    __getattr__ = __neg__ = __pow__ = __rpow__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse


class _Call(Record):
    """One kernel call: indices of its operands and of its result; None if the first operand is overwritten."""

    kernel: Op
    operands: tuple[int, ...]
    named: dict[str, Any]
    result: int | None


_WITH_RESULT = {"abs", "add", "addcmul", "div", "mul", "neg", "sign", "sqrt", "sub"}
_WITH_NUMBER = {"add_", "div_", "mul_", "sub_"}


class Program:
    """The kernel calls of a rule, recorded once and run on block after block without the rule's own Python.

    All blocks use the same temporaries, which therefore stay in the cache. Numbers become 0-d tensors once, because
    making one in each call takes as long as a short kernel.

    Args:
        dtype: The blocks' dtype; they are on the CPU.
        operands: How many tensors each block has.
    """

    def __init__(self, dtype: torch.dtype, operands: int) -> None:
        self._dtype = dtype
        self._operands = operands
        self._values: list[Any] = [None] * operands  # followed by constants, and None for each temporary
        self._calls: list[_Call] = []
        recorded: dict[str, Any] = {
            name: self._recording(name) for name in one._fields if name in _WITH_RESULT or name.endswith("_")
        }
        recorded |= {
            "map": lambda function, *operands: self._record(function, operands, {}, None),
            "pow": _Operand._refuse,
            "as_complex": lambda x, _: x,
        }
        self.ops = one._replace(**recorded)

    def operand(self, index: int) -> Any:
        """The stand-in for one of a block's tensors while the rule is recorded."""
        return _Operand(index)

    def run(self, columns: Sequence[Iterable[Tensor]], size: int) -> None:
        """Make the calls on every block.

        Args:
            columns: The blocks of each operand, all of `size` elements except the last ones.
            size: Elements in a block.
        """
        bound, length = self._bound(size), size
        with _below_autograd():
            for row in zip(*columns, strict=False):  # an operand that is None has no end
                if row[0].numel() != length:
                    length = row[0].numel()
                    bound = self._bound(length)
                values, calls = bound
                values[: self._operands] = row
                for kernel, operands in calls:
                    kernel(*operands(values))

    def _bound(self, length: int) -> tuple[list[Any], list[tuple[Op, Callable[[list[Any]], Sequence[Any]]]]]:
        """The values, with temporaries of this length, and the calls with their arguments bound."""
        values = list(self._values)
        calls = []
        for call in self._calls:
            named = call.named
            if call.result is not None:
                values[call.result] = torch.empty(length, dtype=self._dtype, device="cpu")
                named = {**named, "out": values[call.result]}
            calls.append((partial(call.kernel, **named) if named else call.kernel, _getter(call.operands)))
        return values, calls

    def _recording(self, name: str) -> Op:
        kernel = getattr(torch, name) if name in _WITH_RESULT else getattr(one, name)

        def call(*operands: Any, **named: Any) -> Any:
            if name in _WITH_RESULT or name in _WITH_NUMBER:
                operands = (operands[0], *map(self._number, operands[1:]))
            result = self._index(None) if name in _WITH_RESULT else None
            self._record(kernel, operands, named, result)
            return operands[0] if result is None else _Operand(result)

        return call

    def _record(self, kernel: Op, operands: Sequence[Any], named: dict[str, Any], result: int | None) -> None:
        if not isinstance(operands[0], _Operand) or any(isinstance(value, _Operand) for value in named.values()):
            raise UnrecordedError
        indices = tuple(x.index if isinstance(x, _Operand) else self._index(x) for x in operands)
        self._calls.append(_Call(kernel, indices, named, result))

    def _index(self, value: Any) -> int:
        self._values.append(value)
        return len(self._values) - 1

    def _number(self, value: Any) -> Any:
        if type(value) is not float:
            return value
        # Kernels compute in float32 or float64, and a 0-d tensor does not change the dtype of the result.
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        return torch.tensor(value, dtype=wide, device="cpu")


def _getter(indices: tuple[int, ...]) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that picks the values at these indices, always as a sequence."""
    first = indices[0]
    return itemgetter(*indices) if len(indices) > 1 else lambda values: (values[first],)
