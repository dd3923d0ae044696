"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from optimstate.installed_torch import ASGD_CHECKS
from optimstate.optim._ops import Ops
from optimstate.optim._step import Complex, Group, Rule, RuleOptimizer, Setting, Traits
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_lr, check_not_negative, scalar_dtype, to_scalar, zeros

__all__ = ["ASGD", "asgd"]


class ASGD(RuleOptimizer, torch.optim.ASGD):
    r"""Averaged stochastic gradient descent: SGD that also keeps the average of all values of the parameter.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, at step :math:`t`:

    .. math::
        \theta &\leftarrow (1 - \lambda \eta)\,\theta - \eta g \qquad a \leftarrow a + \mu (\theta - a) \\
        \eta &\leftarrow \gamma / (1 + \lambda \gamma t)^\alpha \qquad \mu \leftarrow 1 / \max(1, t - t_0)

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging",
        https://doi.org/10.1137/0330046.

    State of a parameter, all scalars 0-d float32 (float64 where that is the default dtype) on the parameter's device:
        step: Number of steps.
        eta: Step size :math:`\eta` of the next step.
        mu: Weight :math:`\mu` of the next step in the average.
        ax: The average :math:`a`, like the parameter.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        lambd: Decay term :math:`\lambda`.
        alpha: Power :math:`\alpha` by which the step size falls.
        t0: Step after which averaging starts.
        weight_decay: L2 penalty, at least 0.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd records the step.
        capturable: Whether the step may be captured in an accelerator graph.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("mu", "ax", "eta", "step")
    _scalars = ("step", "eta", "mu")
    _traits = Traits(
        sparse_error="ASGD does not support sparse gradients",
        complex=Complex.BEFORE_DECAY,
        capturable_subjects=("params, mus, etas, and state_steps", "params, mus, etas, and state_steps"),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        check_lr(lr)
        if ASGD_CHECKS:
            check_not_negative(lambd=lambd, alpha=alpha)
        check_not_negative(weight_decay=weight_decay)
        super().__init__(
            params,
            {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay},
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    @override
    def _scalar(self, value: Any, p: Tensor, group: Group) -> Tensor:
        return torch.as_tensor(value, device=p.device, dtype=scalar_dtype()).clone().detach()

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        starts = {"step": 0.0, "eta": to_scalar(group["lr"]), "mu": 1.0}
        return {name: self._scalar(value, p, group) for name, value in starts.items()} | {"ax": zeros(p)}

    def _rule(self, s: Setting) -> Rule:
        # torch's foreach path merges decay and step into one term and keeps eta and mu as tensors, so it needs
        # functions of its own.
        if s.k.is_list:
            return self._rule_lists(s)
        return self._rule_live(s.group, s.lr) if s.live else self._rule_each(s.k, s.group, s.lr)

    def _rule_each(self, k: Ops, group: Group, lr: Any) -> Rule:
        lambd, alpha, t0 = group["lambd"], group["alpha"], group["t0"]
        next_scalars: dict[float, tuple[Tensor, Tensor]] = {}

        def numbers(t: float, eta: Tensor, mu: Tensor) -> tuple[float, float, float]:
            now, weight = eta.item(), mu.item()
            if t not in next_scalars:
                next_eta = torch.as_tensor(lr / ((1 + lambd * lr * t) ** alpha))
                next_scalars[t] = next_eta, torch.as_tensor(1 / max(1, t - t0))
            eta.copy_(next_scalars[t][0])
            mu.copy_(next_scalars[t][1])
            return 1 - lambd * now, -now, weight

        def update(p: Tensor, g: Tensor, ax: Tensor, shrink: float, rate: float, weight: float) -> None:
            k.mul_(p, shrink)
            k.add_(p, g, alpha=rate)
            if weight == 1:
                k.copy_(ax, p)
            else:
                k.add_(ax, k.mul_(k.sub(p, ax), weight))

        return Rule(update, numbers)

    def _rule_live(self, group: Group, lr: Any) -> Rule:
        lambd, alpha, t0 = group["lambd"], group["alpha"], group["t0"]

        def numbers(step: Tensor, eta: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
            now = eta.clone(), mu.clone()
            eta.copy_(lr / ((1 + lambd * lr * step) ** alpha))
            mu.copy_(1 / torch.maximum(step - t0, torch.ones_like(step)))
            return now

        def update(p: Tensor, g: Tensor, ax: Tensor, eta: Tensor, mu: Tensor) -> None:
            p.mul_(1 - lambd * eta).addcmul_(g, eta, value=-1)
            ax.add_(p.sub(ax).mul_(mu))

        return Rule(update, numbers)

    def _rule_lists(self, s: Setting) -> Rule:
        k, group, lr = s.k, s.group, s.lr
        lambd, alpha, t0 = group["lambd"], group["alpha"], group["t0"]

        def update(p: Any, g: Any, ax: Any, steps: Any, etas: Any, mus: Any) -> None:
            k.addcmul_(p, k.add(g, p, alpha=lambd), etas, value=-1)
            k.addcmul_(ax, k.sub(p, ax), mus)
            (advance_live if s.live else advance)(steps, etas, mus)

        def advance(steps: Any, etas: Any, mus: Any) -> None:
            device = etas[0].device
            new_etas = [torch.as_tensor(lr / ((1 + lambd * lr * step) ** alpha), device=device) for step in steps]
            k.copy_(etas, new_etas)
            k.copy_(mus, [torch.as_tensor(1 / max(1, step.item() - t0), device=device) for step in steps])

        def advance_live(steps: Any, etas: Any, mus: Any) -> None:
            new_mus = k.sub(steps, t0)
            torch._foreach_maximum_(new_mus, 1.0)
            torch._foreach_reciprocal_(new_mus)
            k.copy_(mus, new_mus)
            new_etas = k.mul(steps, lambd)
            k.mul_(new_etas, lr)
            k.add_(new_etas, 1)
            torch._foreach_pow_(new_etas, alpha)
            torch._foreach_reciprocal_(new_etas)
            k.mul_(new_etas, lr)
            k.copy_(etas, new_etas)

        return Rule(update, lambda steps, etas, mus: (steps, etas, mus), rowwise=False)


asgd = function_of(ASGD)
