"""Rehearse a resume: the old run and the new one side by side, before a night is spent on it.

The old run's state is loaded into the new one under the plan, and both make the same few steps. What a resume must keep
is compared: the function (loss and outputs before any step), the gradients under the plan, and after each step the
parameters and slots, those of the old run carried over by the plan. So a swapped pair of equal shape, lost state or a
scale without its degree is told from state that can only be approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from optimstate.errors import UsageError
from optimstate.plan.language.plan import Plan
from optimstate.rehearsal.comparing import Comparison
from optimstate.rehearsal.report import Deviation, Rehearsal
from optimstate.rehearsal.runs import Run
from optimstate.rehearsal.tensors import converted
from optimstate.resuming import resume

__all__ = ["Deviation", "Rehearsal", "rehearse"]

_ROUNDING = {True: 1e-8, False: 1e-3}
"""Relative differences that are rounding, in float64 and in what the model computes with."""


def rehearse(
    old: Callable[[], Any] | Any,
    new: Callable[[], Any] | Any,
    plan: Plan | str | PathLike[str] | None,
    batch: Any,
    loss: Callable[[Any, Any], Any],
    *,
    steps: int = 2,
    checkpoint: str | PathLike[str] | Mapping[str, Any] | None = None,
    load: Callable[[Mapping[str, Any], Any, Any], object] | None = None,
) -> Rehearsal:
    """Compare a run with its continuation in a changed model.

    Models are computed with in float64 where they can, so that what differs is not rounding; dropout is switched off,
    and models that use random numbers otherwise are compared in evaluation mode. Neither run that is given is changed.

    Args:
        old: The old run, as `(model, optimizer)` or `(model, optimizer, scheduler)`, a dict with these keys, or a
            function that builds it. Of optimizers and schedulers there may be several, in lists.
        new: The new run, likewise; nothing need be loaded.
        plan: What has changed, as a plan or the path of a plan file.
        batch: What `loss` takes; tensors may stand in dicts, lists and tuples.
        loss: Of a model and the batch; gives a scalar tensor, or that and the outputs to compare. Of outputs in a dict
            those that both models have are compared, and of each the places that both have.
        steps: How many steps both make; with 0 the function alone is compared, and what is loaded.
        checkpoint: What the old run is loaded from first; without, it is taken as it stands.
        load: How the new run is loaded, where it is not `optimstate.resume`: called with the old run's state
            (`model`, `optimizer`), the new model and the new optimizer.

    Raises:
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint or the old run lacks a part, a run has parts that are not known, or the loss
            is no scalar.
        UsageError: `steps` is negative.
        UserCodeError: The loss, or what builds or loads a run, failed.
    """
    if steps < 0:
        raise UsageError(f"steps is {steps}, it must be a number from 0 up")
    from optimstate.installed_torch import torch

    given = Plan.of(plan) if plan is not None else Plan()
    with torch.random.fork_rng(devices=[]):
        return _rehearsed(old, new, given, batch, loss, steps, checkpoint, load)


def _rehearsed(
    old: Any, new: Any, given: Plan, batch: Any, loss: Any, steps: int, checkpoint: Any, load: Any
) -> Rehearsal:
    for double in (True, False):
        before, after = (Run.of(run, double=double) for run in (old, new))
        if checkpoint is not None:
            resume(checkpoint, **before.parts())
        values = converted(batch) if double else batch
        try:
            return Comparison(before, after, given, values, loss, _ROUNDING[double]).run(steps, load)
        except RuntimeError as error:  # a constant or a kernel of another dtype
            said = str(error.__cause__ or error).lower()
            if not double or ("dtype" not in said and "double" not in said):
                raise
    raise AssertionError("the second attempt returns or raises")
