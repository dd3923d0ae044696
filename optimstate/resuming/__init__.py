"""Resume everything from a checkpoint by one plan: weights, their average, optimizer, scheduler, gradient scaler."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from optimstate import reporting
from optimstate.io.location import Place
from optimstate.plan.language.plan import Plan
from optimstate.problems import Problem
from optimstate.resuming.certified import Given
from optimstate.resuming.parts import Named, Parts
from optimstate.resuming.run import Run

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from optimstate.hooks import Report

__all__ = ["Resumed", "resume"]

_LOGGER = logging.getLogger("optimstate")
T = TypeVar("T")
OneOrMore: TypeAlias = T | Sequence[T] | Mapping[str, T]


class Resumed(reporting.Report):
    """What a resumption did.

    Attributes:
        reports: What became of the parameters: of `model`, `ema` and `optimizer`, as far as they were given; of one of
            several by the path of its part, as in `optimizer optimizers[1]`.
        notes: What deserves attention though nothing is wrong.
        problems: What `optimstate.hooks.resume_problems` finds in the result.
        nbytes: Bytes of tensors that this process read of a checkpoint whose shards every process reads for itself.
    """

    reports: Mapping[str, Report]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    nbytes: int = 0

    def __str__(self) -> str:
        told = {note for report in self.reports.values() for note in report.notes}
        rest = (note for note in self.notes if note not in told)
        return "\n".join(map(str, (*self.reports.values(), *rest, *self.problems)))


def resume(
    checkpoint: Place | Mapping[str, Any],
    *,
    model: OneOrMore[torch.nn.Module] | None = None,
    optimizer: OneOrMore[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    ema: OneOrMore[torch.nn.Module] | None = None,
    scaler: Any = None,
    plan: Plan | str | PathLike[str] | None = None,
    schedule: Literal["checkpoint", "live"] | None = None,
    saved: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    certificate: Given | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Resumed:
    """Load a checkpoint into a run whose model, groups or wrappers may have changed: all of it, or nothing.

    The parts are found by their structure. Parameters are matched by name, wrapper prefixes on either side aside.
    Everything is planned before anything is changed, and what was changed is put back if a part cannot be loaded.

    Of models, optimizers, schedulers and averages there may be several: in a list, in the order in which the
    checkpoint has them, where names do not tell; or in a dict by the paths of their parts, as `optimstate inspect`
    prints them.

    Models and optimizers may be sharded (FSDP2, tensor parallelism): call it in every process, after the model was
    sharded and the optimizer built. Every process then reads only the bytes of its own shards, and nothing is changed
    in any of them before every one has read its part.

    Args:
        checkpoint: A file or folder in any format that optimstate reads (nothing in it is executed), or what was read
            from one: a mapping with the parts anywhere inside.
        model: Gets the weights; also names the parameters of an optimizer that was built without names.
        optimizer: Gets the state by name.
        scheduler: Gets its state, rebuilt for the param groups of its optimizer.
        ema: An `AveragedModel`, or a module that a plain dict of averages is for.
        scaler: A `GradScaler`; the state of one that was disabled, which is empty, leaves it as it is.
        plan: What has changed, as a plan or the path of a plan file; without, only wrappers, order and groups may have.
        schedule: Whether schedulers have their arguments from the checkpoint or keep their own, `live`, and take the
            position alone; None for what the plan's policy says. Where the two differ, a note says so.
        saved: The names that the checkpoint's optimizer has not got, in the order of its groups; of several by path. Or
            `live`: the live optimizer was built as the checkpoint's, so that theirs are the same in the same order.
            Without, they are concluded as `optimstate name` concludes them, or refused.
        certificate: What the result has to be, bit for bit: `True` for what `hooks.certify()` wrote into the
            checkpoint, or the path of a certificate. All that was certified has to be given: model, optimizer,
            scheduler, scaler. With a plan, the checkpoint is held against it, and what the plan only moves.
        process_group: The processes that load together; all by default.

    Returns:
        What became of everything.

    Raises:
        CheckpointError: The checkpoint cannot be read, or bytes that are read do not match their checksum.
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint lacks a part or has several that could be meant, names are not determined,
            the result is not what was certified, or another process failed.
    """
    given = Plan.of(plan)
    if schedule is not None:
        given = given.with_policy(schedule=schedule)
    models, optimizers, schedulers, averages = (
        [] if several is None else _named(several) for several in (model, optimizer, scheduler, ema)
    )
    from optimstate.resuming import shards

    optimizers = [(path, shards.innermost(live)) for path, live in optimizers]
    schedulers = [(path, getattr(live, "scheduler", live)) for path, live in schedulers]
    sharded = shards.is_sharded([live for _, live in (*models, *averages)], [live for _, live in optimizers])
    failure: Exception | None = None
    run: Run | None = None
    try:
        run = Run(Parts(checkpoint, lazily=sharded), given, saved)
        live_models = [live for _, live in models]
        weights, means = run.choose("model", models), run.choose("ema", averages)
        states, schedules = run.choose("optimizer", optimizers, live_models), run.choose("scheduler", schedulers)
        run.plan_modules("model", models, weights)
        run.plan_modules("ema", averages, means)
        run.plan_optimizers(optimizers, states, live_models)
        run.plan_schedulers(schedulers, schedules)
        if scaler is not None:
            run.plan_scaler(scaler)
        run.refuse_unused()
        run.parts.compare()
    except Exception as error:  # noqa: BLE001  # the other processes wait to be told
        failure = error
    shards.agree(failure, process_group, sharded=sharded)
    assert run is not None
    run.carry_out(partial(run.check, certificate, scaler))
    problems = run.problems()
    made = Resumed(run.reports, tuple(run.notes), problems, run.nbytes)
    _LOGGER.info("resume: %s", "; ".join(report.summary() for report in run.reports.values()) or "done")
    for problem in problems:
        _LOGGER.warning("resume: %s", problem)
    return made


def _named(several: Any) -> list[Named]:
    """Live objects with the paths that are given for them."""
    if isinstance(several, Mapping) and not hasattr(several, "state_dict"):
        return [(str(path), live) for path, live in several.items()]
    if type(several) in (list, tuple):
        return [(None, live) for live in several]
    return [(None, several)]
