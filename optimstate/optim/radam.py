"""RAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimstate.optim._adam_kernel import AdamKernelOptimizer, adam_kernel, bodies
from optimstate.optim._ops import Ops, traced
from optimstate.optim._step import Columns, Complex, Group, Rule, Setting, Traits, count_steps, rows_of
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_betas, check_lr, check_not_negative

__all__ = ["RAdam", "radam"]


class RAdam(AdamKernelOptimizer, torch.optim.RAdam):
    r"""RAdam: Adam that uses its mean square only after enough gradients.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, at step :math:`t`:

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \rho_\infty &= \tfrac{2}{1 - \beta_2} - 1 \qquad
            \rho = \rho_\infty - \tfrac{2 t \beta_2^t}{1 - \beta_2^t} \qquad
            r = \sqrt{\tfrac{(\rho - 4)(\rho - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho}} \\
        \theta &\leftarrow \theta - \frac{\gamma m}{1 - \beta_1^t} \cdot
            \begin{cases} r \sqrt{1 - \beta_2^t} / (\sqrt{v} + \epsilon) & \rho > 5 \\ 1 & \text{else} \end{cases}

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", https://arxiv.org/abs/1908.03265.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``capturable``.
        exp_avg: :math:`m`, like the parameter.
        exp_avg_sq: :math:`v`, like the parameter.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 penalty, at least 0.
        decoupled_weight_decay: Shrink the parameter by ``lr * weight_decay`` instead of changing the gradient.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        capturable: Whether the step may be captured in an accelerator graph.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused Adam kernel for dense float32 and float64 parameters of at least 16,384
            elements on the CPU, from the first rectified step on, which is 5 times as fast or more. The same gradients
            (weight decay included) give the same state bit for bit, and parameters within 1e-6 relative to the largest.
            Parameters that the kernel cannot take are updated as without it. torch's class has no such argument.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("exp_avg", "exp_avg_sq", "step")
    _scalars = ("step",)
    _traits = Traits(
        options=("foreach", "maximize", "differentiable", "capturable", "decoupled_weight_decay"),
        kernel=True,
        sparse_error="RAdam does not support sparse gradients",
        complex=Complex.BEFORE_DECAY,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_lr(lr)
        check_not_negative(epsilon=eps)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
            differentiable=differentiable,
            fused=fused,
        )

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, live = s.k, s.group, s.lr, s.live
        (beta1, beta2), eps = group["betas"], group["eps"]
        share1, share2 = 1 - beta1, 1 - beta2

        def moments(g: Any, exp_avg: Any, exp_avg_sq: Any) -> None:
            k.lerp_(exp_avg, g, share1)
            k.mul_(exp_avg_sq, beta2)
            k.addcmul_(exp_avg_sq, g, g, value=share2)

        def root(exp_avg_sq: Any) -> Any:
            denom = k.keep(k.sqrt(exp_avg_sq))
            k.add_(denom, eps)
            return denom

        # torch's for loop branches on the rectification; its foreach path combines both branches in one factor. After
        # the moments they share nothing.
        times = k.mul if k is traced else k.mul_

        def numbers(t: float) -> tuple[Any, Any, Any]:
            rho, rect = rectification(beta2, t)
            return 1 - beta1**t, (1 - beta2**t) ** 0.5, rect if rho > 5.0 else None

        def update(
            p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, correction1: Any, root2: Any, rect: Any
        ) -> None:
            moments(g, exp_avg, exp_avg_sq)
            change = times(k.div(exp_avg, correction1), lr)
            if rect is not None:
                change = times(times(change, times(k.reciprocal_(root(exp_avg_sq)), root2)), rect)
            k.add_(p, change, alpha=-1.0)

        def live_numbers(step: Tensor) -> tuple[Any, Any, Any, Any]:
            rho, rect = rectification(beta2, step)
            return 1 - beta1**step, (1 - beta2**step) ** 0.5, rho > 5.0, rect

        def live_update(
            p: Tensor,
            g: Tensor,
            exp_avg: Tensor,
            exp_avg_sq: Tensor,
            correction1: Any,
            root2: Any,
            trusted: Any,
            rect: Any,
        ) -> None:
            moments(g, exp_avg, exp_avg_sq)
            factor = torch.where(trusted, rect * (root2 / root(exp_avg_sq)), 1.0)
            p.add_(exp_avg / correction1 * lr * factor, alpha=-1.0)

        def list_numbers(t: float) -> tuple[Any, Any]:
            rho, rect = rectification(beta2, t)
            rect = rect if rho > 5 else 0
            correction1 = 1 - beta1**t
            plain = (lr * (0 if rect > 0 else 1.0) / correction1) * -1
            return ((1 - beta2**t) ** 0.5) * (lr * rect / correction1) * -1, plain

        def update_lists(p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, rectified: Any, plain: Any) -> None:
            moments(g, exp_avg, exp_avg_sq)
            factor = root(exp_avg_sq)
            k.div_(factor, rectified)
            torch._foreach_reciprocal_(factor)
            k.add_(factor, plain)
            k.addcmul_(p, exp_avg, factor)

        if k.is_list:
            return Rule(update_lists, (lambda steps: live_factors(k, group, lr, steps)) if live else list_numbers)
        return Rule(live_update, live_numbers) if live else Rule(update, numbers)

    def _kernel_suits(self, group: Group) -> bool:
        return all(beta > 0 for beta in group["betas"])

    def _through_kernel(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> None:
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        by_step: dict[float, list[int]] = {}
        for index, step in enumerate(columns["step"]):
            by_step.setdefault(step.item() + 1, []).append(index)
        for t, indices in by_step.items():
            p, g, some = rows_of(params, grads, columns, indices)
            rho, rect = rectification(beta2, t)
            if not rho > 5.0 or lr == 0:
                self._run_each(group, p, g, some, False)
                continue
            count_steps(some["step"])
            decoupled = group["decoupled_weight_decay"]
            adam_kernel(
                bodies(p),
                bodies(g),
                bodies(some["exp_avg"]),
                bodies(some["exp_avg_sq"]),
                step=t,
                lr=lr * rect,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"] / (1 - beta2**t) ** 0.5,  # Adam adds it after dividing by this, RAdam before
                weight_decay=decay / rect if decoupled else decay,
                decoupled=decoupled,
                maximize=group["maximize"],
            )
            numbers = 1 - beta1**t, (1 - beta2**t) ** 0.5, rect
            self._run_tails(group, p, g, [some["exp_avg"], some["exp_avg_sq"]], numbers)


def rectification(beta2: float, t: Any) -> tuple[Any, Any]:
    """The length of the moving average at step t, and the variance rectification where that length exceeds 4."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * (beta2**t) / (1 - beta2**t)
    if not isinstance(rho, Tensor) and rho <= 5.0:
        return rho, 0
    return rho, ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5


def live_factors(k: Ops, group: Group, lr: Any, steps: Any) -> tuple[Any, Any]:
    """The factors of a foreach step as tensors, computed in torch's order of operations."""
    beta1, beta2 = group["betas"]
    rho_inf = 2 / (1 - beta2) - 1

    def correction(beta: float) -> Any:
        values = k.pow(beta, steps)
        torch._foreach_neg_(values)
        k.add_(values, 1)
        return values

    rho = k.pow(beta2, steps)
    k.mul_(rho, steps)
    k.mul_(rho, 2)
    k.div_(rho, correction(beta2))
    torch._foreach_neg_(rho)
    k.add_(rho, rho_inf)
    rect = k.sub(rho, 4)
    k.mul_(rect, k.sub(rho, 2))
    k.mul_(rect, rho_inf)
    k.div_(rect, k.mul(rho, (rho_inf - 4) * (rho_inf - 2)))
    k.sqrt_(rect)
    rect = k.map(lambda value, length: torch.where(length > 5.0, value, 0.0), rect, rho)
    plain = k.map(lambda value: torch.where(value > 0, 0.0, 1.0), rect)
    correction1 = correction(beta1)
    k.mul_(plain, lr)
    k.div_(plain, correction1)
    torch._foreach_neg_(plain)
    rectified = correction(beta2)
    k.sqrt_(rectified)
    k.mul_(rectified, lr)
    k.mul_(rectified, rect)
    torch._foreach_neg_(rectified)
    k.div_(rectified, correction1)
    return rectified, plain


radam = function_of(RAdam)
