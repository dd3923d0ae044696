"""What a load hook costs: `load_state_dict` through ours, without any, and through the documentation's recipe.

    python -m tests.bench --only hooks [--quick]

All take turns on the same dict, in one process with one thread. Every load goes into a new optimizer. Misses are
marked; nothing is asserted, because a clock is no test.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from optimstate import hooks
from tests.bench._harness import MB, Row, Spread, print_table
from tests.hooks.recipes import names_matching

StateDict = dict[str, Any]
Hook = Callable[..., Any]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KILOBYTE = 1024


def memory(field: str) -> int | None:
    """`VmRSS` or `VmHWM` of this process in bytes; None where the system does not tell."""
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * KILOBYTE


class Loading:
    """A dict to load, and parameters to load it for.

    Args:
        shapes: Of the parameters; their values are never looked at.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.names = [f"blocks.{n}.weight" for n in range(len(shapes))]
        self.parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        self.saved = self.optimizer().state_dict()
        self.saved["state"] = {
            key: {"step": torch.tensor(3.0), "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}
            for key, shape in enumerate(shapes)
        }

    @property
    def nbytes(self) -> int:
        """The size of the state."""
        return sum(value.nbytes for slots in self.saved["state"].values() for value in slots.values())

    def optimizer(self, rename: Callable[[str], str] = str) -> torch.optim.Optimizer:
        """A new one without state."""
        return torch.optim.AdamW(list(zip(map(rename, self.names), self.parameters, strict=True)))

    def run(self, hook: Hook | None, rename: Callable[[str], str] = str) -> tuple[float, int | None]:
        """Seconds, and bytes of memory beyond what was in use, of one load."""
        optimizer = self.optimizer(rename)
        if hook is not None:
            optimizer.register_load_state_dict_pre_hook(hook)
        gc.collect()
        if RESET.exists():
            RESET.write_text("5")
        before = memory("VmRSS")
        start = time.perf_counter()
        optimizer.load_state_dict(self.saved)
        seconds = time.perf_counter() - start
        peak = memory("VmHWM")
        assert len(optimizer.state) == len(self.names)
        return seconds, None if before is None or peak is None else max(0, peak - before)


def prefixed(name: str) -> str:
    return f"model.{name}"


def large(quick: bool) -> None:
    """An AdamW of 365 million parameters (4 million with `quick`)."""
    loading = Loading([(2048, 2048)] * (1 if quick else 87))
    loading.run(hooks.match_names())
    rounds = 1 if quick else 5
    ours = [loading.run(hooks.match_names()) for _ in range(rounds)]
    plain = [loading.run(None) for _ in range(rounds)]
    renamed = [loading.run(hooks.rename({"blocks": "model.blocks"}), prefixed) for _ in range(rounds)]
    theirs = [loading.run(names_matching) for _ in range(1 if quick else 2)]
    extra = [(a[0] - b[0]) * 1e3 for a, b in zip(ours, plain, strict=True)]
    recipe = Spread.of([seconds for seconds, _ in theirs])
    rows = [
        Row("match_names beyond no hook", Spread.of(extra), 10.0, "ms"),
        Row("match_names / the recipe", Spread.of([seconds / recipe.median for seconds, _ in ours]), 0.01),
        Row("rename / the recipe", Spread.of([seconds / recipe.median for seconds, _ in renamed])),
        Row("the recipe", recipe, None, "s"),
    ]
    peaks = [peak for _, peak in ours if peak is not None]
    if peaks:
        rows.append(Row("match_names: extra memory / state", Spread.of([p / loading.nbytes for p in peaks]), 0.01))
        said = [peak for _, peak in theirs if peak is not None]
        rows.append(Row("the recipe: extra memory / state", Spread.of([peak / loading.nbytes for peak in said])))
    print_table(f"hooks on {loading.nbytes / MB:,.0f} MB of AdamW state in {len(loading.names)} parameters", rows)


def many(quick: bool) -> None:
    """20,000 parameters (2,000 with `quick`), where torch looks for each tensor's parameter from the beginning."""
    loading = Loading([(4,)] * (2_000 if quick else 20_000))
    loading.run(hooks.match_names())
    rounds = 1 if quick else 3
    ours = [loading.run(hooks.match_names())[0] for _ in range(rounds)]
    renamed = [loading.run(hooks.rename({"blocks": "model.blocks"}), prefixed)[0] for _ in range(rounds)]
    plain = Spread.of([loading.run(None)[0] for _ in range(1 if quick else 2)])
    rows = [
        Row("match_names / no hook", Spread.of([seconds / plain.median for seconds in ours]), 0.1),
        Row("rename / no hook", Spread.of([seconds / plain.median for seconds in renamed]), 0.1),
        Row("match_names", Spread.of(ours), None, "s"),
        Row("no hook", plain, None, "s"),
    ]
    print_table(f"hooks on {len(loading.names):,} parameters", rows)


def main(quick: bool) -> None:
    """Print the tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        large(quick)
        many(quick)
    finally:
        torch.set_num_threads(threads)
