"""The base of the hooks that run before an optimizer loads; hooks registered side by side act as one.

Each says what it wants in a `LoadRequest`; the last of them plans once, for the live optimizer, and hands over a new
dict. So a rule and the policies it needs may be registered in any order, and nothing is copied on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import PlanError, StateMismatchError
from optimstate.hooks.engine.live import Live
from optimstate.hooks.engine.match import LoadOutcome, matched, own_containers
from optimstate.hooks.engine.report import Report
from optimstate.hooks.engine.request import LoadRequest, StateDict, named
from optimstate.installed_torch import adagrad_starts_late, torch
from optimstate.plan.solve.migration import SectionMoves
from optimstate.state.optimizer import OptimizerState
from optimstate.tree import no_garbage_collection

__all__ = ["LOGGER", "LoadHook", "adapt"]

LOGGER = logging.getLogger("optimstate")


class LoadHook:
    """A hook for `torch.optim.Optimizer.register_load_state_dict_pre_hook`.

    Hooks registered one after the other on one optimizer act together: rules in the order of registration, then a
    match by name with the live parameters, whatever groups these are in. So each of them is `match_names` and more.
    The dict that is loaded is not changed, and tensors that are only moved are not copied. If anything does not fit,
    the optimizer is left as it is.

    Attributes:
        moves: The migration behind the last load; None before, and where every parameter was kept as it was.
    """

    moves: SectionMoves | None = None
    after_loading = False
    """Whether it has something left to do when torch has loaded."""
    _outcome: LoadOutcome | None = None

    @property
    def report(self) -> Report | None:
        """What the last load did; None before the first."""
        return self._outcome.report if self._outcome is not None else None

    def prepare(self, request: LoadRequest) -> None:
        """Add to the request what this hook wants."""

    def identify(self) -> tuple[torch.nn.Module | None, Sequence[str] | None]:
        """A model that names the live parameters, and names for those of the checkpoint, where they are given."""
        return None, None

    def finish(self, optimizer: torch.optim.Optimizer, made: StateDict) -> None:
        """Called when the new dict is complete.

        Args:
            optimizer: The one that is about to load.
            made: What it loads, to be changed at will: its containers belong to nobody else. Its tensors may be the
                checkpoint's; replace them, never change them in place.
        """

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict | None:
        """The dict to load instead; None where a later hook supplies it.

        Raises:
            OptimStateError: The state does not fit.
        """
        hooks = self._beside(optimizer)
        if hooks[-1] is not self:
            return None
        return _load(optimizer, state_dict, hooks)

    def _beside(self, optimizer: torch.optim.Optimizer) -> list[LoadHook]:
        """This hook and those registered directly before and after it; alone if it is not registered."""
        registered = list(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", {}).values())
        if registered.count(self) > 1:
            raise PlanError(f"{self} is registered twice on one optimizer", hint="Remove one of them.")
        if self not in registered:
            return [self]
        first = last = registered.index(self)
        while first > 0 and isinstance(registered[first - 1], LoadHook):
            first -= 1
        while last + 1 < len(registered) and isinstance(registered[last + 1], LoadHook):
            last += 1
        return registered[first : last + 1]

    def __str__(self) -> str:
        return "match_names"

    def __repr__(self) -> str:
        return str(self)


def adapt(optimizer: torch.optim.Optimizer, state_dict: StateDict, *hooks: LoadHook) -> StateDict:
    """The dict that load hooks would give to an optimizer, for optimizers whose own loading does not run hooks.

    `optimizer.load_state_dict(hooks.adapt(optimizer, state_dict, hooks.match_names()))` also works where
    `load_state_dict` runs no hooks (bitsandbytes), or goes back to the dict from before they ran (pytorch_optimizer).

    Args:
        optimizer: Not changed.
        state_dict: Not changed.
        *hooks: In order; without any, parameters are matched by name.

    Raises:
        PlanError: A hook has something to do after loading, and this optimizer's loading would not call it.
        OptimStateError: The state does not fit.
    """
    library = type(optimizer).load_state_dict.__module__.partition(".")[0]
    late = [hook for hook in hooks if hook.after_loading]
    if late and library not in ("torch", "optimstate"):
        raise PlanError(
            f"{late[0]} works after loading, when {type(optimizer).__name__}.load_state_dict may call no hooks",
            hint="Leave it out, and look at the optimizer's own options for the dtypes of its state.",
        )
    return _load(optimizer, state_dict, hooks or (LoadHook(),))


def _load(optimizer: torch.optim.Optimizer, state_dict: StateDict, hooks: Sequence[LoadHook]) -> StateDict:
    given: Any = state_dict
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= given.keys():
        there = ", ".join(map(describe, list(given)[:5])) if isinstance(given, Mapping) else ""
        raise StateMismatchError(
            "this is not an optimizer's state dict: "
            + (f"it has {there}" if there else f"it is a {type(given).__name__} of {len(given)}"),
            hint="Give the part of the checkpoint that is the optimizer's, or the whole to optimstate.resume().",
        )
    if _is_own(optimizer, state_dict):
        return state_dict
    model, saved = _identities(hooks)
    live = Live.of(optimizer, model)
    request = LoadRequest(named(OptimizerState.from_node(state_dict), live, saved), live)
    for hook in hooks:
        hook.prepare(request)
    with no_garbage_collection():
        made, outcome = matched(request, tuple(map(str, hooks)), live.names)
    if any(type(hook).finish is not LoadHook.finish for hook in hooks):
        made = own_containers(made)
    made = _with_adagrads_start(optimizer, made)
    for hook in hooks:
        hook.finish(optimizer, made)
        hook._outcome, hook.moves = outcome, outcome.moves
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info(outcome.report.summary())
    return made


def _with_adagrads_start(optimizer: torch.optim.Optimizer, made: StateDict) -> StateDict:
    """State for parameters without any, which torch's Adagrad creates only in its constructor."""
    adagrad: Any = torch.optim.Adagrad
    if getattr(type(optimizer), "_init_group", None) is not adagrad._init_group or adagrad_starts_late():
        return made
    made = own_containers(made)
    for group, live in zip(made["param_groups"], optimizer.param_groups, strict=True):
        for key, p in zip(group["params"], live["params"], strict=True):
            if not made["state"].get(key):
                start = group.get("initial_accumulator_value", 0.0)
                value = complex(start, start) if p.is_complex() else start
                made["state"][key] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, value).detach()}
    return made


def _is_own(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> bool:
    """Whether a dict is what a new optimizer has itself: trainers load that into it (Accelerate, when it prepares one).

    There is nothing to resume then, and rules would take the live names for a checkpoint's.
    """
    if state_dict["state"] or optimizer.state:
        return False
    own, given = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    return len(own) == len(given) and all(
        a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
        for a, b in zip(own, given, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one.cpu(), other.cpu())
    return type(one) is type(other) and bool(one == other)


def _identities(hooks: Sequence[LoadHook]) -> tuple[torch.nn.Module | None, Sequence[str] | None]:
    models, names = zip(*(hook.identify() for hook in hooks), strict=True)
    given = [model for model in models if model is not None]
    saved = [found for found in names if found is not None]
    if any(model is not given[0] for model in given):
        raise PlanError("two hooks name the live parameters by different models", hint="Give it to one of them.")
    if any(list(found) != list(saved[0]) for found in saved):
        raise PlanError("two hooks give the checkpoint's parameters different names", hint="Leave it to one of them.")
    return (given[0] if given else None), (saved[0] if saved else None)
