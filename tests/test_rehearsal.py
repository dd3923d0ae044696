"""Rehearsals: right plans pass, and each way to be wrong is told apart and named with its parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import Plan
from optimstate.errors import StateMismatchError
from optimstate.rehearsal import Rehearsal, rehearse
from optimstate.rehearsal.runs import Run
from tests.cli.running import run

HEADS = 2


class Attention(nn.Module):
    """Two heads; projections apart, fused one after the other, or interleaved head by head."""

    def __init__(self, fused: str = "") -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.o = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused == "interleaved":
            q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, 4)).unbind(-2)
        else:
            parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
            q, k, v = (part.unflatten(-1, (HEADS, 4)) for part in parts)
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 2, -1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


class Model(nn.Module):
    def __init__(self, fused: str = "", words: int = 11, renamed: bool = False, experts: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 8)
        self.renamed = renamed
        setattr(self, "attention" if renamed else "attn", Attention(fused))
        if experts:
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
        else:
            self.mlp = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + getattr(self, "attention" if self.renamed else "attn")(x)
        several = hasattr(self, "experts")
        x = torch.stack([expert(x) for expert in self.experts]).mean(0) if several else self.mlp(x)
        return self.head(self.drop(x.tanh()))


BATCH = (torch.arange(10).reshape(2, 5), torch.arange(10).reshape(2, 5).flip(0))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    made = model(batch[0])
    return nn.functional.cross_entropy(made.flatten(0, 1), batch[1].flatten()), made


def built(optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, seed: int = 1, **kind: Any) -> Any:
    torch.manual_seed(seed)
    model = Model(**kind)
    return model, optimizer(model.named_parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def old() -> Any:
    model, optimizer = built(seed=0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, BATCH)[0].backward()
        optimizer.step()
    return model, optimizer


FUSE = '[[rule]]\nfrom = "attn.{x=q|k|v}.{p}"\nto = "attn.qkv.{p}"\nconcat = 0\n'
INTERLEAVE = """
[[rule]]
from = "attn.{x=q|k|v}.{p}"
to = "attn.qkv.{p}"
ops = [{ reshape = { dim = 0, to = [2, 4] } }, { stack = 1 }, { reshape = { dim = 0, from = [2, 3, 4], to = [24] } }]
"""


def wrong(found: Rehearsal, verdict: str, *names: str) -> None:
    assert not found.holds
    assert found.verdict == verdict
    assert set(names) <= {deviation.name for deviation in found.decisive}, str(found)
    others = {deviation.name.split(".")[0] for deviation in found.decisive}
    assert others <= {name.split(".")[0] for name in names}, str(found)


def test_heads_interleaved_the_other_way_are_another_function(old: Any) -> None:
    found = rehearse(old, lambda: built(fused="interleaved"), Plan.from_toml(FUSE), BATCH, loss)
    wrong(found, "another function", "attn.qkv.weight")


def test_weights_of_equal_shape_exchanged_by_a_plan_are_another_function(old: Any) -> None:
    plan = Plan.from_options(rename=["attn.{x=q|k}.{p}=attn.{x=v|k}.{p}", "attn.v.{p}=attn.q.{p}"])
    wrong(rehearse(old, built, plan, BATCH, loss), "another function", "attn.q.weight", "attn.v.weight")


def exchanged(state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What loading by position does when two layers changed places."""
    model.load_state_dict(state["model"])
    made = state["optimizer"]
    names = made["param_groups"][0]["param_names"]
    one, other = names.index("attn.q.weight"), names.index("attn.o.weight")
    made["state"][one], made["state"][other] = made["state"][other], made["state"][one]
    optimizer.load_state_dict(made)


def test_exchanged_moments_of_equal_shape_are_wrong_state(old: Any) -> None:
    found = rehearse(old, built, None, BATCH, loss, load=exchanged)
    wrong(found, "wrong state", "attn.q.weight", "attn.o.weight")


def test_lost_state_is_wrong_state(old: Any) -> None:
    found = rehearse(old, built, None, BATCH, loss, load=lambda state, model, _: model.load_state_dict(state["model"]))
    assert found.verdict == "wrong state"
    assert {d.name for d in found.decisive} == {name for name, _ in old[0].named_parameters()}
    assert all(d.size == float("inf") for d in found.decisive)


class Noisy(Model):
    """Draws random numbers by a function, not by a module that could be switched off; `always` in evaluation too."""

    always = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + nn.functional.dropout(torch.ones(11), 0.5, self.training or self.always)


@pytest.mark.parametrize("always", [False, True])
def test_models_that_use_random_numbers_are_compared_in_evaluation(always: bool) -> None:
    def noisy(seed: int = 1) -> Any:
        torch.manual_seed(seed)
        model = Noisy()
        model.always = always
        return model, torch.optim.AdamW(model.named_parameters(), lr=1e-2)

    model, optimizer = noisy(0)
    loss(model, BATCH)[0].backward()
    optimizer.step()
    found = rehearse((model, optimizer), noisy, None, BATCH, loss)
    assert any("compared in evaluation mode" in note for note in found.notes)
    assert any("random numbers in evaluation too" in note for note in found.notes) is always
    assert found.verdict == "exact", str(found)
    assert model.training, "the run that was given is left as it was"
    lost = rehearse((model, optimizer), noisy, None, BATCH, loss, load=lambda s, m, _: m.load_state_dict(s["model"]))
    assert lost.verdict == "wrong state", str(lost)


class Scaled(Model):
    """The same function, with the mlp's weight stored four times as large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.attn(x)
        return self.head(self.drop((nn.functional.linear(x, self.mlp.weight / 4, self.mlp.bias)).tanh()))


@pytest.mark.parametrize(("scale", "verdict"), [("4.0", None), ("{ param = 4.0, grad = 1.0 }", "wrong state")])
def test_a_scale_without_its_degree_is_wrong_state(old: Any, scale: str, verdict: str | None) -> None:
    def new() -> Any:
        model = Scaled()
        return model, torch.optim.AdamW(model.named_parameters(), lr=1e-2)

    plan = Plan.from_toml(f'[[rule]]\nfrom = "mlp.weight"\nto = "mlp.weight"\nscale = {scale}\n')
    found = rehearse(old, new, plan, BATCH, loss)
    gradients = [d.name for d in found.deviations if d.what == "gradient"]
    assert gradients == (["mlp.weight"] if verdict else [])


def test_a_grown_vocabulary_is_approximate_and_measured(old: Any) -> None:
    plan = Plan.from_toml('[[rule]]\nfrom = "embed.weight"\nto = "embed.weight"\nresize = { dim = 0, size = 13 }\n')
    found = rehearse(old, lambda: built(words=13), plan, BATCH, loss)
    assert found.holds
    assert {d.name for d in found.decisive} <= {"embed.weight"}


def test_experts_are_approximate_and_the_loss_is_measured(old: Any) -> None:
    plan = Plan.from_options(duplicate=["mlp.{p}=experts.{e=0..1}.{p}"])
    found = rehearse(old, lambda: built(experts=2), plan, BATCH, loss)
    assert found.verdict == "approximate"
    assert found.losses[0][0] == pytest.approx(found.losses[0][1], rel=1e-9)
    assert found.losses[1][0] != found.losses[1][1]
    assert {d.name.split(".")[0] for d in found.decisive} == {"experts"}


def test_runs_that_were_given_are_as_they_were(old: Any) -> None:
    before = {name: value.clone() for name, value in old[0].state_dict().items()}
    step = float(old[1].state[next(old[0].parameters())]["step"])
    rehearse(old, built, None, BATCH, loss)
    assert all(torch.equal(value, before[name]) for name, value in old[0].state_dict().items())
    assert float(old[1].state[next(old[0].parameters())]["step"]) == step


SCRIPT = """
import torch
from torch import nn

def build(names):
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    return model, torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)

old = lambda: build(["a", "b"])
new = lambda: build(["a", "c"])
batch = torch.ones(2, 4)
loss = lambda model, batch: model(batch).square().sum()
plan = PLAN
"""


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for given in (lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None, "ab"):
        with pytest.raises(StateMismatchError, match=r"a run is \(model, optimizer\)"):
            Run.of(given, double=False)
    lines = ["import torch", "def old(): return torch.nn.Linear(2, 2)", "new, batch, loss = old, abs, abs"]
    (tmp_path / "script.py").write_text("\n".join(lines))
    outcome = run("rehearse", "--script", str(tmp_path / "script.py"))
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.startswith("error: a run is (model, optimizer)")


@pytest.mark.parametrize(("plan", "code"), [('"plan.toml"', 0), ('"twisted.toml"', 1), ("None", 4)])
def test_the_command_says_whether_a_resume_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text('[[rule]]\nfrom = "b.{p}"\nto = "c.{p}"\n')
    Path("twisted.toml").write_text('[[rule]]\nfrom = "b.{p}"\nto = "a.{p}"\n[[rule]]\nfrom = "a.{p}"\nto = "c.{p}"\n')
    Path("check.py").write_text(SCRIPT.replace("PLAN", plan))
    outcome = run("rehearse", "--script", "check.py", "--json")
    assert outcome.code == code
    document = json.loads(outcome.out)
    if code < 2:
        assert document["command"] == "rehearse"
        assert document["verdict"] == ("another function" if code else "exact")
