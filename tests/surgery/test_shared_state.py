"""What optimizers keep in `state` for all parameters together is carried along, compared, and never taken for slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.errors import CheckpointError
from optimstate.state.optimizer import OptimizerState
from optimstate.surgery.writing.settings import with_options

SHARED: dict[str, Any] = {"tensor": torch.arange(3.0), "list": [1, "two"], "number": 3, "none": None}


def saved(path: Path, *, named: bool = True, key: object = "k", value: object = 3) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(list(model.named_parameters() if named else model.parameters()))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][key] = value  # as `optimizer.state["k"]` is saved
    optimizer.load_state_dict(state)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def renamed(source: Path, target: Path) -> None:
    optimstate.remap(source, target, optimstate.Plan.from_options(rename=["0.{p}=first.{p}"]))


def dropped(source: Path, target: Path) -> None:
    optimstate.remap(source, target, optimstate.Plan.from_options(drop=["0.**"]))


def with_other_rate(source: Path, target: Path) -> None:
    optimstate.remap(source, target, with_options(optimstate.Plan(), source, ["lr=0.5"]))


def of_another_algorithm(source: Path, target: Path) -> None:
    optimstate.convert(source, target, optimizer="Lion")


def in_another_container(source: Path, target: Path) -> None:
    there = source.with_suffix(".safetensors")
    optimstate.convert(source, there)
    optimstate.convert(there, target)


VERBS: list[Callable[[Path, Path], None]] = [
    renamed,
    dropped,
    with_other_rate,
    of_another_algorithm,
    in_another_container,
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
@pytest.mark.parametrize("kind", SHARED)
def test_it_is_written_as_it_was(verb: Callable[[Path, Path], None], kind: str, tmp_path: Path) -> None:
    verb(saved(tmp_path / "a.pt", value=SHARED[kind]), tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt")["optimizer"]["state"]["k"]
    assert torch.equal(found, SHARED[kind]) if kind == "tensor" else found == SHARED[kind]


def test_naming_keeps_it(tmp_path: Path) -> None:
    optimstate.name(saved(tmp_path / "a.pt", named=False, value=[7]), tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt")["optimizer"]["state"]["k"] == [7]


@pytest.mark.parametrize("other", [4, None, [3], torch.ones(2)], ids=str)
def test_a_difference_in_it_is_found(other: object, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt", value=other)
    assert not optimstate.diff(one, one).changes
    assert optimstate.diff(one, two).changes


def test_it_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt")
    assert any("'k'" in finding.message for finding in optimstate.verify(path).findings)
    report = optimstate.remap(path, None, optimstate.Plan.from_options(rename=["0.{p}=first.{p}"]), dry_run=True)
    assert any("state under k belongs to no parameter: left as it is" in note for note in report.notes)


@pytest.mark.parametrize("value", [None, 3, "text", [1], torch.ones(2)], ids=str)
def test_under_the_key_of_a_parameter_it_is_refused(value: object, tmp_path: Path) -> None:
    torch.save({"optimizer": {"state": {0: value}, "param_groups": [{"lr": 0.1, "params": [0]}]}}, tmp_path / "a.pt")
    for verb in (optimstate.verify, optimstate.inspect):
        with pytest.raises(CheckpointError, match=r"a\.pt: .*state of parameter 0"):
            verb(tmp_path / "a.pt")


def test_the_flat_form_has_no_place_for_it() -> None:
    state = OptimizerState.from_node({"state": {"k": 3, "w": {}}, "param_groups": [{"params": ["w"], "lr": 0.1}]})
    with pytest.raises(optimstate.errors.StateMismatchError, match="'k' belongs to no parameter"):
        state.to_flat()
