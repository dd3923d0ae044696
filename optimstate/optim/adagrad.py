"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from optimstate.installed_torch import ADAGRAD_FUSES_ON_CUDA
from optimstate.optim._step import Columns, Group, Rule, RuleOptimizer, Setting, Traits, run_fused
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_lr, check_not_negative, sparse_like

__all__ = ["Adagrad", "adagrad"]


class Adagrad(RuleOptimizer, torch.optim.Adagrad):
    r"""Adagrad: steps scaled by the root of the sum of all squared gradients so far.

    With :math:`g` the gradient plus ``weight_decay`` times the parameter, at step :math:`t`:

    .. math::
        s \leftarrow s + g^2 \qquad
        \theta \leftarrow \theta - \frac{\gamma}{1 + (t - 1) \eta} \cdot \frac{g}{\sqrt{s} + \epsilon}

    A sparse gradient changes only the elements that it contains, and allows no weight decay. Source: Duchi, Hazan and
    Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    http://jmlr.org/papers/v12/duchi11a.html.

    State of a parameter, created with the optimizer:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``fused``.
        sum: :math:`s`, like the parameter.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`, or a 1-element tensor.
        lr_decay: :math:`\eta \ge 0`.
        weight_decay: L2 penalty, at least 0.
        initial_accumulator_value: First value of :math:`s`; at least 0.
        eps: :math:`\epsilon \ge 0`.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused kernel (CPU; floating-point parameters and dense gradients only).

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: Options exclude each other, or a sparse gradient meets weight decay.
    """

    _columns = ("sum", "step")
    _scalars = ("step",)
    _traits = Traits(options=("foreach", "maximize", "differentiable", "fused"), kernel=True)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_lr(lr)
        check_not_negative(
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            epsilon=eps,
        )
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "eps": eps,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
            },
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(self._new_state(p, group))

    def share_memory(self) -> None:
        """Move every ``sum`` to shared memory, for training in several processes."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"].share_memory_()

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        start = self.defaults["initial_accumulator_value"]
        value = complex(start, start) if p.is_complex() else start
        total = torch.full_like(p, value, memory_format=torch.preserve_format)
        return {"step": self._scalar(0.0, p, group), "sum": total}

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], *lists: list[Any]
    ) -> tuple[bool, bool]:
        if group["fused"] and getattr(self, "_need_device_dtype_check_for_fused", True):
            for p in group["params"]:
                if p.grad is not None:
                    _device_dtype_check_for_fused(p, cuda_unsupported=not ADAGRAD_FUSES_ON_CUDA)
                    self._need_device_dtype_check_for_fused = False
                    break
        has_sparse, has_complex = super()._init_group(group, params, grads, *lists)
        if group["fused"] and (has_sparse or has_complex):
            raise RuntimeError("`fused` does not support sparse grad or complex param")
        if has_sparse and group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        return has_sparse, has_complex

    def _rule(self, s: Setting) -> Rule:
        k, group, lr, owned = s.k, s.group, s.lr, s.owned
        lr_decay, eps = group["lr_decay"], group["eps"]

        def numbers(t: Any) -> tuple[Any]:
            return (-lr / (1 + (t - 1) * lr_decay),)

        def denominator(g: Any, total: Any) -> Any:
            k.addcmul_(total, g, g, value=1)
            std = k.keep(k.sqrt(total))
            k.add_(std, eps)
            return std

        def update_each(p: Tensor, g: Tensor, total: Tensor, rate: Any) -> None:
            if g.is_sparse:
                sparse_update(p, g, total, rate, eps)
            else:
                k.addcdiv_(p, g, denominator(g, total), value=rate)

        def update_lists(p: Any, g: Any, total: Any, rates: Any) -> None:
            # torch's foreach path rounds g times the rate before dividing; its for loop does not.
            std = denominator(g, total)
            if owned:
                k.mul_(g, rates)
            k.addcdiv_(p, g if owned else k.mul(g, rates), std)

        if k.is_list and s.live:  # compiled: step counts, and so the rates, are tensors
            return Rule(update_lists, lambda steps: ([rate for t in steps for rate in numbers(t)],))
        return Rule(update_lists if k.is_list else update_each, numbers)

    def _fused(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> bool:
        if group["differentiable"]:
            raise RuntimeError("adagrad with fused=True does not support differentiable=True")
        lists = [columns["sum"], columns["step"]]
        run_fused(torch._fused_adagrad_, self, group, params, grads, lists, lr_decay=group["lr_decay"])
        return True


def sparse_update(p: Tensor, g: Tensor, total: Tensor, rate: Any, eps: float) -> None:
    """One step of the elements that a sparse gradient contains."""
    g = g.coalesce()  # the update is not linear, so no element may come twice
    values = g._values()
    total.add_(sparse_like(g, values.pow(2)))
    std = total.sparse_mask(g)._values().sqrt_().add_(eps)
    p.add_(sparse_like(g, values / std), alpha=rate)


adagrad = function_of(Adagrad)
