"""How an inspection is shown as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from optimstate.surgery.reports import ModelInfo, OptimizerInfo, SchedulerInfo, collapsed
from optimstate.surgery.text import percent, plural, shown, size, table

if TYPE_CHECKING:
    from optimstate.surgery.reports import Inspection, ParameterInfo
    from optimstate.surgery.statistics import Statistics

__all__ = ["inspection", "is_step", "telling_options"]

KINDS_SHOWN = 12


def inspection(found: Inspection, *, params: bool, groups: bool, stats: bool) -> None:
    """Print an inspection.

    Args:
        found: What to print.
        params: Every parameter by itself instead of one line for all layers.
        groups: Every option of every group instead of the telling ones.
        stats: The statistics, which it must have.
    """
    typer.echo(f"{found.path}: {found.format}, {size(found.nbytes)}, {plural(found.tensors, 'tensor')}")
    for section in found.sections:
        typer.echo()
        if isinstance(section, OptimizerInfo):
            _optimizer(section, params=params, groups=groups, stats=stats)
        elif isinstance(section, SchedulerInfo):
            typer.echo(f"scheduler at {section.path}: {section.algorithm}")
            typer.echo(f"  last_epoch {section.last_epoch}, last lr {shown(section.last_lr)}")
        else:
            _model(section, params=params, stats=stats)
    if not found.sections:
        typer.echo("\nno model, optimizer or scheduler was recognised")
    if found.opaque:
        typer.echo("\nobjects kept as records, not loaded:")
        for name, count in found.opaque.items():
            typer.echo(f"  {name} x {count}")
    for name in found.dangerous:
        typer.echo(f"\nwarning: the file names {name}, which would run code if it were unpickled; nothing was run")
    for note in found.notes:
        typer.echo(f"\nnote: {note}")
    if found.sections:
        typer.echo()
        for line in found.resume or ("nothing is missing that names, sizes and steps can show (`optimstate verify`)",):
            typer.echo(f"resume: {line}")


def _optimizer(info: OptimizerInfo, *, params: bool, groups: bool, stats: bool) -> None:
    names = "named parameters" if info.named else "no parameter names (by position)"
    algorithm = info.algorithm or "unrecognised algorithm"
    typer.echo(f"optimizer at {info.path}: {algorithm}, {plural(len(info.groups), 'group')}, {names}")
    count = sum(group.parameters for group in info.groups)
    steps = ", ".join(f"{step} (x{n})" if len(info.steps) > 1 else step for step, n in info.steps.items()) or "none"
    typer.echo(f"  {plural(count, 'parameter')}, {size(info.nbytes)} of state, step {steps}")
    if info.fresh:
        typer.echo(f"  {plural(info.fresh, 'parameter')} without state (fresh)")
    if info.slots:
        slots = [(slot.name, str(slot.parameters), ", ".join(slot.dtypes), size(slot.nbytes)) for slot in info.slots]
        typer.echo(table(("slot", "parameters", "dtype", "size"), slots))
    _groups(info, everything=groups)
    if not params:
        _kinds(info.names)
    if stats and any(parameter.statistics for parameter in info.parameters):
        typer.echo(_statistics("parameter", _slot_rows(info, each=params)))
    if params:
        rows = [
            (
                str(parameter.group),
                parameter.name or f"({parameter.key})",
                ", ".join(f"{slot} {shown(value)}" for slot, value in parameter.slots.items()) or "fresh",
            )
            for parameter in info.parameters
        ]
        typer.echo(table(("group", "parameter", "slots"), rows))


_TELLING = ("lr", "weight_decay", "betas", "momentum", "eps")


def telling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that people look for first."""
    return {key: options[key] for key in _TELLING if key in options}


def _groups(info: OptimizerInfo, *, everything: bool) -> None:
    for index, group in enumerate(info.groups):
        options = group.options if everything else telling_options(group.options)
        listed = [plural(group.parameters, "parameter"), *(f"{key} {shown(value)}" for key, value in options.items())]
        typer.echo(f"  group {index}: {', '.join(listed)}")


def _model(info: ModelInfo, *, params: bool, stats: bool) -> None:
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in info.dtypes.items())
    what = "averaged model" if info.kind == "ema" else "model"
    typer.echo(
        f"{what} at {info.path}: {plural(info.parameters, 'tensor')}, {info.elements:,} elements, {size(info.nbytes)}"
    )
    typer.echo(f"  {dtypes}")
    for names in info.tied:
        typer.echo(f"  share memory: {', '.join(names)}")
    if stats and info.statistics:
        named = ((name if params else collapsed(name), "", found) for name, found in info.statistics.items())
        typer.echo(_statistics("tensor", named))
    if params:
        typer.echo(table(("tensor", "type"), info.tensors.items()))
    elif not stats:
        _kinds(info.names)


def _kinds(names: Mapping[str, tuple[int, str]]) -> None:
    kinds = list(names.items())
    for pattern, (count, example) in kinds[:KINDS_SHOWN]:
        typer.echo(f"  {pattern}  " + (f"x {count}" if count > 1 else example))
    if len(kinds) > KINDS_SHOWN:
        typer.echo(f"  ... and {len(kinds) - KINDS_SHOWN} more kinds of names (--params lists all)")


# --- statistics -----------------------------------------------------------------------------------------------------

Row = tuple[str, str, "Statistics"]


def _slot_rows(info: OptimizerInfo, *, each: bool) -> Iterable[Row]:
    """Name, slot and statistics; the layers together unless `each`. Step counts are no statistics."""
    for parameter in info.parameters:
        name = _label(parameter, each=each)
        yield from ((name, slot, found) for slot, found in parameter.statistics.items() if not is_step(slot))


def is_step(slot: str) -> bool:
    """Whether a slot counts steps, which are shown as such."""
    return slot.rpartition(".")[2] == "step"


def _label(parameter: ParameterInfo, *, each: bool) -> str:
    if parameter.name is not None:
        return parameter.name if each else collapsed(parameter.name)
    return f"({parameter.key})" if each else f"(all of group {parameter.group})"


def _statistics(what: str, rows: Iterable[Row]) -> str:
    """A line for each name and slot; those that are called the same together."""
    together: dict[tuple[str, str], tuple[int, Statistics]] = {}
    for name, slot, found in rows:
        count, known = together.get((name, slot), (0, None))
        together[name, slot] = count + 1, found if known is None else known + found
    slots, odd = any(slot for _, slot in together), any(found.nonfinite for _, found in together.values())
    columns = [what, *(["slot"] if slots else []), "x", "norm", "rms", "min", "max", "zeros"]
    columns += ["NaN", "inf"] if odd else []
    lines = []
    for (name, slot), (count, found) in together.items():
        numbers = [_number(value) for value in (found.norm, found.rms, found.minimum, found.maximum)]
        bad = [str(found.nan or ""), str(found.inf or "")] if odd else []
        numbers += [percent(found.zeros, found.elements), *bad]
        lines.append([name, *([slot] if slots else []), str(count), *numbers])
    return table(columns, lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
