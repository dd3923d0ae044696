"""The base of every optimizer: torch's machinery, with a loader that knows what it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["Optimizer", "ParamsT", "register_optimizer_step_post_hook", "register_optimizer_step_pre_hook"]


Options = Mapping[str, Any]


class Optimizer(torch.optim.Optimizer):
    """Base class of all optimizers."""

    _scalars: ClassVar[tuple[str, ...]] = ()
    _later_options: ClassVar[Options] = {}  # what older checkpoints' groups lack

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._later_options.items():
                group.setdefault(name, value)
            for p in group["params"]:
                p_state = self.state.get(p)
                if p_state:
                    self._tensor_scalars(p, p_state, group)

    def _tensor_scalars(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Turn scalar slots that older checkpoints hold as numbers into tensors."""
        for name in self._scalars:
            if not torch.is_tensor(state[name]):
                value = float(state[name]) if name == "step" else state[name]
                state[name] = self._scalar(value, p, group)

    def _scalar(self, value: float, p: Tensor, group: dict[str, Any]) -> Tensor:
        """A scalar slot: on the parameter's device where kernels read it there, else on the CPU, whose launches are
        free.""" fused = group.get("fused") and "fused" in self._later_options
        on_device = fused or group.get("capturable")
        return torch.tensor(
            value, dtype=torch.float32 if fused else scalar_dtype(), device=p.device if on_device else None
        )


def zeros(p: Tensor) -> Tensor:
    """Zeros with the parameter's shape, dtype, device and strides."""
    return torch.zeros_like(p, memory_format=torch.preserve_format)


def scalar_dtype() -> torch.dtype:
    """The dtype of step counts: float64 only where that is the default dtype."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def to_scalar(x: Any) -> Any:
    """A one-element tensor as a 0-d one; anything else as it is."""
    return x.squeeze() if isinstance(x, Tensor) and x.dim() != 0 else x


def to_number(x: Any) -> Any:
    """A tensor hyperparameter as a number, except while compiling."""
    return x.item() if isinstance(x, Tensor) and not torch.compiler.is_compiling() else x


def require(condition: bool, message: str) -> None:
    """Raise ValueError with torch's message unless a hyperparameter is in range."""
    if not condition:
        raise ValueError(message)


def check_lr(lr: Any, message: str = "Invalid learning rate: ") -> None:
    """A learning rate must be one number, not negative (and not NaN)."""
    require(not isinstance(lr, Tensor) or lr.numel() == 1, "Tensor lr must be 1-element")
    require(bool(lr >= 0.0), f"{message}{lr}")


def check_betas(betas: Any) -> None:
    """Both coefficients must be in [0, 1)."""
    for index in (0, 1):
        require(bool(0.0 <= betas[index] < 1.0), f"Invalid beta parameter at index {index}: {betas[index]}")
