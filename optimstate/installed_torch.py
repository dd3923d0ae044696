"""The installed torch, and everything that depends on its release.

All modules import torch from here, so that one place reports that it is missing, too old, or newer than any tested
release. Differences between releases are found by inspecting torch, not by its version number. Each entry names the
release of the change and why it matters here; docs/versions.md describes the consequences.
"""

from __future__ import annotations

import inspect
import re
import warnings
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any

from optimstate.errors import MissingTorchError, UnsupportedTorchError, UntestedTorchWarning

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # NumPy is not needed here
        import torch
except ImportError as error:
    if (error.name or "torch") != "torch":
        raise  # torch is installed, but one of its own imports fails
    raise MissingTorchError(
        "this needs torch, which is not installed",
        hint="pip install 'optimstate[torch]', or any torch from 2.6 on. Without it work inspect, scan, plan, name, "
        "renaming, converting between containers, diff --headers and verify --no-numbers.",
    ) from None

__all__ = [
    "ADAGRAD_FUSES_ON_CUDA",
    "ASGD_CHECKS",
    "HAS_MUON",
    "LBFGS_LIMITS_LINE_SEARCH",
    "LBFGS_MAXIMIZES",
    "MUON_ADJUSTMENTS",
    "MUON_DIVIDES_IN_PLACE",
    "OptimizerBase",
    "SchedulerBase",
    "TorchMuon",
    "adagrad_starts_late",
    "dtype_of",
    "fused_sgd_takes_half_precision",
    "has_dtype",
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
    """Refuse a torch without named parameters, and warn once about an untested release.

    Since 2.6, optimizers take `(name, parameter)` pairs and keep `param_names`, which everything here relies on.

    Raises:
        UnsupportedTorchError: torch is older.

    Warns:
        UntestedTorchWarning: torch is newer than any release that was tested.
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
        message = f"torch {torch.__version__} is newer than {newest}, the newest that optimstate was tested with"
        warnings.warn(message, UntestedTorchWarning, stacklevel=2)


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


def mentions(function: Any, word: str) -> bool:
    """Whether the code of a function of the installed torch contains a word as a name, a keyword or a text."""

    def inside(code: CodeType) -> bool:
        for constant in code.co_consts:
            if (isinstance(constant, CodeType) and inside(constant)) or (
                isinstance(constant, str | tuple) and word in constant
            ):
                return True
        return word in code.co_names

    return inside(inspect.unwrap(function).__code__)


# --- what torch.optim's classes do ------------------------------------------------------------------------------------

# 2.13; before, there is nothing to swap.
swap_in_optimizer_params_and_state: Any = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)

HAS_MUON = hasattr(torch.optim, "Muon")  # 2.9

if TYPE_CHECKING:
    from torch.optim import Muon as TorchMuon
    from torch.optim import Optimizer as OptimizerBase
    from torch.optim.lr_scheduler import LRScheduler as SchedulerBase
else:
    # Before 2.9 there is no Muon, and ours is only an instance of Optimizer.
    TorchMuon = getattr(torch.optim, "Muon", torch.optim.Optimizer)

    OptimizerBase = torch.optim.Optimizer
    if not hasattr(OptimizerBase, "_accelerator_graph_capture_health_check"):
        # Before 2.12 the check is for CUDA only and has another name.
        class OptimizerBase(torch.optim.Optimizer):
            """torch's base class, with the current name of its check."""

            def _accelerator_graph_capture_health_check(self):
                self._cuda_graph_capture_health_check()

    SchedulerBase = torch.optim.lr_scheduler.LRScheduler
    if not hasattr(torch.optim.lr_scheduler, "_param_groups_val_list"):
        # Up to 2.9 at least, the last learning rates are the optimizer's own tensors, which later steps change. Before
        # 2.9 a step always issues its warnings; before 2.7 it does not record whether it is the first.
        class SchedulerBase(torch.optim.lr_scheduler.LRScheduler):
            """torch's base class, with `_update_lr` and `_is_initial` as in current releases."""

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


# These read torch's code, and run none of it.

# 2.14: LBFGS has the option `maximize`, in its groups too.
LBFGS_MAXIMIZES = accepts(torch.optim.LBFGS, "maximize")
# 2.10 to 2.12: the evaluations of a line search count for LBFGS's `max_eval`; before, each search may make 25.
LBFGS_LIMITS_LINE_SEARCH = mentions(torch.optim.LBFGS.step, "max_ls")
# 2.10 to 2.12: before, Adagrad's fused kernel exists only for the CPU.
ADAGRAD_FUSES_ON_CUDA = not mentions(torch.optim.Adagrad._init_group, "cuda_unsupported")
# 2.15: ASGD refuses a negative `lambd` or `alpha`.
ASGD_CHECKS = mentions(torch.optim.ASGD.__init__, "Invalid lambd value")
# The values of Muon's `adjust_lr_fn`; 2.14 brought `spectral_unclamped`.
MUON_ADJUSTMENTS: tuple[str | None, ...] = (None, "original", "match_rms_adamw")
MUON_DIVIDES_IN_PLACE = False
if HAS_MUON:
    from torch.optim import _muon

    if mentions(_muon._adjust_lr, "spectral_unclamped"):
        MUON_ADJUSTMENTS = (*MUON_ADJUSTMENTS, "spectral_unclamped")
    # Before 2.15, Muon without nesterov divides a bfloat16 momentum itself by its norm, not a copy.
    MUON_DIVIDES_IN_PLACE = not mentions(_muon._zeropower_via_newtonschulz, "copy")


@cache
def fused_sgd_takes_half_precision() -> bool:
    """2.14: before, the CPU kernel skips whole vectors of bfloat16 and float16 and does not update their momentum."""
    p, g, buffer = (torch.full((64,), value, dtype=torch.bfloat16) for value in (1.0, 0.5, 0.0))
    kernel: Any = torch._fused_sgd_
    options = {"weight_decay": 0.0, "momentum": 0.5, "lr": 0.5, "dampening": 0.0, "nesterov": False, "maximize": False}
    kernel([p], [g], [buffer], is_first_step=False, grad_scale=None, found_inf=None, **options)
    return bool((p == 0.75).all() and (buffer == 0.5).all())


@cache
def adagrad_starts_late() -> bool:
    """2.10 to 2.12: Adagrad creates missing state in its step; before, only in its constructor."""
    p = torch.zeros(1)
    p.grad = torch.ones(1)
    optimizer = torch.optim.Adagrad([p])
    optimizer.state.clear()
    try:
        optimizer.step()
    except KeyError:
        return False
    return True
