"""Rehearsing a resume: the old run and the new one make a few steps side by side and are compared.

The old run's state is loaded into the new run under the plan, and both make the same few steps. The rehearsal compares
what a resume must keep: the function (loss and outputs before any step), the gradients, and after each step the
parameters and slots. Values of the old run are first moved by the plan. So errors such as two swapped parameters of
equal shape, lost state or a scale without its degree are distinguished from state that can only be approximated.
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
"""Relative differences up to these are rounding: in float64, and in the model's own precision."""


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

    Models compute in float64 if they can, so that differences are not rounding. Dropout is switched off; models that
    use other random numbers are compared in evaluation mode. The given runs are not changed.

    Args:
        old: The old run, as `(model, optimizer)` or `(model, optimizer, scheduler)`, a dict with these keys, or a
            function that builds it. Several optimizers or schedulers are given in lists.
        new: The new run, in the same form; nothing needs to be loaded into it.
        plan: What has changed, as a plan or the path of a plan file.
        batch: The second argument of `loss`: tensors, possibly in dicts, lists and tuples.
        loss: Takes a model and the batch; returns a scalar tensor, or a pair of that and the outputs to compare. Of
            outputs in a dict, those of both models are compared; of outputs with different shapes, the common part.
        steps: The number of steps that both make; with 0 only the function and the loaded values are compared.
        checkpoint: Loaded into the old run first; without it, the old run is used as it is.
        load: Loads the new run, in place of `optimstate.resume`: called with the old run's state (`model`,
            `optimizer`), the new model and the new optimizer.

    Raises:
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint or the old run lacks a part, a run has unknown parts, or the loss is not a
            scalar.
        UsageError: `steps` is negative.
        UserCodeError: The loss, or code that builds or loads a run, failed.
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
            message = str(error.__cause__ or error).lower()
            if not double or ("dtype" not in message and "double" not in message):
                raise
    raise AssertionError("the second attempt returns or raises")
