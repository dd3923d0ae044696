"""Other algorithms through torch's fused Adam kernel, for the CPU.

Adam's kernel reads and writes each tensor once, where a rule makes several passes. With suitable arguments it computes
other algorithms too: with `beta1 = 0` the first moment is the gradient itself, so the gradient can be passed for it,
and a huge step count turns bias corrections off. The kernel rounds the elements after the last full vector in another
way, so it gets the full vectors and the rule updates the rest.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from optimstate.optim._blocks import fits
from optimstate.optim._ops import one
from optimstate.optim._step import Columns, Group, RuleOptimizer, Setting, repeats, rows_of, shrinking

__all__ = ["ENDLESS", "AdamKernelOptimizer", "adam_kernel", "bodies"]

LANES = 64  # a multiple of any CPU's vector of floats
SMALLEST = 1 << 14  # elements; for smaller tensors the kernel is no faster
ENDLESS = 1e18  # steps; any beta below 1 to this power is 0 or very nearly 0


class AdamKernelOptimizer(RuleOptimizer):
    """An optimizer that with ``fused=True`` updates its dense float32 (or float64) CPU parameters by Adam's kernel.

    The resulting state is bit for bit that of the rule; parameters agree within 1e-6 relative to the largest, because
    the kernel rounds in another order. The rule updates what the kernel cannot take (other dtypes and devices,
    gradients with other strides than their parameter, options that its formula lacks), and small tensors.
    """

    _kernel_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)

    def _kernel_suits(self, group: Group) -> bool:
        """Whether the kernel's formula covers these options."""
        raise NotImplementedError

    def _through_kernel(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> None:
        """One step of parameters that suit the kernel."""
        raise NotImplementedError

    def _fused(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> bool:
        if group["capturable"] or group["differentiable"] or not self._kernel_suits(group) or repeats(params):
            return False
        names = [name for name in self._columns if columns[name]]
        slots = [columns[name] for name in names if name not in self._scalars]
        chosen: dict[bool, list[int]] = {True: [], False: []}
        for index, (p, grad, *state) in enumerate(zip(params, grads, *slots, strict=True)):
            dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
            plain = p.is_cpu and p.dtype in self._kernel_dtypes and dense and p.numel() >= SMALLEST
            chosen[plain and all(fits(t, p) for t in (grad, *state))].append(index)
        if not chosen[True]:
            return False
        for suits, indices in chosen.items():
            if not indices:
                continue
            some_params, some_grads, some = rows_of(params, grads, columns, indices)
            if suits:
                self._through_kernel(group, some_params, some_grads, some)
            else:
                self._run_each(group, some_params, some_grads, some, any(p.is_complex() for p in some_params))
        return True

    def _run_tails(
        self, group: Group, params: list[Tensor], grads: list[Tensor], slots: list[Any], numbers: Any
    ) -> None:
        """Run the rule on the elements after the last full vector, with the same numbers for all tensors."""
        rule = self._rule(Setting.of(one, group))
        with_tail = [i for i, p in enumerate(params) if p.numel() % LANES]
        columns = [[tail(column[i]) for i in with_tail] if column else repeat(None) for column in slots]
        p, g = [tail(params[i]) for i in with_tail], [tail(grads[i]) for i in with_tail]
        repeated = list(map(repeat, numbers))
        self._run_column(rule.update, group, p, g, columns, repeated, shrinking(group), has_complex=False)


def bodies(tensors: list[Tensor]) -> list[Tensor]:
    """The full vectors of dense tensors, each as a 1-D view."""
    return [t.as_strided((t.numel() // LANES * LANES,), (1,)) for t in tensors]


def tail(t: Tensor) -> Tensor:
    """The elements after the last full vector, as a 1-D view."""
    rest = t.numel() % LANES
    return t.as_strided((rest,), (1,), t.storage_offset() + t.numel() - rest)


def adam_kernel(
    p: list[Tensor],
    grad: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """Call torch's fused Adam kernel once, for parameters that are all at the same step."""
    kernel: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        p,
        grad,
        exp_avg,
        exp_avg_sq,
        [],
        [torch.tensor(step, dtype=torch.float32)] * len(p),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=maximize,
    )
