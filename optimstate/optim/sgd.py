"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused
from typing_extensions import override

from optimstate.installed_torch import fused_sgd_takes_half_precision
from optimstate.optim._load import Slots
from optimstate.optim._ops import Ops
from optimstate.optim._step import Columns, Complex, Group, Rule, RuleOptimizer, Setting, Traits, fused_batches
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import Options, ParamsT, require

__all__ = ["SGD", "sgd"]


class SGD(RuleOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent, optionally with momentum.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, momentum :math:`\mu` and dampening
    :math:`\tau`:

    .. math::
        b &\leftarrow \mu b + (1 - \tau) g \quad \text{(at first } b = g \text{)} \\
        \theta &\leftarrow \theta - \gamma \cdot
            \begin{cases} g + \mu b & \text{nesterov} \\ b & \text{momentum} \\ g & \text{else} \end{cases}

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
    http://proceedings.mlr.press/v28/sutskever13.html. Unlike there, the velocity does not include the learning rate.

    State of a parameter:
        momentum_buffer: :math:`b`, like the gradient; only with momentum, from the first step on.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`; 0 with nesterov.
        weight_decay: L2 penalty, at least 0.
        nesterov: Look ahead along the momentum; needs momentum and no dampening.
        maximize: Ascend instead of descend.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused kernel (floating-point parameters only). Before torch 2.14 its CPU kernel
            corrupts momentum in bfloat16 and float16; such parameters are updated tensor by tensor then.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: Options exclude each other.
    """

    _columns = ("momentum_buffer",)
    _later_options: ClassVar[Options] = {"nesterov": False, "fused": False}
    _traits = Traits(
        options=("maximize", "foreach", "differentiable", "fused"),
        optional={"momentum_buffer": lambda group: bool(group["momentum"] != 0)},
        kernel=True,
        complex=Complex.NATIVE,
        blocks=False,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        require(not isinstance(lr, Tensor) or lr.numel() == 1, "Tensor lr must be 1-element")
        require(not lr < 0.0, f"Invalid learning rate: {lr}")
        require(not momentum < 0.0, f"Invalid momentum value: {momentum}")
        require(not weight_decay < 0.0, f"Invalid weight_decay value: {weight_decay}")
        steady = momentum > 0 and dampening == 0
        require(not nesterov or steady, "Nesterov momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    @override
    def _slot_shapes(self, p: Tensor, group: Group) -> Slots:
        return {}, {"momentum_buffer": tuple(p.shape)}

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], *lists: list[Any]
    ) -> tuple[bool, bool]:
        has_sparse = False
        unchecked = group["fused"] and getattr(self, "_need_device_dtype_check_for_fused", True)
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if unchecked:
                _device_dtype_check_for_fused(p)
                self._need_device_dtype_check_for_fused = unchecked = False
            params.append(p)
            grads.append(grad)
            if grad.is_sparse:
                has_sparse = True
        if has_sparse and group["fused"]:
            raise RuntimeError("`_fused_sgd` does not support sparse gradients")
        if group["momentum"] != 0:
            lists[0].extend([self.state[p].get("momentum_buffer") for p in params])
        return has_sparse, False

    def _rule(self, s: Setting) -> Rule:
        k, group = s.k, s.group
        momentum, nesterov = group["momentum"], group["nesterov"]
        descend = self._descent(k, s.lr)
        if momentum == 0:
            return Rule(descend)
        share = 1 - group["dampening"]
        mul_, add_, add, state = k.mul_, k.add_, k.add, self.state

        def velocity(p: Tensor, g: Tensor, buffer: Tensor | None) -> Tensor:
            if buffer is None:
                buffer = state[p]["momentum_buffer"] = g.detach().clone()
            else:
                buffer.mul_(momentum).add_(g, alpha=share)
            return buffer

        def update(p: Any, g: Any, buffer: Any) -> None:
            if buffer is None or (k.is_list and any(b is None for b in buffer)):
                buffer = k.map(velocity, p, g, buffer)
            else:
                mul_(buffer, momentum)
                add_(buffer, g, alpha=share)
            # Not in place: without weight decay or maximize, g is the parameter's own gradient.
            descend(p, add(g, buffer, alpha=momentum) if nesterov else buffer)

        return Rule(update)

    def _descent(self, k: Ops, lr: Any) -> Callable[[Any, Any], Any]:
        if isinstance(lr, Tensor):
            if not k.is_list and lr.requires_grad:
                return lambda p, g: p.addcmul_(g, lr, value=-1)
            if k.is_list and torch.compiler.is_compiling():
                return lambda p, g: k.add_(p, k.mul(g, -lr))  # alpha would be read on the host
        return partial(k.add_, alpha=-lr)

    def _fused(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> bool:
        buffers = columns["momentum_buffer"]
        fresh = [buffer is None for buffer in buffers]
        if not any(fresh):
            self._run_kernel(group, params, grads, buffers, first=False)
            return True
        for first in set(fresh):
            some = [
                row for row, new in zip(zip(params, grads, buffers, strict=True), fresh, strict=True) if new == first
            ]
            some_params, some_grads, some_buffers = map(list, zip(*some, strict=True))
            if first:  # zeros, not uninitialized: the kernel writes nothing if AMP found an infinity
                some_buffers = [torch.zeros_like(grad) for grad in some_grads]
                for p, buffer in zip(some_params, some_buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer
            self._run_kernel(group, some_params, some_grads, some_buffers, first=first)
        return True

    def _run_kernel(
        self, group: Group, params: list[Tensor], grads: list[Tensor], buffers: list[Any], *, first: bool
    ) -> None:
        lists = [buffers] if buffers else []
        for (some_params, some_grads, *held), _, scaling in fused_batches(self, group, params, grads, lists):
            some_buffers = held[0] if held else []
            if is_half_on_cpu(some_params[0]) and not fused_sgd_takes_half_precision():
                self._unfused(group, some_params, some_grads, [None] * len(some_params) if first else some_buffers)
                continue
            kernel: Any = torch._fused_sgd_
            kernel(
                some_params,
                some_grads,
                some_buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                is_first_step=first,
                **scaling,
            )

    def _unfused(self, group: Group, params: list[Any], grads: list[Any], buffers: list[Any]) -> None:
        """The step of half-precision parameters on the CPU by the rule, because older fused kernels get it wrong."""
        if (found_inf := getattr(self, "found_inf", None)) is not None and found_inf.item():
            return
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_div_(grads, grad_scale.item())
        self._run_each(group, params, grads, {"momentum_buffer": buffers}, False)


def is_half_on_cpu(p: Tensor) -> bool:
    """Whether a parameter is on the CPU in half precision, which older fused kernels get wrong."""
    return p.is_cpu and p.dtype in (torch.bfloat16, torch.float16)


sgd = function_of(SGD)
