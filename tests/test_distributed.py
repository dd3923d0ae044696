"""Sharded models resume under a plan with the trajectory of one process that never changed."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import optimstate
from optimstate import distributed
from optimstate.distributed import NamedSavePlanner, fill_state_dict, load, optimizer_names
from optimstate.errors import CheckpointNotFoundError, MigrationError, StateMismatchError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.language.plan import Plan
from optimstate.resuming.identity import identity_of, refuse_different
from optimstate.state.sections import find_sections
from tests import corpus
from tests.distributed_worker import OPTIONS, PLAN, TRANSPOSED, After, Before, filled, groups, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint in several containers after five steps, and the losses of the five steps after it."""
    folder = tmp_path_factory.mktemp("distributed")
    net = filled(Before())
    optimizer = torch.optim.AdamW(groups(net), **OPTIONS)
    train(net, optimizer, range(5))
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "before.pt")
    for suffix in ("dcp", "safetensors"):
        optimstate.convert(folder / "before.pt", folder / f"before.{suffix}", options=WriteOptions(sync=False))
    return folder, train(net, optimizer, range(5, 10))


@pytest.fixture(scope="module")
def two_ranks(trained: tuple[Path, list[float]]) -> list[dict[str, Any]]:
    folder, _ = trained
    worked("tests.distributed_worker", folder)
    return [torch.load(folder / f"arrived{rank}.pt") for rank in range(2)]


def worked(module: str, folder: Path) -> None:
    """Run a module that forks processes; a process that waits for another one fails."""
    command = [sys.executable, "-m", module, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def together(trained: tuple[Path, list[float]]) -> list[dict[str, Any]]:
    """What two processes say if one of them fails, or has other parameters."""
    folder, _ = trained
    (folder / "plan.toml").write_text(TRANSPOSED)
    tree = torch.load(folder / "before.pt", weights_only=True)
    tree["model"]["turned"] += 1  # as after another step
    torch.save(tree, folder / "other.pt")
    optimstate.convert(folder / "other.pt", folder / "other.dcp", options=WriteOptions(sync=False))
    worked("tests.together_worker", folder)
    return [json.loads((folder / f"together{rank}.json").read_text()) for rank in range(2)]


def after(folder: Path) -> tuple[After, torch.optim.Optimizer]:
    """The changed model in one process, moved in the file."""
    net = After()
    return net, torch.optim.AdamW(groups(net), **OPTIONS)


def expected(folder: Path, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the same plan gives in files: weights, and slots by name."""
    optimstate.remap(folder / "before.pt", tmp_path / "after.pt", Plan.from_toml(TRANSPOSED), sync=False)
    moved = torch.load(tmp_path / "after.pt", weights_only=True)
    state = {
        name: moved["optimizer"]["state"][key]
        for group in moved["optimizer"]["param_groups"]
        for name, key in zip(group["param_names"], group["params"], strict=True)
    }
    return moved["model"], state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_every_shard_gets_its_part(
    kind: str, two_ranks: list[dict[str, Any]], trained: tuple[Path, list[float]], tmp_path: Path
) -> None:
    model, state = expected(trained[0], tmp_path)
    for arrived in (results[kind] for results in two_ranks):
        assert model.keys() == arrived["model"].keys()
        assert all(torch.equal(arrived["model"][name], value) for name, value in model.items())
        assert state.keys() == arrived["state"].keys()
        for name, slots in state.items():
            assert all(torch.equal(arrived["state"][name][slot], value) for slot, value in slots.items()), name
        assert [group["lr"] for group in arrived["options"]] == [1e-2, 1e-2]  # of the checkpoint, not of the script
        assert [group["weight_decay"] for group in arrived["options"]] == [0.1, 0.0]


@pytest.mark.slow
def test_the_trajectory_is_that_of_one_process(
    two_ranks: list[dict[str, Any]], trained: tuple[Path, list[float]], tmp_path: Path
) -> None:
    folder, losses = trained
    optimstate.remap(folder / "before.pt", tmp_path / "after.pt", Plan.from_toml(TRANSPOSED), sync=False)
    moved = torch.load(tmp_path / "after.pt", weights_only=True)
    net, optimizer = after(folder)
    net.load_state_dict(moved["model"])
    optimizer.load_state_dict(moved["optimizer"])
    alone = train(net, optimizer, range(5, 10))
    assert alone == pytest.approx(losses, rel=1e-6)  # one matrix was cut into three: the last bits differ
    for results in two_ranks:
        assert results["fsdp"]["losses"] == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_torchs_own_load_follows_a_plan(
    kind: str, two_ranks: list[dict[str, Any]], trained: tuple[Path, list[float]], tmp_path: Path
) -> None:
    model, state = expected(trained[0], tmp_path)
    whole = sum(t.nbytes for s in find_sections(open_checkpoint(trained[0] / "before.pt").tree) for t in _tensors(s))
    arrived = two_ranks[0][f"planned {kind}"]  # a whole state dict is on the first rank
    assert all(torch.equal(arrived["model"][name], value) for name, value in model.items())
    for name, slots in state.items():
        assert all(torch.equal(arrived["state"][name][slot], value) for slot, value in slots.items()), name
    assert [group["lr"] for group in arrived["groups"]] == [1e-2, 1e-2]
    for results in two_ranks:
        assert results[f"planned {kind}"]["losses"] == pytest.approx(trained[1], rel=1e-6)
        assert results[f"planned {kind}"]["nbytes"] < 0.75 * whole


@pytest.mark.slow
def test_what_was_saved_in_the_background_is_a_folder_like_others(two_ranks: list[dict[str, Any]]) -> None:
    assert [results["async"] for results in two_ranks] == ["[1.0, 2.0]"] * 2


@pytest.mark.slow
def test_no_process_reads_the_whole_state(two_ranks: list[dict[str, Any]], trained: tuple[Path, list[float]]) -> None:
    document = open_checkpoint(trained[0] / "before.pt")
    whole = sum(t.nbytes for section in find_sections(document.tree) for t in _tensors(section))
    for results in two_ranks:
        assert results["fsdp"]["nbytes"] < 0.62 * whole  # 7 rows over 2 ranks: one has 4, and every rank the steps
    assert sum(results["fsdp"]["nbytes"] for results in two_ranks) < 1.1 * whole


def _tensors(section: Any) -> list[Any]:
    if section.kind == "model":
        return list(section.tensors().values())
    return [value for slots in section.optimizer().state.values() for value in slots.values()]


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_all(
    two_ranks: list[dict[str, Any]], trained: tuple[Path, list[float]]
) -> None:
    said = [json.loads((trained[0] / f"said{rank}.json").read_text()) for rank in range(2)]
    assert "StateMismatchError: rank 1 could not load" in said[0][0]
    assert "nowhere: no such file or folder" in said[0][0]
    assert said[1][0].startswith("CheckpointNotFoundError")
    for one in said:
        assert one[1].startswith("MigrationError")
        assert "'turned'" in one[1]
        assert "[5, 3]" in one[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error", "cause"),
    [
        ("fsdp2 plan", "PlanSyntaxError", "nowhere.toml"),
        ("fsdp2 hook", "RuntimeError", "a hook of one process"),
        ("fsdp2 certificate", "CorruptCheckpointError", "nowhere.json"),
        ("fsdp1 plan", "PlanSyntaxError", "nowhere.toml"),
    ],
)
def test_a_fault_of_one_process_is_raised_in_all_and_nothing_is_changed(
    kind: str, error: str, cause: str, together: list[dict[str, Any]]
) -> None:
    (first, state), (second, other) = (said[kind] for said in together)
    assert first.startswith("StateMismatchError: rank 1 could not load: ")
    assert second.startswith(f"{error}: ")
    assert cause in first
    assert cause in second
    assert state == other == "as before"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fsdp2 planner", "nowhere.toml: the plan cannot be read"),
        ("fsdp2 other plan", "by different plans"),
        ("fsdp2 checkpoint", "other.dcp, which are different checkpoints"),
        ("fsdp2 planner's checkpoint", "other.dcp, which are different checkpoints"),
        ("fsdp1 resume", "sharded by FSDP1 (FullyShardedDataParallel), which flattens its parameters\nCall optimstate"),
        ("fsdp1 hook", "a hook of one process"),
        ("fsdp1 trained", "a hook of one process"),
    ],
)
def test_a_fault_that_all_processes_learn_of_changes_nothing(
    kind: str, said: str, together: list[dict[str, Any]]
) -> None:
    for found in together:
        assert said in found[kind][0]
        assert found[kind][1] == "as before"


@pytest.mark.slow
def test_a_process_without_a_part_of_a_parameter_reads_none(
    together: list[dict[str, Any]], trained: tuple[Path, list[float]]
) -> None:
    saved = torch.load(trained[0] / "before.pt", weights_only=True)["model"]["turned"]
    assert together[0]["of one process"] == [saved.tolist(), saved.tolist(), saved.nbytes]
    assert together[1]["of one process"] == [[], [], 0]


@pytest.mark.slow
def test_a_parameter_with_fewer_rows_than_processes_is_loaded(together: list[dict[str, Any]]) -> None:
    assert together[0]["small"] == [[[3.0, 3.0]], [4.0]]


@pytest.mark.slow
def test_slots_within_slots_are_sharded_as_their_parameter_is(together: list[dict[str, Any]]) -> None:
    for said, rows in zip(together, (3, 2), strict=True):
        sharded, replicated, refused, square = said["within"]
        assert sharded == [True, 3 * rows * 3 * 4 + 4]  # the weight and two slots, and the count of steps
        assert replicated == [True, 3 * 5 * 3 * 4 + 4]
        assert refused.startswith(
            "'w of.square' has the shape [5, 5] and its parameter [5, 3], so it cannot be sharded"
        )
        assert square == [True, 3 * 5 * 3 * 4 + 4 + 5 * 5 * 4]


@pytest.mark.slow
def test_parameters_that_only_one_process_has_get_their_state_and_options(together: list[dict[str, Any]]) -> None:
    assert [said["experts"] for said in together] == [[[], []]] * 2


@pytest.mark.slow
def test_a_planner_saves_optimizers_by_name(two_ranks: list[dict[str, Any]], trained: tuple[Path, list[float]]) -> None:
    document = open_checkpoint(trained[0] / "named.dcp")
    (optimizer,) = (s.optimizer() for s in find_sections(document.tree) if s.kind == "optimizer")
    saved = two_ranks[0]["fsdp"]["saved"]
    assert optimizer.is_named
    assert set(optimizer.state) == set(saved)
    assert [len(group.params) for group in optimizer.groups] == [5, 4]
    for name, slots in saved.items():
        for slot, value in slots.items():
            assert optimizer.state[name][slot].tobytes() == value.contiguous().numpy().tobytes(), (name, slot)
    assert document.tree["epoch"] == 3


# --- in one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["before.pt", "before.dcp", "before.safetensors"])
def test_any_container_loads_into_one_process(name: str, trained: tuple[Path, list[float]]) -> None:
    folder, losses = trained
    net, optimizer = after(folder)
    found = load(folder / name, net, optimizer, plan=Plan.from_toml(TRANSPOSED))
    assert train(net, optimizer, range(5, 10)) == pytest.approx(losses, rel=1e-6)
    assert set(found.reports["optimizer"].exact) == set(optimizer_names(optimizer, net))


@pytest.mark.parametrize("name", ["before.pt", "before.dcp", "before.safetensors"])
def test_a_state_dict_is_filled_from_any_container(name: str, trained: tuple[Path, list[float]]) -> None:
    net = After()
    live = {"model": net.state_dict()}
    done = fill_state_dict(live, trained[0] / name, Plan.from_toml(TRANSPOSED))
    saved = torch.load(trained[0] / "before.pt", weights_only=True)["model"]
    assert torch.equal(torch.cat([net.q.weight, net.k.weight, net.v.weight]), saved["qkv.weight"])
    assert torch.equal(net.turned, saved["turned"].t())
    assert done.nbytes == sum(value.nbytes for value in live["model"].values())
    with pytest.raises(StateMismatchError, match=r"no 'model\.extra' under this plan; it has 'model\."):
        fill_state_dict({"model": {"extra": torch.ones(2)}}, trained[0] / name, Plan.from_toml(TRANSPOSED))
    kept = {"model": {"extra": torch.ones(2)}}
    fill_state_dict(kept, trained[0] / name, Plan.from_toml(TRANSPOSED), allow_partial_load=True)
    assert torch.equal(kept["model"]["extra"], torch.ones(2))
    with pytest.raises(
        StateMismatchError, match=r"'model\.turned' has the shape \[3, 5\] under this plan, .* \[5, 3\]"
    ):
        fill_state_dict({"model": {"turned": torch.ones(5, 3)}}, trained[0] / name, Plan.from_toml(TRANSPOSED))


def test_an_optimizer_without_names_is_named_by_the_model(trained: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, losses = trained
    net = After()
    plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups(net)]
    optimizer = torch.optim.AdamW(plain, **OPTIONS)
    (tmp_path / "plan.toml").write_text(TRANSPOSED)
    load(folder / "before.pt", net, optimizer, plan=tmp_path / "plan.toml")
    assert train(net, optimizer, range(5, 10)) == pytest.approx(losses, rel=1e-6)
    assert "param_names" not in optimizer.param_groups[0]


def test_new_parameters_keep_their_weights_and_have_no_state(trained: tuple[Path, list[float]]) -> None:
    folder, _ = trained
    net, optimizer = after(folder)
    net.extra = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("extra", net.extra)]})
    with pytest.raises(MigrationError, match="'extra'"):
        load(folder / "before.pt", net, optimizer, plan=Plan.from_toml(TRANSPOSED))
    assert not optimizer.state
    plan = Plan.from_toml(TRANSPOSED + '\n[[rule]]\nfresh = "extra"\n').with_policy(hyperparameters="live")
    load(folder / "before.pt", net, optimizer, plan=plan)
    assert net.extra not in optimizer.state
    assert torch.equal(net.extra, torch.ones(2))
    assert net.q.weight in optimizer.state


def test_another_precision_is_said(trained: tuple[Path, list[float]]) -> None:
    folder, _ = trained
    net = After().bfloat16()
    optimizer = torch.optim.AdamW(groups(net), **OPTIONS)
    found = load(folder / "before.pt", net, optimizer, plan=Plan.from_toml(TRANSPOSED))
    (note,) = (note for note in found.notes if "become" in note)
    assert note.startswith("28 tensors are float32 in the checkpoint and become bfloat16: ")
    assert optimizer.state[net.q.weight]["exp_avg"].dtype is torch.bfloat16
    net, optimizer = after(folder)
    assert load(folder / "before.pt", net, optimizer, plan=Plan.from_toml(TRANSPOSED)).notes == ()


def test_refusals_name_what_to_do(trained: tuple[Path, list[float]]) -> None:
    folder, _ = trained
    net, optimizer = after(folder)
    with pytest.raises(CheckpointNotFoundError):
        load(folder / "nowhere", net, optimizer)
    with pytest.raises(MigrationError, match=r"'turned'.*\[5, 3\]"):
        load(folder / "before.pt", net, optimizer, plan=Plan.from_toml(PLAN))
    with pytest.raises(StateMismatchError, match="has no optimizer; it has model"):
        load(corpus.case("transformers/llama_tied_sharded").entry / "model.safetensors.index.json", net, optimizer)
    with pytest.raises(StateMismatchError, match=r"is not one of the model's.*\n.*after the model was sharded"):
        load(folder / "before.pt", After(), optimizer, plan=Plan.from_toml(TRANSPOSED))


def test_the_planner_takes_names_from_the_caller(tmp_path: Path) -> None:
    net = filled(Before())
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, range(2))
    tree = {"model": net.state_dict(), "inner": {"optimizer": optimizer.state_dict()}}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(tree, checkpoint_id=str(tmp_path / "a"), planner=NamedSavePlanner())
    assert "StateMismatchError: the optimizer at inner.optimizer: the parameters" in str(caught.value)
    assert "Build the optimizer from model.named_parameters()" in str(caught.value)
    names = list(optimizer_names(optimizer, net))
    dcp.save(tree, checkpoint_id=str(tmp_path / "b"), planner=NamedSavePlanner(names))
    assert list(tree["inner"]["optimizer"]["state"]) == list(range(5))
    (found,) = (s.optimizer() for s in find_sections(open_checkpoint(tmp_path / "b").tree) if s.kind == "optimizer")
    assert list(found.state) == names
    for key, name in enumerate(names):
        value = tree["inner"]["optimizer"]["state"][key]["exp_avg"]
        assert found.state[name]["exp_avg"].tobytes() == value.numpy().tobytes()
    with pytest.raises(CheckpointException, match="4 names for an optimizer of 5 parameters"):
        dcp.save(tree, checkpoint_id=str(tmp_path / "c"), planner=NamedSavePlanner(names[:4]))


@pytest.mark.parametrize("suffix", ["pt", "dcp", "safetensors"])
def test_a_copy_is_the_same_checkpoint_and_another_step_is_not(
    suffix: str, trained: tuple[Path, list[float]], tmp_path: Path
) -> None:
    tree = torch.load(trained[0] / "before.pt", weights_only=True)
    tree["optimizer"]["state"][0]["exp_avg"][0, 0] += 1
    torch.save(tree, tmp_path / "tree.pt")
    if suffix != "pt":
        optimstate.convert(tmp_path / "tree.pt", tmp_path / f"tree.{suffix}", options=WriteOptions(sync=False))
    one, copied = trained[0] / f"before.{suffix}", tmp_path / f"copied.{suffix}"
    (shutil.copytree if one.is_dir() else shutil.copyfile)(one, copied)
    same, other = identity_of(one, Plan()), identity_of(tmp_path / f"tree.{suffix}", Plan())
    refuse_different([same, None, identity_of(copied, Plan())])
    with pytest.raises(StateMismatchError, match=r"rank 0 and rank 1 load .* by different plans"):
        refuse_different([same, identity_of(copied, Plan.from_toml(PLAN))])
    with pytest.raises(StateMismatchError, match=r"rank 0 loads .*before.* and rank 2 .*tree.*different checkpoints"):
        refuse_different([same, None, other])


def test_the_guide_names_what_is_there() -> None:
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names = {
        alias.name
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "optimstate.distributed"
        for alias in node.names
    }
    assert names == set(distributed.__all__) - {"load"}
    assert {"reports", "nbytes"} <= {field.name for field in dataclasses.fields(optimstate.Resumed)}


@pytest.mark.parametrize("flat", [False, True])
def test_what_a_plan_declares_new_stays_as_it_is_in_the_live_state(flat: bool, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    def parts(*names: str) -> dict[str, Any]:
        torch.manual_seed(len(names))
        model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
        optimizer = torch.optim.AdamW(model.parameters())
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        return {"model": model.state_dict(), "optimizer": state}

    dcp.save(saved := parts("old"), checkpoint_id=tmp_path / "saved")
    live, before = parts("first", "second"), parts("first", "second")
    plan = Plan.from_options(rename=["old=second"], fresh=["first"])
    done = fill_state_dict(live, tmp_path / "saved", plan)
    assert [note for note in done.notes if note.startswith("2 parameters are new and keep their values")]
    assert torch.equal(live["model"]["first.weight"], before["model"]["first.weight"])
    assert torch.equal(live["model"]["second.weight"], saved["model"]["old.weight"])

    def slot(state: dict[str, Any], name: str) -> torch.Tensor:
        found = state["optimizer"]
        return found[f"state.{name}.exp_avg"] if flat else found["state"][name]["exp_avg"]

    assert torch.equal(slot(live, "first.weight"), slot(before, "first.weight"))
    assert torch.equal(slot(live, "second.weight"), slot(saved, "old.weight"))
    for fresh, error, message in (
        (
            ["first", "third"],
            MigrationError,
            "third.*matches no parameter of the checkpoint, and none that only",
        ),
        (["first.bias"], StateMismatchError, "has no 'model.first.weight' under this plan"),
    ):
        with pytest.raises(error, match=message):
            fill_state_dict(live, tmp_path / "saved", Plan.from_options(rename=["old=second"], fresh=fresh))
