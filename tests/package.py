"""`python -m tests.package [PYTEST ARGUMENTS]`: the package as its users get it, from source archive and wheel.

The wheel is built from the unpacked source archive and installed by pip alone in a new environment, which must say
nothing. The tests of the archive run there against what is installed: the archive's own sources are moved out of their
way, so the tests that read the sources are left out (`READ_SOURCES`). An option of this program:

    --packages FOLDER   site-packages that have torch and the rest, instead of installing the extra `test`
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("optimstate", "hooks", "cli")
READ_SOURCES = (
    "tests/cli/test_bare_install.py",
    "tests/optim/test_size.py",
    "tests/test_architecture.py",
    "tests/test_public_face.py",
    "tests/test_recipes.py",
    "tests/test_docs.py",
    "tests/optim/test_identity.py",
)
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, out: Path) -> Path:
    """The archive (`sdist`) or `wheel` of a source tree."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return out / done.stdout.splitlines()[-1]


def unpacked(archive: Path, out: Path) -> Path:
    """The folder of a source archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


def installed(wheel: Path, folder: Path, packages: Path | None) -> Path:
    """The Python of a new environment with the wheel in it.

    Raises:
        SystemExit: pip warned of something.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if packages is not None:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
    what = [str(wheel), "--no-deps"] if packages is not None else [f"{wheel}[test]"]
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr.strip():
        sys.exit(f"pip: {done.stderr}")
    command = [str(python), "-W", "error", "-m", "optimstate.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode or done.stderr:
        sys.exit(f"optimstate --version: {done.stderr}")
    print(done.stdout.strip(), "from", wheel.name)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.package", allow_abbrev=False)
    parser.add_argument("--packages", type=Path, default=None)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = unpacked(built("sdist", ROOT, work), work)
        python = installed(built("wheel", folder, work), work / "environment", options.packages)
        (folder / "sources").mkdir()
        for name in SOURCES:
            (folder / name).rename(folder / "sources" / name)
        left_out = [f"--ignore={path}" for path in READ_SOURCES]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(python), "-m", "pytest", *left_out, *(rest or ["tests"])]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
