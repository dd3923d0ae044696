"""The next step: verify calls faulty what torch cannot take it with, and options bring the slots that they ask for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.errors import MigrationError
from optimstate.plan.language.plan import Plan
from optimstate.surgery.writing.settings import with_options
from tests.cli.running import run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {},
    "Adam amsgrad": {"amsgrad": True},
    "AdamW": {},
    "AdamW amsgrad": {"amsgrad": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adafactor": {},
    "ASGD": {},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.9},
    "Rprop": {},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def built(name: str, live: nn.Module, **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, name.split()[0])(live.named_parameters(), **options)
    return made


def stepped(live: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    live(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def steps_with(name: str, saved: dict[str, Any]) -> bool:
    """Whether torch's class takes a step with a state."""
    live = model()
    optimizer = built(name, live)
    try:
        optimizer.load_state_dict(copy.deepcopy(saved))  # torch takes the tensors themselves
        stepped(live, optimizer)
    except (AssertionError, AttributeError, KeyError, TypeError):
        return False
    return True


def damaged(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A state, whole, and without each of its slots in one parameter and in all."""
    live = model()
    optimizer = built(name, live, **OPTIMIZERS[name])
    stepped(live, optimizer)
    saved = optimizer.state_dict()
    yield "whole", saved
    for slot in {slot for slots in saved["state"].values() for slot in slots}:
        for keys in (set(saved["state"]), {1}):
            state = {
                key: {own: value for own, value in slots.items() if own != slot or key not in keys}
                for key, slots in saved["state"].items()
            }
            yield f"no {slot} in {len(keys)}", {**saved, "state": state}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_faulty_exactly_where_torch_cannot_step_with_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for what, saved in damaged(name):
        torch.save({"optimizer": saved}, path)
        found = optimstate.verify(path)
        faults = [str(finding) for finding in found.findings if finding.level == "fault"]
        assert bool(faults) == (not steps_with(name, saved)), (what, faults)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("Adam", "amsgrad=true"),
        ("AdamW", "amsgrad=true"),
        ("RMSprop", "centered=true"),
        ("RMSprop", "momentum=0.9"),
        ("SGD", "momentum=0.5"),
        ("SGD", "nesterov=true"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_an_option_that_comes_on_brings_its_slot(name: str, setting: str, named: bool, tmp_path: Path) -> None:
    live = model()
    optimizer = built(name, live, **OPTIMIZERS[name])
    stepped(live, optimizer)
    saved = optimizer.state_dict()
    if not named:
        del saved["param_groups"][0]["param_names"]
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"optimizer": saved}, path)
    report = optimstate.remap(path, out, with_options(Plan(), path, [setting]))
    made = torch.load(out)["optimizer"]
    assert steps_with(name, made)
    assert optimstate.verify(out).healthy
    for key, slots in made["state"].items():
        for slot in slots.keys() - saved["state"][key].keys():
            square = saved["state"][key].get("exp_avg_sq")
            expected = square if slot == "max_exp_avg_sq" else torch.zeros_like(slots["square_avg"])
            assert torch.equal(slots[slot], expected)
            assert any(slot in note and setting.partition("=")[0] in note for note in report.notes)
    assert steps_with(name, saved)  # the source is as it was


@pytest.mark.parametrize(
    "setting",
    [
        "lr=nan",
        "lr=-1",
        "initial_lr=-3",
        "eps=inf",
        "eps=true",
        "weight_decay=-0.1",
        "betas=0.9",
        "betas=[0.9]",
        "betas=[0.9, 1.0]",
        "betas=[0.9, 0.99, 0.9]",
        "foreach=1",
        "amsgrad=2",
    ],
)
def test_a_value_that_the_optimizer_cannot_take_is_refused(setting: str, tmp_path: Path) -> None:
    live = model()
    optimizer = built("AdamW", live)
    stepped(live, optimizer)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    path = tmp_path / "a.pt"
    torch.save({"optimizer": optimizer.state_dict()}, path)
    with pytest.raises(MigrationError, match=setting.partition("=")[0]):
        optimstate.remap(path, tmp_path / "b.pt", with_options(Plan(), path, [setting]))
    table = f"[[group]]\nset = {{ {setting} }}\n"
    with pytest.raises(MigrationError, match=setting.partition("=")[0]):
        optimstate.remap(path, tmp_path / "b.pt", Plan.from_toml(table))


@pytest.mark.parametrize("option", ["lr", "weight_decay", "eps", "betas", "momentum", "foreach", "anything"])
@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("nan"), [10**5000, None, "x"], (), {"a": 1}, b"\xff", True]
)
def test_verify_judges_options_of_any_value(option: str, value: Any, tmp_path: Path) -> None:
    live = model()
    saved = built("AdamW", live).state_dict()
    saved["param_groups"][0][option] = value
    torch.save({"optimizer": saved, "model": live.state_dict()}, tmp_path / "a.pt")
    assert optimstate.verify(tmp_path / "a.pt").verdict in ("healthy", "faulty", "unknown")


@pytest.mark.parametrize("number", [10**400, -(10**5000)], ids=["large", "larger than Python prints"])
@pytest.mark.parametrize("option", ["lr", "eps", "betas"])
def test_a_number_that_no_float_holds_is_no_crash(option: str, number: int, tmp_path: Path) -> None:
    slots = {"step": number, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    group = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "params": [0]}
    scheduler = {"last_epoch": number, "base_lrs": [number], "_last_lr": [number]}
    optimizer = {"state": {0: slots}, "param_groups": [{**group, option: number}]}
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"optimizer": optimizer, "lr_scheduler": scheduler, "epoch": number}, path)
    lines: list[tuple[str | Path, ...]] = [
        ("inspect", path),
        ("inspect", path, "--stats", "--json"),
        ("verify", path),
        ("diff", path, path),
        ("scan", path),
        ("name", path, out, "--force"),
        ("remap", path, out, "--force", "--set", "lr=0.1"),
        ("remap", path, out, "--force", "--set-schedule", "gamma=0.5"),
        ("convert", path, tmp_path / "b.safetensors", "--force"),
    ]
    for line in lines:
        outcome = run(*map(str, line))
        assert outcome.code in range(8), (line, outcome)
