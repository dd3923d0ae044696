"""Adafactor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from typing_extensions import override

from optimstate.optim._load import Slots
from optimstate.optim._step import batches, count_steps
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import GroupOptimizer, Options, ParamsT, check_lr, require, to_scalar

__all__ = ["Adafactor", "adafactor"]


class Adafactor(GroupOptimizer, torch.optim.Adafactor):
    r"""Adafactor: Adam's mean square factored into one number per row and one per column of a matrix.

    Steps are relative to the size of the weights. With :math:`\hat\beta_t = t^{\tau}`, for matrices (over the last two
    dimensions) and for vectors:

    .. math::
        R &\leftarrow R + \hat\beta_t (\mathrm{mean}_{col}\, g^2 - R) \qquad
            C \leftarrow C + \hat\beta_t (\mathrm{mean}_{row}\, g^2 - C) \qquad
            V = \frac{R C}{\max(\mathrm{mean}\, R, \epsilon_1)} \\
        V &\leftarrow V + \hat\beta_t (g^2 - V) \text{ for vectors} \\
        U &= g / \sqrt{\max(V, \epsilon_1^2)} \qquad
            \alpha = \max(\epsilon_2, \mathrm{rms}\,\theta) \min(\gamma, 1 / \sqrt t) \\
        \theta &\leftarrow (1 - \gamma \lambda)\,\theta - \alpha\, U / \max(1, \mathrm{rms}(U) / d)

    Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    https://arxiv.org/abs/1804.04235; without its first moment, and with a learning rate.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype), on the CPU.
        row_var: :math:`R`, for two dimensions and more: the gradient's shape with 1 as its last dimension.
        col_var: :math:`C`, for two dimensions and more: the gradient's shape with 1 as its last but one dimension.
        variance: :math:`V`, for fewer dimensions: like the gradient.

    Args:
        params: Real tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Largest relative step :math:`\gamma \ge 0`, or a 1-element tensor.
        beta2_decay: :math:`\tau \le 0`.
        eps: :math:`\epsilon_1 \ge 0` (None for the dtype's own) and :math:`\epsilon_2 \ge 0`.
        d: Clipping threshold, at least 1.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        foreach: Whether to update lists of tensors at a time; None means no.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A parameter is complex or a gradient sparse.
    """

    _scalars = ("step",)
    _later_options: ClassVar[Options] = {"foreach": None}
    _checks_graph_capture = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        check_lr(lr, "Learning rate should be >= 0 but is: ")
        require(beta2_decay <= 0.0, f"beta2_decay should be <= 0 but is: {beta2_decay}")
        require(eps[0] is None or eps[0] >= 0.0, f"epsilon1 should be >= 0 but is: {eps[0]}")
        require(eps[1] >= 0.0, f"epsilon2 should be >= 0 but is: {eps[1]}")
        require(d >= 1.0, f"Clipping threshold d should be >= 1 but is: {d}")
        require(weight_decay >= 0.0, f"weight_decay should be >= 0 but is: {weight_decay}")
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @override
    def _slot_shapes(self, p: Tensor, group: dict[str, Any]) -> Slots:
        slots = factor_shapes(p) if p.dim() > 1 else {"variance": tuple(p.shape)}
        return {"step": None, **slots}, {}

    def _update_group(self, group: dict[str, Any]) -> None:
        lists: list[list[Any]] = [[] for _ in range(6)]
        self._init_group(group, *lists)
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise AssertionError("Grad scaling should occur outside of optimizer.step()")
        self._update(group, lists)

    def _update(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        if lists[0]:
            (self._update_lists if group["foreach"] else self._update_each)(group, lists)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        row_vars: list[Tensor | None],
        col_vars: list[Tensor | None],
        variances: list[Tensor | None],
        steps: list[Tensor],
    ) -> bool:
        """Fill the lists from the parameters with gradients, and create the state of those that have none."""
        for p, grad in self._real_with_dense_gradients(group):
            params.append(p)
            grads.append(grad)
            state = self.state[p]
            if not state:
                state.update(self._new_state(p, group))
            row_vars.append(state.get("row_var"))
            col_vars.append(state.get("col_var"))
            variances.append(state.get("variance"))
            steps.append(state["step"])
        return False

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        grad = p.grad
        assert grad is not None
        step = {"step": self._scalar(0.0, p, group)}
        if grad.dim() <= 1:
            return step | {"variance": torch.zeros_like(grad, memory_format=torch.preserve_format)}
        return step | {name: grad.new_zeros(shape) for name, shape in factor_shapes(grad).items()}

    # Not compiled: every number read from a tensor here would break the compiler's graph.
    @_disable_dynamo
    def _update_each(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        lr, (eps1, eps2) = to_scalar(group["lr"]), group["eps"]
        for p, g, row_var, col_var, variance, step in zip(*lists, strict=True):
            count_steps([step])  # one by one: a tied parameter may be listed twice
            if group["maximize"]:
                g = -g
            if eps1 is None:
                eps1 = torch.finfo(p.dtype).eps  # from here on for the whole group, whatever its other dtypes: as torch
            t = step.item()
            share = t ** group["beta2_decay"]
            alpha = step_size(p, t, lr, eps2)
            if group["weight_decay"] != 0:
                p.mul_(1 - lr * group["weight_decay"])
            if g.dim() > 1:
                row_var.lerp_(torch.norm(g, dim=-1, keepdim=True).square_().div_(g.size(-1)), share)
                col_var.lerp_(torch.norm(g, dim=-2, keepdim=True).square_().div_(g.size(-2)), share)
                estimate = row_var @ col_var
                estimate.div_(row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1))
            else:
                variance.lerp_(g * g, share)
                estimate = variance.clone()
            update = estimate.clamp_(min=eps1 * eps1).rsqrt_().mul_(g)
            p.add_(update, alpha=-alpha / clipping(update, group["d"]))

    # Shares no code with _update_each: torch's foreach path rounds the scaled update before adding it, its for loop
    # does not, and norms and matrix products have no foreach kernels.
    @_disable_dynamo
    def _update_lists(self, group: dict[str, Any], lists: list[list[Any]]) -> None:
        eps1 = group["eps"][0]
        for _, batch in batches(self, lists):
            if eps1 is None:
                eps1 = torch.finfo(batch[0][0].dtype).eps
            for matrix in dict.fromkeys(g.dim() > 1 for g in batch[1]):
                rows = [row for row in zip(*batch, strict=True) if (row[1].dim() > 1) == matrix]
                self._update_alike(group, [list(column) for column in zip(*rows, strict=True)], eps1, matrix)

    def _update_alike(self, group: dict[str, Any], lists: list[list[Any]], eps1: float, matrix: bool) -> None:
        params, grads, row_vars, col_vars, variances, steps = lists
        lr, eps2 = to_scalar(group["lr"]), group["eps"][1]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        count_steps(steps)
        times = [step.item() for step in steps]
        shares = [t ** group["beta2_decay"] for t in times]
        alphas = [step_size(p, t, lr, eps2) for p, t in zip(params, times, strict=True)]
        if group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        if matrix:
            for factors, dim in ((row_vars, -1), (col_vars, -2)):
                means = [torch.norm(g, dim=dim, keepdim=True) for g in grads]
                torch._foreach_mul_(means, means)
                torch._foreach_div_(means, [g.size(dim) for g in grads])
                torch._foreach_lerp_(factors, means, shares)
            estimates = [row_var @ col_var for row_var, col_var in zip(row_vars, col_vars, strict=True)]
            means = [row_var.mean(dim=-2, keepdim=True) for row_var in row_vars]
            torch._foreach_clamp_min_(means, eps1)
            torch._foreach_div_(estimates, means)
        else:
            torch._foreach_lerp_(variances, torch._foreach_mul(grads, grads), shares)
            estimates = [variance.clone() for variance in variances]
        torch._foreach_clamp_min_(estimates, eps1 * eps1)
        torch._foreach_rsqrt_(estimates)
        torch._foreach_mul_(estimates, grads)
        torch._foreach_mul_(
            estimates, [-a / clipping(update, group["d"]) for a, update in zip(alphas, estimates, strict=True)]
        )
        torch._foreach_add_(params, estimates)


def factor_shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes of both factors of the mean square, for a tensor of two dimensions or more."""
    return {"row_var": (*p.shape[:-1], 1), "col_var": (*p.shape[:-2], 1, p.shape[-1])}


def step_size(p: Tensor, t: float, lr: Any, eps2: float) -> Any:
    """The step size, which is relative to the parameter's root mean square."""
    return max(eps2, p.norm(2).item() / (p.numel() ** 0.5)) * min(lr, 1 / (t**0.5))


def clipping(update: Tensor, d: float) -> float:
    """The divisor that clips an update to a root mean square of at most d."""
    size: float = update.norm(2).item() / ((update.numel() ** 0.5) * d)
    return max(1.0, size)


def lists_step(optimizer: Any, group: dict[str, Any], lists: dict[str, list[Any]]) -> None:
    """One step on lists of parameters, gradients and slots."""
    optimizer._update(group, [lists[name] for name in ("param", "grad", "row_var", "col_var", "variance", "step")])


adafactor = function_of(Adafactor, lists_step)
