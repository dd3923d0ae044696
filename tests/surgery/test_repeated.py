"""What a folder holds twice is said, by every command that would have to choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import optimstate
from optimstate.errors import MigrationError
from tests import corpus


def trained() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def trainer(folder: Path, *twice: str) -> None:
    """What transformers' Trainer leaves where the way of saving was changed between two runs."""
    weights, state = trained()
    save_file(weights, folder / "model.safetensors")
    torch.save(state, folder / "optimizer.pt")
    if "bin" in twice:
        torch.save(weights, folder / "pytorch_model.bin")
    if "optimizer" in twice:
        torch.save(state, folder / "optimizer.bin")
    if "shards" in twice:
        files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
        for file in set(files.values()):
            save_file({name: weights[name] for name in files if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def lightning(folder: Path, *names: str) -> None:
    for name in names:
        weights, state = trained()
        torch.save({"state_dict": weights, "optimizer_states": [state], "epoch": 1}, folder / name)


def composer(folder: Path, *names: str) -> None:
    for name in names:
        weights, state = trained()
        torch.save({"state": {"model": weights, "optimizers": {"AdamW": state}}, "rng": []}, folder / name)


@pytest.mark.parametrize(
    ("write", "names", "kinds"),
    [
        (trainer, ["bin"], ["model"]),
        (trainer, ["shards"], ["model"]),
        (trainer, ["optimizer"], ["optimizer"]),
        (trainer, ["bin", "optimizer", "shards"], ["model", "optimizer"]),
        (trainer, [], []),
        (lightning, ["last.ckpt", "epoch=0.ckpt"], ["model", "optimizer"]),
        (lightning, ["last.ckpt"], []),
        (composer, ["ep1-rank0.pt", "latest-rank0.pt"], ["model", "optimizer"]),
    ],
)
def test_a_part_that_is_there_twice_is_named(write: Any, names: list[str], kinds: list[str], tmp_path: Path) -> None:
    write(tmp_path, *names)
    told = [line for line in optimstate.inspect(tmp_path).notes if "programs load one of them" in line]
    assert sorted(line.split()[0] for line in told) == kinds
    found = [finding for finding in optimstate.verify(tmp_path).findings if finding.kind == "section"]
    assert [finding.level for finding in found] == ["note"] * len(kinds)
    if "model" in kinds:
        with pytest.raises(MigrationError, match="sections are called 'model'"):
            optimstate.convert(tmp_path, tmp_path.parent / "out.pt", section="model", dry_run=True)


def test_a_link_is_not_a_second_part(tmp_path: Path) -> None:
    composer(tmp_path, "ep1-rank0.pt")
    (tmp_path / "latest-rank0.pt").symlink_to("ep1-rank0.pt")
    assert not [line for line in optimstate.inspect(tmp_path).notes if "programs load" in line]


@pytest.mark.parametrize("case", corpus.cases("transformers/", "accelerate/", "composer/", "lightning/"), ids=str)
def test_folders_of_frameworks_hold_nothing_twice(case: corpus.Case) -> None:
    assert not [line for line in optimstate.inspect(case.entry).notes if "programs load" in line]
