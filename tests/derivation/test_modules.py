"""Scripts that copy weights between two live modules become plans; what they leave alone is said to start fresh."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import Plan
from optimstate.errors import DerivationError
from optimstate.surgery.plans.deriving import derive_plan
from tests.derivation.by_fork import derived_by_fork


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value = self.norm(self.emb(tokens))
        for layer in self.layers:
            value = value + layer(value)
        value = self.bn(value + sum(self.qkv(value).chunk(3, -1)))
        made: torch.Tensor = self.head(value)
        return made


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(14, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.bn = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 14, bias=False)


def written(old: Old, new: New) -> None:
    """As people write it: `.data`, `copy_`, slices, new parameters, nested loads, an initialisation."""
    with torch.no_grad():
        new.tok.weight[:10] = old.emb.weight
        for i, (before, after) in enumerate(zip(old.layers, new.blocks, strict=True)):
            after[0].weight.copy_(before.weight)
            after[0].bias = nn.Parameter(before.bias.clone())
            nn.init.zeros_(after[1].weight)
            if i == 0:
                nn.init.normal_(after[1].bias)
    for n, name in enumerate("qkv"):
        layer = getattr(new, name)
        layer.weight.data.copy_(old.qkv.weight[4 * n : 4 * n + 4])
        layer.bias.data = old.qkv.bias.detach().chunk(3)[n].clone()
    new.norm.load_state_dict(old.norm.state_dict())
    new.bn.load_state_dict(old.bn.state_dict())
    new.out.weight.data[:10] = old.head.weight.data


def trained() -> tuple[Old, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Old()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randint(10, (8,))).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_a_run_resumes_as_if_the_script_had_moved_its_state_too(tmp_path: Path) -> None:
    old, optimizer = trained()
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    derived = Plan.derive(written, old, into=New())
    new = New()
    before = copy.deepcopy(new.state_dict())
    fresh = torch.optim.AdamW(new.named_parameters(), lr=1e-2)
    optimstate.resume(tmp_path / "old.pt", model=new, optimizer=fresh, plan=derived.plan)

    expected = New()
    expected.load_state_dict(before)
    written(old, expected)
    untouched = set(derived.new)
    assert {name for name in before if re.match(r"blocks\.\d\.1\.", name)} == untouched
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name] if name in untouched else expected.state_dict()[name]), name

    state = {name: fresh.state[parameter] for name, parameter in new.named_parameters()}
    moments = {name: optimizer.state[parameter] for name, parameter in old.named_parameters()}
    assert torch.equal(state["k.weight"]["exp_avg"], moments["qkv.weight"]["exp_avg"][4:8])
    assert torch.equal(state["tok.weight"]["exp_avg"][:10], moments["emb.weight"]["exp_avg"])
    assert torch.equal(state["blocks.2.0.bias"]["exp_avg_sq"], moments["layers.2.bias"]["exp_avg_sq"])
    assert not state["blocks.0.1.weight"]


def test_what_is_left_alone_is_told_from_what_is_initialised() -> None:
    derived = Plan.derive(written, Old(), into=New())
    assert sorted(derived.untouched) == ["blocks.1.1.bias", "blocks.2.1.bias"]
    assert "blocks.0.1.bias" in derived.new
    assert "blocks.0.1.weight" in derived.new
    (note,) = derived.notes
    assert note == "a part of 'tok.weight', 'out.weight' keeps the live model's values: resume with this plan"
    assert derived.plan.policy.missing == "fresh"


class Tied(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(rows, 4)
        self.head = nn.Linear(4, rows, bias=False)
        self.head.weight = self.emb.weight


def test_tied_weights_are_one_tensor_with_two_names() -> None:
    def grown(old: Tied, new: Tied) -> None:
        new.emb.weight.data[: old.emb.num_embeddings].copy_(old.emb.weight.data)

    derived = Plan.derive(grown, Tied(6), into=Tied(8))
    assert [str(rule) for rule in derived.plan.all_rules()] == [
        '{x=emb|head}.weight -> {x}.weight, resize = { dim = 0, size = 8, fill = "live" }'
    ]

    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)

    def untie(old: Tied, new: Untied) -> None:
        new.tok.weight.data.copy_(old.emb.weight)
        new.out.weight.data.copy_(old.head.weight)

    untied = Plan.derive(untie, Tied(6), into=Untied())
    assert [str(rule) for rule in untied.plan.all_rules()] == ["{x=emb|head}.weight -> {x=tok|out}.weight"]
    assert not untied.dropped


def put(old: Any, new: Any, value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    new.weight.data.copy_(value(old.weight.data, new.weight.data))


REFUSED: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "a mean with its own": (lambda o, n: (o + n) / 2, "'weight' is not a layout .* own values are part of it"),
    "a product": (lambda o, n: o * o, "'weight' is not a layout of the sources: it is not linear"),
    "its own rows moved": (lambda o, n: torch.cat([o[:1], n[:2]]), "own values are part of it, at other positions"),
    "rows dropped by the shape": (lambda o, n: o[:, :2], "The expanded size|must match|shape"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_computed_is_refused_with_the_parameter(kind: str) -> None:
    value, message = REFUSED[kind]
    with pytest.raises((DerivationError, RuntimeError), match=message):
        Plan.derive(lambda old, new: put(old, new, value), nn.Linear(4, 3, False), into=nn.Linear(4, 3, False))


def test_what_the_script_forgets_must_be_allowed() -> None:
    def forgetful(old: nn.Linear, new: nn.Linear) -> None:
        new.weight.data.copy_(old.weight)

    with pytest.raises(DerivationError, match="no output takes 'bias'"):
        Plan.derive(forgetful, nn.Linear(2, 2), into=nn.Linear(2, 2))
    derived = Plan.derive(forgetful, nn.Linear(2, 2), into=nn.Linear(2, 2), allow_drop=True)
    assert (derived.dropped, derived.untouched) == (("bias",), ("bias",))


def test_neither_module_is_changed_and_a_module_that_is_returned_is_the_new_one() -> None:
    old, new = nn.Linear(3, 2), nn.Linear(2, 3)
    before = copy.deepcopy((old.state_dict(), new.state_dict()))

    def built(old: nn.Linear, _: nn.Linear) -> nn.Module:
        made = nn.Linear(2, 3, bias=False)
        made.weight.data = old.weight.data.t_()
        made.register_buffer("shift", old.bias)
        return made

    derived = Plan.derive(built, old, into=new)
    assert {str(rule) for rule in derived.plan.all_rules()} == {
        "weight -> weight, transpose = true", "bias -> shift",
    }  # fmt: skip
    for one, other in zip(before, (old.state_dict(), new.state_dict()), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_modules_are_asked_for() -> None:
    with pytest.raises(DerivationError, match="give two modules"):
        Plan.derive(lambda old, new: None, {"a": (2, 2)}, into=nn.Linear(2, 2))


SCRIPT = """
from torch import nn

def Old(): return nn.Linear(4, 3)
def New(): return nn.Linear(4, 5)
def Other(): return nn.Linear(4, 7)
def number(): return 3
def grow(old, new):
    new.weight.data[:3].copy_(old.weight)
    new.bias.data[:3].copy_(old.bias)
"""


def test_the_command_builds_both_models_in_the_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("copying.py").write_text(SCRIPT)
    torch.save({"model": nn.Linear(4, 3).state_dict()}, "old.pt")
    with derived_by_fork():
        report = derive_plan("old.pt", function="copying:grow", models=("copying:Old", "copying:New"))
        assert report.rules == ('{x=weight|bias} -> {x}, resize = { dim = 0, size = 5, fill = "live" }',)
        message = r"'weight': the model of copying:Other has shape \[7, 4\], the check"
        with pytest.raises(DerivationError, match=message):
            derive_plan("old.pt", function="copying:grow", models=("copying:Other", "copying:New"))
        with pytest.raises(DerivationError, match="copying:number makes int, not a module"):
            derive_plan("old.pt", function="copying:grow", models=("copying:number", "copying:New"))
    with pytest.raises(DerivationError, match="give the function"):
        derive_plan("old.pt", transformers="x", models=("copying:Old", "copying:New"))
