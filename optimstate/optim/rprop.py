"""Resilient backpropagation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimstate.optim._step import Group, Rule, RuleOptimizer, Setting, Traits
from optimstate.optim._surface import function_of
from optimstate.optim.optimizer import ParamsT, check_lr, require, to_scalar, zeros

__all__ = ["Rprop", "rprop"]


class Rprop(RuleOptimizer, torch.optim.Rprop):
    r"""Resilient backpropagation: each element has its own step size and follows only the gradient's sign.

    The step size of an element is multiplied by :math:`\eta^+` where the gradient kept its sign since the last step,
    and by :math:`\eta^-` where the sign changed; there the element also pauses, as if its gradient were 0:

    .. math::
        s \leftarrow \mathrm{clip}\left(s \cdot
            \begin{cases} \eta^+ & g g' > 0 \\ \eta^- & g g' < 0 \\ 1 & \text{else} \end{cases}\right) \qquad
        g' \leftarrow \begin{cases} 0 & g g' < 0 \\ g & \text{else} \end{cases} \qquad
        \theta \leftarrow \theta - s\, \mathrm{sign}(g')

    Source: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
    https://doi.org/10.1109/ICNN.1993.298623.

    State of a parameter:
        step: 0-d float32 (float64 where that is the default dtype); on the CPU unless ``capturable``.
        prev: The last gradient :math:`g'`, like the parameter.
        step_size: :math:`s`, like the gradient; starts as ``lr`` everywhere.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        lr: First step size, at least 0, or a 1-element tensor.
        etas: :math:`\eta^-, \eta^+` with :math:`0 < \eta^- < 1 < \eta^+`.
        step_sizes: Smallest and largest step size.
        capturable: Whether the step may be captured in an accelerator graph.
        foreach: Whether to update lists of tensors at a time; None lets the device decide.
        maximize: Ascend instead of descend.
        differentiable: Whether autograd records the step.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: A gradient is sparse.
    """

    _columns = ("prev", "step_size", "step")
    _scalars = ("step",)
    _traits = Traits(sparse_error="Rprop does not support sparse gradients", capturable_on_xla=(True, True))

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_lr(lr)
        require(0.0 < etas[0] < 1.0 < etas[1], f"Invalid eta values: {etas[0]}, {etas[1]}")
        super().__init__(
            params,
            {"lr": lr, "etas": etas, "step_sizes": step_sizes},
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        lr = group["lr"]
        # The two parts of a complex number are independent, so both need a step size.
        start = complex(lr, lr) if p.dtype.is_complex else to_scalar(lr)
        assert p.grad is not None
        return {"step": self._scalar(0.0, p, group), "prev": zeros(p), "step_size": torch.full_like(p.grad, start)}

    def _rule(self, s: Setting) -> Rule:
        k, group = s.k, s.group
        shrink, grow = group["etas"]
        smallest, largest = group["step_sizes"]

        def update(p: Any, g: Any, prev: Any, step_size: Any) -> None:
            sign = k.sign(k.mul(g, k.keep(prev)))
            # The factor for signs -1, 0 and 1 without comparisons, which are slow: max(grow * sign, clip(sign + 1)).
            factor = k.add(sign, 1)
            k.map(lambda f: f.clamp_(shrink, 1), factor)
            k.mul_(sign, grow)
            k.maximum_(factor, sign)
            k.mul_(step_size, factor)
            k.map(lambda s: s.clamp_(smallest, largest), step_size)
            k.map(lambda prev, g, f: prev.copy_(torch.where(f.eq(shrink), 0, g)), prev, g, factor)
            k.addcmul_(p, k.sign(prev), step_size, value=-1)

        return Rule(update)


rprop = function_of(Rprop)
