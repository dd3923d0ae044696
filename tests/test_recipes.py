"""The recipes of CONTRIBUTING.md: each adds one thing in a package of its own, without a change to this one."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from optimstate import Plan
from optimstate.cli import app
from optimstate.plan.language.base import OPERATIONS
from tests import corpus
from tests.cli.running import run

TEXT = (corpus.FIXTURES.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def added(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The code of a recipe as a module of another package."""
    section = TEXT.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    name = f"recipe_{heading.split()[-1]}"
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("common", [{}, {"foreach": False}, {"foreach": True}, {"maximize": True}])
def test_an_optimizer_is_a_rule_and_has_every_common_option(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    lion = added("An optimizer", tmp_path, monkeypatch).Lion
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours = lion(mine, lr=1e-2, weight_decay=0.1, **common)
    peer = lion_pytorch.Lion(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = -p.grad if common.get("maximize") else p.grad.clone()
        ours.step()
        peer.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert {"maximize", "foreach", "capturable", "differentiable"} <= ours.param_groups[0].keys()


def test_an_operation_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added("An operation", tmp_path, monkeypatch)
    try:
        plan = Plan.from_toml('[[rule]]\nfrom = "w"\nto = "v"\nroll = { dim = 0, by = 1 }\n')
        model = {"w": torch.arange(6.0).reshape(3, 2)}
        slots = {"step": torch.tensor(1.0), "exp_avg": model["w"] * 2, "exp_avg_sq": model["w"] * 3}
        group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "params": [0], "param_names": ["w"]}
        old, new = tmp_path / "old.pt", tmp_path / "new.pt"
        torch.save({"model": model, "optimizer": {"state": {0: slots}, "param_groups": [group]}}, old)
        (tmp_path / "plan.toml").write_text(plan.to_toml())
        assert run("remap", str(old), str(new), "--plan", str(tmp_path / "plan.toml")).code == 0
        made = torch.load(new)
        assert torch.equal(made["model"]["v"], model["w"].roll(1, 0))
        assert torch.equal(made["optimizer"]["state"][0]["exp_avg"], (model["w"] * 2).roll(1, 0))
        inverted = run("plan", "invert", str(tmp_path / "plan.toml"))
        assert "by = -1" in inverted.out
    finally:
        OPERATIONS.pop("roll", None)


def test_a_command_is_one_file_and_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app.register([])
    before = list(app.app.registered_commands)
    monkeypatch.setattr(app, "COMMANDS", (*app.COMMANDS, "steps"))
    monkeypatch.setitem(sys.modules, "optimstate.cli.steps", added("A command", tmp_path, monkeypatch))
    try:
        outcome = run("steps", str(corpus.case("torch/adamw_named_layerwise_sequentiallr").entry))
    finally:
        app.app.registered_commands[:] = before
    assert outcome.code == 0
    assert "step" in outcome.out
