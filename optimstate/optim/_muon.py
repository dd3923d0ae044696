"""Muon."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from optimstate.installed_torch import HAS_MUON, MUON_ADJUSTMENTS, MUON_DIVIDES_IN_PLACE, TorchMuon
from optimstate.optim._load import Slots
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import GroupOptimizer, ParamsT, check_lr, require, to_scalar

__all__ = ["Muon", "muon"]


class Muon(GroupOptimizer, TorchMuon):
    r"""Muon: momentum, made nearly orthogonal before each step. For the 2D parameters of hidden layers.

    With momentum :math:`\mu`, and :math:`\mathrm{NS}` a few quintic Newton-Schulz steps in bfloat16 on the normalized
    matrix:

    .. math::
        b &\leftarrow \mu b + (1 - \mu) g \qquad
            u = \mathrm{NS}\left((1 - \mu) g + \mu b \text{ if nesterov, else } b\right) \\
        \theta &\leftarrow (1 - \gamma \lambda)\,\theta - \gamma c\, u

    where :math:`c` for a parameter of A by B is :math:`\sqrt{\max(1, A / B)}` ("original") or
    :math:`0.2 \sqrt{\max(A, B)}` ("match_rms_adamw"). Sources: Jordan et al., "Muon: An optimizer for hidden layers in
    neural networks", https://kellerjordan.github.io/posts/muon/; Liu et al., "Muon is Scalable for LLM Training",
    https://arxiv.org/abs/2502.16982.

    State of a parameter:
        momentum_buffer: :math:`b`, like the gradient.

    Args:
        params: 2D tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        momentum: :math:`\mu \ge 0`.
        nesterov: Look ahead along the momentum.
        ns_coefficients: The three coefficients of a Newton-Schulz step.
        eps: Smallest norm to divide by.
        ns_steps: Number of Newton-Schulz steps, below 100.
        adjust_lr_fn: "original" (the default), "match_rms_adamw" or, where torch has it (2.14), "spectral_unclamped":
            :math:`c = \sqrt{A / B}`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is not 2D.
        RuntimeError: A parameter is complex or a gradient sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        check_lr(lr, "Learning rate should be >= 0 but is: ")
        require(momentum >= 0.0, f"momentum should be >= 0 but is: {momentum}")
        require(weight_decay >= 0.0, f"weight decay should be >= 0 but is: {weight_decay}")
        require(adjust_lr_fn in MUON_ADJUSTMENTS, f"Adjust learning rate function {adjust_lr_fn} is not supported")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                message = f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}"
                require(p.ndim == 2, message)

    @override
    def _slot_shapes(self, p: Tensor, group: dict[str, Any]) -> Slots:
        return {"momentum_buffer": tuple(p.shape)}, {}

    def _update_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor] = []
        self._init_group(group, params, grads, buffers)
        for p, grad, buffer in zip(params, grads, buffers, strict=True):
            update(p, grad, buffer, group)

    def _init_group(
        self, group: MutableMapping[Any, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
    ) -> bool:
        """Fill the lists from the parameters with gradients, and create the state of those that have none."""
        for p, grad in self._real_with_dense_gradients(group):
            params.append(p)
            grads.append(grad)
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
            buffers.append(state["momentum_buffer"])
        return False


def update(p: Tensor, grad: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    """One step of one matrix."""
    require(grad.ndim == 2, "Param gradient must be a 2D matrix")
    momentum, lr = group["momentum"], to_scalar(group["lr"])
    buffer.lerp_(grad, 1 - momentum)
    direction = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
    direction = orthogonalized(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
    rows, columns = p.shape
    ratio = 1.0
    if group["adjust_lr_fn"] in (None, "original"):
        ratio = math.sqrt(max(1, rows / columns))
    elif group["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    elif group["adjust_lr_fn"] == "spectral_unclamped":
        ratio = math.sqrt(rows / columns)
    p.mul_(1 - lr * group["weight_decay"])
    p.add_(direction, alpha=-(lr * ratio))


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximately the closest orthogonal matrix, in bfloat16, with singular values between about 0.5 and 1.5."""
    require(steps < 100, "Number of steps must be less than 100 for computational efficiency")
    require(len(coefficients) == 3, "Coefficients must be a tuple of exactly 3 values")
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(torch.bfloat16, copy=not MUON_DIVIDES_IN_PLACE)
    if tall:
        x = x.T
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, gram, x, beta=a)
    return x.T if tall else x


def lists_step(_: Any, group: dict[str, Any], lists: dict[str, list[Any]]) -> None:
    """One step on lists of parameters, gradients and momentum."""
    for p, grad, buffer in zip(lists["param"], lists["grad"], lists["momentum_buffer"], strict=True):
        update(p, grad, buffer, group)


muon: Any = function_of(Muon, lists_step) if HAS_MUON else None  # its signature is that of torch's function
