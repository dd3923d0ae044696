"""AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimstate.optim._surface import function_of
from optimstate.optim.adam import Adam
from optimstate.optim.optimizer import ParamsT

__all__ = ["AdamW", "adamw"]


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam whose weight decay shrinks the parameter directly and leaves both running means alone.

    .. math::
        \theta \leftarrow (1 - \gamma \lambda)\, \theta

    before Adam's update with the plain gradient. Source: Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization", https://arxiv.org/abs/1711.05101.

    State of a parameter: as for :class:`~optimstate.optim.Adam`.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: Learning rate :math:`\gamma \ge 0`; a 1-element tensor too, for foreach only with ``capturable``.
        betas: Decay of the running means of gradients and of their squares, each in [0, 1).
        eps: Added to the denominator; at least 0.
        weight_decay: :math:`\lambda \ge 0`.
        amsgrad: Divide by the largest mean square so far.
        maximize: Ascend instead of descend.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        capturable: Whether the step may be captured in an accelerator graph.
        differentiable: Whether autograd records the step.
        fused: Whether to use torch's fused kernel.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: Options exclude each other, or a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of Adam may say otherwise
            group["decoupled_weight_decay"] = True


adamw = function_of(AdamW, decoupled_weight_decay=True)
