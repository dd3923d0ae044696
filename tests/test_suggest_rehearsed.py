"""A batch decides what names and shapes leave open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimstate import Plan
from optimstate.errors import PlanError
from optimstate.plan.solve.deciding import decided
from optimstate.plan.solve.suggest import suggest
from optimstate.rehearsal import rehearse
from tests.cli.running import run

SCRIPT = """
import torch
from torch import nn
from tests.test_rehearsal import Attention

class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention("")
        self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)
        self.square, self.wide = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x):
        return self.wide(self.two(x + self.square(self.one(self.attn(x))).tanh()))

class New(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention("interleaved")
        self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.square, self.wide = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x):
        return self.wide(self.last(x + self.square(self.first(self.attn(x))).tanh()))

def build(kind):
    torch.manual_seed(0)
    model = kind()
    return model, torch.optim.AdamW(model.named_parameters())

old, new = (lambda: build(Old)), (lambda: build(New))
batch = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

def loss(model, batch):
    made = model(batch)
    return made.square().mean(), made
"""


def test_a_rehearsal_decides_between_the_possibilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("check.py").write_text(SCRIPT)
    space: dict[str, object] = {"__name__": "check"}
    exec(SCRIPT, space)
    for name in ("old", "new"):
        model, _ = space[name]()  # type: ignore[operator]
        torch.save(model.state_dict(), f"{name}.pt")
    alone = run("plan", "suggest", "old.pt", "new.pt", "--headers", "--json")
    assert alone.code == 1
    found = json.loads(alone.out)
    assert {"first.weight", "last.weight"} <= set(found["missing"])
    assert len(found["alternatives"]) == 2
    assert "  0." in run("plan", "suggest", "old.pt", "new.pt", "--headers").out
    done = run("plan", "suggest", "old.pt", "new.pt", "--headers", "--rehearse", "check.py", "--json")
    assert done.code == 0, done.out + done.err
    found = json.loads(done.out)
    assert (found["alternatives"], found["missing"]) == ([], [])
    plan = Plan.from_toml(found["plan"])
    assert {rule["confidence"] for rule in found["rules"] if "rehearsal" in rule["reason"]} == {1.0}
    again = rehearse(space["old"], space["new"], plan, space["batch"], space["loss"])  # type: ignore[arg-type]
    assert again.verdict == "exact", str(again)


def test_nothing_is_decided_where_nothing_keeps_the_function_and_less_where_several_do() -> None:
    old: dict[str, tuple[int, ...]] = {"a.x": (4,), "a.y": (4,)}
    found = suggest(old, {"b.u": (4,), "b.v": (4,)})
    none = decided(found, old, lambda _: False)
    assert (none.rules, none.decisions, none.missing) == (found.rules, found.decisions, found.missing)
    assert "none of the 2 combinations" in none.options[0]
    both = decided(found, old, lambda _: True)
    assert both.missing == found.missing
    assert "does not tell these apart" in both.options[0]
    with pytest.raises(PlanError, match="combinations are possible"):
        decided(found._replace(decisions=found.decisions * 9), old, lambda _: True)
