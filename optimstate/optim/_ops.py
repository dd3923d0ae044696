"""The operations of update rules, in two backends: on one tensor, or on a list of tensors at a time.

A rule is written once, in terms of `Ops`. With `one` its operands are tensors and numbers. With `many` they are lists
of tensors, and a number is either one for all or a list with one for each tensor. A trailing underscore means that the
first operand is overwritten. In-place list kernels round scalars to the tensors' dtype and the others do not, so which
of the two a rule uses is part of its definition. `traced` is `one` for steps that autograd records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Op", "Ops", "many", "one", "traced"]

# Typed loosely, because an operand is a tensor in one backend and a list of tensors in the other.
Op = Callable[..., Any]


class Ops(NamedTuple):
    """One backend. A NamedTuple, because `torch.compile` traces calls of its members.

    `keep(x)` returns a tensor that may be modified although autograd needs x; `map(f, *xs)` applies a function of
    tensors for which no list kernel exists; `as_complex(x, p)` undoes the real view of x if p is complex.
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
    """A list kernel that takes both forms of `value`: torch takes a number by name, and a list only by position."""

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
