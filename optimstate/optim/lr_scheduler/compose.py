"""Schedulers made of schedulers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer, lr_scheduler

from optimstate.errors import StateMismatchError
from optimstate.optim.lr_scheduler.base import LRScheduler, StateDict, attach, group_values, set_group_value
from optimstate.optim.lr_scheduler.plateau import ReduceLROnPlateau

AnyScheduler = torch.optim.lr_scheduler.LRScheduler


class _Composed(LRScheduler):
    """Several schedulers of one optimizer with one `step()`; their states are nested in its state."""

    _per_group: ClassVar[tuple[str, ...]] = ("_last_lr",)
    _schedulers: Any  # a list of schedulers; torch annotates it differently in its two classes

    def _adopt(self, schedulers: Sequence[AnyScheduler], optimizer: Optimizer) -> None:
        """Check the schedulers and keep them as nested ones."""
        name = type(self).__name__
        for index, scheduler in enumerate(schedulers):
            if not hasattr(scheduler, "optimizer"):
                raise TypeError(f"{name} at index {index} should have `optimizer` as its attribute.")
            if isinstance(scheduler, (ReduceLROnPlateau, torch.optim.lr_scheduler.ReduceLROnPlateau)):
                raise ValueError(
                    f"{name} does not support `ReduceLROnPlateau` scheduler as it requires additional kwargs to be "
                    f"specified when calling `step`, but got one at index {index} in the given schedulers sequence."
                )
            if scheduler.optimizer != optimizer:
                raise ValueError(
                    f"{name} expects all schedulers to belong to the same optimizer, but got scheduler "
                    f"{type(scheduler).__name__} at index {index} has {scheduler.optimizer}, which is different from "
                    f"{type(optimizer).__name__}."
                )
        self._schedulers = list(schedulers)
        for scheduler in schedulers:
            if isinstance(scheduler, LRScheduler):
                scheduler._runtime.nested = True

    def _export(self) -> StateDict:
        state = super()._export()
        del state["_schedulers"]
        state["_schedulers"] = [scheduler.state_dict() for scheduler in self._schedulers]
        return state

    def _import(self, state: StateDict) -> None:
        saved = state.pop("_schedulers", ())
        if len(saved) != len(self._schedulers):
            names = ", ".join(type(scheduler).__name__ for scheduler in self._schedulers)
            raise StateMismatchError(
                f"{type(self).__name__}: the state holds {len(saved)} nested schedulers, this one has "
                f"{len(self._schedulers)} ({names}).",
                hint="Construct the scheduler with the schedulers of the saved run, in the same order.",
            )
        super()._import(state)
        for scheduler, nested in zip(self._schedulers, saved, strict=True):
            scheduler.load_state_dict(nested)


class ChainedScheduler(_Composed, lr_scheduler.ChainedScheduler):
    """Steps several schedulers one after the other, each from the learning rate that the one before has set.

    Args:
        schedulers: Schedulers of one optimizer, none of which follows a metric.
        optimizer: Their optimizer; None for the optimizer of the first.

    Raises:
        TypeError: One of them has no optimizer.
        ValueError: There are none, or one of them does not fit.
    """

    def __init__(self, schedulers: Sequence[AnyScheduler], optimizer: Optimizer | None = None) -> None:
        if len(schedulers) < 1:
            raise ValueError(
                f"{type(self).__name__} expects at least one scheduler to be chained, but got no scheduler."
            )
        optimizer = optimizer or schedulers[0].optimizer
        self._adopt(schedulers, optimizer)
        self.optimizer = optimizer
        self._last_lr = group_values(optimizer, "lr")
        attach(self)

    def step(self) -> None:  # type: ignore[override]
        """Step every scheduler, in order."""
        for scheduler in self._schedulers:
            scheduler.step()
        self._last_lr = group_values(self.optimizer, "lr")


class SequentialLR(_Composed, lr_scheduler.SequentialLR):
    """Runs one scheduler after the other, each starting at its epoch 0 at a milestone.

    Args:
        optimizer: The optimizer of all of them.
        schedulers: Schedulers, none of which follows a metric.
        milestones: The epochs, in order, at which the next scheduler takes over: one fewer than schedulers.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        TypeError: One of them has no optimizer.
        ValueError: There are none, one of them does not fit, or the number of milestones does not.
    """

    def __init__(
        self, optimizer: Optimizer, schedulers: list[AnyScheduler], milestones: list[int], last_epoch: int = -1
    ) -> None:
        if len(schedulers) < 1:
            raise ValueError(f"{type(self).__name__} expects at least one scheduler, but got no scheduler.")
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(
                "Sequential Schedulers expects number of schedulers provided to be one more than the number of "
                f"milestone points, but got number of schedulers {len(schedulers)} and the number of milestones to be "
                f"equal to {len(milestones)}"
            )
        self._adopt(schedulers, optimizer)
        self._milestones = milestones
        self.last_epoch = last_epoch + 1
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            set_group_value(group, "lr", group["initial_lr"])
        self.recursive_undo()
        first = self._schedulers[bisect_right(milestones, 0)]
        first._initial_step()
        self._last_lr = first.get_last_lr()
        attach(self)

    def recursive_undo(self, sched: AnyScheduler | None = None) -> None:
        """Undo the step that each scheduler made when it was constructed.

        Args:
            sched: The scheduler to start from; None for this one.
        """
        scheduler = self if sched is None else sched
        if hasattr(scheduler, "_schedulers"):
            for nested in scheduler._schedulers:
                self.recursive_undo(nested)
        elif hasattr(scheduler, "last_epoch"):
            scheduler.last_epoch -= 1

    def step(self) -> None:  # type: ignore[override]
        """Step the scheduler of the current epoch."""
        self.last_epoch += 1
        index = bisect_right(self._milestones, self.last_epoch)
        scheduler = self._schedulers[index]
        if index > 0 and self._milestones[index - 1] == self.last_epoch:
            scheduler._update_lr(0)
        else:
            scheduler.step()
        self._last_lr = scheduler.get_last_lr()
