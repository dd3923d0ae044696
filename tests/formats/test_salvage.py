"""What is whole in a damaged checkpoint is read, what is not is named, and nothing is filled up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import optimstate
from optimstate.errors import CheckpointError, CorruptCheckpointError
from optimstate.formats.registry import open_checkpoint
from optimstate.tree import format_path, tensors
from tests.cli.running import run


def checkpoint() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.Linear(40, 3))
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.randn(2, 9)).sum().backward()
    optimizer.step()
    base = torch.arange(60.0)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": (base[:20], base[20:], [torch.zeros(0), "text"]),
        "epoch": 3,
    }


def contents(path: Path) -> dict[str, bytes]:
    return {format_path(place): tensor.tobytes() for place, tensor in tensors(open_checkpoint(path).tree)}


@pytest.fixture(params=["a.pt", "a.safetensors"])
def whole(request: Any, tmp_path: Path) -> Path:
    torch.save(checkpoint(), tmp_path / "a.pt")
    if request.param != "a.pt":
        optimstate.convert(tmp_path / "a.pt", tmp_path / request.param)
    return tmp_path / str(request.param)


def test_at_every_cut_what_is_whole_is_read_and_the_rest_is_named(whole: Path, tmp_path: Path) -> None:
    data, saved = whole.read_bytes(), contents(whole)
    cut = tmp_path / f"cut{whole.suffix}"
    counts = []
    for length in range(8, len(data), 311):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(cut)
        try:
            document = open_checkpoint(cut, salvage=True)
        except CheckpointError:
            counts.append(0)
            continue
        found = {format_path(place): tensor.tobytes() for place, tensor in tensors(document.tree)}
        assert all(saved[name] == content for name, content in found.items())
        assert found.keys().isdisjoint(document.lost)
        assert {*found, *document.lost} == saved.keys()
        assert document.tree["epoch"] == 3
        counts.append(len(found))
    assert counts[0] == 0
    assert len(set(counts)) > 8
    assert max(counts) >= len(saved) - 6


def test_a_damaged_record_is_lost_and_the_others_are_not(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "a.pt")
    saved = contents(tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    at = data.find(saved["model['0.weight']"])
    data[at] ^= 1
    (tmp_path / "cut.pt").write_bytes(data[:-30])
    document = open_checkpoint(tmp_path / "cut.pt", salvage=True)
    assert document.lost == ["model['0.weight']"]


def test_a_healthy_file_is_read_as_ever(whole: Path, tmp_path: Path) -> None:
    report = optimstate.convert(whole, tmp_path / "b.pt", salvage=True)
    assert report.lost == ()
    assert contents(tmp_path / "b.pt") == contents(whole)


def test_a_file_renamed_in_place_and_cut_has_its_new_names(tmp_path: Path) -> None:
    live = {f"t{number}": torch.full((2,), float(number)) for number in range(1500)}
    torch.save(live, tmp_path / "a.pt")
    optimstate.remap(tmp_path / "a.pt", None, optimstate.Plan.from_options(rename=["t7=new"]), in_place=True)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "cut.pt")
    document = open_checkpoint(tmp_path / "cut.pt", salvage=True)
    assert document.lost == []
    assert document.tree["new"].tobytes() == live["t7"].numpy().tobytes()
    assert "t7" not in document.tree


def test_shards_that_are_missing_or_cut(tmp_path: Path) -> None:
    live = {f"l{n}.w": torch.full((100,), float(n)) for n in range(6)}
    save_file(live, tmp_path / "a.safetensors")
    options = optimstate.formats.protocol.WriteOptions(shard_size=900, sync=False)
    optimstate.convert(tmp_path / "a.safetensors", tmp_path / "shards", options=options)
    first, second, third = sorted((tmp_path / "shards").glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    index = next((tmp_path / "shards").glob("*.index.json"))
    with pytest.raises(CheckpointError):
        open_checkpoint(index)
    document = open_checkpoint(index, salvage=True)
    assert sorted(document.lost) == ["l0.w", "l1.w", "l3.w"]
    assert {name: tensor.tobytes() for name, tensor in document.tree.items()} == {
        name: live[name].numpy().tobytes() for name in ("l2.w", "l4.w", "l5.w")
    }
    assert third.exists()


def test_a_folder_with_one_damaged_file(tmp_path: Path) -> None:
    live = checkpoint()
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(live["model"], folder / "model.safetensors")
    torch.save(live["optimizer"], folder / "optimizer.pt")
    shutil.copy(folder / "optimizer.pt", folder / "nothing.pt")
    data = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(data[: len(data) // 2])
    (folder / "nothing.pt").write_bytes(data[:100])
    done = run("convert", str(folder), str(tmp_path / "b.pt"), "--salvage", "--json")
    report = json.loads(done.out)
    assert done.code == 1
    assert any(name.startswith("optimizer.pt: state[") for name in report["lost"])
    assert any(name.startswith("nothing.pt: ") for name in report["lost"])
    made = torch.load(tmp_path / "b.pt")
    assert all(torch.equal(made["model.safetensors"][name], tensor) for name, tensor in live["model"].items())
    assert run("convert", str(folder), str(tmp_path / "c.pt")).code == 3
    assert run("convert", str(folder), str(tmp_path / "c.pt"), "--salvage", "--section", "model").code == 1


@pytest.mark.parametrize("length", [0, 20, 300])
def test_where_nothing_is_whole_it_is_refused(length: int, tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:length])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "cut.pt", salvage=True)


def test_the_pickle_that_is_lost_is_named(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:500])
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl\) is not complete"):
        open_checkpoint(tmp_path / "cut.pt", salvage=True)


def test_shards_without_an_index_one_of_which_is_missing(tmp_path: Path) -> None:
    """What a writer leaves that was killed before it wrote the index is no whole checkpoint."""
    save_file({f"layers.{i}": torch.arange(100.0) + i for i in range(4)}, tmp_path / "a.safetensors")
    options = optimstate.formats.protocol.WriteOptions(shard_size=900, sync=False)
    optimstate.convert(tmp_path / "a.safetensors", tmp_path / "shards", options=options)
    (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    first, second = sorted((tmp_path / "shards").iterdir())
    assert len(open_checkpoint(tmp_path / "shards").parts) == 2
    second.unlink()
    with pytest.raises(CorruptCheckpointError, match=f"'{second.name}' is missing: the folder has 1 of 2 shards"):
        open_checkpoint(tmp_path / "shards")
    found = open_checkpoint(tmp_path / "shards", salvage=True)
    assert list(found.parts) == [first.name]
    assert [second.name in lost for lost in found.lost] == [True]
