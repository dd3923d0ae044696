"""Frameworks arrange the same few sections differently: all are found by structure, in a real file each."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import RepresentationError
from optimstate.formats import archive
from optimstate.formats.registry import format_for_destination, open_checkpoint
from optimstate.state.records import tensor_record
from optimstate.state.sections import Section, find_sections
from optimstate.surgery.inspection.inspecting import inspect
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import AttributedTensor, Opaque, difference, tensors
from tests import corpus
from tests.formats import gloo_worker
from tests.formats.live import differs, raw
from tests.formats.truths import judge

# The kind of each section, and the keys that lead to it.
LAYOUTS: dict[str, list[tuple[Any, ...]]] = {
    "transformers/gpt2_adamw": [
        ("model", "model.safetensors"),
        ("optimizer", "optimizer.pt"),
        ("scheduler", "scheduler.pt"),
    ],
    "transformers/llama_tied_sharded": [
        ("model", "model.safetensors.index.json"),
        ("optimizer", "optimizer.pt"),
        ("scheduler", "scheduler.pt"),
    ],
    "transformers/peft_lora_llama": [
        ("model", "adapter_model.safetensors"),
        ("optimizer", "optimizer.pt"),
        ("scheduler", "scheduler.pt"),
    ],
    "accelerate/save_state_adamw": [
        ("model", "model.safetensors"),
        ("optimizer", "optimizer.bin"),
        ("scheduler", "scheduler.bin"),
    ],
    "accelerate/save_state_unsafe_bin_custom": [
        ("optimizer", "optimizer.bin"),
        ("model", "pytorch_model.bin"),
        ("scheduler", "scheduler.bin"),
    ],
    "lightning/adamw_named_groups": [
        ("model", "state_dict"),
        ("optimizer", "optimizer_states", 0),
        ("scheduler", "lr_schedulers", 0),
    ],
    "lightning/adamw_onecycle": [
        ("model", "state_dict"),
        ("optimizer", "optimizer_states", 0),
        ("scheduler", "lr_schedulers", 0),
    ],
    "lightning/swa_callback": [
        ("model", "state_dict"),
        ("scheduler", "callbacks", "StochasticWeightAveraging", "scheduler_state"),
        ("ema", "callbacks", "StochasticWeightAveraging", "average_model_state"),
        ("optimizer", "optimizer_states", 0),
        ("scheduler", "lr_schedulers", 0),
    ],
    "fastai/adam_discriminative": [
        ("model", "model"),
        ("optimizer", "opt"),
    ],
    "timm/checkpoint_saver_ema_layerdecay": [
        ("optimizer", "optimizer"),
        ("model", "state_dict"),
        ("model", "state_dict_ema"),
    ],
    "composer/decoupled_adamw": [
        ("model", "ep2-ba8-rank0.pt", "state", "model"),
        ("optimizer", "ep2-ba8-rank0.pt", "state", "optimizers", "DecoupledAdamW"),
        ("scheduler", "ep2-ba8-rank0.pt", "state", "schedulers", "LambdaLR"),
    ],
    "stable_baselines3/ppo": [
        ("model", "policy.pth"),
        ("optimizer", "policy.optimizer.pth"),
    ],
    "stable_baselines3/a2c_rmsprop": [
        ("model", "policy.pth"),
        ("optimizer", "policy.optimizer.pth"),
    ],
    "torch_ema/adamw_ema": [
        ("model", "model"),
        ("optimizer", "optimizer"),
        ("ema", "ema"),
    ],
    "mmengine/sgd_paramwise": [
        ("model", "epoch_2.pth", "state_dict"),
        ("optimizer", "epoch_2.pth", "optimizer"),
        ("scheduler", "epoch_2.pth", "param_schedulers", 0),
        ("scheduler", "epoch_2.pth", "param_schedulers", 1),
    ],
    "ignite/checkpoint_rmsprop": [
        ("model", "model"),
        ("optimizer", "optimizer"),
        ("scheduler", "lr_scheduler"),
    ],
    "fvcore/adam_sched": [
        ("model", "model_0000002.pth", "model"),
        ("optimizer", "model_0000002.pth", "optimizer"),
        ("scheduler", "model_0000002.pth", "scheduler"),
    ],
    "fsdp1/full_useorig": [
        ("model", "model.pt"),
        ("optimizer", "optim.pt"),
    ],
    "deepspeed/z1_ws2_bf16_adamw": [
        ("model", "global_step4", "model"),
        ("optimizer", "global_step4", "optimizer"),
    ],
    "deepspeed/bf16opt_ws2_z1_universal": [
        ("model", "global_step4", "model"),
        ("optimizer", "global_step4", "optimizer"),
        ("model", "global_step4_universal", "model"),
        ("optimizer", "global_step4_universal", "optimizer"),
    ],
    "megatron/distopt-fully_reshardable": [
        ("model", "model"),
        ("optimizer", "optimizer"),
    ],
    "nanogpt/ckpt": [
        ("model", "model"),
        ("optimizer", "optimizer"),
    ],
}


def sections_of(name: str) -> list[Section]:
    return find_sections(open_checkpoint(corpus.case(name).entry).tree)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sections_stand_where_the_framework_puts_them(name: str) -> None:
    assert [(section.kind, *section.path) for section in sections_of(name)] == LAYOUTS[name]


# --- forms of their own ---------------------------------------------------------------------------------------------


def test_fastai_lists_state_by_position_and_options_apart() -> None:
    (section,) = (s for s in sections_of("fastai/adam_discriminative") if s.kind == "optimizer")
    assert section.positional
    state = section.optimizer()
    assert not state.is_named
    assert [len(group.params) for group in state.groups] == [6]  # which of them are in which group is not in the file
    options = dict(state.groups[0].options)
    assert options == {"wd": 0.01, "sqr_mom": 0.99, "mom": options["mom"], "eps": 1e-05}  # lr differs between groups
    report = inspect(corpus.case("fastai/adam_discriminative").entry)
    (optimizer,) = (found for found in report.sections if found.kind == "optimizer")
    assert {slot.name: slot.parameters for slot in optimizer.slots}["grad_avg"] == 6
    assert optimizer.steps == {"4": 6}


def test_torch_ema_keeps_shadows_by_position() -> None:
    (section,) = (s for s in sections_of("torch_ema/adamw_ema") if s.kind == "ema")
    assert section.positional
    model = next(s for s in sections_of("torch_ema/adamw_ema") if s.kind == "model").tensors()
    parameters = [value for name, value in model.items() if "running" not in name and "num_batches" not in name]
    assert [value.shape for value in section.tensors().values()] == [value.shape for value in parameters]


def test_nested_slots_are_listed_by_their_paths() -> None:
    (optimizer,) = (s for s in inspect(corpus.case("heavyball/adamw").entry).sections if s.kind == "optimizer")
    slots = {slot.name: slot.parameters for slot in optimizer.slots}
    assert slots == {
        "0.step": 1,
        "0.update_by_adam_exp_avg_0": 8,
        "0.update_by_adam_exp_avg_sq_0": 8,
        "0.is_initialized": 8,
    }
    assert optimizer.steps == {"4": 1}
    (optimizer,) = (s for s in inspect(corpus.case("bitsandbytes/adamw8bit").entry).sections if s.kind == "optimizer")
    assert "__bnb_optimizer_quant_state__.state1" in {slot.name for slot in optimizer.slots}


@pytest.mark.parametrize("name", ["torch/wholeobject", "torch/wholeobject_legacy"])
def test_pickled_optimizers_are_read_not_run(name: str) -> None:
    found = sections_of(name)
    (section,) = (s for s in found if s.kind == "optimizer")
    assert isinstance(section.node, Opaque)
    assert judge(open_checkpoint(corpus.case(name).entry).tree, corpus.case(name).truth()).wrong == []
    assert any(s.kind == "scheduler" for s in found)


def test_pickled_modules_are_models(tmp_path: Path) -> None:
    """What ultralytics saves: the module itself, in half precision, beside an EMA and plain numbers."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    torch.save({"epoch": -1, "model": net.half(), "train_args": {"lr0": 0.01}}, tmp_path / "best.pt")
    document = open_checkpoint(tmp_path / "best.pt")
    (section,) = find_sections(document.tree)
    assert section.kind == "model"
    live = net.state_dict()
    assert set(section.tensors()) == set(live)
    assert all(section.tensors()[name].tobytes() == raw(value) for name, value in live.items())
    assert inspect(tmp_path / "best.pt").opaque["torch.nn.modules.conv.Conv2d"] == 1


def test_flat_parameters_are_reported_not_guessed() -> None:
    report = inspect(corpus.case("fsdp1/raw_flatparam_per_rank").entry)
    notes = [note for note in report.notes if "flat parameters" in note]
    assert len(notes) == 2
    assert all("cannot be named" in note and "FSDP.optim_state_dict()" in note for note in notes)
    named = inspect(corpus.case("fsdp1/full_useorig").entry)
    assert not any("flat parameters" in note for note in named.notes)


# --- tensors of other classes ---------------------------------------------------------------------------------------


def test_tensors_with_attributes_are_tensors(tmp_path: Path) -> None:
    path = corpus.case("fsdp1/full_useorig").entry / "model.pt"
    document = open_checkpoint(path)
    (section,) = find_sections(document.tree)
    assert all(isinstance(value, AttributedTensor) for value in section.tensors().values())
    assert document.tree["tok.weight"].attributes == {"_has_been_cloned": True}
    assert differs(document.tree, torch.load(path, weights_only=True)) is None


def attributed() -> dict[str, Any]:
    marked = torch.nn.Parameter(torch.ones(3))
    marked.tag = "norm"  # type: ignore[attr-defined]
    buffer = torch.nn.Buffer(torch.zeros(2), persistent=False)
    return {"marked": marked, "buffer": buffer, "plain": torch.nn.Parameter(torch.ones(1), requires_grad=False)}


@pytest.mark.parametrize("name", ["b.pt", "b.safetensors"])
def test_attributes_survive(name: str, tmp_path: Path) -> None:
    live = attributed()
    torch.save(live, tmp_path / "a.pt")
    document = open_checkpoint(tmp_path / "a.pt")
    assert document.tree["marked"].attributes == {"tag": "norm"}
    assert document.tree["marked"].is_parameter
    assert document.tree["buffer"].attributes == {"persistent": False, "_is_buffer": True}
    format_for_destination(tmp_path / name, None).write(document.tree, tmp_path / name, like=None)
    again = open_checkpoint(tmp_path / name)
    assert difference(document.tree, again.tree) is None
    if name.endswith(".pt"):
        loaded = torch.load(tmp_path / name, weights_only=False)
        assert loaded["marked"].tag == "norm"
        assert loaded["buffer"]._is_buffer


def test_records_say_which_dtype_and_shape_they_stand_for() -> None:
    tree = open_checkpoint(corpus.case("torchao/adamw8bit").entry).tree
    record = tensor_record(tree["optimizer"]["state"][0]["exp_avg"])
    assert record is not None
    assert (record.kind, record.dtype, record.shape) == ("OptimState8bit", "float32", (256, 32))
    assert {name: part.dtype for name, part in record.parts.items()} == {
        "codes": "uint8",
        "scale": "float32",
        "qmap": "float32",
    }
    folder = corpus.case("dcp/fsdp2_ws2_dtensor_torchsave_per_rank").entry
    trees = [open_checkpoint(folder / f"rank{rank}.pt").tree for rank in range(2)]  # each alone, not put together
    records = [tensor_record(tree["model"]["tok.weight"]) for tree in trees]
    assert [str(found) for found in records] == [
        "DTensor float32[33, 8] (_local_tensor float32[17, 8])",
        "DTensor float32[33, 8] (_local_tensor float32[16, 8])",
    ]


@pytest.mark.slow
def test_sharded_tensors_say_what_they_are_parts_of(two_processes: Path) -> None:
    tree = open_checkpoint(two_processes / "rank1.pt").tree
    record = tensor_record(tree["s"])
    assert str(record) == "ShardedTensor float32[6, 5] (shard 0 float32[6, 2])"
    assert record is not None
    assert record.parts["shard 0"].tobytes() == raw(gloo_worker.values("columns")[:, 3:])


def test_a_damaged_record_is_no_tensor() -> None:
    tree = open_checkpoint(corpus.case("torchao/adamw8bit").entry).tree
    damaged = tree["optimizer"]["state"][0]["exp_avg"]
    arguments = damaged.arguments
    for broken in (arguments[:3], (*arguments[:2], (1,), arguments[3]), (1, *arguments[1:])):
        damaged.arguments = broken
        assert tensor_record(damaged) is None
    assert tensor_record({"a": 1}) is None


# --- zip archives of files ------------------------------------------------------------------------------------------


def test_a_zip_of_files_is_written_again(tmp_path: Path) -> None:
    path = corpus.case("stable_baselines3/ppo").entry
    document = open_checkpoint(path)
    assert document.format == "zip"
    tree = dict(document.tree)
    tree["policy.pth"] = type(tree["policy.pth"])((f"new.{name}", value) for name, value in tree["policy.pth"].items())
    archive.write(tree, tmp_path / "b.zip", like=document)
    again = open_checkpoint(tmp_path / "b.zip")
    assert next(tensors(again.tree["policy.pth"]))[0] == ("new.mlp_extractor.policy_net.0.weight",)
    assert difference(again.tree["policy.optimizer.pth"], document.tree["policy.optimizer.pth"]) is None
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.zip") as new:
        assert new.testzip() is None
        assert old.namelist() == new.namelist()
        for name in old.namelist():
            assert (old.read(name) == new.read(name)) == (name != "policy.pth")
        with new.open("policy.pth") as file:
            assert next(iter(torch.load(file, weights_only=True))) == "new.mlp_extractor.policy_net.0.weight"


def test_other_trees_are_not_written_as_a_zip_of_files(tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="zip archive of files"):
        archive.write({"a": 1}, tmp_path / "b.zip")


def test_members_lie_where_they_are() -> None:
    document = open_checkpoint(corpus.case("stable_baselines3/a2c_rmsprop").entry)
    tensor = document.tree["policy.pth"]["action_net.weight"]
    assert isinstance(tensor, LazyTensor)
    (piece,) = tensor.extents()
    assert Path(piece.source.path) == document.path  # type: ignore[union-attr]
