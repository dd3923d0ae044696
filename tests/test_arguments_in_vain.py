"""Arguments of functions and hooks that mean nothing, or that another makes pointless, are refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import hooks
from optimstate.errors import OptimStateError, UsageError
from optimstate.plan.language.plan import Plan


def run() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


HOOKS: dict[str, Callable[[], Any]] = {
    "merge": lambda: hooks.regroup(merge="nope"),  # type: ignore[arg-type]
    "step": lambda: hooks.regroup(step="nope"),  # type: ignore[arg-type]
    "fill": lambda: hooks.resize("weight", fill="nope"),  # type: ignore[arg-type]
    "fill of a slot": lambda: hooks.resize("weight", fill={"exp_avg": "nope"}),
    "a slot to cast": lambda: hooks.cast_state({"nope": "float32"}),
    "the source of an option": lambda: hooks.hyperparameters(sources={"nope": "live"}),
    "an option": lambda: hooks.hyperparameters(nope=3),
    "a rate that is no number": lambda: hooks.hyperparameters(lr=math.nan),
    "a rate of another type": lambda: hooks.hyperparameters(lr="x"),
}


@pytest.mark.parametrize("what", HOOKS)
def test_a_load_hook_refuses(what: str) -> None:
    _, optimizer = run()
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())

    def loaded() -> None:
        optimizer.register_load_state_dict_pre_hook(HOOKS[what]())
        optimizer.load_state_dict(saved)

    with pytest.raises(OptimStateError):
        loaded()
    assert str(optimizer.state_dict()) == str(before)


def test_what_a_load_hook_takes_is_done() -> None:
    _, optimizer = run()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["eps"] = 0.5
    optimizer.register_load_state_dict_pre_hook(hooks.hyperparameters(sources={"eps": "live"}, lr=0.25))
    optimizer.load_state_dict(saved)
    assert [optimizer.param_groups[0][key] for key in ("eps", "lr")] == [0.5, 0.25]


def places(folder: Path) -> Path:
    model, optimizer = run()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "a.pt")
    return folder / "a.pt"


CALLS: dict[str, Callable[[Path], Any]] = {
    "verify_resume": lambda _: hooks.verify_resume("nope"),  # type: ignore[arg-type]
    "what verify_resume skips": lambda _: hooks.verify_resume(skip=["nope"]),  # type: ignore[list-item]
    "what resume_problems skips": lambda _: hooks.resume_problems(run()[1], skip=["nope"]),  # type: ignore[list-item]
    "certify": lambda _: hooks.certify(path=""),
    "in place with a destination": lambda at: optimstate.remap(at, at.parent / "b.pt", Plan(), in_place=True),
    "an order of names": lambda at: optimstate.name(at, at.parent / "b.pt", order="nope"),  # type: ignore[arg-type]
    "a schedule": lambda at: optimstate.resume(at, model=run()[0], schedule="nope"),  # type: ignore[call-overload]
    "nothing to resume": lambda at: optimstate.resume(at),
    "a policy": lambda _: Plan().with_policy(missing="nope"),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_function_refuses(what: str, tmp_path: Path) -> None:
    path = places(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UsageError):
        CALLS[what](path)
    assert path.read_bytes() == before
    assert not (tmp_path / "b.pt").exists()
