"""Folders of torch's HuggingFaceStorageWriter with an optimizer: read whole, and written so that torch reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from optimstate import Plan, convert, remap, scan, verify
from optimstate.errors import CorruptCheckpointError
from optimstate.formats.registry import open_checkpoint
from optimstate.state.sections import find_sections
from optimstate.tree import tensors
from tests.formats.live import differs, raw
from tests.releases import WRITES_SAFETENSORS_SHARDS

if not WRITES_SAFETENSORS_SHARDS:
    pytest.skip("this torch writes no safetensors shards", allow_module_level=True)
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # there is one process, and no process group
FORMS = ("flattened", "nested", "optimizer alone", "torch's own", "tensors alone")


def written(form: str, folder: Path) -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """A folder as torch writes it, the optimizer in it, and all its tensors by the names that torch gives them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    last = list(model[2].parameters())
    groups = [{"params": list(model[0].parameters())}, {"params": last, "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    flattened = form in ("flattened", "tensors alone")
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flattened))
    trees: dict[str, Any] = {
        "flattened": {**weights, **state},
        "nested": {"model": weights, "optim": state, "epoch": 7},
        "optimizer alone": state,
        "torch's own": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7},
        "tensors alone": {k: v for k, v in {**weights, **state}.items() if isinstance(v, torch.Tensor)},
    }
    dcp.save(trees[form], storage_writer=HuggingFaceStorageWriter(str(folder)))
    named: dict[str, torch.Tensor] = {}
    for key, value in trees[form].items():
        named.update(flat(key, value))
    return optimizer, named


def flat(key: str, value: Any) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {key: value}
    found: dict[str, torch.Tensor] = {}
    for inner, item in value.items() if isinstance(value, dict) else ():
        found.update(flat(f"{key}.{inner}", item))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_is_read_with_its_options(form: str, tmp_path: Path) -> None:
    optimizer, named = written(form, tmp_path / "hf")
    document = open_checkpoint(tmp_path / "hf")
    (section,) = (section for section in find_sections(document.tree) if section.kind == "optimizer")
    state = section.optimizer()
    live = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    found = [slots or {} for _, _, slots in state.parameters()]
    if form in ("flattened", "tensors alone"):  # groups are those of equal options, in the order of their names
        assert sorted(found[0]) == sorted(live[0])
    else:
        assert [
            differs(dict(sorted(a.items())), dict(sorted(b.items()))) for a, b in zip(found, live, strict=True)
        ] == [None] * 4
    if form != "tensors alone":
        assert [group.options["weight_decay"] for group in state.groups] == [0.01, 0.5]
        assert {group.options["betas"] for group in state.groups} == {(0.9, 0.999)}
    assert state.is_named is (form != "torch's own")
    assert sum(1 for _ in tensors(document.tree)) == len(named)
    assert verify(tmp_path / "hf").healthy
    assert not scan(tmp_path / "hf").unreadable


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_by_torch(form: str, tmp_path: Path) -> None:
    _, named = written(form, tmp_path / "hf")
    remap(tmp_path / "hf", tmp_path / "out", Plan.from_options(rename=["0.{p}=body.{p}"], drop=[]))
    (index,) = (tmp_path / "out").glob("*.json")
    there = json.loads(index.read_text())["weight_map"]
    state = {name: torch.zeros_like(value) for name, value in named.items() if name in there}
    moved = {name: name.replace("0.weight", "body.weight").replace("0.bias", "body.bias") for name in named}
    state |= {new: torch.zeros_like(named[name]) for name, new in moved.items() if new in there}
    assert len(state) == len(named)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "out")))
    for name, value in named.items():
        assert raw(state[name if name in there else moved[name]]) == raw(value), name


def test_it_becomes_a_file_of_torch(tmp_path: Path) -> None:
    optimizer, _ = written("torch's own", tmp_path / "hf")
    (index,) = (tmp_path / "hf").glob("*.json")
    convert(index, tmp_path / "a.pt", section="optimizer")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    optimizer.load_state_dict(loaded)
    assert optimizer.param_groups[1]["weight_decay"] == 0.5


def test_values_without_names_are_told_of(tmp_path: Path) -> None:
    written("flattened", tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    document = open_checkpoint(file)
    assert "44 values" in document.notes[0]
    assert len(document.tree) == 16


def test_an_index_with_too_few_names_is_refused(tmp_path: Path) -> None:
    written("flattened", tmp_path / "hf")
    (index,) = (tmp_path / "hf").glob("*.json")
    content = json.loads(index.read_text())
    del content["weight_map"]["param_groups.0.weight.lr"]
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptCheckpointError, match="43 names for 44 values"):
        open_checkpoint(tmp_path / "hf")


def test_an_archive_that_is_cut_is_refused(tmp_path: Path) -> None:
    written("flattened", tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    data = file.read_bytes()
    for length in (100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(CorruptCheckpointError):
            open_checkpoint(tmp_path / "hf")
