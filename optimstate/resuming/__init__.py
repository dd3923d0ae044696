"""Resuming a run by one plan: weights, their average, optimizer, scheduler and gradient scaler."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from optimstate import reporting
from optimstate.errors import UsageError
from optimstate.io.location import Place
from optimstate.plan.language.plan import Plan
from optimstate.problems import Problem
from optimstate.resuming import shards
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
    """The outcome of a resumption.

    Attributes:
        reports: The outcome for every parameter of `model`, `ema` and `optimizer`, as far as they were given. If there
            are several, their keys have the path of the part, as in `optimizer optimizers[1]`.
        notes: Remarks that need attention although nothing is wrong.
        problems: The problems that `optimstate.hooks.resume_problems` finds in the result.
        nbytes: Bytes of tensors that this process read, if the run is sharded and each process reads its own shards.
    """

    reports: Mapping[str, Report]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    nbytes: int = 0

    def __str__(self) -> str:
        reported = {note for report in self.reports.values() for note in report.notes}
        rest = (note for note in self.notes if note not in reported)
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

    The parts of the checkpoint are found by their structure. Parameters are matched by name, without the prefixes of
    wrappers. Everything is planned before anything is changed, and if a part cannot be loaded, all changes are undone.

    There may be several models, optimizers, schedulers and averages, in a list or in a dict. The objects of a list are
    matched by their parameters' names or, if names do not decide, in the order of the checkpoint. The keys of a dict
    are the paths of the checkpoint's parts, as `optimstate inspect` prints them.

    Models and optimizers may be sharded (FSDP2, tensor parallelism): call this function in every process, after the
    model was sharded and the optimizer built. Every process then reads only the bytes of its own shards, and no process
    changes anything before all have read their parts.

    Args:
        checkpoint: A file or folder in any format that optimstate reads (nothing in it is executed), or a mapping that
            was loaded from one, with the parts anywhere inside.
        model: Gets the weights; also gives names to the parameters of an optimizer that was built without names.
        optimizer: Gets the state by name.
        scheduler: Gets its state, rebuilt for the param groups of its optimizer.
        ema: An `AveragedModel`, or a module for a plain dict of averages.
        scaler: A `GradScaler`. It keeps its state if the checkpoint's scaler was disabled, whose state is empty.
        plan: What has changed, as a plan or the path of a plan file. Without it, only wrappers, the order of parameters
            and groups may have changed.
        schedule: `checkpoint` if schedulers take their arguments from the checkpoint, `live` if they keep their own and
            take only the position; None for the plan's policy. If the arguments differ, a note says so.
        saved: Names for the parameters of a checkpoint's optimizer that has none, in the order of its groups; for
            several optimizers in a dict by path. Or `live` if the live optimizer was built in the same way, with the
            same names in the same order. Without it, names are inferred as by `optimstate name`, or refused.
        certificate: The certificate that the result must match bit for bit: `True` for the one that `hooks.certify()`
            wrote into the checkpoint, or the path of one. Everything that was certified must be given: model,
            optimizer, scheduler, scaler. With a plan, the checkpoint is compared, and everything that the plan only
            moves.
        process_group: The processes that load one checkpoint together; all by default.

    Returns:
        The outcome for every part.

    Raises:
        CheckpointError: The checkpoint cannot be read, or bytes that are read do not match their checksum.
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint lacks a part or has several that could be meant, names are not determined,
            the result is not what was certified, another process failed, or processes were given different
            checkpoints or plans.
    """
    models, optimizers, schedulers, averages = (
        [] if several is None else _named(several) for several in (model, optimizer, scheduler, ema)
    )
    if not (models or optimizers or schedulers or averages) and scaler is None:
        raise UsageError("nothing is given to resume", hint="Give model=..., optimizer=..., scheduler=... or ema=....")
    optimizers = [(path, shards.innermost(live)) for path, live in optimizers]
    schedulers = [(path, getattr(live, "scheduler", live)) for path, live in schedulers]
    sharded = shards.is_sharded([live for _, live in (*models, *averages)], [live for _, live in optimizers])
    together = partial(shards.together, process_group, sharded=sharded)
    with together() as loads:
        given = Plan.of(plan)
        if schedule is not None:
            given = given.with_policy(schedule=schedule)
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
        run.find_certificates(certificate)
        run.parts.compare()
        if sharded or process_group is not None:
            loads.append(run.parts.identity(given))
    run.carry_out(partial(run.check, scaler), together)
    problems = run.problems()
    made = Resumed(run.reports, tuple(run.notes), problems, run.nbytes)
    _LOGGER.info("resume: %s", "; ".join(report.summary() for report in run.reports.values()) or "done")
    for problem in problems:
        _LOGGER.warning("resume: %s", problem)
    return made


def _named(several: Any) -> list[Named]:
    """One or several live objects, each with the path that is given for it."""
    if isinstance(several, Mapping) and not hasattr(several, "state_dict"):
        return [(str(path), live) for path, live in several.items()]
    if type(several) in (list, tuple):
        return [(None, live) for live in several]
    return [(None, several)]
