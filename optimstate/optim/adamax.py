"""Adamax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimstate.optim._step import Rule, RuleOptimizer, Setting, Traits
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_betas, check_lr, check_not_negative, to_number

__all__ = ["Adamax", "adamax"]


class Adamax(RuleOptimizer, torch.optim.Adamax):
    r"""Adamax: Adam with a decaying maximum of gradient magnitudes in place of the mean square.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, at step :math:`t`:

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m) \qquad u \leftarrow \max(\beta_2 u, |g| + \epsilon) \qquad
        \theta \leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \cdot \frac{m}{u}

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", section 7.1, https://arxiv.org/abs/1412.6980.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``capturable``.
        exp_avg: :math:`m`, like the parameter.
        exp_inf: :math:`u`, like the parameter.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 penalty, at least 0.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd records the step.
        capturable: Whether the step may be captured in an accelerator graph.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("exp_avg", "exp_inf", "step")
    _scalars = ("step",)
    _traits = Traits(sparse_error="Adamax does not support sparse gradients")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        check_lr(lr)
        check_not_negative(epsilon=eps)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, live = s.k, s.group, s.lr, s.live
        (beta1, beta2), eps = group["betas"], group["eps"]
        share = 1 - beta1
        if k.is_list and not live:
            lr = to_number(lr)

        def averages(g: Any, exp_avg: Any, exp_inf: Any) -> None:
            k.lerp_(exp_avg, g, share)
            k.mul_(exp_inf, beta2)
            size = k.abs(g)
            k.add_(size, eps)
            k.maximum_(exp_inf, size)

        def numbers(t: Any) -> tuple[Any]:
            return (-(lr / (1 - beta1**t)),)

        def update(p: Any, g: Any, exp_avg: Any, exp_inf: Any, rate: Any) -> None:
            averages(g, exp_avg, exp_inf)
            k.addcdiv_(p, exp_avg, exp_inf, value=rate)

        # A tensor cannot be addcdiv's `value`, so the negative rate goes into the denominator.
        def live_numbers(step: Any) -> tuple[Any]:
            correction = k.pow(beta1, step)
            k.sub_(correction, 1)
            k.div_(correction, lr)
            return (correction,)

        def live_update(p: Any, g: Any, exp_avg: Any, exp_inf: Any, inverse_rate: Any) -> None:
            averages(g, exp_avg, exp_inf)
            k.addcdiv_(p, exp_avg, k.mul(exp_inf, inverse_rate))

        return Rule(live_update, live_numbers) if live else Rule(update, numbers)


adamax = function_of(Adamax)
