"""The tests on other releases of torch and Python: `python -m tests.matrix [--quick] [--torch 2.6.0 ...]`.

Each release gets an environment of its own, one after the other, with the packages of the tests that ask for no torch.
What the tests say is printed as rows of a table, for docs/versions.md. The whole takes hours, `--quick` some minutes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVERY = ("2.6.0", "2.9.1", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
ENDS = (EVERY[0], EVERY[-1])
PACKAGES = (
    "pytest>=9",
    "pytest-xdist>=3.8",
    "hypothesis>=6.150",
    "safetensors>=0.8",
    "numpy>=2",
    "psutil",
    "typer",
    "rich",
)
# Third-party optimizers and frameworks want releases of torch of their own; tests that need them are skipped.
WHOLE = (
    "tests/io",
    "tests/tensors",
    "tests/state",
    "tests/plan",
    "tests/surgery",
    "tests/hooks",
    "tests/optim",
    "tests/cli",
)
# What depends on torch most: what is loaded, what steps, and what the module of releases says.
QUICK = (
    "tests/state", "tests/hooks/test_load.py", "tests/hooks/test_releases.py", "tests/optim/lr_scheduler",
    "tests/optim/test_identity.py", "tests/optim/test_surface.py", "tests/optim/test_errors.py",
    "tests/optim/test_interchange.py", "tests/optim/test_tied.py", "tests/cli/test_without_torch.py",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--torch", nargs="+", help=f"releases (default: {' '.join(EVERY)})")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters (default: this one)")
    parser.add_argument("--quick", action="store_true", help="the oldest and the newest release, the telling tests")
    parser.add_argument("--out", type=Path, default=ROOT / "matrix", help="where environments and logs go")
    parser.add_argument("--index", help="pip's index for torch, such as one of CPU wheels")
    parser.add_argument(
        "--make", help="a program that makes an environment with a torch, called with release, folder and interpreter"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments, and take those that are there")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tests = QUICK if given.quick else WHOLE
    failed = 0
    print("| torch | Python | installs | imports | tests | date |\n|---|---|---|---|---|---|", flush=True)
    for release in given.torch or (ENDS if given.quick else EVERY):
        for python in given.python:
            failed += row(release, python, tests, given)
    return int(failed > 0)


def row(release: str, python: str, tests: tuple[str, ...], given: argparse.Namespace) -> bool:
    """Print one row; whether anything in it failed."""
    folder = given.out / f"torch-{release}-{Path(python).name}"
    if not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    date = datetime.date.today().isoformat()
    started, spent = time.monotonic(), cpu_seconds()
    made, log = installed(release, python, folder, given)
    if not made:
        print(f"| {release} | {python} | no: {log} | | | {date} |", flush=True)
        return True
    interpreter = folder / "bin" / "python"
    version = run([interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).stdout.strip()
    imported = run([interpreter, "-W", "error", "-c", IMPORTS])
    log_file = given.out / f"torch-{release}-{version}.log"
    with log_file.open("w") as output:
        present = [test for test in tests if (ROOT / test).exists() and covered(test, release)]
        command = [
            interpreter,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            *present,
        ]
        code = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=output, check=False
        ).returncode
    found = re.findall(r"^=*\s*(\d+ (?:passed|failed).*?) in ", log_file.read_text(), re.MULTILINE)
    minutes = (time.monotonic() - started) / 60
    told = f"{found[-1] if found else 'none ran'} ({minutes:.0f} min, {(cpu_seconds() - spent) / 60:.0f} of CPU)"
    print(f"| {release} | {version} | yes | {imported.stdout.strip()} | {told} | {date} |", flush=True)
    if not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return code != 0 or imported.returncode != 0


def covered(test: str, release: str) -> bool:
    """Whether a test speaks of a release: `optimstate.optim` is held against torch from 2.9 on."""
    return not test.startswith("tests/optim") or tuple(map(int, release.split(".")[:2])) >= (2, 9)


IMPORTS = """
import importlib, pkgutil, optimstate
names = [i.name for i in pkgutil.walk_packages(optimstate.__path__, "optimstate.") if not i.name.endswith("__main__")]
bad, others = [], []  # of ours or torch's; of packages that are not there
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        (bad if top in ("optimstate", "torch") else others).append(f"{name}: {error}")
    except Exception as error:
        bad.append(f"{name}: {error!r}")
modules = f"{len(names) - len(bad) - len(others)} of {len(names) - len(others)}"
print("; ".join([modules, *bad, *([f"{len(others)} ask for other packages"] if others else [])]))
raise SystemExit(bool(bad))
"""


def installed(release: str, python: str, folder: Path, given: argparse.Namespace) -> tuple[bool, str]:
    """An environment with this torch and what the tests need; and what went wrong."""
    steps: list[list[str]] = []
    there = (folder / "bin").is_dir()
    if given.make and not there:
        steps = [[*shlex.split(given.make), release, str(folder), python]]
    elif not there:
        index = ["--index-url", given.index] if given.index else []
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        steps = [[python, "-m", "venv", str(folder)], [*pip, f"torch=={release}", *index]]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
    for step in [*steps, [*pip, *PACKAGES]]:
        done = run(step)
        if done.returncode:
            return False, (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return True, ""


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def cpu_seconds() -> float:
    """What the processes that ended have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


if __name__ == "__main__":
    sys.exit(main())
