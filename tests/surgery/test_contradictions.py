"""Optimizer state that contradicts itself: every verb that reads it names the file and the section."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.errors import CheckpointError


def saved(path: Path, change: Callable[[dict[str, Any]], None] = lambda state: None) -> Path:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)]}])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    change(state)
    torch.save({"model": model.state_dict(), "optimizer": state}, path)
    return path


def in_two_groups(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"] = [0]


def a_name_too_many(state: dict[str, Any]) -> None:
    state["param_groups"][1]["param_names"] += ["more"]


def a_key_that_is_none(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"] = [[1]]


def resumed(path: Path) -> object:
    model = nn.Linear(2, 2)
    return optimstate.resume(path, model=model, optimizer=torch.optim.AdamW(model.named_parameters()))


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda bad, _: optimstate.inspect(bad),
    "verify": lambda bad, _: optimstate.verify(bad),
    "diff": lambda bad, good: optimstate.diff(good, bad),
    "remap": lambda bad, _: optimstate.remap(bad, None, optimstate.Plan.from_options(rename=["bias=b"]), dry_run=True),
    "like": lambda bad, good: optimstate.remap(good, None, optimstate.Plan(), like=bad, dry_run=True),
    "name": lambda bad, _: optimstate.name(bad, None, dry_run=True),
    "convert": lambda bad, _: optimstate.convert(bad, bad.parent / "out.pt", optimizer="Lion"),
    "resume": lambda bad, _: resumed(bad),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", [in_two_groups, a_name_too_many, a_key_that_is_none])
def test_the_file_is_named(change: Callable[[dict[str, Any]], None], verb: str, tmp_path: Path) -> None:
    bad, good = saved(tmp_path / "bad.pt", change), saved(tmp_path / "good.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: .*param"):
        VERBS[verb](bad, good)


def test_a_parameter_that_torch_lets_be_listed_twice_is_one(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of the second listing
        optimizer = torch.optim.AdamW([("one", weight), ("tied", weight)])
    weight.sum().backward()
    optimizer.step()
    path = tmp_path / "tied.pt"
    torch.save({"model": {"one": weight.data, "tied": weight.data}, "optimizer": optimizer.state_dict()}, path)
    report = optimstate.verify(path)
    assert report.healthy
    assert "one and tied are one parameter, listed 2 times" in str(report)
    optimstate.remap(path, tmp_path / "out.pt", optimstate.Plan.from_options(rename=["tied=two"]))
    group = torch.load(tmp_path / "out.pt")["optimizer"]["param_groups"][0]
    assert (group["params"], group["param_names"]) == (
        optimizer.state_dict()["param_groups"][0]["params"],
        ["one", "two"],
    )
