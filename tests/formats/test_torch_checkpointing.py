"""Folders of Meta's torch_checkpointing: read as the package loads them, and written so that it loads them."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate import Plan, convert, diff, inspect, remap, verify
from optimstate.errors import CheckpointError, RepresentationError
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch_checkpointing import NAME
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tree import difference
from tests import corpus
from tests.formats.live import differs

ONE = corpus.case("torch_checkpointing/adamw_one_rank").entry
TWO = corpus.case("torch_checkpointing/adamw_two_ranks").entry


def loaded(folder: Path, **into: Any) -> dict[str, Any]:
    """Items as the package loads them, through `metadata.pkl` where there is one."""
    pytest.importorskip("torch_checkpointing")
    from torch_checkpointing.checkpoint_manager import CheckpointManager
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.schema import ItemSpec
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config = CheckpointManager.Config.with_sync_save()
    config.items = {
        key: ItemSpec(resharder=None if value is None else DefaultResharder()) for key, value in into.items()
    }
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    manager = config.build()
    try:
        return dict(manager.load(str(folder), into=into, strict=True))
    finally:
        manager.close()


def torchs(optimizer: Any) -> Any:
    """The package's own way to the form that `torch.optim` loads."""
    pytest.importorskip("torch_checkpointing")
    from torch_checkpointing.state_transformations import optimizer_transform_post

    return optimizer_transform_post(optimizer)


def without_metadata(tmp_path: Path) -> Path:
    """As the package saves items that no resharder was declared for."""
    shutil.copytree(ONE, tmp_path / "plain")
    (tmp_path / "plain" / "metadata.pkl").unlink()
    return tmp_path / "plain"


def test_what_is_read_is_what_the_package_loads(tmp_path: Path) -> None:
    for folder in (ONE, without_metadata(tmp_path)):
        document = open_checkpoint(folder)
        live = loaded(folder, model=None, optimizer=None, scheduler=None, step=None)
        assert document.format == NAME
        assert differs(document.tree["optimizer"], torchs(live.pop("optimizer"))) is None
        assert differs(dict(document.tree["model"]), live.pop("model")) is None  # which it makes a dict
        assert differs({key: document.tree[key] for key in live}, live) is None


def test_the_parts_of_the_ranks_are_one() -> None:
    """That the tensors are those of the run, `test_truths` shows."""
    one, two = open_checkpoint(ONE).tree, open_checkpoint(TWO).tree
    assert two["rank"] == {"rank0": {"rank": 0}, "rank1": {"rank": 1}}
    assert [*one["optimizer"]["state"][0]] == [*two["optimizer"]["state"][0]]
    assert [s.kind for s in find_sections(one)] == [s.kind for s in find_sections(two)]
    assert verify(TWO).healthy
    assert inspect(TWO).sections[1].kind == "optimizer"


@pytest.mark.parametrize("source", [ONE, TWO], ids=["one rank", "two ranks"])
def test_what_is_written_is_loaded_by_the_package(source: Path, tmp_path: Path) -> None:
    remap(source, tmp_path / "out", Plan.from_options(rename=["body.{n}.{p}=trunk.{n}.{p}"]))
    tree = open_checkpoint(tmp_path / "out").tree
    model = {name: torch.zeros(tensor.shape) for name, tensor in tree["model"].items()}
    assert "trunk.0.weight" in model
    raw = torch.load(tmp_path / "out" / "optimizer_0.pt")
    blank = {name: {slot: torch.zeros_like(v) for slot, v in slots.items()} for name, slots in raw["state"].items()}
    live = loaded(tmp_path / "out", model=model, optimizer={**raw, "state": blank})
    assert differs(dict(tree["model"]), dict(live["model"])) is None
    assert differs(tree["optimizer"], torchs(live["optimizer"])) is None
    optimizer = torch.optim.AdamW([{"params": list(model.values())[::2]}, {"params": list(model.values())[1::2]}])
    optimizer.load_state_dict(torchs(live["optimizer"]))


def test_the_metadata_is_what_the_package_writes(tmp_path: Path) -> None:
    convert(ONE, tmp_path / "out", to=NAME)
    theirs, ours = (pickle.loads((folder / "metadata.pkl").read_bytes()) for folder in (ONE, tmp_path / "out"))
    assert ours == theirs
    assert difference(open_checkpoint(ONE).tree, open_checkpoint(tmp_path / "out").tree) is None
    assert not diff(ONE, tmp_path / "out").changes


def test_files_of_torch_and_back(tmp_path: Path) -> None:
    convert(ONE, tmp_path / "a.pt")
    live = torch.load(tmp_path / "a.pt", weights_only=True)
    assert [group["params"] for group in live["optimizer"]["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
    convert(tmp_path / "a.pt", tmp_path / "b", to=NAME)
    assert difference(open_checkpoint(ONE).tree, open_checkpoint(tmp_path / "b").tree) is None
    raw = torch.load(tmp_path / "b" / "optimizer_0.pt")
    assert raw["_optimizer_state_format_version"] == 1
    assert all("params" not in group for group in raw["param_groups"])
    assert [*raw["state"]][:2] == ["body.0.weight", "body.2.weight"]


def test_the_form_is_known_in_any_container(tmp_path: Path) -> None:
    shutil.copy(ONE / "optimizer_0.pt", tmp_path / "a.pt")
    (section,) = find_sections(open_checkpoint(tmp_path / "a.pt").tree)
    state = section.optimizer()
    assert state.is_named
    assert difference(state.to_node(), section.node) is None
    assert [group["params"] for group in state.by_name().to_node()["param_groups"]] == [
        list(group.names or ()) for group in state.groups
    ]
    remap(tmp_path / "a.pt", tmp_path / "b.pt", Plan.from_options(rename=["head.{p}=tail.{p}"]))
    raw = torch.load(tmp_path / "b.pt")
    assert raw["param_groups"][0]["param_names"][-1] == "tail.weight"
    assert "params" not in raw["param_groups"][0]
    assert "tail.weight" in raw["state"]
    assert OptimizerState.from_node(open_checkpoint(tmp_path / "b.pt").tree).is_named


def test_an_optimizer_without_names_keeps_the_form_of_torch(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    torch.save({"model": {"w": weight.data}, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    report = convert(tmp_path / "a.pt", tmp_path / "out", to=NAME)
    assert any("no names" in note for note in report.notes)
    assert differs(open_checkpoint(tmp_path / "out").tree["optimizer"], optimizer.state_dict()) is None


def test_a_state_dict_alone_is_one_item(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "out", to=NAME).notes
    assert [*open_checkpoint(tmp_path / "out").tree] == ["model"]


def test_files_beside_the_items_are_kept(tmp_path: Path) -> None:
    shutil.copytree(ONE, tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text('{"a": 1}')
    (tmp_path / "in" / "more").mkdir()
    torch.save({"v.weight": torch.ones(2, 2)}, tmp_path / "in" / "more" / "ema.pt")
    remap(tmp_path / "in", tmp_path / "out", Plan.from_options(rename=["head.{p}=tail.{p}"]))
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    assert torch.load(tmp_path / "out" / "more" / "ema.pt").keys() == {"v.weight"}


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / "metadata.pkl").read_bytes())
    change(metadata)
    (folder / "metadata.pkl").write_bytes(pickle.dumps(metadata))


def outside(metadata: Any) -> None:
    metadata["metadata"]["model"]["rank_to_layout_info"][0] = {"file_path": "../model_0.pt"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model_1.pt").unlink(), "model_1.pt is missing"),
        (lambda folder: (folder / "step_0.pt").unlink(), "step_0.pt is missing"),
        (lambda folder: change_metadata(folder, lambda m: m.update(version="3.0")), "version '3.0'"),
        (lambda folder: change_metadata(folder, outside), "outside the folder"),
        (lambda folder: change_metadata(folder, lambda m: m.pop("world_size")), "cannot be read"),
        (lambda folder: change_metadata(folder, lambda m: m.update(metadata=3)), "cannot be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(damage: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    shutil.copytree(TWO, tmp_path / "in")
    damage(tmp_path / "in")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "in")


def test_parts_of_another_description_are_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(TWO, tmp_path / "in")

    def change(metadata: Any) -> None:
        found = metadata["metadata"]["model"]["nested_path_to_metadata"]
        metadata["metadata"]["rank"] = {
            "nested_path_to_metadata": {"[]": next(iter(found.values()))},
            "rank_to_layout_info": {0: None, 1: None},
        }
        metadata["metadata"]["rank"]["nested_path_to_metadata"]["[]"][0]["sharding_metadata"]["type"] = "my_tensor"

    change_metadata(tmp_path / "in", change)
    with pytest.raises(CheckpointError, match="described as my_tensor"):
        open_checkpoint(tmp_path / "in")


@pytest.mark.parametrize("tree", [{"a.b": {"c": 1}}, {3: {"c": 1}}, [1]])
def test_what_has_no_name_as_an_item_is_refused(tree: Any, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "a.pt")
    with pytest.raises(RepresentationError):
        convert(tmp_path / "a.pt", tmp_path / "out", to=NAME)
