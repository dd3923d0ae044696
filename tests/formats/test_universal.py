"""DeepSpeed's universal checkpoints, read and written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import CorruptCheckpointError, RepresentationError
from optimstate.formats.deepspeed import universal as deepspeed_universal
from optimstate.formats.registry import open_checkpoint
from optimstate.surgery.writing.converting import convert
from optimstate.tree import difference
from tests import corpus
from tests.formats import zero
from tests.formats.live import differs, raw
from tests.formats.truths import judge

CASE = "deepspeed/bf16opt_ws2_z1_universal"


def universal() -> Path:
    return corpus.case(CASE).entry / "global_step4_universal"


def test_it_holds_what_the_optimizer_held() -> None:
    case = corpus.case(CASE)
    document = open_checkpoint(universal())
    assert document.format == "deepspeed-universal"
    verdict = judge(document.tree, case.truth())
    assert verdict.wrong == []
    assert verdict.slots == 24
    groups = document.tree["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_it_says_what_the_partitions_it_was_made_of_say() -> None:
    partitions = open_checkpoint(corpus.case(CASE).entry / "global_step4").tree
    tree = open_checkpoint(universal()).tree
    assert difference(tree["model"], partitions["model"]) is None
    for name, slots in partitions["optimizer"]["state"].items():
        for slot, value in slots.items():
            assert tree["optimizer"]["state"][name][slot].tobytes() == value.tobytes()


def test_partitions_become_a_universal_checkpoint(tmp_path: Path) -> None:
    source = corpus.case(CASE).entry / "global_step4"
    report = convert(source, tmp_path / "b", to="deepspeed-universal")
    assert report.notes == ()
    ours, theirs = tmp_path / "b", universal()
    for file in sorted(theirs.rglob("*.pt")):
        name = file.relative_to(theirs)
        if "counter" in name.parts:  # a buffer: DeepSpeed's tool writes it too, its loader takes it from the model
            continue
        live = torch.load(file, weights_only=True)
        mine = torch.load(ours / name, weights_only=True)
        if name.name == "optimizer_state.pt":
            assert mine["param_groups"] == live["param_groups"]
        elif name.name == "mp_rank_00_model_states.pt":
            assert mine["param_shapes"] == live["param_shapes"]
            assert set(mine) == set(live)
        else:
            assert differs(open_checkpoint(ours / name).tree, without_grad(live)) is None, name
    assert judge(open_checkpoint(ours).tree, corpus.case(CASE).truth()).wrong == []


def without_grad(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: without_grad(value) for key, value in node.items()}
    return node.detach() if isinstance(node, torch.Tensor) else node


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_written_reads_the_same(stage: int, tmp_path: Path) -> None:
    state = zero.named_state({"a": (5, 3), "b": (4,)})
    if stage == 2:
        zero.write_stage_2(tmp_path / "tag", state, [["a"], ["b"]], 3, keep_padding=False)
    else:
        zero.write_stage_3(tmp_path / "tag", state, ["a", "b"], 3, torch.zeros(2))
    document = open_checkpoint(tmp_path / "tag")
    deepspeed_universal.write(document.tree, tmp_path / "b")
    again = open_checkpoint(tmp_path / "b")
    for part in ("state", "param_groups"):
        for name in state:
            one, other = document.tree["optimizer"], again.tree["optimizer"]
            if part == "state":
                assert {k: v.tobytes() for k, v in one["state"][name].items()} == {
                    k: v.tobytes() for k, v in other["state"][name].items()
                }
        assert difference(document.tree["optimizer"]["param_groups"], again.tree["optimizer"]["param_groups"]) is None
    assert difference(document.tree["model"], again.tree["model"], aliases=False) is None


def test_the_flat_tensors_of_stage_3_get_their_shapes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(universal(), tmp_path / "b"))
    for file in (folder / "zero").rglob("*.pt"):
        live = torch.load(file, weights_only=True)
        if isinstance(live, dict) and "param" in live:
            torch.save(live["param"].flatten(), file)
    assert judge(open_checkpoint(folder).tree, corpus.case(CASE).truth()).wrong == []


def test_a_plain_fp32_checkpoint_needs_no_masters(tmp_path: Path) -> None:
    live = plain()
    torch.save(live, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b", to="deepspeed-universal")
    tree = open_checkpoint(tmp_path / "b").tree
    assert tree["optimizer"]["state"]["w"]["fp32_param"].tobytes() == raw(live["model"]["w"])
    assert tree["optimizer"]["state"]["w"]["exp_avg"].tobytes() == raw(live["optimizer"]["state"]["w"]["exp_avg"])


def test_names_beside_positions_are_enough(tmp_path: Path) -> None:
    case = corpus.case("torch/adam_named_wd")
    report = convert(case.files[0], tmp_path / "b", to="deepspeed-universal")
    assert report.notes == ("DeepSpeed's counters (global_steps, global_samples, skipped_steps) start at 0",)
    assert judge(open_checkpoint(tmp_path / "b").tree, case.truth()).wrong == []


def plain() -> dict[str, Any]:
    return {
        "model": {"w": torch.randn(3, 2), "count": torch.ones(1)},
        "optimizer": {
            "state": {"w": {"step": torch.tensor(4.0), "exp_avg": torch.randn(3, 2)}},
            "param_groups": [{"lr": 0.1, "params": ["w"]}],
        },
    }


def test_a_half_weight_without_a_master_is_refused(tmp_path: Path) -> None:
    live = plain()
    live["model"]["w"] = live["model"]["w"].half()
    torch.save(live, tmp_path / "a.pt")
    with pytest.raises(RepresentationError, match="'w' is float16 and has no fp32 master"):
        convert(tmp_path / "a.pt", tmp_path / "b", to="deepspeed-universal")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["torch/adam_unnamed_wd", "torch/optimizer_alone"])
def test_an_anonymous_optimizer_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="with parameter names"):
        convert(corpus.case(name).files[0], tmp_path / "b", to="deepspeed-universal")


def test_a_parameter_without_files_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(universal(), tmp_path / "b"))
    shutil.rmtree(folder / "zero" / "fc1.bias")
    with pytest.raises(CorruptCheckpointError, match=r"'fc1\.bias' has no folder"):
        open_checkpoint(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(universal(), tmp_path / "b"))
    torch.save({"param": torch.zeros(3, 3), "cat_dim": 0}, folder / "zero" / "fc1.bias" / "exp_avg.pt")
    with pytest.raises(CorruptCheckpointError, match=r"exp_avg\.pt: shape \(3, 3\), but the parameter has \(17,\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stage_3_has_a_file_of_model_states_for_each_rank(world: int, tmp_path: Path) -> None:
    """Weights that are not trained are cut as the engine cuts them, buffers stand in every file."""
    shapes = {"a": (5, 3), "b": (4,)}
    state = zero.named_state(shapes)
    zero.write_stage_3(tmp_path / "tag", state, ["a", "b"], world, torch.arange(7.0))
    document = open_checkpoint(tmp_path / "tag")
    deepspeed_universal.write(document.tree, tmp_path / "uni")
    files = sorted(file.name for file in (tmp_path / "uni").glob("*.pt"))
    assert files == [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    again = open_checkpoint(tmp_path / "uni")
    for part in ("model", "optimizer"):
        assert difference(document.tree[part], again.tree[part], aliases=False) is None or part == "optimizer"
    for name, slots in document.tree["optimizer"]["state"].items():
        found = again.tree["optimizer"]["state"][name]
        assert {slot: value.tobytes() for slot, value in slots.items()} == {s: v.tobytes() for s, v in found.items()}
    live = torch.load(tmp_path / "uni" / files[0], weights_only=False)
    assert all(live["module"][name].shape == (0,) for name in shapes)
    deepspeed_universal.write(again.tree, tmp_path / "twice")
    assert difference(open_checkpoint(tmp_path / "twice").tree, again.tree, aliases=False) is None


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    state = zero.named_state({"a": (5, 3), "b": (4,)})
    zero.write_stage_3(tmp_path / "tag", state, ["a", "b"], 3, torch.zeros(2))
    deepspeed_universal.write(open_checkpoint(tmp_path / "tag").tree, tmp_path / "uni")
    (tmp_path / "uni" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match="the model states of rank 1 are missing"):
        open_checkpoint(tmp_path / "uni")


def test_stage_3_keeps_one_step_for_all(tmp_path: Path) -> None:
    state = zero.named_state({"a": (5, 3), "b": (4,)})
    zero.write_stage_3(tmp_path / "tag", state, ["a", "b"], 1, torch.zeros(2))
    tree = open_checkpoint(tmp_path / "tag").tree
    tree["optimizer"]["state"]["b"]["step"] = 99
    with pytest.raises(RepresentationError, match="'b' is at another step"):
        deepspeed_universal.write(tree, tmp_path / "uni")
    assert not (tmp_path / "uni").exists()
