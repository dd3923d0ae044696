"""ZeRO partitions put together, on any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import CorruptCheckpointError, RepresentationError, UnsupportedCheckpointError
from optimstate.formats.deepspeed import zero as deepspeed
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import FileSource
from optimstate.state.sections import find_sections
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import tensors
from tests import corpus
from tests.formats import zero
from tests.formats.live import raw
from tests.formats.truths import judge

SHAPES = {"a.weight": (7, 3), "a.bias": (7,), "b.weight": (2, 7), "scale": (1,), "c.weight": (3, 1, 2)}
GROUPS = [["a.weight", "b.weight", "c.weight"], ["a.bias", "scale"]]
PARTITIONED = ("z1_ws2_bf16_adamw", "z2_ws2_fp32_adam_sched", "z3_ws1_bf16_adamw", "z3_ws2_bf16_adamw")


def assert_state(tree: dict[str, Any], state: zero.Named) -> None:
    found = tree["optimizer"]["state"]
    assert set(found) == set(state)
    for name, slots in state.items():
        assert set(found[name]) == {*slots, "step"}
        for slot, value in slots.items():
            assert found[name][slot].shape == tuple(value.shape)
            assert found[name][slot].tobytes() == raw(value), (name, slot)
        assert found[name]["step"].item() == 9.0


@pytest.mark.parametrize("keep_padding", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_stage_2_on_any_number_of_ranks(world: int, keep_padding: bool, tmp_path: Path) -> None:
    state = zero.named_state(SHAPES)
    zero.write_stage_2(tmp_path / "global_step9", state, GROUPS, world, keep_padding=keep_padding)
    document = open_checkpoint(tmp_path / "global_step9")
    assert document.format == "deepspeed"
    assert_state(document.tree, state)
    assert [group["params"] for group in document.tree["optimizer"]["param_groups"]] == GROUPS
    assert [group["lr"] for group in document.tree["optimizer"]["param_groups"]] == [0.1, 0.2]
    assert document.tree["model"]["a.weight"].dtype == "float16"
    assert document.tree["optimizer"]["zero"] == {"loss_scaler": None, "clip_grad": 1.0, "zero_stage": 2}
    assert document.tree["global_steps"] == 9


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_stage_3_on_any_number_of_ranks(world: int, tmp_path: Path) -> None:
    state = zero.named_state(SHAPES)
    frozen = torch.randn(4, 3)
    zero.write_stage_3(tmp_path / "global_step9", state, list(SHAPES), world, frozen)
    document = open_checkpoint(tmp_path / "global_step9")
    assert_state(document.tree, state)
    model = document.tree["model"]
    assert set(model) == {*SHAPES, "frozen", "tied", "count"}
    assert model["frozen"].tobytes() == raw(frozen)
    assert model["tied"].storage is model["a.weight"].storage
    assert model["a.weight"].tobytes() == raw(state["a.weight"]["fp32_param"])
    assert model["a.weight"].storage is not document.tree["optimizer"]["state"]["a.weight"]["fp32_param"].storage
    assert any("masters" in note for note in document.notes)


@pytest.mark.parametrize("name", PARTITIONED)
def test_no_two_parameters_share_state(name: str) -> None:
    case = corpus.case(f"deepspeed/{name}")
    tree = open_checkpoint(case.entry / "global_step4").tree
    storages = [id(tensor.storage) for _, tensor in tensors(tree["optimizer"])]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("name", PARTITIONED)
def test_nothing_is_copied(name: str) -> None:
    tree = open_checkpoint(corpus.case(f"deepspeed/{name}").entry / "global_step4").tree
    for _, tensor in tensors(tree["optimizer"]):
        assert all(isinstance(piece.source, FileSource) for piece in tensor.extents())


def test_the_slice_mappings_say_what_the_order_of_shapes_says(tmp_path: Path) -> None:
    case = corpus.case("deepspeed/z2_ws2_fp32_adam_sched")
    folder = Path(shutil.copytree(case.entry / "global_step4", tmp_path / "tag"))
    for file in folder.glob("*optim_states.pt"):
        document = torch_zip.read(file)
        del document.tree["optimizer_state_dict"]["param_slice_mappings"]
        torch_zip.write(document.tree, tmp_path / "new.pt", like=document)
        (tmp_path / "new.pt").replace(file)
    assert judge(open_checkpoint(folder).tree, case.truth()).wrong == []


def test_the_scheduler_is_a_section() -> None:
    tree = open_checkpoint(corpus.case("deepspeed/z2_ws2_fp32_adam_sched").entry).tree
    kinds = [section.kind for section in find_sections(tree)]
    assert sorted(kinds) == ["model", "optimizer", "scheduler"]


def test_stage_0_is_left_as_it_was_saved() -> None:
    document = open_checkpoint(corpus.case("deepspeed/z0_ws1_bf16_adamw").entry)
    optimizers = [s.optimizer() for s in find_sections(document.tree) if s.kind == "optimizer"]
    assert [sum(len(group.params) for group in optimizer.groups) for optimizer in optimizers] == [8]


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zero.write_stage_2(tmp_path / "tag", zero.named_state(SHAPES), GROUPS, 3, keep_padding=False)
    return tmp_path / "tag"


def test_a_missing_rank_is_named(folder: Path) -> None:
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match="rank 1 is missing"):
        open_checkpoint(folder)


def test_a_missing_last_rank_is_found_by_what_is_missing(folder: Path) -> None:
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"lacks \d+ elements"):
        open_checkpoint(folder)


def test_tensor_parallel_ranks_are_refused(folder: Path) -> None:
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedCheckpointError, match=r"tensor parallelism[^\0]*ds_to_universal"):
        open_checkpoint(folder)


def test_partitions_of_another_length_are_found(folder: Path) -> None:
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    inner = torch.load(file)
    inner["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(inner, file)
    with pytest.raises(CorruptCheckpointError, match=r"'a\.weight' needs float32 elements"):
        open_checkpoint(folder)


def test_malformed_states_are_a_named_error(folder: Path) -> None:
    torch.save(
        {"optimizer_state_dict": {"base_optimizer_state": 3}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    with pytest.raises((CorruptCheckpointError, UnsupportedCheckpointError), match="optimizer"):
        open_checkpoint(folder)


def test_files_of_experts_are_shown_by_name(folder: Path) -> None:
    torch.save({"w": torch.ones(2)}, folder / "layer_0_expert_1_mp_rank_00_model_states.pt")
    document = open_checkpoint(folder)
    assert isinstance(document.tree["layer_0_expert_1_mp_rank_00_model_states.pt"]["w"], LazyTensor)
    assert any("expert_1" in note and "not merged" in note for note in document.notes)


def test_partitions_are_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="deepspeed-universal"):
        deepspeed.write(open_checkpoint(folder).tree, tmp_path / "b")
