"""Adadelta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimstate.optim._step import Rule, RuleOptimizer, Setting, Traits
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_lr, check_not_negative, require

__all__ = ["Adadelta", "adadelta"]


class Adadelta(RuleOptimizer, torch.optim.Adadelta):
    r"""Adadelta: steps scaled by the running size of past steps over the running size of gradients.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter:

    .. math::
        v &\leftarrow \rho v + (1 - \rho) g^2 \qquad
        \Delta \leftarrow g \sqrt{u + \epsilon} / \sqrt{v + \epsilon} \\
        u &\leftarrow \rho u + (1 - \rho) \Delta^2 \qquad \theta \leftarrow \theta - \gamma \Delta

    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", https://arxiv.org/abs/1212.5701.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``capturable``.
        square_avg: :math:`v`, like the parameter.
        acc_delta: :math:`u`, like the parameter.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Factor :math:`\gamma \ge 0` on the step, or a 1-element tensor.
        rho: Decay :math:`\rho` of both running means, in [0, 1].
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 penalty, at least 0.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        capturable: Whether the step may be captured in an accelerator graph.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd records the step.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("square_avg", "acc_delta", "step")
    _scalars = ("step",)
    _traits = Traits(
        sparse_error="Adadelta does not support sparse gradients",
        complex_parameter=True,
        capturable_on_xla=(False, False),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_lr(lr)
        require(0.0 <= rho <= 1.0, f"Invalid rho value: {rho}")
        check_not_negative(epsilon=eps, weight_decay=weight_decay)
        super().__init__(
            params,
            {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay},
            maximize=maximize,
            capturable=capturable,
            foreach=foreach,
            differentiable=differentiable,
        )

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, live = s.k, s.group, s.lr, s.live
        rho, eps = group["rho"], group["eps"]
        share = 1 - rho

        def update(p: Any, g: Any, square_avg: Any, acc_delta: Any) -> None:
            k.mul_(square_avg, rho)
            k.addcmul_(square_avg, g, g, value=share)
            std = k.add(square_avg, eps)
            k.sqrt_(std)
            delta = k.add(acc_delta, eps)
            k.sqrt_(delta)
            delta = k.keep(delta)
            k.div_(delta, std)
            k.mul_(delta, g)
            k.mul_(acc_delta, rho)
            k.addcmul_(acc_delta, delta, delta, value=share)
            if k.is_list and live and isinstance(lr, Tensor):  # as alpha it would be read once, while capturing
                k.mul_(delta, -lr)
                k.add_(p, delta)
            else:
                k.add_(p, k.as_complex(delta, p), alpha=-lr)

        return Rule(update)


adadelta = function_of(Adadelta)
