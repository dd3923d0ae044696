"""Fuzzing: `python -m tests.fuzz readers|verbs [--runs 1000000] [--seconds 3600] [--record FILE]`.

`readers` opens, looks into or scans mutated bytes of a container, guided by what of the code they reach; it needs
`optimstate[fuzz]` (atheris). `verbs` builds checkpoints of random trees, changes some of their bytes and runs a command
on each. An exception that is not of optimstate, a warning, an input of more than 2 CPU seconds or more than 512 MB is
reported, and kept in `tests/fuzz/found`, where the suite runs it ever after.

The inputs are tried in processes of 25,000; what each did is a line of the record, and a run that is begun again with
the same record goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

from tests.fuzz.inputs import understood
from tests.fuzz.targets import FOUND, VERBS, read_anything, run_verbs

MEGABYTES = 512
SECONDS = 2
CHUNK = 25_000


# --- one process ----------------------------------------------------------------------------------------------------


def fuzz_readers(runs: int, seed: int, corpus: Path) -> None:
    """Guided by coverage; the library ends the process."""
    import atheris  # type: ignore[import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["optimstate.formats"]):
        from optimstate import formats

        for module in walk_packages(formats.__path__, "optimstate.formats."):
            import_module(module.name)

    def read(data: bytes) -> None:
        _judge(lambda: read_anything(understood(data)), f"readers-{hashlib.sha256(data).hexdigest()[:12]}", data)

    words = [f"-runs={runs}", f"-seed={seed}", "-timeout=120", "-max_len=2600", f"-rss_limit_mb={MEGABYTES}"]
    words += [f"-artifact_prefix={FOUND}/readers-", "-print_final_stats=1", "-verbosity=0", "-reload=0"]
    atheris.Setup([sys.argv[0], *words, str(corpus)], read)
    atheris.Fuzz()


def fuzz_verbs(runs: int, first: int) -> None:
    """Random trees, one command each."""
    run_verbs(0)  # what is imported late is imported now
    for seed in range(first, first + runs):
        name = f"verbs-{seed}"
        _judge(lambda seed=seed: run_verbs(seed, VERBS[seed % len(VERBS) :][:1]), name, str(seed).encode())  # type: ignore[misc]
    print(f"stat::number_of_executed_units: {runs}\nstat::peak_rss_mb: {_peak}", flush=True)


_peak = 0


def _judge(run: Callable[[], object], name: str, data: bytes) -> None:
    global _peak
    begun = time.process_time()
    told = ""
    try:
        run()
    except Exception as error:  # noqa: BLE001
        told = f"{type(error).__name__}: {str(error)[:200]}"
    if time.process_time() - begun > SECONDS:
        told = f"takes {time.process_time() - begun:.1f} CPU seconds"
    before, _peak = _peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if before <= MEGABYTES < _peak:
        told = f"takes {_peak} MB"
    if told:
        print(f"wrong {name}: {told}", flush=True)
        (FOUND / name).write_bytes(data)


# --- all of them ----------------------------------------------------------------------------------------------------


def chunk(what: str, runs: int, number: int, corpus: Path) -> dict[str, Any]:
    """Try so many inputs in a process of their own, and say what came of it."""
    words = [what, "--chunk", str(number), "--runs", str(runs), "--corpus", str(corpus)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wrong = re.findall(r"^wrong .*$|^==\d+== ?ERROR.*$", done.stdout, re.MULTILINE)
    inputs, peak = (
        int(found[1]) if found else 0
        for found in (
            re.search(rf"stat::{name}: +(\d+)", done.stdout) for name in ("number_of_executed_units", "peak_rss_mb")
        )
    )
    if done.returncode and not wrong:
        wrong = [f"the process ended with {done.returncode}: {done.stdout[-500:]}"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"chunk": number, "inputs": inputs, "wrong": wrong, "cpu": round(cpu, 1), "MB": peak}


def fuzz(what: str, runs: int, seconds: int, record: Path) -> int:
    """Go on with a record until it has that many inputs; the number of inputs that were wrong."""
    end = time.monotonic() + seconds
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    corpus = record.with_name(f"{record.name}.corpus")
    if what == "readers" and not corpus.exists():
        corpus.mkdir()
        subprocess.run([sys.executable, "-m", "tests.fuzz.inputs", str(corpus)], check=True)
    while (left := runs - sum(line["inputs"] for line in lines)) > 0 and time.monotonic() < end:
        lines.append(chunk(what, min(CHUNK, left), len(lines), corpus))
        with record.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        for text in lines[-1]["wrong"]:
            print(text, flush=True)
        if not lines[-1]["inputs"]:
            break
    wrong = sum(len(line["wrong"]) for line in lines)
    inputs, cpu, peak = (f([line[key] for line in lines]) for f, key in ((sum, "inputs"), (sum, "cpu"), (max, "MB")))
    print(f"{inputs} inputs in {cpu:.0f} CPU seconds, at most {peak} MB: {wrong} wrong")
    return wrong


def main() -> int:
    """Fuzz, and say how much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["readers", "verbs"])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--record", type=Path, help="a file of lines, one for each process; a temporary one without")
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.chunk is None:
        record = options.record or Path(tempfile.mkdtemp()) / "record"
        return min(fuzz(options.what, options.runs, options.seconds, record), 1)
    warnings.simplefilter("error")
    if options.what == "readers":
        fuzz_readers(options.runs, options.chunk + 1, options.corpus)
    else:
        fuzz_verbs(options.runs, CHUNK * options.chunk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
