"""Several checkpoints side by side: the history of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from optimstate.surgery.inspection.report import Inspection, ModelInfo, OptimizerInfo
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import plural, shown, size, table

__all__ = ["History"]

_COUNTERS = ("epoch", "global_step", "iteration", "iter_num", "best_acc1", "best_val_loss", "loss")


class History(VerbReport):
    """Inspections of several checkpoints, a line each.

    Attributes:
        checkpoints: In the order that they were given.
    """

    checkpoints: tuple[Inspection, ...]

    VERB = "inspect"

    def _json(self) -> dict[str, Any]:
        return {"checkpoints": self.checkpoints}

    def _lines(self) -> Iterator[str]:
        rows = [_row(found) for found in self.checkpoints]
        columns = [name for name in _COLUMNS if name in _ALWAYS or any(row.get(name) for row in rows)]
        yield table(columns, [[row.get(name, "") for name in columns] for row in rows])
        for found in self.checkpoints:
            yield from (f"{found.path}: warning: names {name}, which would run code" for name in found.dangerous)
        yield f"{plural(len(rows), 'checkpoint')}; give one path alone to see more of it"


_ALWAYS = ("checkpoint", "format", "size", "tensors")
_COLUMNS = (*_ALWAYS, "optimizer", "step", "lr", "weights", "state", *_COUNTERS)


def _row(found: Inspection) -> dict[str, str]:
    optimizers = [section for section in found.sections if isinstance(section, OptimizerInfo)]
    models = [section for section in found.sections if isinstance(section, ModelInfo)]
    rates = list(dict.fromkeys(shown(g.options["lr"]) for o in optimizers for g in o.groups if "lr" in g.options))
    row = {
        "checkpoint": found.path,
        "format": found.format,
        "size": size(found.nbytes),
        "tensors": f"{found.tensors:,}",
        "optimizer": ", ".join(dict.fromkeys(section.algorithm or "unrecognised" for section in optimizers)),
        "step": ", ".join(dict.fromkeys(step for section in optimizers for step in section.steps)),
        "lr": ", ".join(rates[:3]) + (", ..." if len(rates) > 3 else ""),
        "weights": _norm([n.norm for model in models[:1] for n in model.statistics.values()]),
        "state": _norm([n.norm for o in optimizers for p in o.parameters for n in p.statistics.values()]),
    }
    for entry in found.entries:
        name = _last(entry.path)
        if name in _COUNTERS and not row.get(name) and isinstance(entry.value, int | float | str):
            row[name] = shown(entry.value)
    return row


def _last(path: str) -> str:
    """The last key of a path as it is shown: of `state['epoch']` and `epoch` it is `epoch`."""
    return path.rpartition("['")[2].removesuffix("']")


def _norm(norms: Sequence[Any]) -> str:
    known = [norm for norm in norms if norm is not None]
    return f"norm {math.hypot(*known):.4g}" if known else ""
