"""Schedulers that go up and down: triangular cycles, one cycle, a cosine with restarts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from optimstate.errors import StateMismatchError
from optimstate.optim.lr_scheduler.base import (
    LRScheduler,
    StateDict,
    check_optimizer,
    per_group,
    set_group_value,
    warn,
)
from optimstate.optim.lr_scheduler.decay import cosine_lr
from optimstate.optim.lr_scheduler.functions import (
    check_strategy,
    export_function,
    import_function,
    not_saved,
    with_strategy,
)
from optimstate.state.schedules.cycles import phase_at, phases

# The `scale_mode` of each mode of CyclicLR.
_SCALE_MODES = {"triangular": "cycle", "triangular2": "cycle", "exp_range": "iterations"}


class _MomentumCycle(LRScheduler):
    """A scheduler that can also change the momentum, or the first of the betas."""

    cycle_momentum: bool
    use_beta1: bool

    def _start_momentum(self, base_momentum: Any, max_momentum: Any, last_epoch: int) -> tuple[list[Any], list[Any]]:
        """Check that there is a momentum to change; in a new run, set it to its maximum.

        Returns:
            The base and maximum momentum of each param group.

        Raises:
            ValueError: The optimizer has neither momentum nor betas, or a list has a wrong length.
        """
        optimizer = self.optimizer
        if "momentum" not in optimizer.defaults and "betas" not in optimizer.defaults:
            raise ValueError("optimizer must support momentum or beta1 with `cycle_momentum` option enabled")
        self.use_beta1 = "betas" in optimizer.defaults
        base_momentums = per_group("base_momentum", optimizer, base_momentum)
        max_momentums = per_group("max_momentum", optimizer, max_momentum)
        if last_epoch == -1:
            for group, lowest, highest in zip(optimizer.param_groups, base_momentums, max_momentums, strict=True):
                self._set_momentum(group, highest)
                group["max_momentum"] = highest
                group["base_momentum"] = lowest
        return base_momentums, max_momentums

    def _set_momentum(self, group: dict[str, Any], value: float) -> None:
        if self.use_beta1:
            group["betas"] = (value, *group["betas"][1:])
        else:
            group["momentum"] = value


class CyclicLR(_MomentumCycle, lr_scheduler.CyclicLR):
    """The learning rate rises and falls between two bounds, and the momentum does the opposite (arXiv:1506.01186).

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        base_lr: The lower bound, for all or a list with one for each param group; replaces the groups' `lr`.
        max_lr: The upper bound, for all or for each param group; `scale_fn` scales its distance to the lower one.
        step_size_up: Steps from the lower to the upper bound.
        step_size_down: Steps back; None for the same number.
        mode: `triangular` keeps the height of the cycle, `triangular2` halves it each cycle, `exp_range` scales it by
            `gamma ** step`. Ignored when `scale_fn` is given.
        gamma: For `exp_range`.
        scale_fn: A function from the cycle (1, 2, ...) or the step to the factor of the height. The state keeps the
            attributes of a callable object and nothing of a plain function.
        scale_mode: The argument of `scale_fn`: `cycle` or `iterations`.
        cycle_momentum: Also change `momentum`, or `betas[0]`.
        base_momentum: The lower bound of the momentum, for all or for each param group.
        max_momentum: The upper bound of the momentum, for all or for each param group.
        last_epoch: Index of the last step seen; -1 starts anew.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: The mode is unknown, a list has the wrong length, or there is no momentum to cycle.
    """

    _per_group: ClassVar[tuple[str, ...]] = ("base_lrs", "_last_lr", "max_lrs", "base_momentums", "max_momentums")

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | list[float],
        max_lr: float | list[float],
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Literal["cycle", "iterations"] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.8,
        max_momentum: float | list[float] = 0.9,
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        if mode not in _SCALE_MODES and scale_fn is None:
            raise ValueError("mode is invalid and scale_fn is None")
        self.optimizer = optimizer
        base_lrs = per_group("base_lr", optimizer, base_lr)
        if last_epoch == -1:
            for lr, group in zip(base_lrs, optimizer.param_groups, strict=True):
                set_group_value(group, "lr", lr)
        self.max_lrs = per_group("max_lr", optimizer, max_lr)
        up = float(step_size_up)
        self.total_size: Any = up + (up if step_size_down is None else float(step_size_down))
        self.step_ratio = up / self.total_size
        self.mode = mode
        self.gamma = gamma
        self._scale_fn_custom = scale_fn
        self.scale_mode: Any = scale_mode
        self._init_scale_fn()
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self.base_momentums, self.max_momentums = self._start_momentum(base_momentum, max_momentum, last_epoch)
        super().__init__(optimizer, last_epoch)
        self.base_lrs = base_lrs

    def scale_fn(self, x: float) -> float:
        """The factor of the cycle's height; `x` is the cycle (1, 2, ...) or the step, depending on `scale_mode`."""
        return float(self._scale_fn_ref(x)) if self._scale_fn_custom is None else self._scale_fn_custom(x)

    def _init_scale_fn(self) -> None:
        if self._scale_fn_custom is None:
            self.scale_mode = _SCALE_MODES[self.mode]

    @property
    def _scale_fn_ref(self) -> Callable[[float], float]:  # type: ignore[override]
        """The built-in scale function of the mode. In torch an attribute, which states and copies must leave out."""
        if self.mode == "exp_range":
            return partial(self._exp_range_scale_fn, self.gamma)
        return self._triangular_scale_fn if self.mode == "triangular" else self._triangular2_scale_fn

    @staticmethod
    def _triangular_scale_fn(x: float) -> float:  # noqa: ARG004
        return 1.0

    @staticmethod
    def _triangular2_scale_fn(x: float) -> float:
        return float(1 / 2.0 ** (x - 1))

    @staticmethod
    def _exp_range_scale_fn(gamma: float, x: float) -> float:
        return float(gamma**x)

    def _next_lrs(self) -> list[float | Tensor]:
        cycle = math.floor(1 + self.last_epoch / self.total_size)
        x = 1.0 + self.last_epoch / self.total_size - cycle
        height = x / self.step_ratio if x <= self.step_ratio else (x - 1) / (self.step_ratio - 1)
        scaled_by = cycle if self.scale_mode == "cycle" else self.last_epoch

        def between(start: Any, end: Any) -> Any:
            return start + (end - start) * height * self.scale_fn(scaled_by)

        lrs = [between(base, highest) for base, highest in zip(self.base_lrs, self.max_lrs, strict=True)]
        if self.cycle_momentum:
            bounds = zip(self.base_momentums, self.max_momentums, strict=True)
            momentums = [between(highest, base) for base, highest in bounds]
            for group, momentum in zip(self.optimizer.param_groups, momentums, strict=True):
                self._set_momentum(group, momentum)
        return lrs

    def _functions(self) -> list[Callable[..., Any] | None]:
        return [self._scale_fn_custom]

    def _export(self) -> StateDict:
        state = super()._export()
        function = state.pop("_scale_fn_custom")
        state["_scale_fn_custom"] = None if function is None else export_function(function)
        if function is not None and (lost := not_saved(function)):
            self._warn_once(
                f"CyclicLR: scale_fn is not saved with the state ({lost}). To resume, construct the scheduler with the "
                "same scale_fn, or use a callable object: its attributes are saved."
            )
        return state

    def _import(self, state: StateDict) -> None:
        saved = state.pop("_scale_fn_custom", None)
        mode, scale_mode = state.get("mode", self.mode), state.get("scale_mode", self.scale_mode)
        function = self._scale_fn_custom
        # Each built-in mode has its scale_mode: a state with any other pair was written with a scale_fn.
        needed = saved is not None or _SCALE_MODES.get(mode) != scale_mode
        if function is None and needed:
            raise StateMismatchError(
                f"CyclicLR: the state (mode {mode!r}, scale_mode {scale_mode!r}) was saved with a scale_fn, "
                "and this scheduler has none.",
                hint="Construct the scheduler with the scale_fn of the saved run, then load the state.",
            )
        super()._import(state)
        if function is not None and (lost := import_function(function, saved)):
            warn(
                f"CyclicLR: scale_fn is not restored by the state ({lost}). "
                "Make sure this scheduler was constructed with the scale_fn of the saved run."
            )


class OneCycleLR(_MomentumCycle, lr_scheduler.OneCycleLR):
    """The learning rate rises once and falls far below its start, the momentum does the opposite (arXiv:1708.07120).

    The bounds are kept in the optimizer's param groups (`initial_lr`, `max_lr`, `min_lr`, `max_momentum`,
    `base_momentum`), not in the scheduler's state: to resume, load both states.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        max_lr: The top of the cycle, for all or a list with one for each param group.
        total_steps: Steps of the whole cycle; None if `epochs` and `steps_per_epoch` are given.
        epochs: Epochs of the whole cycle.
        steps_per_epoch: Steps in an epoch.
        pct_start: The fraction of the cycle in which the learning rate rises, a float from 0 to 1.
        anneal_strategy: `cos` or `linear`.
        cycle_momentum: Also change `momentum`, or `betas[0]`.
        base_momentum: The lower bound of the momentum, for all or for each param group.
        max_momentum: The upper bound of the momentum, for all or for each param group.
        div_factor: `max_lr` divided by the initial learning rate.
        final_div_factor: The initial learning rate divided by the last one.
        three_phase: Fall to the initial learning rate as fast as it rose, then to the last one in a third phase.
        last_epoch: Index of the last step seen; -1 starts anew.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: An argument is out of range, the length is not given, or there is no momentum to cycle. From
            `step()`: the cycle is over.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.total_steps = _cycle_length(total_steps, epochs, steps_per_epoch)
        if pct_start < 0 or pct_start > 1 or not isinstance(pct_start, float):
            raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}")
        self._schedule_phases: Any = phases(self.total_steps, pct_start, three_phase)
        check_strategy(anneal_strategy)
        self._anneal_func_type = anneal_strategy
        max_lrs = per_group("max_lr", optimizer, max_lr)
        if last_epoch == -1:
            for highest, group in zip(max_lrs, optimizer.param_groups, strict=True):
                group["initial_lr"] = highest / div_factor
                group["max_lr"] = highest
                group["min_lr"] = group["initial_lr"] / final_div_factor
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self._start_momentum(base_momentum, max_momentum, last_epoch)
        super().__init__(optimizer, last_epoch)

    def _next_lrs(self) -> list[float | Tensor]:
        if self.last_epoch > self.total_steps:
            raise ValueError(
                f"Tried to step {self.last_epoch} times. The specified number of total steps is {self.total_steps}"
            )
        phase, done = phase_at(self._schedule_phases, self.last_epoch)
        lrs = []
        for group in self.optimizer.param_groups:
            lrs.append(self._anneal_func(group[phase["start_lr"]], group[phase["end_lr"]], done))
            if self.cycle_momentum:
                self._set_momentum(
                    group, self._anneal_func(group[phase["start_momentum"]], group[phase["end_momentum"]], done)
                )
        return lrs

    def _group_options(self) -> set[str]:
        lrs = {phase[key] for phase in self._schedule_phases for key in ("start_lr", "end_lr")}
        momenta = {phase[key] for phase in self._schedule_phases for key in ("start_momentum", "end_momentum")}
        return lrs | momenta if self.cycle_momentum else lrs

    def _anneal_func(self, start: Any, end: Any, done: float) -> Any:
        anneal = self._annealing_cos if self._anneal_func_type == "cos" else self._annealing_linear
        return anneal(start, end, done)

    @staticmethod
    def _annealing_cos(start: Any, end: Any, pct: float) -> Any:
        return end + (start - end) / 2.0 * (math.cos(math.pi * pct) + 1)

    @staticmethod
    def _annealing_linear(start: Any, end: Any, pct: float) -> Any:
        return (end - start) * pct + start

    def _updated(self, state: StateDict) -> StateDict:
        return with_strategy(state, "_anneal_func_type", self._annealing_cos, self._annealing_linear)


def _cycle_length(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if total_steps is None and (epochs is None or steps_per_epoch is None):
        raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch)")
    if total_steps is not None:
        given = {"total_steps": total_steps}
    else:
        assert epochs is not None
        assert steps_per_epoch is not None
        given = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    for name, value in given.items():
        if value <= 0 or not isinstance(value, int):
            raise ValueError(f"Expected positive integer {name}, but got {value}")
    return math.prod(given.values())


class CosineAnnealingWarmRestarts(LRScheduler, lr_scheduler.CosineAnnealingWarmRestarts):
    """SGDR: half a cosine from the initial learning rate to `eta_min`, repeated (arXiv:1608.03983).

    `step()` may be given a fraction of an epoch, `epoch + batch / batches`.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        T_0: Epochs of the first period.
        T_mult: The length of each period divided by that of the one before.
        eta_min: The lowest learning rate.
        last_epoch: Index of the last epoch seen; -1 starts anew.

    Raises:
        ValueError: `T_0` or `T_mult` is not a positive integer, or `eta_min` is not a number.
    """

    def __init__(
        self, optimizer: Optimizer, T_0: int, T_mult: int = 1, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if T_0 <= 0 or not isinstance(T_0, int):
            raise ValueError(f"Expected positive integer T_0, but got {T_0}")
        if T_mult < 1 or not isinstance(T_mult, int):
            raise ValueError(f"Expected integer T_mult >= 1, but got {T_mult}")
        if not isinstance(eta_min, (float, int)):
            raise ValueError(f"Expected float or int eta_min, but got {eta_min} of type {type(eta_min)}")
        self.T_0 = T_0
        self.T_i = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        self.T_cur: Any = last_epoch  # an int, or a float after `step` was given a fraction
        super().__init__(optimizer, last_epoch)

    def _next_lrs(self) -> list[float | Tensor]:
        return [cosine_lr(base_lr, self.eta_min, self.T_cur, self.T_i) for base_lr in self.base_lrs]

    def step(self, epoch: float | None = None) -> None:
        """Go to the next epoch, or to the given one.

        Args:
            epoch: A whole epoch or a fraction of one, at least 0.

        Raises:
            ValueError: `epoch` is negative.
        """
        if epoch is None and self.last_epoch < 0:
            epoch = 0
        if epoch is None:
            epoch = self.last_epoch + 1
            self.T_cur += 1
            if self.T_cur >= self.T_i:
                self.T_cur %= self.T_i
                self.T_i *= self.T_mult
        elif epoch < 0:
            raise ValueError(f"Expected non-negative epoch, but got {epoch}")
        else:
            self._place(epoch)
        self._update_lr(math.floor(epoch))

    def _place(self, epoch: float) -> None:
        """Find the period that `epoch` is in."""
        if epoch < self.T_0:
            self.T_i = self.T_0
            self.T_cur = epoch
        elif self.T_mult == 1:
            self.T_cur = epoch % self.T_0
        else:
            periods = int(math.log(epoch / self.T_0 * (self.T_mult - 1) + 1, self.T_mult))
            self.T_cur = epoch - self.T_0 * (self.T_mult**periods - 1) / (self.T_mult - 1)
            self.T_i = self.T_0 * self.T_mult**periods
