"""Forms that files may have and no framework writes are shown, kept or refused, by every command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import corpus
from tests.cli.running import run

Tree = dict[str, Any]


def checkpoint() -> Tree:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


def answers(path: Path, folder: Path) -> None:
    """Every command answers: it does what it is asked or refuses it."""
    out = [str(folder / "out.pt"), "--force"]
    (folder / "plan.toml").write_text("[[group]]\nset = { lr = 0.5 }\n")
    lines = [
        ["inspect", str(path), "--json", "--params", "--stats"],
        ["inspect", str(path), "--tree"],
        ["verify", str(path)],
        ["diff", str(path), str(path)],
        ["scan", str(path)],
        ["name", str(path), *out],
        ["remap", str(path), *out, "--duplicate", "{a**}.weight={a}.w1,{a}.w2"],
        ["remap", str(path), *out, "--drop", "**.bias"],
        ["remap", str(path), *out, "--plan", str(folder / "plan.toml")],
        ["plan", "check", str(folder / "plan.toml"), str(path)],
        ["plan", "suggest", str(path), str(path)],
        ["convert", str(path), *out],
        ["convert", str(path), *out, "--optimizer", "Lion"],
        ["convert", str(path), str(folder / "universal"), "--to", "deepspeed-universal", "--force"],
        ["convert", str(path), str(folder / "dcp"), "--to", "dcp", "--force"],
    ]
    for line in lines:
        outcome = run(*line)
        assert outcome.code in range(7), (line, outcome.err)


@pytest.mark.parametrize("key", [2, None, (0, 1), 1.5, True, b"x"], ids=repr)
@pytest.mark.parametrize("place", ["slot", "option", "state", "model", "scheduler"])
def test_keys_that_are_no_text(key: object, place: str, tmp_path: Path) -> None:
    tree = checkpoint()
    where = {
        "slot": tree["optimizer"]["state"][0],
        "option": tree["optimizer"]["param_groups"][0],
        "state": tree["optimizer"]["state"],
        "model": tree["model"],
        "scheduler": tree["scheduler"],
    }[place]
    where[key] = {"slot": torch.ones(3, 2), "option": 3, "state": {}, "model": torch.ones(2), "scheduler": 0.5}[place]
    torch.save(tree, tmp_path / "a.pt")
    answers(tmp_path / "a.pt", tmp_path)


class Box:
    """An object around a checkpoint."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside


@pytest.mark.parametrize("wrap", [Box, lambda tree: {"box": Box(tree)}, lambda tree: [tree], lambda tree: (tree, 1)])
def test_containers_around_a_checkpoint(wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(checkpoint()), tmp_path / "a.pt")
    answers(tmp_path / "a.pt", tmp_path)


@pytest.mark.parametrize("value", [[1, 2], 3, "text", None], ids=repr)
def test_what_bitsandbytes_nests(value: object, tmp_path: Path) -> None:
    tree = torch.load(corpus.case("bitsandbytes/adamw8bit").entry, weights_only=False)
    for slots in tree["optimizer"]["state"].values():
        slots["__bnb_optimizer_quant_state__"] = value
    torch.save(tree, tmp_path / "a.pt")
    answers(tmp_path / "a.pt", tmp_path)


@pytest.mark.parametrize("value", [3, "text", [1], {"a": 1}, [{"a": "x"}], slice(1), None], ids=repr)
@pytest.mark.parametrize("key", ["param_shapes", "frozen_param_shapes", "module", "buffer_names"])
def test_what_deepspeed_describes(key: str, value: object, tmp_path: Path) -> None:
    folder, origin = tmp_path / "step", corpus.case("deepspeed/z2_ws2_fp32_adam_sched").entry
    shutil.copytree(next(origin.rglob("*model_states.pt")).parent, folder)
    file = next(folder.glob("*model_states.pt"))
    tree = torch.load(file, weights_only=False)
    torch.save({**tree, key: value}, file)
    answers(folder, tmp_path)
