"""PyTorch's own tests of optimizers against ours: `python -m tests.optim.torchs FOLDER [pytest's arguments]`.

FOLDER is the folder `test` of PyTorch's sources (Debian's source package `pytorch` has it; they are not part of this
project). The tests run twice, with `torch.optim` in their text and with `optimstate.optim`; what fails with ours and
not with torch's is printed, and is the exit status. The options database is the installed release's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DATABASE = Path(torch.__file__).parent / "testing" / "_internal" / "common_optimizers.py"
# Two files have one name, and one imports the tests of the others.
FILES = {
    "test_optim.py": "test_every_optimizer.py",
    "optim/test_optim.py": "test_differentiable.py",
    "optim/test_lrscheduler.py": "test_lrscheduler.py",
    "optim/test_swa_utils.py": "test_swa_utils.py",
}


def rewritten(text: str, library: str) -> str:
    text = text.replace("torch.testing._internal.common_optimizers", "database_here")
    text = re.sub(r"^from optim\.test_\w+ import .*\n", "", text, flags=re.MULTILINE)
    if library != "torch.optim":
        text = re.sub(r"\btorch\.optim\b", library, text)
        text = re.sub(r"^import torch$", f"import torch\nimport {library}", text, count=1, flags=re.MULTILINE)
    return text


def outcomes(source: Path, library: str, folder: Path, arguments: list[str]) -> dict[str, str]:
    """How each test ended with a library in the place of `torch.optim`."""
    folder.mkdir()
    (folder / "database_here.py").write_text(rewritten(DATABASE.read_text(), library))
    for name, copy in FILES.items():
        if (source / name).exists():
            (folder / copy).write_text(rewritten((source / name).read_text(), library))
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", "."]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        check=False,
    )
    return {name: how for how, name in re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)}


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "optim").is_dir():
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = (
            outcomes(Path(sys.argv[1]), library, Path(folder) / library, sys.argv[2:])
            for library in ("torch.optim", "optimstate.optim")
        )
    if not theirs:
        print("no test ran")
        return 2
    failing = [name for name, how in theirs.items() if how != "PASSED"]
    besides = [name for name, how in theirs.items() if how == "PASSED" and ours.get(name) != "PASSED"]
    print(
        f"torch {torch.__version__}: {len(theirs)} tests, torch's own fail {len(failing)}, ours besides {len(besides)}"
    )
    for name in besides:
        print(f"  {name}: {ours.get(name, 'not run')}")
    return int(bool(besides))


if __name__ == "__main__":
    sys.exit(main())
