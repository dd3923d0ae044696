"""Fuzzing: `python -m tests.fuzz readers|verbs [--runs 1000000] [--seconds 600]`; needs `optimstate[fuzz]` (atheris).

`readers` opens, looks into and scans mutated bytes of every container, guided by what of the code they reach. `verbs`
builds checkpoints of random trees, changes some of their bytes and runs commands on them. An exception that is not of
optimstate, a run of more than 2 CPU seconds or more than 512 MB is reported, and the input is in `tests/fuzz/found`,
where the suite runs it ever after.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.targets import FOUND, read_anything, run_verbs

MEGABYTES = 512
SECONDS = 2


def seeds() -> Iterator[bytes]:
    """Small files of every container."""
    from tests.corpus import FILES

    for number, path in enumerate(sorted(FILES.rglob("*"))):
        if path.is_file() and path.stat().st_size < 20_000 and path.suffix != ".json":
            yield bytes([number % 256]) + path.read_bytes()


def fuzz_readers(runs: int, seconds: int) -> None:
    """Guided by coverage, until an input is wrong; the library ends the process."""
    import atheris

    with atheris.instrument_imports(include=["optimstate"]):
        import optimstate.formats.registry
        import optimstate.formats.unpickled
        import optimstate.surgery.inspecting  # noqa: F401

    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(seeds()):
        (corpus / str(number)).write_bytes(data)
    words = [f"-runs={runs}", f"-max_total_time={seconds}", f"-timeout={SECONDS + 8}", "-max_len=20000"]
    words += [f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={FOUND}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *words, str(corpus)], read_anything)
    atheris.Fuzz()


def fuzz_verbs(runs: int, seconds: int) -> int:
    """Random trees; the number of inputs that were wrong."""
    run_verbs(0)  # what is imported late is imported now
    end = time.monotonic() + seconds
    wrong = done = 0
    for seed in range(runs):
        if time.monotonic() > end:
            break
        done += 1
        wrong += not _is_fine(lambda seed=seed: run_verbs(seed), f"verbs-{seed}", str(seed).encode())  # type: ignore[misc]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{done} inputs, {wrong} wrong, at most {peak} MB", flush=True)
    return wrong + (peak > 2 * MEGABYTES)  # torch alone takes half of it


def _is_fine(run: Callable[[], object], name: str, data: bytes) -> bool:
    begun = time.process_time()
    try:
        run()
        told = "" if time.process_time() - begun < SECONDS else "takes more than two CPU seconds"
    except Exception as error:  # noqa: BLE001
        told = f"{type(error).__name__}: {str(error)[:200]}"
    if told:
        print(f"{name}: {told}", flush=True)
        (FOUND / name).write_bytes(data)
    return not told


def main() -> int:
    """Fuzz, and say how much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["readers", "verbs"])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=3600)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    random.seed(0)
    if options.what == "readers":
        fuzz_readers(options.runs, options.seconds)
        return 0
    return min(fuzz_verbs(options.runs, options.seconds), 1)


if __name__ == "__main__":
    sys.exit(main())
