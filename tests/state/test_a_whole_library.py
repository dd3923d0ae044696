"""Every optimizer of a large library, trained and saved by its own code: none is called faulty, or another's name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate

library = pytest.importorskip("pytorch_optimizer")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

SIBLINGS = {("aida", "AdaBelief"), ("magma", "AdamW")}
"""Aida's state and options are AdaBelief's; Magma keeps the optimizer that it wraps."""


def trained(name: str) -> tuple[nn.Module, Any] | None:
    """A small model and its optimizer after three steps; None where it takes more than parameters and a loss."""
    torch.manual_seed(0)
    made = library.load_optimizer(name)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    rate = {"lr": 1e-2} if "lr" in inspect.signature(made.__init__).parameters else {}

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found: torch.Tensor = model(torch.randn(4, 4)).square().mean()
        found.backward()
        return found

    try:
        optimizer = made(model.parameters(), **rate)
        for _ in range(3):
            loss()
            optimizer.step(loss)
    except Exception:  # noqa: BLE001 - other arguments, other forms of loss, several processes
        return None
    return model, optimizer


def test_none_is_called_faulty_or_by_the_name_of_another(tmp_path: Path) -> None:
    tried, wrong = 0, []
    for name in library.get_supported_optimizers():
        run = trained(name)
        if run is None:
            continue
        tried += 1
        torch.save({"model": run[0].state_dict(), "optimizer": run[1].state_dict()}, tmp_path / "a.pt")
        faults = [str(finding) for finding in optimstate.verify(tmp_path / "a.pt").findings if finding.level == "fault"]
        sections = optimstate.inspect(tmp_path / "a.pt").sections
        called = next(section.algorithm for section in sections if section.kind == "optimizer")
        words = "".join(filter(str.isalpha, (called or "").lower())).removesuffix("pytorchoptimizer")
        own = words in ("", name) or name == f"schedulefree{words.removesuffix('schedulefree')}"
        if faults or not (own or (name, called) in SIBLINGS):
            wrong.append((name, called, faults))
    assert wrong == []
    assert tried > 80
