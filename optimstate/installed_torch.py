"""The installed torch, and what depends on its release.

Whatever needs torch takes it from here, so that one place says that it is missing, too old, or newer than any that was
tested. What releases do differently is found by asking the torch that is there, not its number; each entry says which
release brought it and why it matters here. docs/versions.md has what follows from it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from optimstate.errors import MissingTorchError, UnsupportedTorchError, UntestedTorchWarning

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it
        import torch
except ImportError as error:
    if (error.name or "torch") != "torch":
        raise  # it is there and lacks something itself
    raise MissingTorchError(
        "this needs torch, which is not installed",
        hint="pip install 'optimstate[torch]', or any torch from 2.6 on. Without it work inspect, scan, plan, name, "
        "renaming, converting between containers, diff --headers and verify --no-numbers.",
    ) from None

__all__ = [
    "HAS_MUON",
    "OptimizerBase",
    "SchedulerBase",
    "TorchMuon",
    "adagrad_starts_late",
    "asgd_checks",
    "dtype_of",
    "fused_sgd_takes_half_precision",
    "has_dtype",
    "lbfgs_maximizes",
    "muon_adjustments",
    "muon_divides_in_place",
    "require_named_parameters",
    "swap_in_optimizer_params_and_state",
    "torch",
]

NEWEST_TESTED = (2, 15)


def release() -> tuple[int, int]:
    """The installed release: its first two numbers."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(found[1]), int(found[2])) if found else NEWEST_TESTED


@cache
def require_named_parameters() -> None:
    """Refuse a torch whose optimizers take no names, and say once that a newer one has not been tried.

    2.6: optimizers take `(name, parameter)` pairs and keep `param_names`, on which everything here stands.

    Raises:
        UnsupportedTorchError: It is older.

    Warns:
        UntestedTorchWarning: It is newer than any that the tests have run with.
    """
    try:
        named = torch.optim.SGD([("p", torch.zeros(1))], lr=0.1).param_groups[0].get("param_names") == ["p"]
    except TypeError:
        named = False
    if not named:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no optimizers with named parameters",
            hint="Install torch 2.6 or newer. The commands that read and rewrite files do not need it.",
        )
    if release() > NEWEST_TESTED:
        newest = ".".join(map(str, NEWEST_TESTED))
        told = f"torch {torch.__version__} is newer than {newest}, the newest that optimstate was tested with"
        warnings.warn(told, UntestedTorchWarning, stacklevel=2)


def has_dtype(name: str) -> bool:
    """Whether the installed torch knows a dtype: 2.7 brought `float8_e8m0fnu`, 2.8 `float4_e2m1fn_x2`."""
    return isinstance(getattr(torch, name, None), torch.dtype)


def dtype_of(name: str) -> Any:
    """The `torch.dtype` of a name.

    Raises:
        UnsupportedTorchError: The installed torch is older than the dtype.
    """
    if not has_dtype(name):
        raise UnsupportedTorchError(
            f"torch {torch.__version__} has no dtype {name}, which this tensor has",
            hint="Install a newer torch. Renaming, copying and converting between files do not need it.",
        )
    return getattr(torch, name)


def accepts(function: Any, argument: str) -> bool:
    """Whether a function or a class of the installed torch has an argument."""
    return argument in inspect.signature(function).parameters


# --- what torch.optim's classes do ------------------------------------------------------------------------------------

# 2.13; before, there is nothing to swap.
swap_in_optimizer_params_and_state: Any = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)

HAS_MUON = hasattr(torch.optim, "Muon")  # 2.9

if TYPE_CHECKING:
    from torch.optim import Muon as TorchMuon
    from torch.optim import Optimizer as OptimizerBase
    from torch.optim.lr_scheduler import LRScheduler as SchedulerBase
else:
    # Where there is none, ours is an instance of no more than an optimizer.
    TorchMuon = getattr(torch.optim, "Muon", torch.optim.Optimizer)

    OptimizerBase = torch.optim.Optimizer
    if not hasattr(OptimizerBase, "_accelerator_graph_capture_health_check"):
        # Before 2.12 it is CUDA's alone, under another name.
        class OptimizerBase(torch.optim.Optimizer):
            """torch's, with its check under today's name."""

            def _accelerator_graph_capture_health_check(self):
                self._cuda_graph_capture_health_check()

    SchedulerBase = torch.optim.lr_scheduler.LRScheduler
    if not hasattr(SchedulerBase, "_update_lr"):
        # Before 2.9 a step cannot be made without its warnings; before 2.7 it does not say whether it is the first.
        class SchedulerBase(torch.optim.lr_scheduler.LRScheduler):
            """torch's, with a step in two parts and a mark on the first."""

            if not hasattr(torch.optim.lr_scheduler, "_initial_mode"):
                _is_initial = False

                def _initial_step(self):
                    self._is_initial = True
                    super()._initial_step()
                    del self._is_initial

            def _update_lr(self, epoch=None):
                self._get_lr_called_within_step = True
                self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
                closed = getattr(self, "_get_closed_form_lr", None)
                values = closed() if epoch is not None and closed else self.get_lr()
                self._get_lr_called_within_step = False
                for group, lr in zip(self.optimizer.param_groups, values, strict=True):
                    if isinstance(group["lr"], torch.Tensor):
                        group["lr"].fill_(lr)
                    else:
                        group["lr"] = lr
                lrs = [group["lr"] for group in self.optimizer.param_groups]
                self._last_lr = [lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in lrs]


def lbfgs_maximizes() -> bool:
    """2.14: LBFGS has the option `maximize`, and its group the key."""
    return accepts(torch.optim.LBFGS, "maximize")


@cache
def muon_adjustments() -> tuple[str | None, ...]:
    """The values of Muon's `adjust_lr_fn`; 2.14 brought `spectral_unclamped`."""
    known = (None, "original", "match_rms_adamw")
    newer = "spectral_unclamped"
    if not HAS_MUON:
        return known
    try:
        TorchMuon([torch.zeros(1, 1)], adjust_lr_fn=newer)
    except ValueError:
        return known
    return (*known, newer)


@cache
def muon_divides_in_place() -> bool:
    """Before 2.15, Muon without nesterov divides a bfloat16 momentum itself by its norm, not a copy."""
    if not HAS_MUON:
        return False
    p = torch.ones(4, 4, dtype=torch.bfloat16)  # a momentum of norm 2
    p.grad = torch.ones_like(p)
    optimizer = TorchMuon([p], momentum=0.5, nesterov=False)
    optimizer.step()  # type: ignore[no-untyped-call]
    return not bool((optimizer.state[p]["momentum_buffer"] == 0.5).all())


@cache
def asgd_checks() -> bool:
    """2.15: ASGD refuses a negative `lambd` or `alpha`."""
    try:
        torch.optim.ASGD([torch.zeros(1)], lambd=-1.0)
    except ValueError:
        return True
    return False


@cache
def fused_sgd_takes_half_precision() -> bool:
    """2.14: before, the CPU kernel skips whole vectors of bfloat16 and float16 and leaves their momentum as it was."""
    p, g, buffer = (torch.full((64,), value, dtype=torch.bfloat16) for value in (1.0, 0.5, 0.0))
    kernel: Any = torch._fused_sgd_
    options = {"weight_decay": 0.0, "momentum": 0.5, "lr": 0.5, "dampening": 0.0, "nesterov": False, "maximize": False}
    kernel([p], [g], [buffer], is_first_step=False, grad_scale=None, found_inf=None, **options)
    return bool((p == 0.75).all() and (buffer == 0.5).all())


@cache
def adagrad_starts_late() -> bool:
    """2.10: Adagrad makes the state that a parameter lacks when it steps; before, only in its constructor."""
    p = torch.zeros(1)
    p.grad = torch.ones(1)
    optimizer = torch.optim.Adagrad([p])
    optimizer.state.clear()
    try:
        optimizer.step()
    except KeyError:
        return False
    return True
