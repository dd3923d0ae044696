"""Averaged weights (SWA, EMA), the learning rate schedule of SWA, and batch-norm statistics for averaged weights."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from optimstate.describe import few
from optimstate.errors import StateMismatchError
from optimstate.optim.lr_scheduler.base import LRScheduler, per_group
from optimstate.optim.lr_scheduler.functions import check_strategy, with_strategy

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

Device = int | str | torch.device
AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]
T = TypeVar("T")


def _check_decay(decay: float) -> None:
    if decay < 0.0 or decay > 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """The exponential moving average, in place, for lists of tensors of one device and dtype.

    Args:
        decay: The weight of the average so far, from 0 to 1.

    Raises:
        ValueError: `decay` is out of range.
    """
    _check_decay(decay)

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:  # noqa: ARG001
        if _is_continuous(averaged[0]):
            torch._foreach_lerp_(list(averaged), list(current), 1 - decay)
        else:
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(mean * decay + value * (1 - decay))

    return update


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """The equal average of all values so far, in place, for lists of tensors of one device and dtype."""
    average = get_swa_avg_fn()

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        if _is_continuous(averaged[0]):
            weight: Any = 1 / (num_averaged + 1)
            torch._foreach_lerp_(list(averaged), list(current), weight)
        else:
            # Integers: torch's operations on lists refuse fractions for them.
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(average(mean, value, num_averaged))

    return update


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """The exponential moving average of one tensor.

    Args:
        decay: The weight of the average so far, from 0 to 1.

    Raises:
        ValueError: `decay` is out of range.
    """
    _check_decay(decay)

    @torch.no_grad()
    def update(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:  # noqa: ARG001
        return decay * averaged + (1 - decay) * current

    return update


def get_swa_avg_fn() -> AvgFn:
    """The equal average of all values of one tensor so far."""

    @torch.no_grad()
    def update(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        return averaged + (current - averaged) / (num_averaged + 1)

    return update


class AveragedModel(torch.optim.swa_utils.AveragedModel):
    """A copy of a model whose weights are an average of the model's: SWA (arXiv:1803.05407) or EMA.

    Args:
        model: The model. It is copied at once; the first `update_parameters()` takes its weights as the average.
        device: The device of the average; None for that of the model.
        avg_fn: Maps (average, current value, updates so far) to the new average, tensor by tensor. Without it and
            `multi_avg_fn`, all values have the same weight.
        multi_avg_fn: The same for lists of tensors of one device and dtype; changes the averages in place.
        use_buffers: Average the buffers too, instead of copying them.

    Raises:
        AssertionError: Both functions are given.
    """

    n_averaged: Tensor  # shape (), int64: updates so far

    def __init__(
        self,
        model: Module,
        device: Device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        Module.__init__(self)  # not super(): torch's class is a base only for isinstance
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("Only one of avg_fn and multi_avg_fn should be provided")
        self.module = deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: Module) -> None:
        """Add the model's current weights to the average; call it after the optimizer's `step()`.

        Args:
            model: A model with the parameters and buffers of the averaged one, in the same order.

        Raises:
            StateMismatchError: The models differ in the number of parameters or buffers.
        """
        averaged, current = _tensors(self.module, self.use_buffers), _tensors(model, self.use_buffers)
        buffers = [] if self.use_buffers else list(zip(self.module.buffers(), model.buffers(), strict=False))
        _check_same_tensors(self.module, model)
        pairs = [(mean, value.to(mean.device)) for mean, value in zip(averaged, current, strict=True)]
        if self.n_averaged == 0:
            for mean, value in pairs:
                mean.copy_(value)
        elif self.avg_fn is not None:
            for mean, value in pairs:
                mean.copy_(self.avg_fn(mean, value, self.n_averaged.to(mean.device)))
        else:
            self._average_lists(pairs)
        for buffer, value in buffers:
            buffer.detach().copy_(value.detach().to(buffer.device))
        self.n_averaged += 1

    def _average_lists(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for mean, value in pairs:
            means, values = lists.setdefault((mean.device, mean.dtype), ([], []))
            means.append(mean)
            values.append(value)
        for (device, _), (means, values) in lists.items():
            count = self.n_averaged.to(device)
            if self.multi_avg_fn is not None:
                self.multi_avg_fn(means, values, count)
            elif device.type in _get_foreach_kernels_supported_devices():
                get_swa_multi_avg_fn()(means, values, count)
            else:
                average = get_swa_avg_fn()
                for mean, value in zip(means, values, strict=True):
                    mean.copy_(average(mean, value, count))


def _tensors(model: Module, with_buffers: bool) -> list[Tensor]:
    buffers = model.buffers() if with_buffers else ()
    return [tensor.detach() for tensor in itertools.chain(model.parameters(), buffers)]


def _check_same_tensors(averaged: Module, model: Module) -> None:
    for kind in ("parameters", "buffers"):
        mine, theirs = ([name for name, _ in getattr(m, f"named_{kind}")()] for m in (averaged, model))
        if len(mine) != len(theirs):
            raise StateMismatchError(
                f"AveragedModel averages {len(mine)} {kind}, the model has {len(theirs)} (only in one of them: "
                f"{few(sorted(set(mine) ^ set(theirs)), 5)}).",
                hint="Average a model of the same structure, or start a new AveragedModel from this one.",
            )


class SWALR(LRScheduler, torch.optim.swa_utils.SWALR):
    """Changes the learning rate of each param group to a fixed value, `swa_lr`, and keeps it there (arXiv:1803.05407).

    `swa_lr` is kept in the optimizer's param groups, not in the scheduler's state: to resume, load both states.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        swa_lr: The value, for all or a list with one for each param group.
        anneal_epochs: Epochs until `swa_lr` is reached.
        anneal_strategy: `cos` or `linear`.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        ValueError: The strategy is unknown, `anneal_epochs` is negative or not an integer, or the list has the wrong
            length.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        swa_lrs = per_group("swa_lr", optimizer, swa_lr)
        check_strategy(anneal_strategy)
        if anneal_epochs < 0 or not isinstance(anneal_epochs, int):
            raise ValueError(f"anneal_epochs must be equal or greater than 0, got {anneal_epochs}")
        for value, group in zip(swa_lrs, optimizer.param_groups, strict=True):
            group["swa_lr"] = value
        self._set_anneal_func(anneal_strategy)
        self.anneal_epochs = anneal_epochs
        super().__init__(optimizer, last_epoch)

    def anneal_func(self, t: float) -> float:
        """The weight of `swa_lr` in the learning rate after the fraction `t` of the epochs."""
        return self._linear_anneal(t) if self._anneal_strategy == "linear" else self._cosine_anneal(t)

    def _set_anneal_func(self, anneal_strategy: Literal["cos", "linear"]) -> None:
        self._anneal_strategy = anneal_strategy

    @staticmethod
    def _linear_anneal(t: float) -> float:
        return t

    @staticmethod
    def _cosine_anneal(t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2

    @staticmethod
    def _get_initial_lr(lr: Any, swa_lr: Any, alpha: float) -> Any:
        """The learning rate from which `lr` was made by mixing in `swa_lr` with the weight `alpha`."""
        return swa_lr if alpha == 1 else (lr - alpha * swa_lr) / (1 - alpha)

    def _group_options(self) -> set[str]:
        return {"swa_lr"}

    def _updated(self, state: dict[str, Any]) -> dict[str, Any]:
        return with_strategy(state, "_anneal_strategy", self._cosine_anneal, self._linear_anneal)

    def _next_lrs(self) -> list[float | Tensor]:
        step = self._step_count - 1
        if self.anneal_epochs == 0:
            step = max(1, step)
        before, now = (
            self.anneal_func(max(0, min(1, taken / max(1, self.anneal_epochs)))) for taken in (step - 1, step)
        )
        return [
            group["swa_lr"] * now + self._get_initial_lr(group["lr"], group["swa_lr"], before) * (1 - now)
            for group in self.optimizer.param_groups
        ]


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: Module, device: Device | None = None, *, progress: bool = False) -> None:
    """Recompute the running statistics of every batch norm of a model in one pass over the data.

    Args:
        loader: Batches: tensors, or lists and tuples whose first element is the tensor.
        model: The model; called on every batch, in training mode.
        device: The device to which batches are moved first; None leaves them where they are.
        progress: Show a progress line on stderr, if it is a terminal.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    for norm in norms:
        norm.reset_running_stats()
    try:
        model.train()
        for norm in norms:
            norm.momentum = None
        for batch in _show_progress(loader) if progress else loader:
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(inputs if device is None else inputs.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)


def _show_progress(batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches, counting them on one line of a terminal."""
    stream = sys.stderr
    if not stream.isatty():
        yield from batches
        return
    try:
        total = f"/{len(batches)}"  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader over an iterable of unknown length
        total = ""
    try:
        for count, batch in enumerate(batches, 1):
            yield batch
            stream.write(f"\rupdate_bn: {count}{total} batches")
            stream.flush()
    finally:
        stream.write("\n")
