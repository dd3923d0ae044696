"""The vocabulary of update rules, in two dialects: one tensor, or a list of tensors at a time.

A rule is written once over an `Ops`. With `one` its operands are tensors and numbers; with `many` they are lists of
tensors, and a number is one number for all or a list with a number for each tensor. A trailing underscore means that
the first operand is overwritten; because the in-place list kernels round scalars to the tensors' dtype and the others
do not, which of the two a rule uses is part of its definition. `traced` is `one` with autograd watching.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ops", "Scratch", "many", "one", "traced"]

# An operand is a tensor in one dialect and a list of tensors in the other, so operators can only be typed loosely.
Op = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One dialect.

    `keep(x)` gives what may be modified although autograd remembers x; `map(f, *xs)` applies a function of tensors for
    which no list kernel exists; `as_complex(x, p)` undoes the real view of x where p is still complex.
    """

    abs: Op
    add: Op
    add_: Op
    addcdiv_: Op
    addcmul: Op
    addcmul_: Op
    copy_: Op
    div: Op
    div_: Op
    lerp_: Op
    maximum_: Op
    mul: Op
    mul_: Op
    neg: Op
    pow: Op
    sign: Op
    sqrt: Op
    sqrt_: Op
    sub: Op
    sub_: Op
    keep: Op
    map: Op
    as_complex: Op
    is_list: bool


def _same(x: Any, *_: Any) -> Any:
    return x


def _each(function: Op, *operands: Any) -> list[Any]:
    return [function(*row) for row in zip(*operands, strict=True)]


def _valued(kernel: Op) -> Op:
    """List kernels take one value by name and a list of them only by position."""

    def call(x: Any, a: Any, b: Any, value: Any = 1) -> Any:
        return kernel(x, a, b, value) if isinstance(value, list) else kernel(x, a, b, value=value)

    return call


one = Ops(
    abs=Tensor.abs,
    add=Tensor.add,
    add_=Tensor.add_,
    addcdiv_=Tensor.addcdiv_,
    addcmul=Tensor.addcmul,
    addcmul_=Tensor.addcmul_,
    copy_=Tensor.copy_,
    div=Tensor.div,
    div_=Tensor.div_,
    lerp_=Tensor.lerp_,
    maximum_=lambda x, y: torch.maximum(x, y, out=x),
    mul=Tensor.mul,
    mul_=Tensor.mul_,
    neg=Tensor.neg,
    pow=torch.pow,
    sign=Tensor.sign,
    sqrt=Tensor.sqrt,
    sqrt_=Tensor.sqrt_,
    sub=Tensor.sub,
    sub_=Tensor.sub_,
    keep=_same,
    map=lambda function, *operands: function(*operands),
    as_complex=lambda x, p: torch.view_as_complex(x) if p.is_complex() else x,
    is_list=False,
)

traced = replace(one, keep=Tensor.clone, maximum_=lambda x, y: x.copy_(torch.maximum(x.clone(), y)))

many = Ops(
    abs=torch._foreach_abs,
    add=torch._foreach_add,
    add_=torch._foreach_add_,
    addcdiv_=_valued(torch._foreach_addcdiv_),
    addcmul=_valued(torch._foreach_addcmul),
    addcmul_=_valued(torch._foreach_addcmul_),
    copy_=torch._foreach_copy_,
    div=torch._foreach_div,
    div_=torch._foreach_div_,
    lerp_=torch._foreach_lerp_,
    maximum_=torch._foreach_maximum_,
    mul=torch._foreach_mul,
    mul_=torch._foreach_mul_,
    neg=torch._foreach_neg,
    pow=torch._foreach_pow,
    sign=lambda x: [t.sign() for t in x],
    sqrt=torch._foreach_sqrt,
    sqrt_=torch._foreach_sqrt_,
    sub=torch._foreach_sub,
    sub_=torch._foreach_sub_,
    keep=_same,
    map=_each,
    as_complex=_same,
    is_list=True,
)


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
