"""The other names of torch.optim: each algorithm as a function of lists, and names that only torch's modules use.

adam = function_of(Adam)        # like torch.optim.adam.adam: the same arguments, computed by the rule of the class
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
# Takes an optimizer without parameters, the options, and the lists by slot ("param" and "grad" among them).
Step = Callable[[Any, Group, Lists], None]

# The arguments of torch's functions that are lists, where the name is not the slot's name with an s: argument to slot.
SLOTS = {
    "d_p_list": "grad",
    "momentum_buffer_list": "momentum_buffer",
    "muon_momentum_bufs": "momentum_buffer",
    "state_sums": "sum",
    "state_steps": "step",
}
# The arguments that are one half of an option: argument to option.
PAIRS = {"beta1": "betas", "beta2": "betas", "etaminus": "etas", "etaplus": "etas", "eps1": "eps", "eps2": "eps"}
PAIRS |= {"step_size_min": "step_sizes", "step_size_max": "step_sizes"}
FLAGS = ("has_complex", "has_sparse_grad")  # not needed: the lists themselves show it
SCALING = ("grad_scale", "found_inf")


def function_of(
    cls: type[Optimizer], step: Step | None = None, *, signature_of: Any = None, **fixed: Any
) -> Callable[..., None]:
    """An algorithm's step as a function of lists, like the one that torch has for each of its classes.

    Args:
        cls: The algorithm's class.
        step: Makes the step; needed if the class is not a RuleOptimizer.
        signature_of: torch's function; None for the one with the name of the class in lower case, in the same module.
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
    """A call's arguments as lists by slot, the options of a param group, and the tensors of gradient scaling."""
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
    """One step of a RuleOptimizer on lists; state that it creates or copies is written back into them."""
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
                given.copy_(now)  # the step was made on a copy with the strides of the parameter


def complete(package: str) -> None:
    """Give every module of `package` the names that only torch's module of the same name has.

    These are helpers of torch's implementations, annotations and imported names. Nothing here needs them, but some
    frameworks import them. torch's private modules without a counterpart can be imported under our name too.
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
