"""RMSprop."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from optimstate.optim._adam_kernel import ENDLESS, AdamKernelOptimizer, adam_kernel, bodies
from optimstate.optim._ops import one
from optimstate.optim._step import Columns, Group, Rule, Setting, Traits, count_steps, effective
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import Options, ParamsT, check_lr, check_not_negative

__all__ = ["RMSprop", "rmsprop"]


class RMSprop(AdamKernelOptimizer, torch.optim.RMSprop):
    r"""RMSprop: steps scaled by the root of a running mean of squared gradients.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter and momentum :math:`\mu`:

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \qquad
        a \leftarrow a + (1 - \alpha)(g - a) \quad\text{(centered)} \\
        d &= \sqrt{v - a^2 \text{ if centered}} + \epsilon \qquad b \leftarrow \mu b + g / d \\
        \theta &\leftarrow \theta - \gamma b

    Source: Tieleman and Hinton, "Lecture 6.5: rmsprop", Coursera, 2012,
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves,
    https://arxiv.org/abs/1308.0850.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``capturable``.
        square_avg: :math:`v`, like the parameter.
        momentum_buffer: :math:`b`, like the parameter; only with momentum.
        grad_avg: :math:`a`, like the parameter; only if centered.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        alpha: :math:`\alpha \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 penalty, at least 0.
        momentum: :math:`\mu \ge 0`.
        centered: Divide by the estimated standard deviation instead of the root mean square.
        capturable: Whether the step may be captured in an accelerator graph.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused Adam kernel for dense float32 and float64 parameters of at least 16,384
            elements on the CPU, if neither centered nor with momentum, which is 3 to 4 times as fast. The same
            gradients (weight decay included) give the same state bit for bit, and parameters within 1e-6 relative to
            the largest. Parameters that the kernel cannot take are updated as without it. torch's class has no such
            argument.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("square_avg", "momentum_buffer", "grad_avg", "step")
    _scalars = ("step",)
    _later_options: ClassVar[Options] = {"momentum": 0, "centered": False}
    _traits = Traits(
        optional={
            "momentum_buffer": lambda group: bool(group["momentum"] > 0),
            "grad_avg": lambda group: bool(group["centered"]),
        },
        kernel=True,
        sparse_error="RMSprop does not support sparse gradients",
        capturable_on_xla=(True, True),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
    ) -> None:
        check_lr(lr)
        check_not_negative(epsilon=eps, momentum=momentum, weight_decay=weight_decay, alpha=alpha)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "alpha": alpha,
                "eps": eps,
                "centered": centered,
                "weight_decay": weight_decay,
            },
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, live = s.k, s.group, s.lr, s.live
        alpha, eps, momentum, centered = group["alpha"], group["eps"], group["momentum"], group["centered"]
        share = 1 - alpha
        tensor_rate = (
            k.is_list and live and isinstance(lr, Tensor)
        )  # a kernel would read its value once, while capturing

        def update(p: Any, g: Any, square_avg: Any, buffer: Any, grad_avg: Any) -> None:
            k.mul_(square_avg, alpha)
            k.addcmul_(square_avg, g, g, value=share)
            if centered:
                k.lerp_(grad_avg, g, share)
                avg = k.addcmul(square_avg, grad_avg, grad_avg, value=-1)
                k.sqrt_(avg)
            else:
                avg = k.sqrt(square_avg)
            avg = k.keep(avg)
            k.add_(avg, eps)
            if momentum > 0:
                k.mul_(buffer, momentum)
                k.addcdiv_(buffer, g, avg)
                if tensor_rate:
                    k.add_(p, k.mul(buffer, -lr))
                else:
                    k.add_(p, buffer, alpha=-lr)
            elif tensor_rate:
                k.div_(avg, -lr)
                k.addcdiv_(p, g, avg)
            else:
                k.addcdiv_(p, g, avg, value=-lr)

        return Rule(update)

    def _kernel_suits(self, group: Group) -> bool:
        return not group["centered"] and group["momentum"] <= 0 and bool(0.0 <= group["alpha"] ** ENDLESS < 1e-16)

    def _through_kernel(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> None:
        count_steps(columns["step"])
        options = {
            "step": ENDLESS,
            "lr": float(group["lr"]),
            "beta1": 0.0,
            "beta2": group["alpha"],
            "eps": group["eps"],
        }
        p, g, square_avg = bodies(params), bodies(grads), bodies(columns["square_avg"])
        if not group["maximize"] and group["weight_decay"] == 0:
            adam_kernel(p, g, g, square_avg, **options)
        else:  # the kernel overwrites what it takes for the first moment, which must not be p.grad now
            for body, grad, average in zip(p, g, square_avg, strict=True):
                changed = [effective(one, group, body, grad)]
                adam_kernel([body], changed, changed, [average], **options)
        self._run_tails(group, params, grads, [columns["square_avg"], [], []], ())


rmsprop = function_of(RMSprop)
