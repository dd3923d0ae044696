"""Schedulers that follow one curve from the initial learning rate: by factors, by functions, by a cosine.

torch has two forms of some curves, a recursive one for `step()` and a closed one for the deprecated `step(epoch)`. They
round differently, and resumed and chained runs depend on the exact floats, so both are here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from optimstate.optim.lr_scheduler.base import LRScheduler, StateDict, group_values, warn
from optimstate.optim.lr_scheduler.functions import by_group, export_function, import_function, not_saved

LambdaFunction = Callable[[int], float]

HELD = float("nan")  # returned instead of a factor: rates stay unchanged. Compared by identity, so no factor equals it.


class _LambdaBase(LRScheduler):
    """One user function for each param group."""

    _per_group: ClassVar[tuple[str, ...]] = ("base_lrs", "_last_lr", "lr_lambdas")

    def __init__(
        self, optimizer: Optimizer, lr_lambda: LambdaFunction | list[LambdaFunction], last_epoch: int = -1
    ) -> None:
        self.optimizer = optimizer
        groups = len(optimizer.param_groups)
        if isinstance(lr_lambda, (list, tuple)):
            if len(lr_lambda) != groups:
                raise ValueError(f"Expected {groups} lr_lambdas, but got {len(lr_lambda)}")
            self.lr_lambdas: list[LambdaFunction] = list(lr_lambda)
        else:
            self.lr_lambdas = [lr_lambda] * groups
        for function in self.lr_lambdas:
            if not callable(function):
                raise TypeError(f"lr_lambda should be a function, but got {type(function).__name__}")
        super().__init__(optimizer, last_epoch)

    def _functions(self) -> list[Callable[..., Any] | None]:
        return list(self.lr_lambdas)

    def _export(self) -> StateDict:
        state = super()._export()
        del state["lr_lambdas"]
        state["lr_lambdas"] = [export_function(function) for function in self.lr_lambdas]
        if lost := by_group([not_saved(function) for function in self.lr_lambdas]):
            self._warn_once(
                f"{type(self).__name__}: lr_lambda is not saved with the state ({lost}). To resume, construct the "
                "scheduler with the same lr_lambda, or use a callable object: its attributes are saved."
            )
        return state

    def _import(self, state: StateDict) -> None:
        saved = state.pop("lr_lambdas", None) or [None] * len(self.lr_lambdas)
        super()._import(state)
        if lost := by_group([import_function(*pair) for pair in zip(self.lr_lambdas, saved, strict=True)]):
            warn(
                f"{type(self).__name__}: lr_lambda is not restored by the state ({lost}). "
                "Make sure this scheduler was constructed with the lr_lambda of the saved run."
            )


class LambdaLR(_LambdaBase, lr_scheduler.LambdaLR):
    """The initial learning rate times a function of the epoch: `lr(t) = base_lr * lr_lambda(t)`.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        lr_lambda: A function from the epoch (int) to a factor (float), or a list of them, one for each param group. The
            state keeps the attributes of callable objects and nothing of plain functions.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        ValueError: The list has another length than the param groups.
        TypeError: An entry cannot be called.
    """

    def _next_lrs(self) -> list[float | Tensor]:
        return [base * factor(self.last_epoch) for factor, base in zip(self.lr_lambdas, self.base_lrs, strict=True)]


class MultiplicativeLR(_LambdaBase, lr_scheduler.MultiplicativeLR):
    """The last learning rate times a function of the epoch: `lr(t) = lr(t - 1) * lr_lambda(t)`.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        lr_lambda: A function from the epoch (int) to a factor (float), or a list of them, one for each param group. The
            state keeps the attributes of callable objects and nothing of plain functions.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        ValueError: The list has another length than the param groups.
        TypeError: An entry cannot be called.
    """

    def _next_lrs(self) -> list[float | Tensor]:
        if self._is_initial:
            return group_values(self.optimizer, "lr")
        groups = self.optimizer.param_groups
        return [group["lr"] * factor(self.last_epoch) for factor, group in zip(self.lr_lambdas, groups, strict=True)]


class _FactorLR(LRScheduler):
    """A curve that multiplies the learning rates of all groups by the same factor."""

    def _factor(self) -> float:
        """The factor of the last learning rate at `last_epoch`, or `HELD`."""
        raise NotImplementedError

    def _closed_factor(self) -> float:
        """The factor of the initial learning rate at `last_epoch`."""
        raise NotImplementedError

    def _next_lrs(self) -> list[float | Tensor]:
        factor = self._factor()
        if factor is HELD:
            return group_values(self.optimizer, "lr")
        return [group["lr"] * factor for group in self.optimizer.param_groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        factor = self._closed_factor()
        return [base_lr * factor for base_lr in self.base_lrs]


class StepLR(_FactorLR, lr_scheduler.StepLR):
    """The learning rate is multiplied by `gamma` every `step_size` epochs.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        step_size: Epochs between two changes.
        gamma: The factor.
        last_epoch: Index of the last epoch seen; -1 starts anew.
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor(self) -> float:
        return HELD if self.last_epoch == 0 or self.last_epoch % self.step_size != 0 else self.gamma

    def _closed_factor(self) -> float:
        return self.gamma ** (self.last_epoch // self.step_size)


class MultiStepLR(_FactorLR, lr_scheduler.MultiStepLR):
    """The learning rate is multiplied by `gamma` at each milestone; a milestone given twice counts twice.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        milestones: Epochs at which the learning rate changes.
        gamma: The factor.
        last_epoch: Index of the last epoch seen; -1 starts anew.
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Iterable[int], gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.milestones = Counter(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor(self) -> float:
        falls = self.milestones.get(self.last_epoch)
        return HELD if falls is None else self.gamma**falls

    def _closed_factor(self) -> float:
        return self.gamma ** bisect_right(sorted(self.milestones.elements()), self.last_epoch)


class ConstantLR(_FactorLR, lr_scheduler.ConstantLR):
    """The learning rate is held at `factor` times its initial value for `total_iters` epochs.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        factor: From 0 to 1.
        total_iters: The epoch from which the initial learning rate is used.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        ValueError: `factor` is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, factor: float = 1.0 / 3, total_iters: int = 5, last_epoch: int = -1
    ) -> None:
        if factor > 1.0 or factor < 0:
            raise ValueError("Constant multiplicative factor expected to be between 0 and 1.")
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _factor(self) -> float:
        if self.last_epoch == 0:
            return self.factor
        return HELD if self.last_epoch != self.total_iters else 1.0 / self.factor

    def _closed_factor(self) -> float:
        return self.factor + (self.last_epoch >= self.total_iters) * (1 - self.factor)


class LinearLR(_FactorLR, lr_scheduler.LinearLR):
    """The factor changes linearly from `start_factor` to `end_factor` in `total_iters` epochs, then stays.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        start_factor: Above 0, up to 1.
        end_factor: From 0 to 1.
        total_iters: Epochs until `end_factor` is reached.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        ValueError: A factor is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if start_factor > 1.0 or start_factor <= 0:
            raise ValueError("Starting multiplicative factor expected to be greater than 0 and less or equal to 1.")
        if end_factor > 1.0 or end_factor < 0:
            raise ValueError("Ending multiplicative factor expected to be between 0 and 1.")
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _factor(self) -> float:
        if self.last_epoch == 0:
            return self.start_factor
        if self._is_initial or self.last_epoch > self.total_iters:
            return HELD
        rise = self.end_factor - self.start_factor
        return 1.0 + rise / (self.total_iters * self.start_factor + (self.last_epoch - 1) * rise)

    def _closed_factor(self) -> float:
        rise = self.end_factor - self.start_factor
        return self.start_factor + rise * min(self.total_iters, self.last_epoch) / self.total_iters


class ExponentialLR(_FactorLR, lr_scheduler.ExponentialLR):
    """The learning rate is multiplied by `gamma` every epoch.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        gamma: The factor.
        last_epoch: Index of the last epoch seen; -1 starts anew.
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor(self) -> float:
        return HELD if self._is_initial else self.gamma

    def _closed_factor(self) -> float:
        return self.gamma**self.last_epoch


class PolynomialLR(_FactorLR, lr_scheduler.PolynomialLR):
    """The learning rate falls to zero: `lr(t) = base_lr * (1 - t / total_iters) ** power`.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        total_iters: Epochs until zero.
        power: The exponent; 1 is a straight line.
        last_epoch: Index of the last epoch seen; -1 starts anew.
    """

    def __init__(self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1) -> None:
        self.total_iters = total_iters
        self.power = power
        super().__init__(optimizer, last_epoch)

    def _factor(self) -> float:
        if self._is_initial or self.last_epoch > self.total_iters:
            return HELD
        left = 1.0 - self.last_epoch / self.total_iters
        left_before = 1.0 - (self.last_epoch - 1) / self.total_iters
        return float((left / left_before) ** self.power)

    def _closed_factor(self) -> float:
        return float((1.0 - min(self.total_iters, self.last_epoch) / self.total_iters) ** self.power)


def cosine_lr(base_lr: Any, eta_min: float, epoch: float, period: float) -> Any:
    """The cosine from `base_lr` at epoch 0 down to `eta_min` at epoch `period` (eq. 5 of arXiv:1608.03983)."""
    return eta_min + (base_lr - eta_min) * (1 + math.cos(math.pi * epoch / period)) / 2


class CosineAnnealingLR(LRScheduler, lr_scheduler.CosineAnnealingLR):
    """The learning rate follows half a cosine from its initial value to `eta_min` in `T_max` epochs, then back up.

    `step()` scales the last learning rate, so that schedulers can be chained; `cosine_lr` is the closed form. Without
    the restarts of its source, SGDR (Loshchilov & Hutter, arXiv:1608.03983).

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        T_max: Epochs until `eta_min`.
        eta_min: The lowest learning rate.
        last_epoch: Index of the last epoch seen; -1 starts anew.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def _next_lrs(self) -> list[float | Tensor]:
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        if self._is_initial:
            return group_values(self.optimizer, "lr")
        if self._step_count == 1 and self.last_epoch > 0:
            return self._get_closed_form_lr()
        if (self.last_epoch - 1 - self.T_max) % (2 * self.T_max) == 0:
            # The step after the lowest point, where the ratio below would divide by zero.
            turn = 1 - math.cos(math.pi / self.T_max)
            return [lr + (base - self.eta_min) * turn / 2 for base, lr in zip(self.base_lrs, lrs, strict=True)]
        here = 1 + math.cos(math.pi * self.last_epoch / self.T_max)
        before = 1 + math.cos(math.pi * (self.last_epoch - 1) / self.T_max)
        return [here / before * (lr - self.eta_min) + self.eta_min for lr in lrs]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return [cosine_lr(base_lr, self.eta_min, self.last_epoch, self.T_max) for base_lr in self.base_lrs]
