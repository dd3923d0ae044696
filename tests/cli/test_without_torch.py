"""What needs no torch works where there is none; what does ends with one sentence, a hint and exit code 7."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

WITHOUT = "import sys; sys.modules['torch'] = None; from optimstate.cli.app import run; sys.exit(run())"
RENAMED = "blocks.{i}.{p}=layers.{i}.{p}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    for name, steps, named in (("a.pt", 1, True), ("b.pt", 2, True), ("anonymous.pt", 1, False)):
        torch.manual_seed(0)
        pairs = [(f"blocks.{i}.weight", nn.Parameter(torch.randn(3 + i, 4))) for i in range(3)]
        optimizer = torch.optim.AdamW(pairs if named else [p for _, p in pairs], lr=1e-3)
        for _ in range(steps):
            for _, p in pairs:
                p.grad = torch.randn_like(p)
            optimizer.step()
        model = {name: p.detach() for name, p in pairs}
        torch.save({"model": model, "optimizer": optimizer.state_dict()}, folder / name)
    run(folder, "remap", "a.pt", "renamed.pt", "--rename", RENAMED, "--plan-out", "plan.toml")
    return folder


def run(folder: Path, *words: str, code: str = WITHOUT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *words]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    "words",
    [
        "inspect a.pt",
        "inspect a.pt --json --params",
        "diff a.pt a.pt",
        "diff a.pt renamed.pt --headers",
        f"remap a.pt new.pt --rename {RENAMED} -f",
        "remap a.pt new.pt --drop blocks.2.{p} -f",
        "convert a.pt new.safetensors -f",
        "scan a.pt",
        "plan suggest a.pt renamed.pt",
        "plan check plan.toml a.pt",
        "plan show plan.toml a.pt",
        "plan invert plan.toml a.pt",
        "name anonymous.pt named.pt -f",
        "verify a.pt --no-numbers",
        "verify renamed.pt --against a.pt --plan plan.toml",
        "--help",
        "--version",
    ],
)
def test_what_needs_no_torch_says_the_same_without_it(place: Path, words: str) -> None:
    done = run(place, *words.split())
    assert done.returncode in (0, 1), done.stderr
    with_it = run(place, *words.split(), code=WITHOUT.replace("sys.modules['torch'] = None; ", ""))
    assert (done.returncode, done.stdout, done.stderr) == (with_it.returncode, with_it.stdout, with_it.stderr)


@pytest.mark.parametrize(
    "words",
    [
        "verify a.pt",
        "diff a.pt b.pt",
        "inspect a.pt --stats",
        "convert a.pt new.pt --dtype model=bfloat16 -f",
        "demo --out demo",
    ],
)
def test_what_needs_torch_says_so(place: Path, words: str) -> None:
    done = run(place, *words.split())
    assert (done.returncode, done.stdout) == (7, "")
    first, second = done.stderr.strip().splitlines()
    assert first == "error: this needs torch, which is not installed"
    assert second.startswith("hint: pip install 'optimstate[torch]'")


@pytest.mark.parametrize("module", ["optim", "hooks", "distributed", "optim.lr_scheduler", "demo"])
def test_a_module_that_needs_torch_says_so(place: Path, module: str) -> None:
    lines = ("import sys", "sys.modules['torch'] = None", "try:", f" import optimstate.{module}")
    done = run(place, code="\n".join((*lines, "except ImportError as error:", " print(repr(error))")))
    assert done.stdout.startswith("MissingTorchError("), done.stderr


OLD = """
import torch
add = torch.optim.Optimizer.add_param_group
def unnamed(self, group):
    group["params"] = list(group["params"])
    if isinstance(group["params"][0], tuple):
        raise TypeError("optimizer can only optimize Tensors, but one of the params is tuple")
    add(self, group)
torch.optim.Optimizer.add_param_group, torch.__version__ = unnamed, "2.4.1"
import optimstate.errors
try:
    import optimstate.hooks
except optimstate.errors.UnsupportedTorchError as error:
    print(error.message)
"""
NEW = """
import warnings, torch
torch.__version__ = "3.1.0"
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import optimstate.hooks, optimstate.optim
print([(w.category.__name__, str(w.message)) for w in seen])
"""


def test_a_torch_without_named_parameters_is_refused(place: Path) -> None:
    assert run(place, code=OLD).stdout == "torch 2.4.1 has no optimizers with named parameters\n"


def test_a_newer_torch_than_tested_warns_once(place: Path) -> None:
    told = "torch 3.1.0 is newer than 2.15, the newest that optimstate was tested with"
    assert run(place, code=NEW).stdout == f"{[('UntestedTorchWarning', told)]}\n"
