"""Adam."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from optimstate.optim._ops import Ops
from optimstate.optim._step import Columns, Group, Rule, RuleOptimizer, Setting, Traits, run_fused
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import Options, ParamsT, check_betas, require, to_scalar

__all__ = ["Adam", "adam"]


class Adam(RuleOptimizer, torch.optim.Adam):
    r"""Adam: steps along a running mean of gradients, scaled by a running mean of their squares.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, at step :math:`t`:

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \cdot
            \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980;
        amsgrad: Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond",
        https://openreview.net/forum?id=ryQu7f-RZ.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype), on the CPU unless ``capturable`` or ``fused``.
        exp_avg: :math:`m`, like the parameter.
        exp_avg_sq: :math:`v`, like the parameter.
        max_exp_avg_sq: The largest :math:`v` so far, like the parameter; only with ``amsgrad``.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`; a 1-element tensor too, for foreach only with ``capturable``.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1): two floats or two 1-element tensors.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 penalty, at least 0.
        amsgrad: Divide by the largest :math:`v` so far.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        capturable: Whether the step may be captured in an accelerator graph.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused kernel (floating-point parameters only; rounds differently from the others).
        decoupled_weight_decay: Shrink the parameter by ``lr * weight_decay`` instead of changing the gradient (AdamW).

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: Options exclude each other, or a gradient is sparse.
    """

    _columns = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    _scalars = ("step",)
    _later_options: ClassVar[Options] = {"amsgrad": False}
    _traits = Traits(
        options=("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
        optional={"max_exp_avg_sq": lambda group: bool(group["amsgrad"])},
        kernel=True,
        sparse_error="Adam does not support sparse gradients, please consider SparseAdam instead",
        live_when_differentiable=True,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        lists_only = bool(foreach) and not capturable
        check_tensor("lr", lr, lists_only)
        require(bool(lr >= 0.0), f"Invalid learning rate: {lr}")
        require(eps >= 0.0, f"Invalid epsilon value: {eps}")
        check_betas(betas)
        require(weight_decay >= 0.0, f"Invalid weight_decay value: {weight_decay}")
        alike = all(isinstance(b, float) for b in betas) or all(isinstance(b, Tensor) for b in betas)
        require(alike, "betas must be either both floats or both Tensors")
        check_tensor("betas[0]", betas[0], lists_only)
        check_tensor("betas[1]", betas[1], lists_only)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(map(to_scalar, betas)),
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
            },
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        if group["fused"]:
            _device_dtype_check_for_fused(p)
        return super()._new_state(p, group)

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], *lists: list[Any]
    ) -> tuple[bool, bool]:
        found = super()._init_group(group, params, grads, *lists)
        steps = lists[-1]
        if group["differentiable"] and any(step.requires_grad for step in steps):
            raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
        if group["foreach"] and steps and isinstance(group["lr"], Tensor) and not group["capturable"]:
            raise RuntimeError("lr as a Tensor is not supported for capturable=False and foreach=True")
        return found

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, live = s.k, s.group, s.lr, s.live
        beta1, beta2 = map(to_scalar, group["betas"])
        eps, amsgrad = group["eps"], group["amsgrad"]
        lerp_, mul_, addcmul_, sqrt, div_, add_ = k.lerp_, k.mul_, k.addcmul_, k.sqrt, k.div_, k.add_
        maximum_, addcdiv_ = k.maximum_, k.addcdiv_
        one_minus_beta1, one_minus_beta2 = 1 - beta1, 1 - beta2
        tensor_betas = isinstance(beta1, Tensor) or isinstance(beta2, Tensor)

        def moments(g: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any) -> Any:
            if tensor_betas:
                tensor_moments(k, g, exp_avg, exp_avg_sq, beta1, beta2)
            else:
                lerp_(exp_avg, g, one_minus_beta1)
                mul_(exp_avg_sq, beta2)
                addcmul_(exp_avg_sq, g, g, value=one_minus_beta2)
            if amsgrad:
                maximum_(max_exp_avg_sq, exp_avg_sq)
                exp_avg_sq = max_exp_avg_sq
            return sqrt(exp_avg_sq)

        def numbers(t: Any) -> tuple[Any, Any]:
            return (1 - beta2**t) ** 0.5, -(lr / (1 - beta1**t))

        def update(
            p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, correction2: Any, step_size: Any
        ) -> None:
            denom = moments(g, exp_avg, exp_avg_sq, max_exp_avg_sq)
            div_(denom, correction2)
            add_(denom, eps)
            addcdiv_(p, exp_avg, denom, value=step_size)

        if not live:
            return Rule(update, numbers)

        # With step counts as tensors, torch folds the step size into the denominator, in its for loop in another way
        # than in its foreach path.
        def numbers_each(step: Any) -> tuple[Any, Any]:
            own = step.clone() if group["differentiable"] and tensor_betas else step
            step_size = (lr / (1 - beta1**own)).neg()
            return (1 - beta2**own).sqrt() * step_size, eps / step_size

        def update_each(
            p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, scale: Any, shift: Any
        ) -> None:
            denom = (moments(g, exp_avg, exp_avg_sq, max_exp_avg_sq) / scale).add_(shift)
            p.addcdiv_(k.keep(exp_avg), denom)

        def numbers_lists(steps: Any) -> tuple[Any, Any]:
            correction1, correction2 = k.pow(beta1, steps), k.pow(beta2, steps)
            k.sub_(correction1, 1)
            k.sub_(correction2, 1)
            torch._foreach_neg_(correction2)
            k.div_(correction1, lr)
            torch._foreach_reciprocal_(correction1)
            k.sqrt_(correction2)
            return correction2, correction1

        def update_lists(
            p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any, correction2: Any, step_size: Any
        ) -> None:
            denom = moments(g, exp_avg, exp_avg_sq, max_exp_avg_sq)
            div_(denom, correction2)
            add_(denom, eps)
            div_(denom, step_size)
            addcdiv_(p, exp_avg, denom)

        return Rule(update_lists, numbers_lists) if k.is_list else Rule(update_each, numbers_each)

    def _fused(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> bool:
        if group["differentiable"]:
            raise RuntimeError("Adam with fused=True does not support differentiable=True")
        kernel: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        beta1, beta2 = map(to_scalar, group["betas"])
        lists = [columns[name] for name in self._columns]
        options = {"amsgrad": group["amsgrad"], "beta1": beta1, "beta2": beta2}
        run_fused(kernel, self, group, params, grads, lists, **options)
        return True


def check_tensor(name: str, value: Any, lists_only: bool) -> None:
    """Refuse a tensor hyperparameter with several elements, or for an implementation that takes only numbers."""
    if isinstance(value, Tensor):
        require(not lists_only, f"{name} as a Tensor is not supported for capturable=False and foreach=True")
        require(value.numel() == 1, f"Tensor {name} must be 1-element")


def tensor_moments(k: Ops, g: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, beta2: Any) -> None:
    """Update both running means with betas that are tensors, for which torch has other formulas."""
    if k.is_list:
        on_device = beta1 if beta1.is_cpu else beta1.to(g[0].device, non_blocking=True)
        k.lerp_(exp_avg, g, 1 - on_device)
        k.mul_(exp_avg_sq, beta2)
        k.addcmul_(exp_avg_sq, k.mul(g, 1 - beta2), g, 1.0)
        return
    k.lerp_(exp_avg, g, 1 - beta1.to(g.device, g.dtype, non_blocking=True))
    if beta2.requires_grad:
        k.lerp_(exp_avg_sq, g.square(), 1 - beta2)  # addcmul's `value` has no gradient
    else:
        k.mul_(exp_avg_sq, beta2)
        k.addcmul_(exp_avg_sq, g, g, value=1 - beta2)


adam = function_of(Adam)
