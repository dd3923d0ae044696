"""Paired measurements of whole processes, and the tables they are printed in.

Two commands run alternately, A B A B …, and are compared pair by pair: on a machine that others use too, a ratio of
neighbours in time says more than two averages. Medians are printed with the smallest and the largest ratio beside them.
Nothing here asserts a time; only a command that fails is an error.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LAUNCHER = Path(__file__).with_name("_launch.py")
MB = 1_000_000


class CommandError(RuntimeError):
    """A measured command failed; the message has its exit code and the end of what it said."""


@dataclass(frozen=True)
class Run:
    """What one process took: seconds of wall time and of CPU (user and system), bytes of peak memory; what it said."""

    wall: float
    cpu: float
    peak: int
    said: str = ""


@dataclass(frozen=True)
class Job:
    """A command to measure.

    `prepare` runs before it and `check`, which is given what the command printed, after it, both outside the timing;
    then every path of `outputs` is removed. A check raises CommandError where the command did not do its work.
    """

    name: str
    command: Sequence[str]
    outputs: Sequence[Path] = ()
    prepare: Callable[[], None] = field(default=lambda: None)
    check: Callable[[str], None] = field(default=lambda said: None)


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """The spread of at least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True)
class Comparison:
    """Runs of two jobs, one of each to a pair."""

    ours: Sequence[Run]
    peer: Sequence[Run]

    @property
    def wall(self) -> Spread:
        """Our wall time over the peer's, pair by pair."""
        return Spread.of([a.wall / b.wall for a, b in zip(self.ours, self.peer, strict=True)])

    @property
    def cpu(self) -> Spread:
        """Our CPU time over the peer's, pair by pair."""
        return Spread.of([a.cpu / b.cpu for a, b in zip(self.ours, self.peer, strict=True)])

    @property
    def peak(self) -> float:
        """The largest peak memory of our runs, in MB."""
        return max(run.peak for run in self.ours) / MB

    @property
    def peer_peak(self) -> float:
        """The largest peak memory of the peer's runs, in MB."""
        return max(run.peak for run in self.peer) / MB

    def beyond(self, start: Sequence[Run]) -> Spread:
        """Our wall time less that of a run that only starts up (the median of `start`), over the peer's."""
        floor = statistics.median(run.wall for run in start)
        return Spread.of([max(0.0, a.wall - floor) / b.wall for a, b in zip(self.ours, self.peer, strict=True)])


def run_once(command: Sequence[str]) -> Run:
    """Run a command from the repository's root, with one thread and no colours; what it took.

    Peak memory never reads less than the launcher's own, about 10 MB.

    Raises:
        CommandError: It exited with another code than 0.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed tool is not compiled at each start
    with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as said:
        subprocess.run(
            [sys.executable, "-I", "-S", str(LAUNCHER), str(report.fileno()), *command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=ROOT,
            env=environment,
            pass_fds=[report.fileno()],
            check=False,
        )
        report.seek(0)
        said.seek(0)
        line = report.read()
        text = said.read().decode(errors="replace").strip()
    if not line:
        raise CommandError(f"{command[0]} could not be started: {text}")
    wall, cpu, peak, code = json.loads(line)
    if code != 0:
        raise CommandError(f"exit code {code} from: {' '.join(command)}\n{text[-2000:]}")
    return Run(wall, cpu, peak, text)


def run_job(job: Job, *, settle: bool = False) -> Run:
    """Prepare, measure, check, clean up; with `settle`, first let the disk take what earlier runs wrote."""
    job.prepare()
    if settle:
        os.sync()
    try:
        run = run_once(job.command)
        job.check(run.said)
    finally:
        for path in job.outputs:
            path.unlink(missing_ok=True)
    return run


def compare(ours: Job, peer: Job, *, pairs: int, warm_up: int = 1, settle: bool = False, around: int = 0) -> Comparison:
    """Measure two jobs alternately, after unmeasured runs of both that fill the page cache.

    With `around`, each of our runs is the median one of so many before and after the peer's: for a peer that takes
    so long that the machine changes its pace meanwhile.
    """
    for _ in range(warm_up):
        for job in (ours, peer):
            run_job(job)
    pair = [*[ours] * max(around, 1), peer, *[ours] * around]
    measured = []
    for _ in range(pairs):
        runs = [run_job(job, settle=settle) for job in pair]
        theirs = runs.pop(max(around, 1))
        measured.append((sorted(runs, key=lambda run: run.wall)[len(runs) // 2], theirs))
    return Comparison([a for a, _ in measured], [b for _, b in measured])


def copy_job(source: Path, target: Path) -> Job:
    """`cp` that really copies: what every stream of a whole file is measured against."""
    return Job("cp", ["cp", "--reflink=never", str(source), str(target)], outputs=[target])


def durable_copy_job(source: Path, target: Path) -> Job:
    """The same, and the copy is on the disk before it ends, as it is when the tool reports success."""
    script = 'cp --reflink=never "$1" "$2" && sync "$2"'
    return Job("cp and sync", ["sh", "-c", script, "sh", str(source), str(target)], outputs=[target])


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, how it came out, and what it should be at most (None: no target)."""

    what: str
    measured: Spread | float
    target: float | None = None
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """`ok`, `MISS`, or nothing where there is no target."""
        if self.target is None:
            return ""
        value = self.measured.median if isinstance(self.measured, Spread) else self.measured
        return "ok" if value <= self.target else "MISS"

    def cells(self) -> tuple[str, str, str, str]:
        """The four texts of the line."""
        value = str(self.measured) if isinstance(self.measured, Spread) else f"{self.measured:.0f}"
        target = "" if self.target is None else f"<= {self.target:.3g}"
        return self.what, target, f"{value} {self.unit}", self.verdict


def standard_rows(name: str, comparison: Comparison, *, wall: float | None, peak: float | None) -> list[Row]:
    """Wall, CPU and memory of a comparison; targets for the first and the last."""
    return [
        Row(f"{name}: wall", comparison.wall, wall),
        Row(f"{name}: cpu", comparison.cpu),
        Row(f"{name}: peak memory (peer's {comparison.peer_peak:.0f})", comparison.peak, peak, "MB"),
    ]


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print rows in aligned columns."""
    lines = [("", "target", "median (min-max)", ""), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    print(f"\n{title}")
    for line in lines:
        print(
            "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True
        )
