"""The base of every optimizer: torch's own base class, with a `load_state_dict` that checks what it is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
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
PLAIN = (Tensor, torch.nn.Parameter)  # tensors whose memory can be read directly; a subclass may store anything


class Optimizer(OptimizerBase):
    """Base class of all optimizers: torch's, with a `load_state_dict` that checks names, shapes and slots.

    A subclass needs no more than a `step`, as with torch's base class.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        defaults: Options of groups that do not state their own.

    Raises:
        TypeError: A parameter is not a tensor.
        ValueError: There are no parameters, one is not a leaf or is in two groups, or only some have names.
    """

    _scalars: ClassVar[tuple[str, ...]] = ()  # slots of one element
    _later_options: ClassVar[Options] = {}  # options that groups of older checkpoints lack, with their defaults

    def __init__(self, params: ParamsT, defaults: Options) -> None:
        # Not super(): subclasses also inherit from torch's class of the same name, whose __init__ must not run.
        torch.optim.Optimizer.__init__(self, params, dict(defaults))

    def _slot_shapes(self, p: Tensor, group: dict[str, Any]) -> Slots:  # noqa: ARG002
        """The shapes of the slots that the state of a parameter must have, and of those that it may have."""
        return {}, {}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict by position; the optimizer is unchanged if it does not fit.

        State is cast to its parameter's dtype and moved to its device. Tensors that need neither are shared with the
        given dict, not copied. Parameter names that this optimizer already has are kept.

        Args:
            state_dict: A state dict of an optimizer of the same algorithm, from optimstate or torch.

        Raises:
            StateMismatchError: Groups, options, slots or shapes do not fit. It is a ValueError.

        Warns:
            ParameterNameWarning: A parameter would get the state of a parameter with another name.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        saved, states = state_dict["param_groups"], state_dict["state"]
        check_groups(self.param_groups, saved)
        if type(self)._slot_shapes is not Optimizer._slot_shapes:  # else the slots of this algorithm are not known
            check_options(self, self._later_options, saved)
        check_fit(self, saved, states, self._slot_shapes)
        check_names(self.param_groups, saved, states)
        loaded: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        receivers = {key: (p, old) for key, p, _, old in pairs(self.param_groups, saved)}
        for key, value in states.items():
            if key in receivers:
                p, old = receivers[key]
                loaded[p] = self._converted(p, key, old, value)
            else:
                loaded[key] = value  # state that belongs to no parameter is kept as it is
        groups = [self._merged(*both) for both in zip(self.param_groups, deepcopy(saved), strict=True)]
        self.__setstate__({"state": loaded, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _converted(self, p: Tensor, key: Any, old: Group, value: Any) -> Any:
        """A parameter's state on its device and in its dtype; for fused kernels, also with its strides."""
        # torch's policy searches all groups for the parameter, once per tensor. A list of one group makes that cheap.
        groups = [{"params": (key,), "fused": old.get("fused", False), "capturable": old.get("capturable", False)}]

        def convert(tensor: Tensor, slot: Any) -> Tensor:
            tensor = self._process_value_according_to_param_policy(p, tensor, key, groups, slot)
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
            new.setdefault("fused", group["fused"])  # torch's class has no such option, so its checkpoints lack it
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
        """Turn scalar slots into tensors; older checkpoints hold them as numbers."""
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


class GroupOptimizer(Optimizer):
    """An optimizer whose step updates one param group after the other."""

    _checks_graph_capture: ClassVar[bool] = False  # whether torch's class of the same name does

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss; optional.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A parameter or its gradient is of a kind that the algorithm does not support.
        """
        if self._checks_graph_capture:
            self._accelerator_graph_capture_health_check()
        loss = evaluated(closure)
        for group in self.param_groups:
            self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _real_with_dense_gradients(self, group: Group) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have a gradient, with it; neither may be complex or sparse."""
        with_grads = [(p, p.grad) for p in group["params"] if p.grad is not None]
        for p, grad in with_grads:
            if p.is_complex():
                raise RuntimeError(f"{type(self).__name__} does not support complex parameters")
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        return with_grads


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss that a step's closure returns, which computes gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def aligned(value: Tensor, p: Tensor) -> Tensor:
    """State with the parameter's strides, because fused kernels walk both memories in parallel and ignore strides."""
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
    """A sparse tensor with the indices of the coalesced tensor `t` and other values."""
    # check_invariants is passed as it is set, because torch warns where it is left out.
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


def check_not_negative(**hyperparameters: Any) -> None:
    """Raise ValueError with torch's message for the first hyperparameter that is negative (or NaN)."""
    for name, value in hyperparameters.items():
        require(value >= 0.0, f"Invalid {name} value: {value}")


def check_lr(lr: Any, message: str = "Invalid learning rate: ") -> None:
    """A learning rate must be one number, not negative (and not NaN)."""
    require(not isinstance(lr, Tensor) or lr.numel() == 1, "Tensor lr must be 1-element")
    require(bool(lr >= 0.0), f"{message}{lr}")


def check_betas(betas: Any) -> None:
    """Both coefficients must be in [0, 1)."""
    for index in (0, 1):
        require(bool(0.0 <= betas[index] < 1.0), f"Invalid beta parameter at index {index}: {betas[index]}")
