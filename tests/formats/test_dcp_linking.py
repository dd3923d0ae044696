"""A folder of torch.distributed.checkpoint that is written from another moves only what changed; torch loads it."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import optimstate
from optimstate.distributed import NamedSavePlanner
from optimstate.errors import CheckpointError, UsageError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import FileSource
from optimstate.io.linking import linked
from optimstate.plan.language.plan import Plan
from tests import corpus
from tests.releases import safetensors_shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RENAMED = Plan.from_options(rename=["{i}.{p}=layers.{i}.{p}"])
SHARDED = corpus.case("dcp/fsdp2_ws2_adamw_nested").entry


def save(path: Path, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 2))
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-3)
    net(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    tree = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    writer = dcp.FileSystemWriter(path, **options)
    dcp.save(tree, storage_writer=writer, planner=NamedSavePlanner())
    return tree


def loaded(path: Path, scratch: Path) -> dict[str, Any]:
    """What torch makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(str(path), str(scratch))
    made: dict[str, Any] = torch.load(scratch, weights_only=True)
    return made


def places(path: Path) -> set[tuple[int, int]]:
    return {(file.stat().st_dev, file.stat().st_ino) for file in path.glob("*.distcp")}


def test_a_rename_moves_no_bytes_and_torch_loads_the_result(tmp_path: Path) -> None:
    tree = save(tmp_path / "a")
    report = optimstate.remap(tmp_path / "a", tmp_path / "b", RENAMED)
    assert places(tmp_path / "a") < places(tmp_path / "b")
    assert (tmp_path / "b" / "__0_1.distcp").stat().st_size < 4096  # the groups' lists of names
    assert any("no bytes were copied" in note for note in report.notes)
    found = loaded(tmp_path / "b", tmp_path / "b.pt")
    assert set(found["model"]) == {f"layers.{name}" for name in tree["model"]}
    for name, value in tree["model"].items():
        assert torch.equal(found["model"][f"layers.{name}"], value)
        slots = found["optimizer"]["state"][f"layers.{name}"]
        old = tree["optimizer"]["state"][list(tree["model"]).index(name)]
        assert all(torch.equal(slots[slot], old[slot]) for slot in ("step", "exp_avg", "exp_avg_sq"))
    assert found["epoch"] == 3


def test_the_pieces_of_ranks_stay_pieces(tmp_path: Path) -> None:
    plan = Plan.from_options(rename=["layers.{i}.{p**}=blocks.{i}.{p}"])
    optimstate.remap(SHARDED, tmp_path / "b", plan, copy=True)
    old, new = open_checkpoint(SHARDED), open_checkpoint(tmp_path / "b")
    pieces = [
        sorted(len(m.rows(number)) for number, _, _ in m.tensors()) for m in (old.handle.metadata, new.handle.metadata)
    ]
    assert pieces[0] == pieces[1]
    assert max(pieces[0]) == 2
    for file in SHARDED.glob("*.distcp"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    before, after = loaded(SHARDED, tmp_path / "a.pt"), loaded(tmp_path / "b", tmp_path / "b.pt")
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name.replace("layers.", "blocks.")], value)


def test_only_what_changes_goes_into_a_new_file(tmp_path: Path) -> None:
    tree = save(tmp_path / "a")
    plan = Plan.from_toml(
        '[[rule]]\nfrom = "0.weight"\nto = "{x=q|k}.weight"\nsplit = 0\n[[rule]]\ndrop = "0.bias"\n'
        '[[rule]]\nfrom = "2.weight"\nto = "copy{i=0..1}.weight"\n'
    )
    report = optimstate.remap(tmp_path / "a", tmp_path / "b", plan)
    assert places(tmp_path / "a") < places(tmp_path / "b")
    (new,) = {file.name for file in (tmp_path / "b").glob("*.distcp")} - {"__0_0.distcp"}
    assert new == "__0_1.distcp"
    changed = 3 * tree["model"]["0.weight"].nbytes
    assert changed < (tmp_path / "b" / new).stat().st_size < changed + 24_000
    assert any(note.endswith("belong to tensors that are not in this folder") for note in report.notes)
    found = loaded(tmp_path / "b", tmp_path / "b.pt")
    assert torch.equal(torch.cat([found["model"]["q.weight"], found["model"]["k.weight"]]), tree["model"]["0.weight"])
    for name in ("copy0.weight", "copy1.weight"):  # two names for one item: torch reads it twice
        assert torch.equal(found["model"][name], tree["model"]["2.weight"])
    optimstate.remap(tmp_path / "b", tmp_path / "c", Plan.from_options(rename=["q.{p}=x.{p}"]))
    assert len(places(tmp_path / "c") & places(tmp_path / "b")) == 2


def test_writing_either_folder_leaves_the_other_alone(tmp_path: Path) -> None:
    save(tmp_path / "a")
    optimstate.remap(tmp_path / "a", tmp_path / "b", RENAMED)
    before = {path: path.read_bytes() for folder in ("a", "b") for path in (tmp_path / folder).iterdir()}
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "c")
    optimstate.remap(tmp_path / "other" / "c", tmp_path / "a", RENAMED, force=True)
    assert all(path.read_bytes() == data for path, data in before.items() if path.parent.name == "b")
    optimstate.remap(tmp_path / "other" / "c", tmp_path / "b", RENAMED, force=True, ranks=2)
    assert loaded(tmp_path / "a", tmp_path / "a.pt")["epoch"] == 3


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_are_impossible_files_are_copied(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    save(tmp_path / "a")
    monkeypatch.setattr(os, "link", refuse)
    report = optimstate.remap(tmp_path / "a", tmp_path / "b", RENAMED)
    assert not places(tmp_path / "a") & places(tmp_path / "b")
    assert not any("links" in note for note in report.notes)
    assert loaded(tmp_path / "b", tmp_path / "b.pt")["epoch"] == 3


def test_a_file_that_was_replaced_meanwhile_is_not_linked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    source = FileSource(tmp_path / "a")
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(tmp_path / "a")
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        linked(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@safetensors_shards
def test_files_that_name_their_tensors_are_written_anew(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    tree = save(tmp_path / "a", serialization_format=SerializationFormat.SAFETENSORS)
    optimstate.remap(tmp_path / "a", tmp_path / "b", RENAMED)
    found = loaded(tmp_path / "b", tmp_path / "b.pt")
    assert all(torch.equal(found["model"][f"layers.{name}"], value) for name, value in tree["model"].items())


@pytest.mark.parametrize("source", [SHARDED, corpus.case("dcp/fsdp2_ws2_adamw_flat").entry])
def test_tensors_are_cut_for_other_ranks(source: Path, tmp_path: Path) -> None:
    options = WriteOptions(ranks=3)
    optimstate.convert(source, tmp_path / "b", to="dcp", options=options)
    assert {file.name for file in (tmp_path / "b").glob("*.distcp")} == {f"__{rank}_0.distcp" for rank in range(3)}
    metadata = open_checkpoint(tmp_path / "b").handle.metadata
    for number, name, form in metadata.tensors():
        rows = form.shape[0] if form.shape else 1
        assert len(metadata.rows(number)) == (1 if rows < 2 else len(torch.arange(rows).chunk(3))), name
    before, after = loaded(source, tmp_path / "a.pt"), loaded(tmp_path / "b", tmp_path / "b.pt")
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    state = [tree["optimizer"].get("state", tree["optimizer"]) for tree in (before, after)]
    assert dict(sorted(state[0].items())).__repr__() == dict(sorted(state[1].items())).__repr__()
    sizes = [file.stat().st_size for file in (tmp_path / "b").glob("*.distcp")]
    assert max(sizes) < 1.6 * min(sizes)


def test_torch_loads_what_is_cut_for_more_ranks_than_there_are_rows(tmp_path: Path) -> None:
    tree = save(tmp_path / "a")
    optimstate.convert(tmp_path / "a", tmp_path / "b", to="dcp", options=WriteOptions(ranks=64))
    assert len(list((tmp_path / "b").glob("*.distcp"))) == 64
    into = {"model": {name: torch.zeros_like(value) for name, value in tree["model"].items()}, "epoch": 0}
    dcp.load(into, checkpoint_id=tmp_path / "b")
    assert into["epoch"] == 3
    assert all(torch.equal(into["model"][name], value) for name, value in tree["model"].items())


def test_other_containers_have_neither(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.pt")
    plan = Plan.from_options(rename=["a=c"])
    with pytest.raises(UsageError, match=r"copy is for folders of torch\.distributed"):
        optimstate.remap(tmp_path / "a.pt", tmp_path / "b.pt", plan, copy=True)
    with pytest.raises(UsageError, match=r"ranks is for folders"):
        optimstate.convert(tmp_path / "a.pt", tmp_path / "b.safetensors", options=WriteOptions(ranks=2))
    with pytest.raises(UsageError, match="between 1 and 65536"):
        optimstate.convert(tmp_path / "a.pt", tmp_path / "b", to="dcp", options=WriteOptions(ranks=0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
