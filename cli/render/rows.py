"""The numbers of a page: a row for every tensor or difference, and histograms, as the script is given them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.state.algorithms.registry import named
from optimstate.surgery.inspection.report import ModelInfo, OptimizerInfo
from optimstate.surgery.inspection.text import is_step
from optimstate.surgery.inspection.updates import BINS, LEAST, PER_DECADE, Histogram
from optimstate.surgery.statistics import second_moments
from optimstate.surgery.text import shown

if TYPE_CHECKING:
    from optimstate.surgery.comparison.comparing import DiffReport
    from optimstate.surgery.inspection.report import Inspection, ParameterInfo
    from optimstate.surgery.inspection.updates import Update
    from optimstate.surgery.statistics import Statistics

__all__ = ["change_rows", "inspection_rows", "kind_of"]

ANONYMOUS_PER_ROW = 32  # parameters without names in a row of the heat map
COLUMNS = (
    "parameter",
    "of",
    "group",
    "type",
    "elements",
    "norm",
    "rms",
    "min",
    "max",
    "zeros",
    "NaN",
    "inf",
    "negative",
)
MEASURES = ("root mean square", "norm", "largest magnitude", "share of zeros")
EFFECTIVE, RATIO = "effective step", "step / weight"


def _short(value: Any) -> Any:
    """A number with as many digits as anybody reads."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


class _Rows:
    """The rows of a page: a series (weights, or a slot), a name, its place in the heat map, and the columns' cells."""

    def __init__(self) -> None:
        self.series: list[str] = []
        self.squares: list[int] = []
        self.names: dict[tuple[str, str, str], int] = {}
        self.kinds: dict[str, int] = {}
        self.rows: list[list[Any]] = []
        self._number: dict[str, int] = {}

    def add(
        self, series: str, name: str, place: tuple[str, str], group: str, kind: str, *cells: Any, square: bool = False
    ) -> None:
        """One row of a series, which begins with its first; names and kinds are written once and numbered."""
        if series not in self._number:
            self._number[series] = len(self.series)
            self.squares += [len(self.series)] if square else []
            self.series.append(series)
        which = self.names.setdefault((name, *place), len(self.names))
        what = self.kinds.setdefault(kind, len(self.kinds))
        self.rows.append([self._number[series], which, group, what, *map(_short, cells)])

    def data(self, columns: Sequence[str], measures: Sequence[str], **more: Any) -> dict[str, Any]:
        """What the script is given."""
        fields = {"series": self.series, "squares": self.squares, "rows": self.rows}
        fields |= {"names": list(self.names), "kinds": list(self.kinds)}
        return {**fields, "columns": columns, "measures": measures, **more}


def inspection_rows(found: Inspection, steps: Sequence[Update]) -> dict[str, Any]:
    """What the script draws of an inspection: series, a row for every tensor, and histograms.

    Args:
        found: With statistics.
        steps: The moments of every parameter and the steps they make.
    """
    made = _Rows()
    optimizers = [section for section in found.sections if isinstance(section, OptimizerInfo)]
    by_key = {(step.section, step.key): step for step in steps}
    histograms: dict[str, dict[str, Histogram]] = {}
    for section in optimizers:
        at = f" ({section.path})" if len(optimizers) > 1 else ""
        second = second_moments(named(section.algorithm or ""))
        for parameter, name, place in _parameters(section):
            group = str(parameter.group)
            for slot, numbers in parameter.statistics.items():
                if not is_step(slot):
                    described = parameter.slots.get(slot, "")
                    kind = described if isinstance(described, str) else "one number"
                    made.add(f"{slot}{at}", name, place, group, kind, *_numbers(numbers), square=slot in second)
            step = by_key.get((section.path, parameter.key))
            if step is not None:
                _add_step(made, histograms, step, name, place, group, at)
    for model in found.sections:
        if isinstance(model, ModelInfo):
            for name, numbers in model.statistics.items():
                made.add(
                    f"{kind_of(model)}: {model.path}", name, _place(name), "", model.tensors[name], *_numbers(numbers)
                )
    drawn = {title: {key: [h.zeros, *h.counts] for key, h in by.items()} for title, by in histograms.items()}
    return made.data(COLUMNS, MEASURES, histograms={"least": LEAST, "perDecade": PER_DECADE, "of": drawn})


def _add_step(
    made: _Rows,
    histograms: dict[str, dict[str, Histogram]],
    step: Update,
    name: str,
    place: tuple[str, str],
    group: str,
    at: str,
) -> None:
    """What a parameter's moments make: the rows of its step, and its share of its kind's histograms."""
    found = dict(step.histograms)
    if step.step is not None:
        made.add(f"{EFFECTIVE}{at}", name, place, group, "from lr and moments", *_numbers(step.step))
    if step.ratio is not None:
        ratio = step.ratio
        elements = 0 if step.step is None else step.step.elements
        made.add(f"{RATIO}{at}", name, place, group, "norms", elements, *[ratio] * 4, 0, 0, 0, 0)
        found[f"{RATIO}, of parameters"] = Histogram(*_binned(ratio))
    for title, histogram in found.items():
        kinds = histograms.setdefault(f"{title}{at}", {})
        kinds[place[0]] = kinds.get(place[0], Histogram()) + histogram


def _binned(value: float) -> tuple[tuple[int, ...], int]:
    """The counts of one number, and of zeros."""
    counts = [0] * BINS
    if value:
        counts[min(max(int((math.log10(value) - LEAST) * PER_DECADE), 0), BINS - 1)] = 1
    return tuple(counts), int(not value)


def change_rows(report: DiffReport) -> dict[str, Any]:
    """What the script draws of a comparison: a row for every difference."""
    made = _Rows()
    for change in report.changes:
        name, _, slot = change.name.partition(" ")
        sides = " → ".join(dict.fromkeys(shown(side) for side in (change.left, change.right) if side))
        series = f"{change.section}{f', {slot}' if slot else ''}"
        made.add(series, name, _place(name), change.kind, sides, None, change.relative, *[None] * 3, *[0] * 4)
    return made.data(("parameter", "of", "difference", "left and right", "", "relative"), ("relative difference",))


def _parameters(section: OptimizerInfo) -> Iterator[tuple[ParameterInfo, str, tuple[str, str]]]:
    """Each parameter with its name and its place in the heat map: by layer, or in order where there are no names."""
    count: dict[int, int] = {}
    for parameter in section.parameters:
        if parameter.name is not None:
            yield parameter, parameter.name, _place(parameter.name)
            continue
        index = count[parameter.group] = count.get(parameter.group, -1) + 1
        first = index // ANONYMOUS_PER_ROW * ANONYMOUS_PER_ROW
        place = f"group {parameter.group}, from {first}", str(index - first)
        yield parameter, f"({parameter.key})", place


def _place(name: str) -> tuple[str, str]:
    """Row and column: the name without its first layer index, and that index."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None or len(parts[at]) > 6:
        return name, ""
    return ".".join([*parts[:at], "*", *parts[at + 1 :]]), str(int(parts[at]))


def _numbers(found: Statistics) -> list[Any]:
    numbers = [found.elements, found.norm, found.rms, found.minimum, found.maximum]
    return [*numbers, found.zeros, found.nan, found.inf, found.negative]


def kind_of(section: ModelInfo) -> str:
    """What the page calls the tensors of a model."""
    return "averaged weights" if section.kind == "ema" else "weights"
