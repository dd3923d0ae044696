"""Folders of torch.distributed.checkpoint: read as torch reads them, and written so that torch reads them."""

from __future__ import annotations

import pickle
import shutil
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed.checkpoint as distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import optimstate
from optimstate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.formats.dcp import folder as dcp
from optimstate.formats.dcp.metadata import load_metadata
from optimstate.formats.ranks.tiles import Tile, check_tiling, tiled
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Extent, chunks
from optimstate.state.sections import find_sections
from optimstate.surgery.writing.converting import convert
from optimstate.tensors.lazy import LazyTensor, Storage, read_numbers
from optimstate.tree import difference
from tests import corpus
from tests.formats import gloo_worker
from tests.formats.live import differs, raw
from tests.releases import safetensors_shards

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NESTED = ("dcp/single_adamw_nested", "dcp/fsdp2_ws2_adamw_nested")


def save(tree: dict[str, Any], path: Path, **options: Any) -> Path:
    writer = distributed.FileSystemWriter(path, **options)
    distributed.save(tree, storage_writer=writer)
    return path


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NESTED)
def test_the_tree_is_the_one_torch_restores(name: str, tmp_path: Path) -> None:
    case = corpus.case(name)
    dcp_to_torch_save(str(case.entry), str(tmp_path / "a.pt"))
    document = open_checkpoint(case.entry)
    assert document.format == "dcp"
    assert differs(document.tree, torch.load(tmp_path / "a.pt", weights_only=True)) is None


def test_a_flattened_optimizer_is_the_nested_one() -> None:
    flat = open_checkpoint(corpus.case("dcp/fsdp2_ws2_adamw_flat").entry).tree
    nested = open_checkpoint(corpus.case("dcp/fsdp2_ws2_adamw_nested").entry).tree
    assert flat["optimizer"]["state"].keys() == nested["optimizer"]["state"].keys()
    for name, slots in nested["optimizer"]["state"].items():
        assert {slot: value.tobytes() for slot, value in slots.items()} == {
            slot: value.tobytes() for slot, value in flat["optimizer"]["state"][name].items()
        }
    assert sorted(map(repr, map(sorted, (g["params"] for g in flat["optimizer"]["param_groups"])))) == sorted(
        map(repr, map(sorted, (g["params"] for g in nested["optimizer"]["param_groups"])))
    )


def test_positions_are_numbers_again() -> None:
    tree = open_checkpoint(corpus.case("dcp/fsdp2_ws2_adamw_raw_intkeys").entry).tree
    assert sorted(tree["optimizer"]["state"]) == list(range(12))
    (optimizer,) = (section.optimizer() for section in find_sections(tree) if section.kind == "optimizer")
    assert optimizer.orphans() == []
    assert all(slots for _, _, slots in optimizer.parameters())


def test_an_optimizer_without_state_is_one(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 3)
    path = save({"optimizer": torch.optim.SGD(net.parameters(), lr=0.1).state_dict()}, tmp_path / "a")
    (section,) = find_sections(open_checkpoint(path).tree)
    assert section.kind == "optimizer"
    assert [len(group.params) for group in section.optimizer().groups] == [2]


def test_megatron_keeps_names_slots_and_the_file_beside() -> None:
    document = open_checkpoint(corpus.case("megatron/distopt-fully_reshardable").entry)
    (optimizer,) = (s.optimizer() for s in find_sections(document.tree) if s.kind == "optimizer")
    (model,) = (s.tensors() for s in find_sections(document.tree) if s.kind == "model")
    assert optimizer.is_named
    assert set(optimizer.state) <= set(model)
    for name, slots in optimizer.state.items():
        assert set(slots) == {"param", "exp_avg", "exp_avg_sq", "step"}
        assert {slots[slot].shape for slot in ("param", "exp_avg", "exp_avg_sq")} == {model[name].shape}
        assert slots["param"].tobytes() == model[name].tobytes()  # trained in fp32: the master is the weight
    assert document.tree["common.pt"]["iteration"] == 3
    assert any("param groups" in note for note in document.notes)
    common = document.tree["common.pt"]["optimizer"]["optimizer"]["param_groups"]
    assert optimizer.groups[0].options["lr"] == common[0]["lr"]


def test_megatrons_names_are_written_again(tmp_path: Path) -> None:
    document = open_checkpoint(corpus.case("megatron/distopt-fully_reshardable").entry)
    dcp.write(document.tree, tmp_path / "a", like=document)
    again = open_checkpoint(tmp_path / "a")
    assert set(again.handle.metadata.order) == set(document.handle.metadata.order)
    assert not again.handle.metadata.paths
    assert difference(document.tree, again.tree, aliases=False) is None
    document.tree["optimizer"]["param_groups"][0]["lr"] = 7.0
    with pytest.raises(RepresentationError, match=r"common\.pt"):
        dcp.write(document.tree, tmp_path / "b", like=open_checkpoint(tmp_path / "a"))


@pytest.mark.parametrize("chain", ["", "chained_0."])
def test_flat_buckets_of_megatron_do_not_hide_the_model(chain: str, tmp_path: Path) -> None:
    distributed_state = f"{chain}optimizer.distributed.dp_group_idx_0."
    bucket = f"{distributed_state}gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0."
    live: dict[str, Any] = {"decoder.weight": torch.randn(3, 2), "decoder._extra_state/shard_0_2": [None]}
    live |= {bucket + slot: torch.rand(6) for slot in ("param", "exp_avg", "exp_avg_sq")}
    live[f"{distributed_state}optimizer/shard_0_1"] = {"param_groups": [{"lr": 0.1, "step": 10, "params": []}]}
    live["rng_state/shard_0.0_1.1"] = [{"torch_rng_state": torch.get_rng_state(), "random": (3, (1, 2), None)}]
    planner = distributed.DefaultSavePlanner(flatten_state_dict=False)
    distributed.save(live, checkpoint_id=tmp_path / "a", planner=planner)
    document = open_checkpoint(tmp_path / "a")
    assert [(s.kind, list(s.tensors())) for s in find_sections(document.tree)] == [("model", ["decoder.weight"])]
    assert any("carried along" in note and "--dist-ckpt-optim-fully-reshardable" in note for note in document.notes)
    report = optimstate.verify(tmp_path / "a")
    assert (report.verdict, len(report.unread)) == ("unknown", 1)
    assert "tensors of optimizer state (exp_avg, exp_avg_sq" in report.unread[0]
    optimstate.remap(tmp_path / "a", tmp_path / "b", optimstate.Plan.from_options(rename=["decoder.{p}=dec.{p}"]))
    moved = {name.replace("decoder.w", "dec.w") for name in live}
    assert set(open_checkpoint(tmp_path / "b").handle.metadata.order) == moved


def test_each_of_megatrons_chained_optimizers_is_one(tmp_path: Path) -> None:
    live: dict[str, Any] = {f"decoder.{name}.weight": torch.randn(3, 2) for name in ("dense", "expert")}
    names = {
        f"chained_{number}.optimizer.state.{slot}.decoder.{name}.weight": torch.rand(3, 2)
        for number, name in enumerate(("dense", "expert"))
        for slot in ("fp32_param", "exp_avg", "exp_avg_sq")
    }
    planner = distributed.DefaultSavePlanner(flatten_state_dict=False)
    distributed.save({**live, **names}, checkpoint_id=tmp_path / "a", planner=planner)
    groups = [{"lr": lr, "params": [0], "wd_mult": 1.0} for lr in (0.1, 0.2)]
    common = {number: {"optimizer": {"param_groups": [group]}, "common_step": 7} for number, group in enumerate(groups)}
    torch.save({"optimizer": common, "iteration": 7}, tmp_path / "a" / "common.pt")
    document = open_checkpoint(tmp_path / "a")
    found = {s.label: s.optimizer() for s in find_sections(document.tree) if s.kind == "optimizer"}
    assert list(found) == ["chained_0.optimizer", "chained_1.optimizer"]
    for number, (state, name) in enumerate(zip(found.values(), live, strict=True)):
        assert [(name, state.groups[0].options["lr"])] == [(state.groups[0].params[0], 0.1 * (number + 1))]
        assert state.state[name]["step"] == 7
        for slot in ("fp32_param", "exp_avg", "exp_avg_sq"):
            assert state.state[name][slot].tobytes() == raw(names[f"chained_{number}.optimizer.state.{slot}.{name}"])
    assert optimstate.inspect(tmp_path / "a").notes == (
        "param groups are not stored by parameter: all are listed in one, with the options of common.pt",
    )
    dcp.write(document.tree, tmp_path / "b", like=document)
    assert set(open_checkpoint(tmp_path / "b").handle.metadata.order) == {*live, *names}


@pytest.mark.slow
def test_shards_along_any_dimension(two_processes: Path) -> None:
    tree = open_checkpoint(two_processes / "sharded").tree
    assert {name: tensor.shape for name, tensor in tree["model"].items()} == gloo_worker.SHAPES
    for name, tensor in tree["model"].items():
        assert tensor.tobytes() == raw(gloo_worker.values(name)), name
    assert (tree["epoch"], tree["betas"]) == (3, (0.9, 0.999))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["safetensors", "without_collectives"])
def test_other_forms_of_two_ranks(name: str, two_processes: Path) -> None:
    if not (two_processes / name).exists():
        pytest.skip("this torch does not write such a form")
    document = open_checkpoint(two_processes / name)
    assert document.tree["epoch"] == 3
    for key, tensor in document.tree["model"].items():
        assert (tensor.shape, tensor.tobytes()) == (gloo_worker.SHAPES[key], raw(gloo_worker.values(key))), key
    noted = any("metadata of 2 ranks" in note for note in document.notes)
    assert noted == (name == "without_collectives")


@pytest.mark.slow
def test_a_rank_that_is_missing_leaves_a_named_hole(two_processes: Path, tmp_path: Path) -> None:
    if not gloo_worker.WITHOUT_COLLECTIVES:
        pytest.skip("this torch does not write such a form")
    folder = Path(shutil.copytree(two_processes / "without_collectives", tmp_path / "a"))
    (folder / "__1.metadata").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'model\.rows'.*\(7, 4\): \[4:7, 0:4\] is missing"):
        open_checkpoint(folder)


@pytest.mark.slow
def test_ranks_that_contradict_one_another_are_refused(two_processes: Path, tmp_path: Path) -> None:
    if not gloo_worker.WITHOUT_COLLECTIVES:
        pytest.skip("this torch does not write such a form")
    folder = Path(shutil.copytree(two_processes / "without_collectives", tmp_path / "a"))
    file = folder / "__1.metadata"
    file.write_bytes(file.read_bytes().replace(b"float32", b"float64"))
    with pytest.raises(CorruptCheckpointError, match=r"'model\.rows' is float32\[7, 4\].*float64\[7, 4\]"):
        open_checkpoint(folder)


@safetensors_shards
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf/sharded", "hf", "hf_consolidated"])
def test_shards_of_the_hugging_face_writer(name: str, two_processes: Path, tmp_path: Path) -> None:
    tree = open_checkpoint(two_processes / name).tree
    parts = {"hf": [tree.get("sharded")], "hf_consolidated": [tree, tree.get("sharded")]}.get(name, [tree])
    for part in parts:
        assert part is not None
        (file,) = (key for key in part if key.startswith("model."))
        for key, tensor in part[file].items():
            assert (tensor.shape, tensor.tobytes()) == (gloo_worker.SHAPES[key], raw(gloo_worker.values(key))), key
    convert(two_processes / name, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[key], gloo_worker.values(key.rpartition(".")[2])) for key in loaded)
    assert len(loaded) == len(parts) * len(gloo_worker.SHAPES)


@safetensors_shards
@pytest.mark.slow
def test_a_missing_shard_of_the_hugging_face_writer_is_named(two_processes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_processes / "hf/sharded", tmp_path / "a"))
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors: the files of rank 1 \(shard-00001-"):
        open_checkpoint(folder)


@safetensors_shards
@pytest.mark.slow
def test_a_damaged_place_of_a_shard_is_named(two_processes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_processes / "hf/sharded", tmp_path / "a"))
    file = folder / "shard-00002-model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[4, 0]", b"[5, 0]"))
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'rows' in .*shard-00002.*: \[4:5, 0:4\] is missing"):
        open_checkpoint(folder)
    file.write_bytes(file.read_bytes().replace(b"[5, 0]", b"[-5,0]"))
    with pytest.raises(CorruptCheckpointError, match=r"shard-00002.*DCP_SHARDING_INFO cannot be read"):
        open_checkpoint(folder)


@safetensors_shards
def test_safetensors_serialization(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    live = {
        "model": {"a.weight": torch.randn(5, 3), "b": torch.arange(4), "h": torch.randn(3).bfloat16()},
        "step": 7,
    }
    path = save(live, tmp_path / "a", serialization_format=SerializationFormat.SAFETENSORS)
    assert differs(open_checkpoint(path).tree, live) is None


NUMBERS = {
    f"{dtype}.{place}": torch.tensor(value).to(dtype)
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool)
    for place, value in enumerate((3, 3, 1, 0, 3, 1))
}


@pytest.mark.parametrize("serialization", ["TORCH_SAVE", pytest.param("SAFETENSORS", marks=safetensors_shards)])
def test_numbers_read_together_are_those_read_one_by_one(serialization: str, tmp_path: Path) -> None:
    options = {}
    if serialization == "SAFETENSORS":
        from torch.distributed.checkpoint.filesystem import SerializationFormat

        options = {"serialization_format": SerializationFormat.SAFETENSORS}
    path = save({**NUMBERS, "one": torch.tensor([3.0]), "large": torch.randn(40, 100)}, tmp_path / "a", **options)
    together, alone = open_checkpoint(path).tree, open_checkpoint(path).tree
    numbers = [value for value in together.values() if value.numel == 1]
    read_numbers(numbers)
    for name in (*NUMBERS, "one"):
        data = alone[name].tobytes()
        assert together[name].tobytes() == data, name
        assert together[name].storage.crc in ({None} if serialization == "SAFETENSORS" else {crc32(data)}), name
    assert difference(together, alone) is None


def test_a_number_whose_archive_is_damaged_is_named(folder: Path) -> None:
    for file in folder.glob("*.distcp"):
        data = file.read_bytes()
        file.write_bytes(data.replace(b"PK\x05\x06", b"PK\x05\x07"))
    with pytest.raises(CorruptCheckpointError, match=r"__\d_0\.distcp"):
        optimstate.inspect(folder)


def test_strided_items_are_read_in_order(tmp_path: Path) -> None:
    live = {"w": torch.randn(4, 6).t(), "c": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    assert differs(open_checkpoint(save(live, tmp_path / "a")).tree, live) is None


def test_lists_tuples_and_objects(tmp_path: Path) -> None:
    live = {"list": [torch.ones(2), {"x": 1}, "t"], "tuple": (torch.zeros(1), 2), "plain": [1, None], "text": "é"}
    assert differs(open_checkpoint(save(live, tmp_path / "a")).tree, live) is None


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.case("dcp/fsdp2_ws2_adamw_nested").entry, tmp_path / "a"))


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"__1_0\.distcp"):
        open_checkpoint(folder)


def test_missing_metadata_is_explained(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"without \.metadata.*\n.*did not finish"):
        open_checkpoint(folder)


def test_a_short_file_is_named_before_anything_is_read(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match=r"__1_0\.distcp: a part of \d+ bytes"):
        open_checkpoint(folder)


def test_every_truncation_of_the_metadata_is_a_named_error(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    for length in range(0, len(data), 997):
        (folder / ".metadata").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="metadata"):
            open_checkpoint(folder)


def test_a_piece_that_is_not_what_the_metadata_says(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    assert b"bfloat16" not in data
    (folder / ".metadata").write_bytes(data.replace(b"\x8c\x07float32", b"\x8c\x07float64").replace(b"x", b"x"))
    tree = open_checkpoint(folder).tree
    with pytest.raises(CorruptCheckpointError, match=r"should be float64"):
        tree["model"]["tok.weight"].tobytes()


def test_metadata_cannot_run_anything_or_leave_the_folder(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, ("raise SystemExit",)

    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(), 4))
    with pytest.raises(CorruptCheckpointError, match="metadata is"):
        open_checkpoint(folder)
    data = corpus.case("dcp/fsdp2_ws2_adamw_nested").entry.joinpath(".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.replace(b"__0_0.distcp", b"../x0.distcp"))
    with pytest.raises(CorruptCheckpointError, match="outside the folder"):
        open_checkpoint(folder)


def test_compressed_items_are_refused_by_name(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(3)}, tmp_path / "a")
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsupportedCheckpointError, match="'w' went through zstd"):
        open_checkpoint(folder)


def test_subclasses_of_tensors_are_refused_by_name_and_class(tmp_path: Path) -> None:
    """Their file is not damaged: it holds another kind of tensor than the metadata says."""
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    folder = save({"w": torch.ones(3), "slot": subclass.OptimState8bit.zeros((4096,))}, tmp_path / "a")
    tree = open_checkpoint(folder).tree
    assert tree["w"].tobytes() == torch.ones(3).numpy().tobytes()
    with pytest.raises(UnsupportedCheckpointError, match=r"'slot' is stored as a subclass .*OptimState8bit") as caught:
        tree["slot"].tobytes()
    assert "save the rest without it" in str(caught.value)


# --- pieces ---------------------------------------------------------------------------------------------------------


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.data)
        return self.data[offset : offset + length]


def cut_into_boxes(shape: tuple[int, ...], data: st.DataObject) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut an index space by recursive bisection: grids and irregular tilings."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        offsets, sizes = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, sizes[axis]))
        low, high = list(sizes), list(sizes)
        low[axis], high[axis] = at, sizes[axis] - at
        moved = list(offsets)
        moved[axis] += at
        boxes += [(offsets, tuple(low)), (tuple(moved), tuple(high))]
    return boxes


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), data=st.data())
def test_any_tiling_gives_the_tensor(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(prod(shape), dtype=torch.int16).view(shape)
    boxes = cut_into_boxes(shape, data)
    check_tiling(shape, boxes)
    tiles = []
    for offsets, sizes in boxes:
        part = raw(whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone())
        tiles.append(Tile(offsets, sizes, Storage((Extent(Bytes(part), 0, len(part)),), len(part))))
    pieces = tiled(shape, 2, tiles)
    for block in (1, 3, 1 << 20):
        assert b"".join(chunks(pieces, block)) == raw(whole)
    full = [box for box in boxes if 0 not in box[1]]
    if len(full) > 1:
        with pytest.raises(CorruptCheckpointError, match="do not fill"):
            check_tiling(shape, full[1:])
        with pytest.raises(CorruptCheckpointError, match="do not fill"):
            check_tiling(shape, [*full, full[0]])


def test_overlaps_of_the_right_total_are_found() -> None:
    boxes = [((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 1))]
    with pytest.raises(CorruptCheckpointError, match="do not fill"):
        check_tiling((3, 3), boxes)
    with pytest.raises(CorruptCheckpointError, match="outside"):
        check_tiling((3,), [((2,), (2,))])


# --- writing --------------------------------------------------------------------------------------------------------


def blank(node: Any) -> Any:
    """The same state dict with other values, for torch to load into."""
    if isinstance(node, torch.Tensor):
        return torch.full_like(node, 77)
    if isinstance(node, dict):
        return type(node)((key, blank(value)) for key, value in node.items())
    if isinstance(node, list):
        return [blank(item) for item in node]
    return None


def same_values(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return raw(a) == raw(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_values, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    "name", ["torch/adamw_named_layerwise_sequentiallr", "torch/sgd_plain_unnamed_1g", "optimstate/adamw_non_ascii"]
)
def test_torch_loads_what_is_written(name: str, tmp_path: Path) -> None:
    case = corpus.case(name)
    document = open_checkpoint(case.files[0])
    dcp.write(document.tree, tmp_path / "a", like=document)
    live = torch.load(case.files[0], weights_only=True)
    loaded = blank(live)
    distributed.load(loaded, checkpoint_id=str(tmp_path / "a"))
    assert same_values(loaded, live)


def test_torch_accepts_every_field_of_the_metadata(tmp_path: Path) -> None:
    live = {"w": torch.randn(3, 4), "none": None}
    torch.save(live, tmp_path / "a.pt")
    dcp.write(open_checkpoint(tmp_path / "a.pt").tree, tmp_path / "a")
    ours = distributed.FileSystemReader(tmp_path / "a").read_metadata()
    theirs = distributed.FileSystemReader(save(live, tmp_path / "b")).read_metadata()
    for form in theirs.state_dict_metadata.values():
        if getattr(getattr(form, "properties", None), "strides", None):
            form.properties.strides = None  # since 2.15; None in what older ones wrote, and in what is written here
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    assert set(ours.storage_data) == set(theirs.storage_data)
    indices = ({key.fqn: key.index for key in found.storage_data} for found in (ours, theirs))
    assert next(indices) == next(indices)


@pytest.mark.slow
def test_two_processes_of_fsdp2_load_what_is_written(two_processes: Path) -> None:
    saved = torch.load(two_processes / "a.pt", weights_only=True)
    arrived = torch.load(two_processes / "arrived.pt", weights_only=True)
    assert same_values(arrived["model"], dict(saved["model"]))
    assert same_values(arrived["optimizer"]["state"], saved["optimizer"]["state"])
    assert arrived["optimizer"]["param_groups"][0]["lr"] == 1e-2


@pytest.mark.parametrize("name", [*NESTED, "dcp/fsdp2_ws2_adamw_flat", "dcp/fsdp2_ws2_adamw_raw_intkeys"])
def test_written_again_it_reads_the_same(name: str, tmp_path: Path) -> None:
    document = open_checkpoint(corpus.case(name).entry)
    dcp.write(document.tree, tmp_path / "a", like=document)
    again = open_checkpoint(tmp_path / "a")
    assert difference(document.tree, again.tree) is None
    old, new = (load_metadata((path / ".metadata").read_bytes())[0] for path in (document.path, again.path))
    assert set(old.order) == set(new.order)  # flattened ones stay flattened: the names are those torch asks for
    assert old.paths == new.paths


def test_files_beside_it_are_written_too(tmp_path: Path) -> None:
    document = open_checkpoint(corpus.case("megatron/distopt-fully_reshardable").entry)
    dcp.write(document.tree, tmp_path / "a", like=document)
    assert difference(document.tree["common.pt"], open_checkpoint(tmp_path / "a" / "common.pt").tree) is None


def test_what_names_cannot_hold_is_named(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    live = {"a": {1: torch.ones(1)}, "empty": {}, "t": torch.ones(2, 3).t(), "x": shared[:3], "y": shared[3:]}
    torch.save(live, tmp_path / "a.pt")
    notes = dcp.write(open_checkpoint(tmp_path / "a.pt").tree, tmp_path / "a")
    assert sorted(note.split(":")[0] for note in notes) == [
        "keys that are not text become text",
        "strides are not kept",
        "tensors that share memory are stored separately",
    ]
    tree = open_checkpoint(tmp_path / "a").tree
    assert sorted(tree) == ["a", "empty", "t", "x", "y"]
    assert tree["empty"] == {}
    assert tree["t"].tobytes() == raw(live["t"])
    assert isinstance(tree["a"]["1"], LazyTensor)


def test_two_paths_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(RepresentationError, match=r"would both be named 'a\.b'"):
        dcp.write(open_checkpoint(tmp_path / "a.pt").tree, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"a": 1}
    loop["self"] = loop
    with pytest.raises(RepresentationError, match="contains itself"):
        dcp.write({"loop": loop}, tmp_path / "a")


def test_only_a_mapping_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="root"):
        dcp.write([1], tmp_path / "a")
