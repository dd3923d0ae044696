"""The base of every optimizer: torch's machinery, with a loader that knows what it loads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optimstate.installed_torch import OptimizerBase
from optimstate.optim._load import (
    Group,
    Slots,
    check_fit,
    check_groups,
    check_names,
    check_options,
    map_tensors,
    pairs,
)

__all__ = ["Optimizer", "ParamsT", "register_optimizer_step_post_hook", "register_optimizer_step_pre_hook"]


Options = Mapping[str, Any]
PLAIN = (Tensor, torch.nn.Parameter)  # tensors whose memory is what it seems, unlike a subclass's


class Optimizer(OptimizerBase):
    """Base class of all optimizers: torch's, and a `load_state_dict` that knows what it loads.

    A subclass that only defines `step` works as with torch's base.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        defaults: Options of groups that do not state their own.

    Raises:
        TypeError: What is to be optimized is not a tensor.
        ValueError: There is nothing to optimize, a tensor is not a leaf or in two groups, or only some have names.
    """

    _scalars: ClassVar[tuple[str, ...]] = ()  # slots of one element
    _later_options: ClassVar[Options] = {}  # what older checkpoints' groups lack

    def __init__(self, params: ParamsT, defaults: Options) -> None:
        # Not super(): a class is also torch's of its name, of which it is to run nothing.
        torch.optim.Optimizer.__init__(self, params, dict(defaults))

    def _slot_shapes(self, p: Tensor, group: dict[str, Any]) -> Slots:  # noqa: ARG002
        """The slots that a state of this parameter must have and may have, with their shapes."""
        return {}, {}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, by position; nothing is changed if it does not fit.

        State is cast to its parameter's dtype and device, and copied only where it has to be: otherwise it is shared
        with the given dict. Names of parameters that this optimizer already has are kept.

        Args:
            state_dict: A state dict of an optimizer of the same algorithm, ours or torch's.

        Raises:
            StateMismatchError: Groups, options, slots or shapes do not fit. It is a ValueError.

        Warns:
            ParameterNameWarning: A parameter would get the state of one with another name.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        saved, states = state_dict["param_groups"], state_dict["state"]
        check_groups(self.param_groups, saved)
        if type(self)._slot_shapes is not Optimizer._slot_shapes:  # of an algorithm defined elsewhere nothing is known
            check_options(self, self._later_options, saved)
        check_fit(self, saved, states, self._slot_shapes)
        check_names(self.param_groups, saved, states)
        loaded: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        places = {key: (p, old) for key, p, _, old in pairs(self.param_groups, saved)}
        for key, value in states.items():
            if key in places:
                p, old = places[key]
                loaded[p] = self._converted(p, key, old, value)
            else:
                loaded[key] = value  # not a parameter's: kept as it is
        groups = [self._merged(*both) for both in zip(self.param_groups, deepcopy(saved), strict=True)]
        self.__setstate__({"state": loaded, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _converted(self, p: Tensor, key: Any, old: Group, value: Any) -> Any:
        """A parameter's state on its device and in its dtype; for fused kernels, also laid out as the parameter."""
        # torch's policy looks for the parameter in all groups, for each tensor; told of one, it need not.
        place = [{"params": (key,), "fused": old.get("fused", False), "capturable": old.get("capturable", False)}]

        def convert(tensor: Tensor, slot: Any) -> Tensor:
            tensor = self._process_value_according_to_param_policy(p, tensor, key, place, slot)
            return aligned(tensor, p) if old.get("fused") else tensor

        return map_tensors(value, convert)

    def _merged(self, group: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """The loaded options with this optimizer's parameters, and its names if it has any."""
        new["params"] = group["params"]
        if "param_names" in group:
            new["param_names"] = group["param_names"]
        elif len(new.get("param_names", new["params"])) != len(new["params"]):
            del new["param_names"]
        if "fused" in group and "fused" not in self._later_options:
            new.setdefault("fused", group["fused"])  # torch's class has no such option, so its checkpoints cannot say
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)
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
        """A scalar slot: on the parameter's device where kernels read it there, else on the CPU."""
        fused = group.get("fused") and "fused" in self._later_options
        on_device = fused or group.get("capturable")
        return torch.tensor(
            value, dtype=torch.float32 if fused else scalar_dtype(), device=p.device if on_device else None
        )


def aligned(value: Tensor, p: Tensor) -> Tensor:
    """State with the parameter's strides: fused kernels walk both memories in parallel and look at no strides."""
    if type(value) not in PLAIN or type(p) not in PLAIN:
        return value
    if value.layout is not torch.strided or value.shape != p.shape or value.stride() == p.stride():
        return value
    own = torch.empty_like(p, dtype=value.dtype, device=value.device, requires_grad=False)
    return value if own.stride() == value.stride() else own.copy_(value.detach())


def zeros(p: Tensor) -> Tensor:
    """Zeros with the parameter's shape, dtype, device and strides."""
    return torch.zeros_like(p, memory_format=torch.preserve_format)


def sparse_like(t: Tensor, values: Tensor) -> Tensor:
    """A sparse tensor with the indices of a coalesced one and other values."""
    # The state of the checks is said, because torch warns where it is not.
    checked = torch.sparse.check_sparse_tensor_invariants.is_enabled()  # type: ignore[no-untyped-call]
    return torch.sparse_coo_tensor(t._indices(), values, t.size(), check_invariants=checked)


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
