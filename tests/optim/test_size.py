"""One definition an algorithm is worth it only if it is shorter: under half of torch's lines, docstrings included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import optimstate.optim
from tests import cases

OURS = Path(optimstate.optim.__file__).parent
TORCHS = Path(torch.optim.__file__).parent

# torch's files that do what the files of optimstate/optim do.
SAME_WORK = (
    "__init__.py",
    "_adafactor.py",
    "_functional.py",
    "_muon.py",
    "adadelta.py",
    "adagrad.py",
    "adam.py",
    "adamax.py",
    "adamw.py",
    "asgd.py",
    "lbfgs.py",
    "nadam.py",
    "optimizer.py",
    "radam.py",
    "rmsprop.py",
    "rprop.py",
    "sgd.py",
    "sparse_adam.py",
)
# Not optimizers: they have no part in the comparison, and no line of the count.
OTHER_WORK = {"swa_utils.py"}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.skipif("# pyrefly" not in (TORCHS / "lbfgs.py").read_text(), reason="older releases are shorter")
def test_the_optimizers_take_less_than_half_of_torchs_lines() -> None:
    ours = {path.name: lines(path) for path in OURS.glob("*.py") if path.name not in OTHER_WORK}
    torchs = {name: lines(TORCHS / name) for name in SAME_WORK}
    assert sum(ours.values()) * 2 < sum(torchs.values()), (
        f"{sum(ours.values())} lines against {sum(torchs.values())}: {ours}"
    )


def test_every_optimizer_has_a_file_of_its_own() -> None:
    own = {vars(getattr(optimstate.optim, name))["__init__"].__module__ for name in cases.OPTIMIZERS}
    assert len(own) == len(cases.OPTIMIZERS)
