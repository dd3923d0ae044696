"""Verify has a finding wherever torch cannot take the next step with a value of an option or a slot."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from tests.surgery.test_next_step import OPTIMIZERS, built, model, stepped

Tree = dict[str, Any]

OPTIONS: list[Any] = ["x", None, math.nan, [], [0.9, 0.9, 0.9, 0.9], {}, torch.ones(2), 1j]
SLOTS: list[Any] = ["x", None, [], {}, 1j, torch.ones(7), torch.ones(3, 4).to_sparse(), torch.ones(1).expand(3, 4)]
SLOTS += [torch.device("cpu")]
LBFGS: Tree = {"history_size": 3}
# Flags may be anything that is true or false to Python; the others are of schedules, or read at the start of a run.
UNREAD = {"initial_accumulator_value", "params", "param_names", "maximize", "foreach", "fused", "capturable"}
UNREAD |= {"differentiable", "decoupled_weight_decay", "nesterov", "amsgrad", "centered"}
# Torch reads them only to compare, or replaces them before it reads them.
UNREAD_SLOTS = {"al", "func_evals", "n_iter", "prev_loss", "H_diag", "ro", "t"}


def state_of(name: str) -> Tree:
    live = model()
    optimizer = built(name, live, **OPTIMIZERS.get(name, LBFGS))
    stepped_with(name, live, optimizer)
    stepped_with(name, live, optimizer)
    return optimizer.state_dict()


def stepped_with(name: str, live: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if name != "LBFGS":
        stepped(live, optimizer)
        return

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = live(torch.ones(2, 4)).square().sum()
        found.backward()
        return found  # type: ignore[no-any-return]

    optimizer.step(loss)  # type: ignore[arg-type]


def resumes(name: str, saved: Tree) -> bool:
    """Whether torch loads a state and takes a step, with finite weights."""
    live = model()
    optimizer = built(name, live)
    try:
        optimizer.load_state_dict(copy.deepcopy(saved))
        stepped_with(name, live, optimizer)
        return all(bool(weight.isfinite().all()) for weight in live.parameters())
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False


def spoilt(saved: Tree, places: list[Tree], keys: Iterator[Any], values: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The state with each of the values under each of the keys, and without the key."""
    for key in keys:
        for place in places:
            kept = place[key]
            for value in values:
                place[key] = value
                yield key, value
            del place[key]
            yield key, "absent"
            place[key] = kept


def findings(saved: Tree, path: Path) -> tuple[str, ...]:
    torch.save({"model": model().state_dict(), "optimizer": saved}, path)
    return tuple(map(str, optimstate.verify(path).findings))


@pytest.mark.filterwarnings("ignore")  # torch's, of complex numbers
@pytest.mark.parametrize("name", [*OPTIMIZERS, "LBFGS"])
def test_options(name: str, tmp_path: Path) -> None:
    saved = state_of(name)
    assert resumes(name, saved)
    assert findings(saved, tmp_path / "a.pt") == ()
    group = saved["param_groups"][0]
    for key, value in spoilt(saved, [group], iter([key for key in group if key not in UNREAD]), OPTIONS):
        if not resumes(name, saved):
            assert findings(saved, tmp_path / "a.pt"), (key, value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*OPTIMIZERS, "LBFGS"])
def test_slots(name: str, tmp_path: Path) -> None:
    saved = state_of(name)
    slots = saved["state"][0]
    for key, value in spoilt(saved, [slots], iter([key for key in slots if key not in UNREAD_SLOTS]), SLOTS):
        if not resumes(name, saved):
            assert findings(saved, tmp_path / "a.pt"), (key, value)


@pytest.mark.parametrize("slot", ["square_avg", "acc_delta"])
def test_averages_of_squares_are_not_negative(slot: str, tmp_path: Path) -> None:
    saved = state_of("Adadelta")
    saved["state"][0][slot] = -saved["state"][0][slot] - 1
    assert not resumes("Adadelta", saved)
    assert any("negative" in line for line in findings(saved, tmp_path / "a.pt"))


def test_a_missing_option_is_noted_where_the_rest_shows_the_algorithm(tmp_path: Path) -> None:
    saved = state_of("AdamW")
    del saved["param_groups"][0]["betas"]
    assert any("betas" in line and "AdamW" in line for line in findings(saved, tmp_path / "a.pt"))


def test_a_slot_that_only_one_parameter_has_is_noted(tmp_path: Path) -> None:
    saved = state_of("AdamW")
    saved["state"][1]["exp_avg_squared"] = saved["state"][1].pop("exp_avg_sq")
    assert any("exp_avg_squared" in line for line in findings(saved, tmp_path / "a.pt"))


def test_an_algorithm_that_is_not_recognised_is_said_not_to_be_checked(tmp_path: Path) -> None:
    saved = state_of("AdamW")
    saved["param_groups"][0]["temperature"] = 0.5
    torch.save({"optimizer": saved}, tmp_path / "a.pt")
    assert any("algorithm is not recognised" in line for line in optimstate.verify(tmp_path / "a.pt").blind)


@pytest.mark.parametrize("named", [True, False])
def test_parameters_in_another_order_than_torchs_are_noted(named: bool, tmp_path: Path) -> None:
    live = model()
    pairs = list(live.named_parameters()) if named else list(live.parameters())
    optimizer = torch.optim.AdamW([{"params": pairs[:2]}, {"params": pairs[2:]}])  # type: ignore[list-item]
    stepped(live, optimizer)
    saved = optimizer.state_dict()
    assert findings(saved, tmp_path / "a.pt") == ()
    saved["param_groups"].reverse()
    assert any("in the order 2, 3, 0, 1" in line for line in findings(saved, tmp_path / "a.pt"))


def test_one_tensor_of_the_meta_device_is_a_fault_in_an_optimizer(tmp_path: Path) -> None:
    saved = state_of("AdamW")
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].to("meta")
    torch.save({"optimizer": saved}, tmp_path / "a.pt")
    assert not optimstate.verify(tmp_path / "a.pt").healthy


@pytest.mark.parametrize("state", ["text", 3, [1], None, False])
def test_groups_beside_a_state_of_another_type_are_not_healthy(state: object, tmp_path: Path) -> None:
    saved = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    torch.save({"model": {"a.weight": torch.ones(2, 2)}, "optimizer": saved}, tmp_path / "a.pt")
    assert optimstate.verify(tmp_path / "a.pt").verdict == "unknown"


@pytest.mark.parametrize("key", ["model", "optimizer", "lr_scheduler"])
@pytest.mark.parametrize(
    "value", [3, 0.5, b"bytes", torch.ones(2), [torch.ones(2)], object(), {}], ids=lambda value: type(value).__name__
)
def test_what_has_the_name_of_a_section_and_is_none_is_told(key: str, value: object, tmp_path: Path) -> None:
    rest = {"model_ema": model().state_dict(), "state_dict": model().state_dict()}
    torch.save({**rest, key: value}, tmp_path / "a.pt")
    report = optimstate.verify(tmp_path / "a.pt")
    told = (*report.blind, *report.unread, *map(str, report.findings))
    assert any(key in line for line in told)


@pytest.mark.parametrize("value", [None, "resnet18", True, {"name": "resnet18", "depth": 18}], ids=repr)
def test_a_description_under_such_a_name_is_not(value: object, tmp_path: Path) -> None:
    torch.save({"state_dict": model().state_dict(), "model": value}, tmp_path / "a.pt")
    report = optimstate.verify(tmp_path / "a.pt")
    assert (report.findings, report.blind) == ((), ())


def test_an_entry_of_a_model_that_is_not_a_tensor_is_noted(tmp_path: Path) -> None:
    weights = model().state_dict()
    weights["0.weight"] = [1, 2]
    torch.save({"model": weights}, tmp_path / "a.pt")
    assert [finding.names for finding in optimstate.verify(tmp_path / "a.pt").findings] == [("0.weight",)]
