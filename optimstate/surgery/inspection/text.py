"""An inspection as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from optimstate.record import Record
from optimstate.surgery.text import collapsed, percent, plural, readable, shown, size, table

Sort = Literal["name", "size", "norm"]

if TYPE_CHECKING:
    from optimstate.surgery.inspection.report import Inspection, ModelInfo, OptimizerInfo, ParameterInfo, SchedulerInfo
    from optimstate.surgery.statistics import Statistics

__all__ = ["Sort", "View", "inspection_lines", "is_step", "telling_options"]

_FILE = r"\.(pt|pth|bin|ckpt|tar|pkl|json)$|^(checkpoint|global_step|epoch|iter)\S*\d$"

KINDS_SHOWN = 12
VALUES_SHOWN = 20  # of a container of containers
LINES_SHOWN = 3  # of the values of one container


class View(Record):
    """How closely an inspection is shown.

    Attributes:
        params: Every parameter by itself instead of one line for all layers.
        groups: Every option of every group instead of the telling ones.
        stats: The statistics, where they were taken.
        sort: In which order parameters are listed: as in the file, by name, or the largest size or norm first.
        top: How many parameters of a section are listed; None for all.
        tree: Names as a tree of modules.
        everything: Every other entry by itself.
    """

    params: bool = False
    groups: bool = False
    stats: bool = True
    sort: Sort | None = None
    top: int | None = None
    tree: bool = False
    everything: bool = False

    @property
    def listed(self) -> bool:
        """Whether parameters are listed one by one."""
        return self.params or self.sort is not None or self.top is not None


def inspection_lines(found: Inspection, view: View) -> Iterator[str]:
    """The lines of an inspection; some hold several."""
    found = readable(found, without=("parameters", "tensors", "statistics"))
    yield f"{found.path}: {found.format}, {size(found.nbytes)}, {plural(found.tensors, 'tensor')}"
    for section in found.sections:
        yield ""
        if section.kind == "optimizer":
            yield from _optimizer(cast("OptimizerInfo", section), view)
        elif section.kind == "scheduler":
            scheduler = cast("SchedulerInfo", section)
            yield f"scheduler at {scheduler.path}: {scheduler.algorithm}"
            yield f"  last_epoch {scheduler.last_epoch}, last lr {shown(scheduler.last_lr)}"
        else:
            yield from _model(cast("ModelInfo", section), view)
    if not found.sections:
        yield "\nno model, optimizer or scheduler was recognised"
    yield from _entries(found, view)
    if found.opaque:
        yield "\nobjects kept as records, not loaded:"
        for name, count in found.opaque.items():
            yield f"  {name} x {count}"
    for name in found.dangerous:
        yield f"\nwarning: the file names {name}, which would run code if it were unpickled; nothing was run"
    for note in found.notes:
        yield f"\nnote: {note}"
    if found.sections and not found.section:
        yield ""
        for line in found.resume or ("nothing is missing that names, sizes and steps can show (`optimstate verify`)",):
            yield f"resume: {line}"


def _entries(found: Inspection, view: View) -> Iterator[str]:
    """Entries in no section, and mappings of names to tensors that were not recognised as one."""
    if found.entries:
        yield "\nother entries:"
        if view.everything:
            yield from (f"  {entry.path}  {shown(entry.value)}" for entry in found.entries)
        else:
            yield from _folded(_nested(found), 1)
        if found.hidden:
            yield f"  ... and at least {found.hidden:,} more (--all lists them)"
    if view.stats and found.statistics:
        yield "\ntensors in no section:"
        yield _statistics("tensor", ((collapsed(path), "", numbers) for path, numbers in found.statistics.items()))
    if found.others:
        yield "\nnames and tensors, but not a section:"
        yield from (f"  {path}  {reason}" for path, reason in found.others.items())


def _nested(found: Inspection) -> dict[str, Any]:
    """The entries as dicts in one another; values as text."""
    root: dict[str, Any] = {}
    for entry in found.entries:
        node = root
        for key in entry.keys[:-1]:
            node = node.setdefault(str(key), {})
        node[str(entry.keys[-1]) if entry.keys else "(root)"] = _short(shown(entry.value), 60)
    return root


def _folded(node: Mapping[str, Any], depth: int, level: int = 0) -> Iterator[str]:
    """Values side by side, then each container: in one line where it is small, in numbers where it is large.

    Args:
        node: Dicts in one another; values as text.
        depth: How far the lines stand in.
        level: How many containers are around, files and folders not counted.
    """
    indent = "  " * depth
    values = [f"{_short(key, 60)} {value}" for key, value in node.items() if not isinstance(value, dict)]
    yield from (indent + line for line in _side_by_side(values))
    for name, inner in node.items():
        below = level + (not re.search(_FILE, name))
        while isinstance(inner, dict) and len(inner) == 1 and isinstance(next(iter(inner.values())), dict):
            ((key, inner),) = inner.items()
            name = f"{name}.{key}"
        if not isinstance(inner, dict):
            continue
        direct = {key: value for key, value in inner.items() if not isinstance(value, dict)}
        rest = _count(inner) - len(direct)
        if not rest:
            lines = list(_side_by_side([f"{_short(key, 60)} {value}" for key, value in inner.items()]))
            yield f"{indent}{_short(name, 80)}: {lines[0]}"
            yield from (f"{indent}    {line}" for line in lines[1:])
        elif below and rest > VALUES_SHOWN:
            yield f"{indent}{_short(name, 80)}: {plural(rest, 'value')} (--all lists them)"
            yield from _folded(direct, depth + 1, below)
        else:
            yield f"{indent}{_short(name, 80)}:"
            yield from _folded(inner, depth + 1, below)


def _side_by_side(values: list[str]) -> Iterator[str]:
    """Values in lines of about a screen's width, not many."""
    lines = [""]
    for place, value in enumerate(values):
        if lines[-1] and len(lines[-1]) + len(value) > 90:
            if len(lines) == LINES_SHOWN:
                lines[-1] += f", and {len(values) - place} more"
                break
            lines.append("")
        lines[-1] += f", {value}" if lines[-1] else value
    return iter(lines if values else [])


def _count(node: Any) -> int:
    return sum(map(_count, node.values())) if isinstance(node, dict) else 1


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _optimizer(info: OptimizerInfo, view: View) -> Iterator[str]:
    names = "named parameters" if info.named else "no parameter names (by position)"
    algorithm = info.algorithm or "unrecognised algorithm"
    yield f"optimizer at {info.path}: {algorithm}, {plural(len(info.groups), 'group')}, {names}"
    count = sum(group.parameters for group in info.groups)
    steps = ", ".join(f"{step} (x{n})" if len(info.steps) > 1 else step for step, n in info.steps.items()) or "none"
    unread = f" ({info.unread_steps:,} were not read: they lie apart in the store)" if info.unread_steps else ""
    yield f"  {plural(count, 'parameter')}, {size(info.nbytes)} of state, step {steps}{unread}"
    if info.fresh:
        yield f"  {plural(info.fresh, 'parameter')} without state (fresh)"
    if info.slots:
        slots = [(slot.name, str(slot.parameters), ", ".join(slot.dtypes), size(slot.nbytes)) for slot in info.slots]
        yield table(("slot", "parameters", "dtype", "size"), slots)
    yield from _groups(info, everything=view.groups)
    if not view.listed:
        yield from _kinds(info.names, view)
    if view.stats and any(parameter.statistics for parameter in info.parameters):
        yield _statistics("parameter", _slot_rows(info, each=view.listed))
    if view.listed:
        rows = [
            (
                str(parameter.group),
                parameter.name or f"({parameter.key})",
                ", ".join(f"{slot} {shown(value)}" for slot, value in parameter.slots.items()) or "fresh",
            )
            for parameter in info.parameters
        ]
        yield table(("group", "parameter", "slots"), rows)
        yield from _left_out(len(rows), count, "parameter")


def _left_out(listed: int, there: int, noun: str) -> Iterator[str]:
    if listed < there:
        yield f"  {listed:,} of {plural(there, noun)}"


_TELLING = ("lr", "weight_decay", "betas", "momentum", "eps")


def telling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that people look for first."""
    return {key: options[key] for key in _TELLING if key in options}


def _groups(info: OptimizerInfo, *, everything: bool) -> Iterator[str]:
    for index, group in enumerate(info.groups):
        options = group.options if everything else telling_options(group.options)
        listed = [plural(group.parameters, "parameter"), *(f"{key} {shown(value)}" for key, value in options.items())]
        yield f"  group {index}: {', '.join(listed)}"


def _model(info: ModelInfo, view: View) -> Iterator[str]:
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in info.dtypes.items())
    what = "averaged model" if info.kind == "ema" else "model"
    yield f"{what} at {info.path}: {plural(info.parameters, 'tensor')}, {info.elements:,} elements, {size(info.nbytes)}"
    yield f"  {dtypes}"
    for names in info.tied:
        yield f"  share memory: {', '.join(names)}"
    if view.stats and info.statistics:
        each = view.listed
        named = ((name if each else collapsed(name), "", found) for name, found in info.statistics.items())
        yield _statistics("tensor", named)
    if view.listed:
        yield table(("tensor", "type"), info.tensors.items())
        yield from _left_out(len(info.tensors), info.parameters, "tensor")
    elif view.tree or not (view.stats and info.statistics):
        yield from _kinds(info.names, view)


def _kinds(names: Mapping[str, tuple[int, str]], view: View) -> Iterator[str]:
    """Names that differ in their indices alone, with how many there are and their shape."""
    if view.tree:
        yield from _branches(names)
        return
    kinds = list(names.items())
    for pattern, (count, example) in kinds[:KINDS_SHOWN]:
        yield f"  {pattern}  " + (f"x {count}  {example}" if count > 1 else example)
    if len(kinds) > KINDS_SHOWN:
        yield f"  ... and {len(kinds) - KINDS_SHOWN} more kinds of names (--params lists all, --tree shows modules)"


def _branches(names: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """Names as a tree of modules; a module with a single child shares its line."""
    root: dict[str, Any] = {}
    for pattern, (count, example) in names.items():
        *modules, leaf = pattern.split(".")
        node = root
        for module in modules:
            node = node.setdefault(f"{module}.", {})
        node[leaf] = f"x {count}  {example}" if count > 1 else example
    stack = [(1, name, node) for name, node in reversed(root.items())]
    while stack:
        depth, name, node = stack.pop()
        while isinstance(node, dict) and len(node) == 1:
            (inner, node), *_ = node.items()
            name += inner
        if isinstance(node, dict):
            yield f"{'  ' * depth}{name}"
            stack += [(depth + 1, inner, below) for inner, below in reversed(node.items())]
        else:
            yield f"{'  ' * depth}{name}  {node}"


# --- statistics -----------------------------------------------------------------------------------------------------

Row = tuple[str, str, "Statistics"]


def _slot_rows(info: OptimizerInfo, *, each: bool) -> Iterable[Row]:
    """Name, slot and statistics; the layers together unless `each`. Step counts are not statistics."""
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
    """A line for each name and slot; equal names share one."""
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
