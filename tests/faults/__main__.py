"""Kills and faults at the moments of commands that write: the destination is old or new, and nothing is left behind.

`python -m tests.faults [--most N] [--kinds kill,enospc] [SCENARIO ...]`; needs Linux, a C compiler and torch.

The commands run in forked children under `faults.c`, which numbers the calls that change files. After every fault: the
sources are unchanged, the destination is what it was or what the command makes (its own library reads both), no
temporary file is left but by a kill, and after a kill none is left by the next run; the exit code is a documented one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.scenarios import SCENARIOS

KINDS = ("kill", "enospc", "edquot", "eio", "read", "short", "eintr", "sigint", "sigterm", "sighup")


def compiled(folder: Path) -> Path:
    """The library that is loaded in front of the C library."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run(folder: Path, scenarios: list[str], kinds: list[str], most: int) -> tuple[Counter[str], list[str]]:
    """How many faults of each kind there were, and what was wrong after them."""
    library = compiled(folder)
    words = ["--folder", str(folder / "work"), "--most", str(most), "--kinds", ",".join(kinds), *scenarios]
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAULTS": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.scenarios", *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    counts: Counter[str] = Counter()
    wrong = [] if done.returncode == 0 else [f"the harness ended with {done.returncode}"]
    for line in done.stdout.splitlines():
        what, _, rest = line.partition(" ")
        if what == "count":
            kind, number = rest.split()
            counts[kind] += int(number)
        elif what == "wrong":
            wrong.append(rest)
    return counts, wrong


def main() -> int:
    """Print what was wrong and how many faults there were."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; all without")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--most", type=int, default=24, help="moments of each scenario and kind of fault")
    options = parser.parse_args()
    unknown = {*options.scenarios} - SCENARIOS.keys() | {*options.kinds.split(",")} - {*KINDS}
    if unknown:
        parser.error(f"not known: {', '.join(sorted(unknown))}")
    folder = Path(tempfile.mkdtemp())
    try:
        counts, wrong = run(folder, options.scenarios or list(SCENARIOS), options.kinds.split(","), options.most)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in wrong:
        print(line)
    listed = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    print(f"{sum(counts.values())} faults ({listed}): {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
