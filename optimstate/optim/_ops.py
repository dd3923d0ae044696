"""The vocabulary of update rules, in two dialects: one tensor, or a list of tensors at a time.

A rule is written once over an `Ops`. With `one` its operands are tensors and numbers; with `many` they are lists of
tensors, and a number is one number for all or a list with a number for each tensor. A trailing underscore means that
the first operand is overwritten; because the in-place list kernels round scalars to the tensors' dtype and the others
do not, which of the two a rule uses is part of its definition. `traced` is `one` with autograd watching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Op", "Ops", "many", "one", "traced"]

# An operand is a tensor in one backend and a list of tensors in the other, so operators can only be typed loosely.
Op = Callable[..., Any]


class Ops(NamedTuple):
    """One backend: what the rules are computed with. A NamedTuple, because `torch.compile` traces calls of its members.

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
    reciprocal_: Op
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
    reciprocal_=Tensor.reciprocal_,
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

traced = one._replace(
    keep=Tensor.clone, reciprocal_=Tensor.reciprocal, maximum_=lambda x, y: x.copy_(torch.maximum(x.clone(), y))
)

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
    reciprocal_=torch._foreach_reciprocal_,
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
