"""torch.optim's other names: each algorithm as a function of lists, and what only torch's own modules need.

adam = function_of(Adam)        # torch.optim.adam.adam: the same arguments, through the rule that the class has
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from optimstate.optim._step import Group, RuleOptimizer
from optimstate.optim.optimizer import Optimizer

__all__ = ["Step", "complete", "function_of"]

Lists = dict[str, list[Any]]
# Given an optimizer without parameters, the options, and the lists by slot ("param" and "grad" among them).
Step = Callable[[Any, Group, Lists], None]

# What torch's functions call a list, or spread over several arguments, where it is not the slot's name and an s.
SLOTS = {
    "d_p_list": "grad",
    "momentum_buffer_list": "momentum_buffer",
    "muon_momentum_bufs": "momentum_buffer",
    "state_sums": "sum",
    "state_steps": "step",
}
PAIRS = {"beta1": "betas", "beta2": "betas", "etaminus": "etas", "etaplus": "etas", "eps1": "eps", "eps2": "eps"}
PAIRS |= {"step_size_min": "step_sizes", "step_size_max": "step_sizes"}
FLAGS = ("has_complex", "has_sparse_grad")  # which the lists themselves tell
SCALING = ("grad_scale", "found_inf")


def function_of(
    cls: type[Optimizer], step: Step | None = None, *, signature_of: Any = None, **fixed: Any
) -> Callable[..., None]:
    """An algorithm's step as the function of lists that torch has beside its class.

    Args:
        cls: The algorithm.
        step: How it is made where the class is not a RuleOptimizer.
        signature_of: torch's function; None for that of the class's name in lower case, in the module of the class.
        fixed: Options that are not arguments of the function.
    """
    name = cls.__name__.lower()
    torchs = signature_of or getattr(import_module(f"torch.optim.{cls.__module__.rpartition('.')[2]}"), name)
    signature = inspect.signature(torchs)

    @wraps(torchs, assigned=("__name__", "__qualname__", "__annotations__"), updated=())
    def function(*args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{torchs.__name__}() {error}") from None
        bound.apply_defaults()
        lists, group, scaling = sorted_arguments(bound.arguments)
        steps = lists.get("step", [])
        if step is None and not all(isinstance(t, Tensor) for t in steps):
            raise RuntimeError("API has changed, `state_steps` argument must contain a list of singleton tensors")
        optimizer: Any = cls.__new__(cls)
        optimizer.state = defaultdict(dict)
        optimizer.__dict__.update(scaling)
        (step or rule_step)(optimizer, {**group, **fixed}, lists)

    del function.__wrapped__
    function.__doc__ = f"One step of :class:`optimstate.optim.{cls.__name__}` on lists of tensors, as torch's function."
    function.__module__ = cls.__module__
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def sorted_arguments(arguments: dict[str, Any]) -> tuple[Lists, Group, dict[str, Any]]:
    """Lists by slot, options as a group has them, and the tensors of gradient scaling."""
    lists: Lists = {}
    group: Group = {}
    scaling = {}
    for name, value in arguments.items():
        if name in SCALING:
            scaling[name] = value
        elif name in PAIRS:
            group[PAIRS[name]] = (*group.get(PAIRS[name], ()), value)
        elif isinstance(value, list) and (name in SLOTS or name.endswith("s")):
            lists[SLOTS.get(name, name.removesuffix("s"))] = value
        elif name not in FLAGS:
            group[name] = value
    return lists, group, scaling


def rule_step(optimizer: RuleOptimizer, group: Group, lists: Lists) -> None:
    """The driver's step on lists; what it makes anew goes back into them."""
    params, grads = lists["param"], lists["grad"]
    if not params:
        return
    active = optimizer._active(group)
    columns = {name: list(lists[name]) if name in active else [] for name in optimizer._columns}
    sparse, complex_ = any(g.is_sparse for g in grads), any(p.is_complex() for p in params)
    optimizer._step_group(group, params, grads, columns, has_sparse=sparse, has_complex=complex_)
    for name, column in columns.items():
        for index, (p, made) in enumerate(zip(params, column, strict=False)):
            given, now = lists[name][index], optimizer.state[p].get(name, made)
            if given is None:
                lists[name][index] = now
            elif now is not given:
                given.copy_(now)  # it was laid out as its parameter for the step


def complete(package: str) -> None:
    """Let every module of `package` answer for what only torch's module of its name has.

    These are the helpers of torch's own implementations, its annotations and what it imports: frameworks import some of
    them, ours need none. torch's private modules without a counterpart are found under our name too.
    """
    for info in pkgutil.walk_packages(torch.optim.__path__, ""):
        ours = sys.modules.get(f"{package}.{info.name}")
        if ours is not None:
            torchs = import_module(f"torch.optim.{info.name}")
            ours.__getattr__ = _answering(ours.__name__, torchs)  # type: ignore[method-assign]
        elif info.name.startswith("_") and f"{package}.{info.name}" not in sys.modules:
            sys.modules[f"{package}.{info.name}"] = import_module(f"torch.optim.{info.name}")


def _answering(name: str, torchs: Any) -> Callable[[str], Any]:
    def answer(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        try:
            return getattr(torchs, attribute)
        except AttributeError:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None

    return answer
