"""The scheduler that follows a metric."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar, Literal, SupportsFloat

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING

from optimstate.optim.lr_scheduler.base import (
    LRScheduler,
    StateDict,
    attach,
    check_optimizer,
    group_values,
    set_group_value,
)


class ReduceLROnPlateau(LRScheduler, lr_scheduler.ReduceLROnPlateau):
    """The learning rate falls by `factor` when a metric has not improved for more than `patience` epochs.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        mode: Whether the metric should fall (`min`) or rise (`max`).
        factor: The factor of each fall, below 1.
        patience: Epochs without improvement before a fall.
        threshold: The smallest change that counts as an improvement.
        threshold_mode: Whether `threshold` is relative to the best value so far (`rel`) or absolute (`abs`).
        cooldown: Epochs after a fall that are not counted.
        min_lr: The lowest learning rate, for all or a list with one for each param group.
        eps: Smaller changes of the learning rate are not made.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: A mode is unknown, `factor` is 1 or more, or `min_lr` has the wrong length.
    """

    _per_group: ClassVar[tuple[str, ...]] = ("_last_lr", "min_lrs")

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = 1e-8,
    ) -> None:
        if factor >= 1.0:
            raise ValueError("Factor should be < 1.0.")
        self.factor = factor
        check_optimizer(optimizer)
        self.optimizer = optimizer
        groups = len(optimizer.param_groups)
        if isinstance(min_lr, (list, tuple)):
            if len(min_lr) != groups:
                raise ValueError(f"expected {groups} min_lrs, got {len(min_lr)}")
            self.default_min_lr: float | None = None
            self.min_lrs = list(min_lr)
        else:
            self.default_min_lr = min_lr
            self.min_lrs = [min_lr] * groups
        self.patience = patience
        self.cooldown = cooldown
        self.eps = eps
        self.last_epoch = 0
        self._last_lr = group_values(optimizer, "lr")
        self._init_is_better(mode, threshold, threshold_mode)
        self._reset()
        attach(self)

    def _init_is_better(
        self, mode: Literal["min", "max"], threshold: float, threshold_mode: Literal["rel", "abs"]
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode {mode} is unknown!")
        if threshold_mode not in ("rel", "abs"):
            raise ValueError(f"threshold mode {threshold_mode} is unknown!")
        self.mode_worse = math.inf if mode == "min" else -math.inf
        self.mode = mode
        self.threshold = threshold
        self.threshold_mode = threshold_mode

    def _reset(self) -> None:
        self.best = self.mode_worse
        self.cooldown_counter = 0
        self.num_bad_epochs = 0

    @property
    def in_cooldown(self) -> bool:
        """Whether the last fall was so recent that epochs are not counted yet."""
        return self.cooldown_counter > 0

    def _is_better(self, metric: float, best: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        margin = sign * self.threshold
        bar = best * (1.0 + margin) if self.threshold_mode == "rel" else best + margin
        return bool(metric > bar if self.mode == "max" else metric < bar)

    is_better = _is_better  # the name until torch 2.8

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Record an epoch's metric, and reduce the learning rates after `patience` epochs without improvement.

        Args:
            metrics: The metric; anything that `float()` takes.
            epoch: The number of the epoch. Deprecated.
        """
        metric = float(metrics)
        if epoch is None:
            epoch = self.last_epoch + 1
        else:
            warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
        self.last_epoch = epoch

        if self._is_better(metric, self.best):
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce_lr(epoch)
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        self._last_lr = group_values(self.optimizer, "lr")

    def _reduce_lr(self, epoch: int) -> None:  # noqa: ARG002 (subclasses of torch's class override it with this form)
        groups = self.optimizer.param_groups
        if len(groups) != len(self.min_lrs):
            if self.default_min_lr is None:
                raise RuntimeError(
                    f"The number of param groups in the `optimizer` ({len(groups)}) differs from when "
                    f"`ReduceLROnPlateau` was initialized ({len(self.min_lrs)}), usually due to a new param group "
                    "being added to the optimizer. Please modify the `min_lrs` field to match the length of the "
                    "`optimizer` param groups."
                )
            self.min_lrs = [self.default_min_lr] * len(groups)
        for group, lowest in zip(groups, self.min_lrs, strict=True):
            old = float(group["lr"])
            new = max(old * self.factor, lowest)
            if old - new > self.eps:
                set_group_value(group, "lr", new)

    def _check_groups(self, state: StateDict) -> None:
        # A single min_lr fits any number of groups, and the learning rates themselves are in the optimizer.
        if state.get("default_min_lr") is None:
            super()._check_groups(state)

    def _import(self, state: StateDict) -> None:
        super()._import(state)
        self._init_is_better(self.mode, self.threshold, self.threshold_mode)
        groups = len(self.optimizer.param_groups)
        if len(self.min_lrs) != groups and self.default_min_lr is not None:
            self.min_lrs = [self.default_min_lr] * groups
            self._last_lr = group_values(self.optimizer, "lr")
