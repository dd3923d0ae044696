"""`plan derive`: the function runs in a process of its own, and what it does moves optimizer state too."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

import optimstate
from optimstate.cli import plan
from optimstate.errors import CheckpointError, DerivationError
from optimstate.surgery.plans.deriving import TIMEOUT, derive_plan
from tests.derivation.by_fork import derived_by_fork

CONVERTER = """
import torch

def fuse(state):
    print("a function may print")
    return {"qkv.weight": torch.cat([state[f"{x}.weight"] for x in "qkv"]), "out.weight": state["out.weight"].t()}

def squared(state):
    return {name: value * value for name, value in state.items()}

def broken(state):
    raise ValueError("no such layer")

def leaving(state):
    raise SystemExit(0)

def gone(state):
    import os
    os._exit(3)

def loud(state):
    import os
    os.write(1, b"not a plan")
    return {"all": torch.cat([state[f"{x}.weight"] for x in "qkv"]), "out.weight": state.pop("out.weight")}

def endless(state):
    while True:
        pass

constant = 3
"""


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4, bias=False) for _ in range(3))
        self.out = nn.Linear(4, 6, bias=False)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("converter.py").write_text(CONVERTER)
    torch.manual_seed(0)
    model = Old()
    optimizer = torch.optim.AdamW(model.named_parameters())
    inside = sum((layer(torch.randn(2, 6)) for layer in (model.q, model.k, model.v)), torch.zeros(2, 4))
    model.out(inside).square().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "old.pt")
    return Path("old.pt")


def test_what_ends_the_process_without_an_answer_is_named(checkpoint: Path) -> None:
    with pytest.raises(DerivationError, match="converter:broken failed: ValueError: no such layer"):
        derive_plan(checkpoint, function="converter:broken")


def test_the_derived_plan_moves_weights_and_state(checkpoint: Path) -> None:
    report = derive_plan(checkpoint, function="converter:fuse")
    assert report.rules == ("{a0=q|k|v}.weight -> qkv.weight, concat = 0", "out.weight -> out.weight, transpose = true")
    optimstate.remap(checkpoint, "new.pt", optimstate.Plan.from_toml(report.plan))
    old, new = torch.load(checkpoint), torch.load("new.pt")
    assert torch.equal(new["model"]["out.weight"], old["model"]["out.weight"].t())
    names = new["optimizer"]["param_groups"][0]["param_names"]
    assert names == ["qkv.weight", "out.weight"]
    assert torch.equal(new["optimizer"]["state"][1]["exp_avg"], old["optimizer"]["state"][3]["exp_avg"].t())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("converter:squared", "q.weight"),
        ("converter:broken", r"converter:broken failed: ValueError: no such layer \(.*converter.py, line 12\)"),
        ("converter:leaving", r"converter:leaving called sys.exit\(0\) \(.*converter.py, line \d+\)"),
        ("converter:gone", "converter:gone failed: it ended the process with exit status 3"),
        ("converter:nothing", "has no attribute 'nothing'"),
        ("converter:constant", "is not a function"),
        ("nowhere:fuse", "No module named 'nowhere'"),
        ("converter", "does not name a function"),
        ("", "give either"),
    ],
)
def test_what_cannot_be_derived_is_refused(checkpoint: Path, function: str, message: str) -> None:
    with derived_by_fork(), pytest.raises(DerivationError, match=message):
        derive_plan(checkpoint, function=function)


def test_what_a_function_writes_to_the_terminal_does_not_mix_with_the_plan(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert derive_plan(checkpoint, function="converter:loud").rules
    assert capfd.readouterr().out == ""


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no weights"):
        derive_plan(tmp_path / "none.pt", function="converter:fuse")


def test_an_interpreter_that_is_not_there_is_named(checkpoint: Path) -> None:
    with pytest.raises(DerivationError, match="no-python cannot be run"):
        derive_plan(checkpoint, function="converter:fuse", python="no-python")


def test_a_function_that_does_not_end_is_ended(checkpoint: Path) -> None:
    with pytest.raises(DerivationError, match=r"converter:endless did not end within 0\.2 s") as caught:
        derive_plan(checkpoint, function="converter:endless", timeout=0.2)
    assert "--timeout" in caught.value.hint
    assert signature(plan.derive).parameters["timeout"].default == TIMEOUT
