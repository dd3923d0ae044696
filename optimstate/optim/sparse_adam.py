"""Adam for sparse gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from optimstate.optim._load import Slots
from optimstate.optim.optimizer import (
    GroupOptimizer,
    ParamsT,
    check_betas,
    check_lr,
    require,
    sparse_like,
    to_scalar,
    zeros,
)

__all__ = ["SparseAdam"]


class SparseAdam(GroupOptimizer, torch.optim.SparseAdam):
    r"""Adam for sparse gradients: only the elements that a gradient contains are updated, in parameter and state.

    For those elements, at the parameter's step :math:`t`:

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m) \qquad v \leftarrow v + (1 - \beta_2)(g^2 - v) \\
        \theta &\leftarrow \theta - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m}{\sqrt{v} +
        \epsilon}

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", https://arxiv.org/abs/1412.6980.

    State of a parameter:
        step: An int, the number of steps in which the parameter had a gradient, even an empty one.
        exp_avg: :math:`m`, dense, like the parameter.
        exp_avg_sq: :math:`v`, dense, like the parameter.

    Args:
        params: Dense real tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma > 0`, or a 1-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon > 0`.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is sparse or complex.
        RuntimeError: A gradient is dense.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        check_lr(lr)
        require(bool(lr > 0.0), f"Invalid learning rate: {lr}")
        require(eps > 0.0, f"Invalid epsilon value: {eps}")
        check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})
        every = [(i, j, p) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])]
        wrong = [[i, j] for i, j, p in every if p.is_sparse]
        require(not wrong, f"Sparse params at indices {wrong}: SparseAdam requires dense parameter tensors")
        wrong = [[i, j] for i, j, p in every if p.is_complex()]
        require(not wrong, f"Complex params at indices {wrong}: SparseAdam does not support complex parameters")

    @override
    def _slot_shapes(self, p: Tensor, group: dict[str, Any]) -> Slots:
        return {"step": None, "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}, {}

    def _update_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not all(p.grad.is_sparse for p in params):
            raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=zeros(p), exp_avg_sq=zeros(p))
            state["step"] += 1
            update(p, p.grad, state, group)


def update(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One step of one parameter, whose step count already includes it."""
    grad = (-grad if group.get("maximize", False) else grad).coalesce()  # so that no element comes twice
    (beta1, beta2), step = group["betas"], state["step"]
    g = grad._values()
    if g.numel() == 0:
        return
    # Adding a sparse tensor to a dense one changes only the elements that it has, so the means change by differences.
    mean = state["exp_avg"].sparse_mask(grad)._values()
    change = g.sub(mean).mul_(1 - beta1)
    state["exp_avg"].add_(sparse_like(grad, change))
    square = state["exp_avg_sq"].sparse_mask(grad)._values()
    square_change = g.pow(2).sub_(square).mul_(1 - beta2)
    state["exp_avg_sq"].add_(sparse_like(grad, square_change))
    numer = change.add_(mean)
    denom = square_change.add_(square).sqrt_().add_(group["eps"])
    step_size = to_scalar(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    p.add_(sparse_like(grad, -step_size * numer.div_(denom)))


def lists_step(_: Any, group: dict[str, Any], lists: dict[str, list[Any]]) -> None:
    """One step on lists of parameters, gradients and slots; step counts are ints that already include this step."""
    for p, grad, exp_avg, exp_avg_sq, step in zip(*lists.values(), strict=True):
        update(p, grad, {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, group)
