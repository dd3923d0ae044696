"""The tests on other releases of torch and Python: `python -m tests.matrix [--quick] [--torch 2.6.0 ...]`.

Each release gets an environment of its own, one after the other, with the packages of the extra `test`. What the tests
say is printed as rows of a table, for docs/versions.md, and below it what failed. The whole takes hours, `--quick` some
minutes; `--tests` takes folders or files, for a part at a time, and `--keep` keeps the environments for the next part.
"""

from __future__ import annotations

import argparse
import datetime
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EVERY = ("2.6.0", "2.9.1", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
ENDS = (EVERY[0], EVERY[-1])
LIMIT_S = 3600  # for one folder; the longest takes some ten minutes of one core
# They ask for torch, and pip would look for another one: they come without what they ask for, and that by name. The
# newest of them are tried with every torch; where one cannot be imported, its tests are skipped.
ASK_FOR_TORCH = {
    "accelerate": ("huggingface_hub", "pyyaml"),
    "bitsandbytes": (),
    "lion-pytorch": (),
    "peft": ("tqdm",),
    "pytorch-lightning": ("lightning-utilities",),
    "pytorch_optimizer": (),
    "schedulefree": (),
    "stable-baselines3": ("cloudpickle", "gymnasium"),
    "torch_checkpointing": (),
    "torchao": (),
    "transformers": ("regex", "requests", "tokenizers"),
}
DEEP = {"transformers": "transformers.models.mixtral.modeling_mixtral", "peft": "peft.tuners.lora"}  # imported late
BESIDES = ("torchmetrics",)  # what one of them asks for asks for torch too
LEFT_OUT = {"deepspeed"}  # it is built against the torch that is there, for minutes
# What depends on torch most: what is loaded, what steps, and what the module of releases says.
QUICK = (
    "tests/state", "tests/hooks/test_load.py", "tests/hooks/test_releases.py", "tests/optim/lr_scheduler",
    "tests/optim/test_identity.py", "tests/optim/test_surface.py", "tests/optim/test_errors.py",
    "tests/optim/test_interchange.py", "tests/optim/test_tied.py", "tests/cli/test_without_torch.py",
)  # fmt: skip
TABLE = "| torch | Python | installs | imports | tests | minutes, of CPU | date |\n|---|---|---|---|---|---|---|"


class Given(NamedTuple):
    """What the command line said."""

    out: Path
    wheels: str | None  # an index of them
    make: str | None
    keep: bool
    workers: int
    tests: list[list[str]]  # run one list at a time


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", help=f"releases (default: {' '.join(EVERY)})")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters (default: this one)")
    parser.add_argument("--quick", action="store_true", help="the oldest and the newest release, the telling tests")
    parser.add_argument("--tests", nargs="+", help="files and folders of tests (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes that run tests (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "matrix", help="where environments and logs go")
    parser.add_argument("--index", help="pip's index for torch, such as one of CPU wheels")
    parser.add_argument(
        "--make", help="a program that makes an environment with a torch, called with release, folder and interpreter"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments, and take those that are there")
    words = parser.parse_args()
    if absent := [python for python in words.python if not shutil.which(python)]:
        parser.error(f"no interpreter {', '.join(absent)}")
    words.out.mkdir(parents=True, exist_ok=True)
    tests = [list(QUICK)] if words.quick else [[test] for test in words.tests or ()] or whole()
    given = Given(words.out.resolve(), words.index, words.make, words.keep, words.workers, tests)
    print(TABLE, flush=True)
    failures = {
        f"{release}, {python}": failed
        for release in words.torch or (ENDS if words.quick else EVERY)
        for python in words.python
        if (failed := row(release, python, given))
    }
    for where, failed in failures.items():
        print(f"\n{where}:", *failed, sep="\n  ")
    return int(bool(failures))


def whole() -> list[list[str]]:
    """Every folder of tests, and the files beside them."""
    folders = {path.parent for path in (ROOT / "tests").glob("*/**/test_*.py")}
    tops = {path.relative_to(ROOT / "tests").parts[0] for path in folders}
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    return [*([f"tests/{top}"] for top in sorted(tops)), files]


def row(release: str, python: str, given: Given) -> list[str]:
    """Print one row; what failed."""
    date = datetime.date.today().isoformat()
    version = run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).stdout.strip()
    folder = given.out / f"torch-{release}-python{version}"
    started, spent = time.monotonic(), cpu_seconds()
    if not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    if problem := made(release, python, folder, given):
        print(f"| {release} | {version} | no: {problem} | | | | {date} |", flush=True)
        return [f"no environment: {problem}"]
    interpreter = folder / "bin" / "python"
    lacking = furnished(interpreter)
    imported = run([interpreter, "-W", "error", "-c", IMPORTS])
    failed = [] if imported.returncode == 0 else [imported.stdout.strip() or imported.stderr.strip()[-500:]]
    counts: Counter[str] = Counter()
    log = folder.with_suffix(folder.suffix + ".log")
    log.write_text("")
    for tests in given.tests:
        if some := [test for test in tests if (ROOT / test).exists() and covered(test, release)]:
            failed += tested(interpreter, some, given.workers, log, counts)
    minutes = f"{(time.monotonic() - started) / 60:.0f}, {(cpu_seconds() - spent) / 60:.0f}"
    told = ", ".join(f"{counts[how]:,} {how}" for how in ("passed", "failed", "skipped", "error") if counts[how])
    installs = "yes" + (f", without {', '.join(lacking)}" if lacking else "")
    print(
        f"| {release} | {version} | {installs} | {imported.stdout.strip()} | {told} | {minutes} | {date} |", flush=True
    )
    if not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return failed


def tested(interpreter: Path, tests: list[str], workers: int, log: Path, counts: Counter[str]) -> list[str]:
    """Run some tests, and count how they ended; which failed."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command: list[str | Path] = [interpreter, *words]
    command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    try:
        done = run([*command, *tests], limit=LIMIT_S)
    except subprocess.TimeoutExpired:
        return [f"{' '.join(tests)}: stopped after {LIMIT_S} s"]
    with log.open("a") as output:
        output.write(done.stdout + done.stderr)
    end = done.stdout.strip().splitlines()[-1:]
    counts.update({how: int(count) for count, how in re.findall(r"(\d+) (passed|failed|skipped|error)", "".join(end))})
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 5) and not failed:  # 5: there was none to run
        failed = [f"{' '.join(tests)}: pytest ended with {done.returncode}; see {log}"]
    return failed


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


def made(release: str, python: str, folder: Path, given: Given) -> str:
    """Make an environment with this torch, unless it is there; what went wrong."""
    if (folder / "bin").is_dir():
        return ""
    index = ["--index-url", given.wheels] if given.wheels else []
    get_torch: list[str | Path] = [*pip(folder / "bin" / "python"), f"torch=={release}", *index]
    by_program: list[str | Path] = [*shlex.split(given.make or ""), release, folder, python]
    steps = [by_program] if given.make else [[python, "-m", "venv", folder], get_torch]
    for step in steps:
        done = run(step)
        if done.returncode:
            return ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1][:200]
    return ""


def furnished(interpreter: Path) -> list[str]:
    """Give an environment this checkout and what its tests need; which packages cannot be had there."""
    site = run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
    (Path(site) / "optimstate-checkout.pth").write_text(f"{ROOT}\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    wanted = [*project["dependencies"], *extras["remote"], *extras["xxh3"], *extras["test"], *build, "psutil"]
    lacking: list[str] = []
    plain: list[str] = []
    bound: list[str] = []
    for requirement in wanted:
        name = re.split(r"[^\w-]", requirement)[0]
        if name not in {*LEFT_OUT, project["name"]}:
            (bound if name in ASK_FOR_TORCH else plain).append(requirement)
    plain += [name for names in ASK_FOR_TORCH.values() for name in names]
    for some, how in ((plain, ()), ([*bound, *BESIDES], ("--no-deps",))):
        install: list[str | Path] = [*pip(interpreter), *how]
        if run([*install, *some]).returncode:
            lacking += [one for one in some if run([*install, one]).returncode]
    for name in ASK_FOR_TORCH:
        module = DEEP.get(name, name.replace("-", "_"))
        if run([interpreter, "-c", f"import {module}"]).returncode:  # of a newer torch than is there
            run([interpreter, "-m", "pip", "uninstall", "--quiet", "--yes", name])
            lacking.append(name)
    return lacking


def pip(interpreter: Path) -> list[str | Path]:
    return [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-warn-conflicts"]


def run(command: Sequence[str | Path], *, limit: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)


def cpu_seconds() -> float:
    """What the processes that ended have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
