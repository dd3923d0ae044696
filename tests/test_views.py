"""Weights in one layout and their optimizer in another, read, checked, named, moved and resumed as one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import hooks
from optimstate.errors import MigrationError, OptimStateError, PlanSyntaxError
from optimstate.plan.language.plan import Plan
from tests.cli.running import run

VIEW = '[[rule]]\nfrom = "blocks.{i:int}.experts.{e=0..3}.w.weight"\nto = "blocks.{i}.experts.fused"\nstack = 0\n'
BACK = '[[rule]]\nfrom = "blocks.{i:int}.experts.fused"\nto = "blocks.{i}.experts.{e=0..3}.w.weight"\nunstack = 0\n'
DROPPED = (
    '[view]\nplan = "to-live.toml"\n%s\n[[rule]]\ndrop = "blocks.1"\n[[rule]]\nfrom = "head.{p}"\nto = "out.{p}"\n'
)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(4, 3, 3))


def built(seed: int, blocks: int = 2, head: str = "head") -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"experts": Experts()}) for _ in range(blocks))
    model.add_module(head, nn.Linear(3, 3))
    return model, torch.optim.AdamW(model.named_parameters(), lr=1e-2)


def stored(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a framework stores the weights: every expert by itself."""
    made = {}
    for name, value in weights.items():
        if name.endswith("fused"):
            made.update({name.replace("fused", f"{e}.w.weight"): part.clone() for e, part in enumerate(value)})
        else:
            made[name] = value
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, optimizer = built(1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    torch.save({"model": stored(model.state_dict()), "optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    torch.save(model.state_dict(), tmp_path / "live.pt")
    (tmp_path / "to-live.toml").write_text(VIEW)
    (tmp_path / "to-stored.toml").write_text(BACK)
    return tmp_path


def test_stacked_layers_are_another_layout(tmp_path: Path) -> None:
    """As Megatron stacks the layers of a model."""
    model, optimizer = built(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weights = model.state_dict()
    names = [name for name in weights if name.startswith("blocks")]
    stacked = {"decoder.experts": torch.stack([weights.pop(name) for name in names]), **weights}
    torch.save({"model": stacked, "optimizer": optimizer.state_dict()}, tmp_path / "stacked.pt")
    assert "stored in another layout than the optimizer's, for 2 parameters" in str(
        optimstate.verify(tmp_path / "stacked.pt")
    )
    view = Plan.from_toml('[[rule]]\nfrom = "decoder.experts"\nto = "blocks.{i=0..1}.experts.fused"\nunstack = 0\n')
    assert "another layout" not in str(optimstate.verify(tmp_path / "stacked.pt", view=view))


def test_an_optimizer_without_names_beside_another_layout_is_called_that(folder: Path) -> None:
    """As Trainer writes a mixture of experts: what the file does not say by names, shapes say."""
    found = torch.load(folder / "old.pt")
    for group in found["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(found, folder / "anonymous.pt")
    told = str(optimstate.verify(folder / "anonymous.pt"))
    assert "stored in another layout than the optimizer's, for 2 parameters of the shapes [4, 3, 3]" in told
    found["model"] = {name: value for name, value in found["model"].items() if "experts.0" not in name}
    torch.save(found, folder / "other.pt")
    assert "may be the model of another run" in str(optimstate.verify(folder / "other.pt"))
    assert "layout" not in str(optimstate.verify(folder / "anonymous.pt", view=folder / "to-live.toml"))


def test_the_infix_of_adapters_is_another_layout(tmp_path: Path) -> None:
    """As PEFT saves adapters: without the name that the optimizer's parameters have."""
    model = nn.Module()
    for part in "AB":
        model.add_module(f"lora_{part}", nn.ModuleDict({"default": nn.Linear(3, 3, bias=False)}))
    optimizer = torch.optim.AdamW(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    weights = {name.replace(".default", ""): value for name, value in model.state_dict().items()}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, tmp_path / "lora.pt")
    assert "stored in another layout than the optimizer's, for 2 parameters" in str(
        optimstate.verify(tmp_path / "lora.pt")
    )
    view = Plan.from_toml('[[rule]]\nfrom = "{m**}.weight"\nto = "{m}.default.weight"\n')
    assert "another layout" not in str(optimstate.verify(tmp_path / "lora.pt", view=view))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimstate.resume(tmp_path / "lora.pt", model=model, optimizer=optimizer)  # which knows adapters
    assert all(
        torch.equal(model.state_dict()[name.replace(".w", ".default.w")], value) for name, value in weights.items()
    )
    torch.save({"model": {"other.weight": torch.ones(3, 3)}, "optimizer": optimizer.state_dict()}, tmp_path / "two.pt")
    assert "none of its 2 parameters is in a model of this file" in str(optimstate.verify(tmp_path / "two.pt"))


def test_verify_inspect_and_name_read_through_a_view(folder: Path) -> None:
    old, view = folder / "old.pt", folder / "to-live.toml"
    assert "another layout" in str(optimstate.verify(old))
    seen = optimstate.verify(old, view=view)
    assert seen.healthy
    assert "another layout" not in str(seen)
    assert run("verify", str(old), "--view", str(view)).code == 0
    assert "blocks.1.experts.fused" in run("inspect", str(old), "--params", "--view", str(view)).out
    found = torch.load(old)
    for group in found["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(found, folder / "anonymous.pt")
    assert run("name", str(folder / "anonymous.pt"), "--dry-run").code == 4
    assert run("name", str(folder / "anonymous.pt"), str(folder / "named.pt"), "--view", str(view)).code == 0
    assert optimstate.diff(old, folder / "named.pt").equal
    assert optimstate.verify(folder / "anonymous.pt", view=view).healthy


@pytest.mark.parametrize("back", [True, False])
def test_one_plan_moves_both_layouts(back: bool, folder: Path) -> None:
    (folder / "plan.toml").write_text(DROPPED % ('back = "to-stored.toml"' if back else ""))
    plan = Plan.from_file(folder / "plan.toml")
    assert Plan.from_toml(plan.to_toml()) == plan  # and needs its files no more
    optimstate.remap(folder / "old.pt", folder / "new.pt", plan)
    old, new = torch.load(folder / "old.pt"), torch.load(folder / "new.pt")
    live = torch.load(folder / "live.pt")
    kept = {name.replace("head", "out"): value for name, value in live.items() if "blocks.1" not in name}
    expected = stored(kept) if back else kept
    assert new["model"].keys() == expected.keys()
    assert all(torch.equal(new["model"][name], value) for name, value in expected.items())
    (group,) = new["optimizer"]["param_groups"]
    assert group["param_names"] == ["blocks.0.experts.fused", "out.weight", "out.bias"]
    fused = new["optimizer"]["state"][group["params"][0]]["exp_avg"]
    assert torch.equal(fused, old["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("back", ["", 'back = "to-stored.toml"'])
@pytest.mark.parametrize("by_hooks", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_resume_through_a_view(changed: bool, by_hooks: bool, back: str, folder: Path) -> None:
    """A live model has the layout of the rules: a way back changes nothing for it."""
    (folder / "plan.toml").write_text(DROPPED % back if changed else f'[view]\nplan = "to-live.toml"\n{back}\n')
    model, optimizer = built(2, 1, "out") if changed else built(2)
    if by_hooks:
        model.register_load_state_dict_pre_hook(hooks.migrate_model(folder / "plan.toml"))
        optimizer.register_load_state_dict_pre_hook(hooks.migrate(folder / "plan.toml"))
        found = torch.load(folder / "old.pt")
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
    else:
        optimstate.resume(folder / "old.pt", model=model, optimizer=optimizer, plan=folder / "plan.toml")
    live = torch.load(folder / "live.pt")
    assert torch.equal(model.state_dict()["blocks.0.experts.fused"], live["blocks.0.experts.fused"])
    saved = torch.load(folder / "old.pt")["optimizer"]["state"]
    first = dict(model.named_parameters())["blocks.0.experts.fused"]
    assert torch.equal(optimizer.state[first]["exp_avg_sq"], saved[0]["exp_avg_sq"])


@pytest.mark.parametrize(
    ("old", "new"), [("blocks.{i:int}.experts.fused", "blocks.{i:int}.experts.joined"), ("{e=0..3}", "{e=0..4}")]
)
@pytest.mark.parametrize("by_hook", [True, False])
def test_a_way_back_from_another_model_is_refused(by_hook: bool, old: str, new: str, folder: Path) -> None:
    (folder / "to-stored.toml").write_text(BACK.replace(old, new))
    (folder / "plan.toml").write_text('[view]\nplan = "to-live.toml"\nback = "to-stored.toml"\n')
    model, optimizer = built(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def load() -> None:
        if by_hook:
            model.register_load_state_dict_pre_hook(hooks.migrate_model(folder / "plan.toml"))
            model.load_state_dict(torch.load(folder / "old.pt")["model"])
        else:
            optimstate.resume(folder / "old.pt", model=model, optimizer=optimizer, plan=folder / "plan.toml")

    with pytest.raises(MigrationError, match=r"(?s)blocks\..*\n.*has to lead from the live model"):
        load()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_plan_that_is_applied_once_is_one_plan_with_and_without_a_way_back(folder: Path) -> None:
    once = "[guard]\nonce = true\n"
    (folder / "plan.toml").write_text(once + DROPPED % 'back = "to-stored.toml"')
    (folder / "live.toml").write_text(once + DROPPED % "")
    optimstate.remap(folder / "old.pt", folder / "new.pt", folder / "plan.toml")
    for name in ("plan.toml", "live.toml"):
        model, optimizer = built(2, 1, "out")
        with pytest.raises(MigrationError, match="was applied to this checkpoint already"):
            optimstate.resume(folder / "new.pt", model=model, optimizer=optimizer, plan=folder / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stage]]\nback = 1\n", r"plan\.toml:2: stage 1: `back` must be true or false"),
        ("[[stage]]\nback = true\n[[stage]]\n", "only the last can lead back"),
        ("[view]\n", r"plan\.toml:1: view: needs `plan`"),
        ("[view]\nplan = 3\n", r"plan\.toml:2: view: `plan` must be text"),
        ('[view]\nplan = "to-live.toml"\nlayout = "x"\n', "unknown key 'layout'"),
        ('[view]\nplan = "nowhere.toml"\n', r"nowhere\.toml: the plan cannot be read"),
        ('[view]\nplan = "grouped.toml"\n', "a view has rules alone"),
    ],
)
def test_a_wrong_view_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "grouped.toml").write_text(VIEW + '[[group]]\nmatch = "**"\n')
    (folder / "plan.toml").write_text(text)
    with pytest.raises(PlanSyntaxError, match=message):
        Plan.from_file(folder / "plan.toml")


def test_a_view_of_another_checkpoint_is_refused(folder: Path) -> None:
    (folder / "other.toml").write_text(VIEW.replace("blocks", "layers"))
    for look in (optimstate.verify, optimstate.inspect):
        with pytest.raises(OptimStateError, match="matches none of"):
            look(folder / "old.pt", view=folder / "other.toml")
