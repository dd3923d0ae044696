"""`pip install .` into an environment without torch: the commands that need none work there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
RENAMED = "body.{i}.{p}=layers.{i}.{p}"


def requirements(name: str) -> set[str]:
    """A distribution that is installed here and all that it requires without extras."""
    found = {name}
    for line in distribution(name).requires or ():
        wanted = re.match(r"[\w.-]+", line)
        if wanted and "extra ==" not in line and wanted[0] not in found:
            try:
                found |= requirements(wanted[0])
            except PackageNotFoundError:  # another platform's
                continue
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the built package, what it requires, and no torch."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", symlinks=True)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("optimstate", "hooks", "cli"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--no-compile", "--target", site, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in requirements("typer") | requirements("rich"):
        for top in {file.parts[0] for file in distribution(name).files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return folder / "env/bin/python"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    named = [(f"body.{i}.weight", nn.Parameter(torch.randn(3 + i, 4))) for i in range(3)]
    optimizer = torch.optim.AdamW(named)
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save({"model": {n: p.detach() for n, p in named}, "optimizer": optimizer.state_dict()}, folder / "a.pt")
    return folder


def run(python: Path, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | {"COLUMNS": "100"}
    command = [python, "-W", "error", *words]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, env=environment)


def test_there_is_no_torch_and_the_package_is_small(python: Path, place: Path) -> None:
    done = run(python, place, "-c", "import optimstate, sys; print(optimstate.__file__); import torch")
    assert "No module named 'torch'" in done.stderr
    assert "site-packages/optimstate/__init__.py" in done.stdout
    installed = next(python.parents[1].glob("lib/python*/site-packages/optimstate"))
    assert sum(file.stat().st_size for file in installed.rglob("*") if file.is_file()) < 6 << 20


def test_commands_work_one_after_another(python: Path, place: Path) -> None:
    for words in (
        "inspect a.pt",
        f"remap a.pt renamed.pt --rename {RENAMED} --plan-out plan.toml",
        "diff a.pt renamed.pt --headers",
        "diff a.pt a.pt",
        "convert renamed.pt renamed.safetensors",
        "inspect renamed.safetensors --json",
        "scan a.pt",
        "plan check plan.toml a.pt",
        "plan suggest a.pt renamed.pt",
        "verify renamed.pt --against a.pt --plan plan.toml",
    ):
        done = run(python, place, "-m", "optimstate", *words.split())
        assert done.returncode in ((1,) if "--headers" in words else (0,)), (words, done.stdout, done.stderr)
    state = torch.load(place / "renamed.pt", weights_only=True)
    assert list(state["model"]) == [f"layers.{i}.weight" for i in range(3)]
    assert state["optimizer"]["param_groups"][0]["param_names"] == list(state["model"])


def test_what_needs_torch_says_how_to_get_it(python: Path, place: Path) -> None:
    done = run(python, place, "-m", "optimstate", "inspect", "a.pt", "--stats")
    assert done.returncode == 7
    assert "pip install 'optimstate[torch]'" in done.stderr
    done = run(python, place, "-c", "import optimstate.optim")
    assert "MissingTorchError" in done.stderr


def test_a_wheel_has_every_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "optimstate").rglob("__init__.py")}
    outside = {
        path.parent.relative_to(ROOT) for name in ("hooks", "cli") for path in (ROOT / name).rglob("__init__.py")
    }
    packages = {".".join(folder.parts) for folder in folders} | {".".join(("optimstate", *f.parts)) for f in outside}
    assert set(setup["packages"]) == packages
