"""NAdam."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimstate.optim._adam_kernel import ENDLESS, AdamKernelOptimizer, adam_kernel, bodies
from optimstate.optim._ops import Ops, one
from optimstate.optim._step import Columns, Complex, Group, Rule, Setting, Traits, count_steps, effective, has_l2
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_betas, check_lr, check_not_negative, to_number

__all__ = ["NAdam", "nadam"]


class NAdam(AdamKernelOptimizer, torch.optim.NAdam):
    r"""NAdam: Adam with Nesterov's look-ahead, whose momentum warms up.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, at step :math:`t`:

    .. math::
        \mu_t &= \beta_1 \left(1 - \tfrac12 \cdot 0.96^{t \psi}\right) \qquad \Pi \leftarrow \Pi \mu_t \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
            \left(\frac{1 - \mu_t}{1 - \Pi}\, g + \frac{\mu_{t+1}}{1 - \Pi \mu_{t+1}}\, m\right)

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``capturable``.
        mu_product: :math:`\Pi`, a scalar like ``step``.
        exp_avg: :math:`m`, like the parameter.
        exp_avg_sq: :math:`v`, like the parameter.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 penalty, at least 0.
        momentum_decay: :math:`\psi \ge 0`.
        decoupled_weight_decay: Shrink the parameter by ``lr * weight_decay`` instead of changing the gradient.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        capturable: Whether the step may be captured in an accelerator graph.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused Adam kernel for dense float32 parameters of at least 16,384 elements on the
            CPU, which is 3 times as fast. The same gradients (weight decay included) give the same state bit for bit,
            and parameters within 1e-6 relative to the largest. Parameters that the kernel cannot take are updated as
            without it. torch's class has no such argument.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("exp_avg", "exp_avg_sq", "mu_product", "step")
    _scalars = ("step", "mu_product")
    _kernel_dtypes = (torch.float32,)
    _traits = Traits(
        options=("maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"),
        kernel=True,
        sparse_error="NAdam does not support sparse gradients",
        complex=Complex.BEFORE_DECAY,
        capturable_subjects=("params, mu_products and state_steps", "params, mu_products, and state_steps"),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
        check_not_negative(weight_decay=weight_decay, momentum_decay=momentum_decay)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay},
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        return super()._new_state(p, group) | {"mu_product": self._scalar(1.0, p, group)}

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, live = s.k, s.group, s.lr, s.live
        (beta1, beta2), eps = group["betas"], group["eps"]
        share1, share2 = 1 - beta1, 1 - beta2
        mu_at = mu_schedule(beta1, group["momentum_decay"])
        if k.is_list and not live:
            lr = to_number(lr)

        def denominator(g: Any, exp_avg: Any, exp_avg_sq: Any, correction2: Any) -> Any:
            k.lerp_(exp_avg, g, share1)
            k.mul_(exp_avg_sq, beta2)
            k.addcmul_(exp_avg_sq, g, g, value=share2)
            if k.is_list:  # torch's foreach path divides the root by a root, its for loop takes the root of a quotient
                denom = k.sqrt(exp_avg_sq)
                k.div_(denom, correction2)
            else:
                denom = k.div(exp_avg_sq, correction2)
                k.sqrt_(denom)
            denom = k.keep(denom)
            k.add_(denom, eps)
            return denom

        def factors(t: float, product: float) -> tuple[Any, Any, Any]:
            mu, mu_next = mu_at(t), mu_at(t + 1)
            correction2 = 1 - beta2**t
            correction2 = correction2**0.5 if k.is_list else correction2
            return correction2, -lr * (1.0 - mu) / (1.0 - product), (-lr * mu_next) / (1.0 - product * mu_next)

        def numbers(t: float, mu_product: Tensor) -> tuple[Any, Any, Any]:
            return factors(t, mu_product.mul_(mu_at(t)).item())

        def list_numbers(steps: list[Tensor], mu_products: list[Tensor]) -> list[list[Any]]:
            times = [step.item() for step in steps]
            k.mul_(mu_products, list(map(mu_at, times)))  # rounds a bfloat16 state as torch's foreach path does
            products = [mu_product.item() for mu_product in mu_products]
            return [list(column) for column in zip(*map(factors, times, products), strict=True)]

        def update(p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, correction2: Any, for_g: Any, for_avg: Any) -> None:
            denom = denominator(g, exp_avg, exp_avg_sq, correction2)
            k.addcdiv_(p, g, denom, value=for_g)
            k.addcdiv_(p, exp_avg, denom, value=for_avg)

        # Tensors cannot be addcdiv's `value`. torch's for loop and foreach path multiply these factors in differently.
        def tensor_numbers(t: Any, mu_product: Tensor) -> tuple[Any, Any, Any]:
            mu, mu_next = mu_at(t), mu_at(t + 1)
            mu_product.mul_(mu)
            return (
                1 - beta2**t,
                -lr * (1.0 - mu) / (1.0 - mu_product),
                -lr * mu_next / (1.0 - mu_product * mu_next),
            )

        def tensor_update(
            p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, correction2: Any, for_g: Any, for_avg: Any
        ) -> None:
            denom = denominator(g, exp_avg, exp_avg_sq, correction2)
            p.addcdiv_(g * for_g, denom)
            p.addcdiv_(exp_avg * for_avg, denom)

        def live_update_lists(
            p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, correction2: Any, for_g: Any, for_avg: Any
        ) -> None:
            denom = denominator(g, exp_avg, exp_avg_sq, correction2)
            numerator = k.mul(for_g, g)
            k.addcmul_(numerator, for_avg, exp_avg)
            k.addcdiv_(p, numerator, denom)

        if live and k.is_list:
            return Rule(live_update_lists, lambda steps, products: live_factors(k, group, lr, steps, products))
        if live or group["differentiable"]:
            return Rule(tensor_update, tensor_numbers)
        return Rule(update, list_numbers, rowwise=False) if k.is_list else Rule(update, numbers)

    def _kernel_suits(self, group: Group) -> bool:
        beta1, beta2 = group["betas"]
        return bool(beta1 > 0 and 0 < beta2 < 1 - 1e-7)

    def _through_kernel(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> None:
        rule = self._rule(Setting.of(one, group))
        assert rule.numbers is not None
        count_steps(columns["step"])
        alike: dict[tuple[float, ...], list[int]] = {}
        for index, (step, product) in enumerate(zip(columns["step"], columns["mu_product"], strict=True)):
            t = step.item()
            alike.setdefault((t, *map(float, rule.numbers(t, product))), []).append(index)
        changed = group["maximize"] or has_l2(group)
        held = params, grads, columns["exp_avg"], columns["exp_avg_sq"]
        for numbers, indices in alike.items():
            for chunk in [[i] for i in indices] if changed else [indices]:
                p, g, *moments = (bodies([column[i] for i in chunk]) for column in held)
                g = list(map(partial(effective, one, group), p, g))
                kernel_twice(group, p, g, moments, numbers)
            p, g, *slots = ([column[i] for i in indices] for column in held)
            self._run_tails(group, p, g, slots, numbers[1:])


def kernel_twice(group: Group, p: list[Tensor], g: list[Tensor], moments: list[list[Tensor]], numbers: Any) -> None:
    """Run Adam's kernel for the moments and the momentum's part of the step, then for the gradient's part."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    t, correction2, for_g, for_avg = numbers
    adam_kernel(p, g, *moments, step=t, lr=-for_avg * (1 - beta1**t), beta1=beta1, beta2=beta2, eps=eps)
    # Now the gradient is its own first moment. The second moment must not change: no float32 does by a beta2 this
    # close to 1.
    root = correction2**0.5
    options = {"step": ENDLESS, "beta1": 0.0, "beta2": math.nextafter(1.0, 0.0), "eps": eps * root}
    adam_kernel(p, g, g, moments[1], lr=-for_g * root, **options)


def mu_schedule(beta1: float, momentum_decay: float) -> Any:
    """The momentum as a function of the step."""
    return lambda t: beta1 * (1.0 - 0.5 * (0.96 ** (t * momentum_decay)))


def live_factors(k: Ops, group: Group, lr: Any, steps: Any, mu_products: Any) -> tuple[Any, Any, Any]:
    """The factors of a foreach step as tensors, computed in torch's order of operations."""
    (beta1, beta2), decay = group["betas"], group["momentum_decay"]

    def mus(exponent: Any) -> Any:
        values = k.pow(0.96, exponent)
        k.mul_(values, -0.5)
        k.add_(values, 1.0)
        k.mul_(values, beta1)
        return values

    exponent = k.mul(steps, decay)
    now = mus(exponent)
    k.add_(exponent, decay)
    following = mus(exponent)
    correction2 = k.pow(beta2, steps)
    k.sub_(correction2, 1.0)
    torch._foreach_neg_(correction2)
    k.sqrt_(correction2)
    k.mul_(mu_products, now)
    k.sub_(now, 1.0)
    k.mul_(now, lr)
    denom = k.sub(mu_products, 1.0)
    torch._foreach_neg_(denom)
    k.div_(now, denom)
    denom = k.mul(mu_products, following)
    k.mul_(following, lr)
    k.sub_(denom, 1.0)
    k.div_(following, denom)
    return correction2, now, following


nadam = function_of(NAdam)
