"""`PlanLoadPlanner` in one process: every item gets the value that belongs to it, or nothing is loaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from optimstate import Plan, resume
from optimstate.distributed import PlanLoadPlanner, fill_state_dict
from optimstate.errors import MigrationError, OptimStateError, StateMismatchError
from tests.test_resuming_interrupted import frozen

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAMES = ("a", "b", "c", "d")
Build = Callable[..., torch.optim.Optimizer]


class Net(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.full((2,), value)))


def built(net: nn.Module, groups: list[list[str]], decay: float, *, named: bool = True) -> torch.optim.AdamW:
    """An optimizer with the parameters in groups; the weight decay of each is `decay` and its number."""
    parameters = dict(net.named_parameters())
    made = [
        {"params": [(n, parameters[n]) if named else parameters[n] for n in own], "weight_decay": decay + number}
        for number, own in enumerate(groups)
    ]
    optimizer = torch.optim.AdamW(made, lr=0.5 if decay else 0.25)
    for name, parameter in parameters.items():
        parameter.grad = torch.full((2,), float(ord(name)) if decay else 1.0)
    optimizer.step()
    return optimizer


def named_state(net: nn.Module, optimizer: torch.optim.Optimizer, *, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return dict(get_optimizer_state_dict(net, optimizer, options=options))


@st.composite
def divisions(draw: st.DrawFn) -> list[list[str]]:
    """The parameters in any order, in one to three groups."""
    order = draw(st.permutations(NAMES))
    cuts = sorted(draw(st.sets(st.integers(1, len(NAMES) - 1), max_size=2)))
    return [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, len(NAMES)], strict=True)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(saved=divisions(), live=divisions(), forms=st.tuples(*[st.booleans()] * 3))
def test_options_follow_the_parameters_and_not_the_position_of_their_group(
    saved: list[list[str]], live: list[list[str]], forms: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    flat_saved, flat_live, named = forms
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    net = Net()
    state = named_state(net, built(net, saved, 10.0), flat=flat_saved)
    dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
    decay = {name: 10.0 + number for number, group in enumerate(saved) for name in group}
    joined = any(len({decay[name] for name in group}) > 1 for group in live)
    split = len({decay[group[0]] for group in live}) < len(live)  # live groups that differ, of one group

    other = Net(1.0)
    optimizer = built(other, live, 0.0, named=named)
    filled = named_state(other, optimizer, flat=flat_live)
    before = frozen(copy.deepcopy(filled))
    if joined or split:
        with pytest.raises(MigrationError, match=r"^optimizer: "):
            fill_state_dict({"optimizer": filled}, folder)
        assert frozen(filled) == before
        return
    fill_state_dict({"optimizer": filled}, folder)
    options = StateDictOptions(flatten_optimizer_state_dict=flat_live)
    set_optimizer_state_dict(other, optimizer, filled, options=options)
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    for group, expected in zip(optimizer.param_groups, live, strict=True):
        own = [names[id(parameter)] for parameter in group["params"]]
        assert own == expected
        assert group.get("param_names", own) == own
        assert {decay[name] for name in own} == {group["weight_decay"]}
        assert group["lr"] == 0.5
        for name, parameter in zip(own, group["params"], strict=True):
            assert optimizer.state[parameter]["exp_avg"][0] == pytest.approx(0.1 * ord(name))


def test_live_options_are_kept_on_request(tmp_path: Path) -> None:
    net, other = Net(), Net(1.0)
    dcp.save(
        {"optimizer": named_state(net, built(net, [["a", "b"], ["c", "d"]], 10.0), flat=False)},
        checkpoint_id=tmp_path / "saved",
        no_dist=True,
    )
    filled = named_state(other, built(other, [list(NAMES)], 0.0), flat=False)
    plan = Plan().with_policy(hyperparameters="live")
    fill_state_dict({"optimizer": filled}, tmp_path / "saved", plan)
    assert filled["param_groups"][0]["lr"] == 0.25
    assert filled["state"]["c"]["exp_avg"][0] == pytest.approx(0.1 * ord("c"))
    with pytest.raises(MigrationError, match=r'hyperparameters = "live" in \[policy\] needs an optimizer'):
        fill_state_dict({"model": {}}, tmp_path / "saved", plan)


@pytest.mark.parametrize("named", [True, False])
def test_numbered_live_state_is_matched_by_its_names(named: bool, tmp_path: Path) -> None:
    """The dict of `Optimizer.state_dict()`, whose numbers mean other parameters than those of the checkpoint."""
    net, other = Net(), Net(1.0)
    optimizer = built(net, [list(NAMES)], 10.0)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "saved", no_dist=True)
    live = built(other, [list(reversed(NAMES))], 0.0, named=named)
    filled = {"optimizer": live.state_dict()}
    if not named:
        with pytest.raises(StateMismatchError, match="parameters of the live optimizer are numbered, and those of the"):
            fill_state_dict(filled, tmp_path / "saved")
        return
    fill_state_dict(filled, tmp_path / "saved")
    live.load_state_dict(filled["optimizer"])
    for name, parameter in other.named_parameters():
        assert live.state[parameter]["exp_avg"][0] == pytest.approx(0.1 * ord(name))
    assert live.param_groups[0]["param_names"] == list(reversed(NAMES))


def test_names_and_numbers_are_not_mixed_and_positions_are_noted(tmp_path: Path) -> None:
    net, other = Net(), Net(1.0)
    optimizer = built(net, [list(NAMES)], 10.0, named=False)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "saved", no_dist=True)
    filled = named_state(other, built(other, [list(NAMES)], 0.0), flat=False)
    with pytest.raises(StateMismatchError, match="of the checkpoint are numbered") as caught:
        fill_state_dict({"optimizer": filled}, tmp_path / "saved")
    assert "optimstate name" in str(caught.value)
    live = built(other, [list(NAMES)], 0.0, named=False)
    done = fill_state_dict({"optimizer": live.state_dict()}, tmp_path / "saved")
    assert any("given by position" in note for note in done.notes)


def test_a_group_of_which_the_checkpoint_knows_nothing_is_refused(tmp_path: Path) -> None:
    net, other = Net(), Net(1.0)
    saved = named_state(net, built(net, [list(NAMES)], 10.0), flat=False)
    saved["param_groups"][0] |= {"params": ["a", "b"], "param_names": ["a", "b"]}  # of a process with parts of a model
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "saved", no_dist=True)
    filled = named_state(other, built(other, [["a", "c"], ["d"]], 0.0), flat=False)
    with pytest.raises(MigrationError, match=r"no param group .* of the live group 1 \('d'\)"):
        fill_state_dict({"optimizer": filled}, tmp_path / "saved")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("where", ["root", "key", "list"])
def test_a_flattened_optimizer_may_be_anywhere(where: str, momentum: float, tmp_path: Path) -> None:
    """Among the weights, under a key of its own, or one of several in a list."""

    def tree(decays: list[float], lr: float) -> dict[str, Any]:
        net = Net(lr)
        groups = [{"params": [net.a, net.b]}, {"params": [net.c, net.d]}][: len(decays)]
        if len(decays) == 1:
            groups = [{"params": list(net.parameters())}]
        made = [{**group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)]
        optimizer = torch.optim.SGD(made, lr=lr, momentum=momentum)
        for parameter in net.parameters():
            parameter.grad = torch.full((2,), lr)
        optimizer.step()
        state = named_state(net, optimizer, flat=True)
        weights = {name: value.detach() for name, value in net.state_dict().items()}
        if where == "root":
            return {**weights, **state}
        return {"model": weights, "optimizer": [{}, state] if where == "list" else state}

    saved = tree([3.0, 4.0], 0.5)
    dcp.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    live = tree([1.0, 2.0], 0.25)
    fill_state_dict(live, tmp_path / "saved")
    assert frozen(live) == frozen(saved)
    live = tree([1.0], 0.25)
    before = frozen(copy.deepcopy(live))
    with pytest.raises(MigrationError, match=r"weight_decay|are of one live param group"):
        fill_state_dict(live, tmp_path / "saved")
    assert frozen(live) == before


def test_a_schedule_for_another_number_of_groups_is_refused(tmp_path: Path) -> None:
    def tree(groups: list[list[str]], decay: float) -> dict[str, Any]:
        net = Net()
        optimizer = torch.optim.SGD([{"params": [getattr(net, name) for name in own]} for own in groups], lr=decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return {"optimizer": named_state(net, optimizer, flat=False), "scheduler": schedule.state_dict()}

    saved = tree([["a", "b"], ["c", "d"]], 0.5)
    dcp.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    live = tree([list(NAMES)], 0.25)
    with pytest.raises(
        StateMismatchError, match=r"'scheduler\.(base_lrs|_last_lr)' has a value for each of 2 param groups"
    ):
        fill_state_dict(live, tmp_path / "saved")
    fill_state_dict({"optimizer": live["optimizer"]}, tmp_path / "saved")
    assert live["optimizer"]["param_groups"][0]["lr"] == 0.5
    same = tree([["c", "d"], ["b", "a"]], 0.25)
    fill_state_dict(same, tmp_path / "saved")
    assert same["scheduler"] == saved["scheduler"]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("rename", [False, True])
def test_state_that_the_plan_starts_anew_stays_as_it_is_in_the_live_state(
    rename: bool, flat: bool, tmp_path: Path
) -> None:
    """Of parameters that the checkpoint has: their weights are loaded."""
    net, other = Net(), Net(1.0)
    saved = {"model": net.state_dict(), "optimizer": named_state(net, built(net, [list(NAMES)], 10.0), flat=False)}
    saved = copy.deepcopy(saved)
    if rename:
        saved["model"]["old"] = saved["model"].pop("a")
        state = saved["optimizer"]
        state["state"]["old"] = state["state"].pop("a")
        for key in ("params", "param_names"):
            state["param_groups"][0][key] = ["old", *NAMES[1:]]
    dcp.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    text = 'from = "old"\nto = "a"\nfresh = true' if rename else 'fresh = "a"'
    live = {"model": other.state_dict(), "optimizer": named_state(other, built(other, [list(NAMES)], 0.0), flat=flat)}
    done = fill_state_dict(live, tmp_path / "saved", Plan.from_toml(f"[[rule]]\n{text}"))
    assert any(note.startswith("start without the state of the checkpoint, and keep") for note in done.notes)
    assert torch.equal(other.a, saved["model"]["old" if rename else "a"])
    slots = [
        live["optimizer"][f"state.{name}.exp_avg"] if flat else live["optimizer"]["state"][name]["exp_avg"]
        for name in ("a", "b")
    ]
    assert slots[0][0] == pytest.approx(0.1)  # of the live optimizer's own step
    assert slots[1][0] == pytest.approx(0.1 * ord("b"))
    del saved["model"]
    dcp.save(saved, checkpoint_id=tmp_path / "without", no_dist=True)
    with pytest.raises(StateMismatchError, match=r"no 'model\.a'"):
        fill_state_dict(live, tmp_path / "without", Plan.from_toml(f"[[rule]]\n{text}"))


def test_options_that_the_live_groups_lack_are_noted(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    live = named_state(net, optimizer, flat=False)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    dcp.save({"optimizer": named_state(net, optimizer, flat=False)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    (note,) = fill_state_dict({"optimizer": live}, tmp_path / "saved").notes
    assert note == "optimizer: not loaded, because the live param groups do not have these options: 'initial_lr'"


def test_slots_that_are_not_tensors_go_to_numbered_state_too(tmp_path: Path) -> None:
    def tree(order: str, step: int) -> dict[str, Any]:
        state = {number: {"step": step + ord(name), "old": step} for number, name in enumerate(order)}
        group = {"params": list(range(len(order))), "param_names": list(order), "lr": 0.5}
        return {"optimizer": {"state": state, "param_groups": [group]}}

    dcp.save(tree("ab", 1), checkpoint_id=tmp_path / "saved", no_dist=True)
    live = tree("ba", 7)
    fill_state_dict(live, tmp_path / "saved")
    assert live == tree("ba", 1)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [np.arange(3), ("MT19937", np.arange(3), 1), torch.Size([2]), torch.bfloat16, {"inner": [torch.device("cpu")]}],
    ids=["array", "random state", "Size", "dtype", "within"],
)
def test_objects_that_are_not_created_are_refused(value: Any, tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(2), "it": value}, checkpoint_id=tmp_path / "saved", no_dist=True)
    live = {"weight": torch.zeros(2), "it": {"inner": None} if isinstance(value, dict) else None}
    with pytest.raises(StateMismatchError, match=r"'it(\.inner)?'.*, which is not created") as caught:
        fill_state_dict(live, tmp_path / "saved")
    assert "without this planner" in str(caught.value)
    assert torch.equal(live["weight"], torch.zeros(2))


@pytest.mark.parametrize("form", ["number", "tensor"])
@pytest.mark.parametrize(
    ("value", "saved", "live", "works"),
    [
        (1.5, torch.float32, torch.int64, False),
        (float("nan"), torch.float32, torch.int64, False),
        (3.0, torch.float32, torch.int64, True),
        (1 + 2j, torch.complex64, torch.float32, False),
        (2, torch.int64, torch.bool, False),
        (300, torch.int64, torch.int8, False),
        (100, torch.int64, torch.int8, True),
        (1, torch.int64, torch.bool, True),
        (2, torch.int64, torch.float32, True),
        (True, torch.bool, torch.int8, True),
        (0.5, torch.float32, torch.complex64, True),
        (0.5, torch.bfloat16, torch.float32, True),
    ],
    ids=str,
)
def test_values_that_a_live_tensor_cannot_hold_are_refused(
    value: complex, saved: torch.dtype, live: torch.dtype, works: bool, form: str, tmp_path: Path
) -> None:
    stored = value if form == "number" and type(value) is not complex else torch.tensor(value, dtype=saved)
    dcp.save({"model": {"first": torch.ones(2), "it": stored}}, checkpoint_id=tmp_path / "saved", no_dist=True)
    target = {"model": {"first": torch.zeros(2), "it": torch.zeros((), dtype=live)}}
    if works:
        notes = fill_state_dict(target, tmp_path / "saved").notes
        assert target["model"]["it"] == value
        assert stored is value or any(f"become {str(live).removeprefix('torch.')}: 'model.it'" in n for n in notes)
        return
    with pytest.raises(StateMismatchError, match=r"'model\.it' is \w+ in the checkpoint and \w+ in the live state"):
        fill_state_dict(target, tmp_path / "saved")
    assert not target["model"]["it"]
    assert not target["model"]["first"].any()


def test_a_model_that_is_resumed_holds_the_values_too(tmp_path: Path) -> None:
    net = nn.BatchNorm1d(2)
    saved = {**net.state_dict(), "num_batches_tracked": torch.tensor(1.5)}
    with pytest.raises(StateMismatchError, match="tracked' is float32 in the checkpoint and int64 in the live state"):
        resume({"model": saved}, model=net)
    with pytest.raises(StateMismatchError, match=r"'weight' cannot be loaded, because .* meta device"):
        resume({"model": saved}, model=net.to("meta"))


@pytest.mark.parametrize("how", ["resume", "load"])
@pytest.mark.parametrize("equal", [True, False])
def test_two_values_for_a_tied_parameter_are_refused(how: str, equal: bool, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Parameter(torch.zeros(2))

    values = torch.tensor([1.0, float("nan")])
    saved = {"model": {"first": values, "second": values.clone() if equal else values + 1}}
    dcp.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    net = Tied()

    def load() -> None:
        if how == "resume":
            resume(tmp_path / "saved", model=net)
        else:
            fill_state_dict({"model": net.state_dict()}, tmp_path / "saved")

    if equal:
        load()
        assert net.first[0] == 1
        return
    with pytest.raises(StateMismatchError, match=r"first' and '(model\.)?second' are one tensor in the live model"):
        load()
    assert torch.equal(net.first, torch.zeros(2))


def test_a_number_does_not_become_a_vector(tmp_path: Path) -> None:
    dcp.save({"epoch": torch.ones(3)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(StateMismatchError, match=r"'epoch' is 4 in the live state, and a tensor of the shape \[3\]"):
        fill_state_dict({"epoch": 4}, tmp_path / "saved")


# --- which items ----------------------------------------------------------------------------------------------------


def test_tensors_that_the_live_state_lacks_are_noted(tmp_path: Path) -> None:
    tree = {"model": {"a": torch.ones(2), "b": torch.ones(2)}, "other": {"c": torch.ones(2)}}
    dcp.save(tree, checkpoint_id=tmp_path / "saved", no_dist=True)
    (note,) = fill_state_dict({"model": {"a": torch.zeros(2)}}, tmp_path / "saved").notes
    assert note.startswith("not loaded, because the live state dict does not have them: 1 tensors: 'model.b'")
    assert fill_state_dict({"model": {"a": torch.zeros(2), "b": torch.zeros(2)}}, tmp_path / "saved").notes == []


@pytest.mark.parametrize("distributed", [True, False])
def test_items_in_files_of_safetensors_have_the_names_that_torch_gives_them(distributed: bool, tmp_path: Path) -> None:
    saved = {"layer.weight": torch.arange(6.0).reshape(3, 2), "layer.bias": torch.ones(3)}
    folder = str(tmp_path / "hf")
    writer = HuggingFaceStorageWriter(path=folder, save_distributed=distributed, enable_consolidation=distributed)
    dcp.save(dict(saved), storage_writer=writer)
    live = {name: torch.zeros_like(value) for name, value in saved.items()}
    dcp.load(live, storage_reader=HuggingFaceStorageReader(folder), planner=PlanLoadPlanner(folder))
    assert frozen(live) == frozen(saved)
    renamed = {"new.weight": torch.zeros(3, 2)}
    fill_state_dict(renamed, folder, Plan.from_options(rename=["layer=new"]))
    assert torch.equal(renamed["new.weight"], saved["layer.weight"])


def test_torch_and_the_planner_are_given_the_same_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / name, no_dist=True)
    live = {"w": torch.zeros(2)}
    with pytest.raises(CheckpointException, match="another checkpoint than this planner, which was given"):
        dcp.load(live, checkpoint_id=tmp_path / "one", planner=PlanLoadPlanner(tmp_path / "two"), no_dist=True)
    assert not live["w"].any()
    (tmp_path / "one").rename(tmp_path / "moved")
    dcp.load(live, checkpoint_id=tmp_path / "moved", planner=PlanLoadPlanner(tmp_path / "moved"), no_dist=True)
    assert live["w"].all()


def test_what_a_slot_is_of_is_named() -> None:
    """A slot of another shape than its parameter cannot be sharded."""
    from optimstate.resuming.shards import Reader

    casts: dict[tuple[str, str], list[str]] = {}
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))])
    made = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"params": [0]}]}
    Reader(casts, []).optimizer(optimizer, made, [["layer.weight"]])
    assert casts == {("float32", "bfloat16"): ["layer.weight exp_avg"]}


def test_every_error_is_ours(tmp_path: Path) -> None:
    dcp.save({"model": {"a": torch.ones(2)}}, checkpoint_id=tmp_path / "saved", no_dist=True)
    for live in ({"model": {"a": 3}}, {"model": {"a": torch.zeros(3)}}, {"model": {"b": 1}}, {"a": torch.zeros(2)}):
        with pytest.raises(OptimStateError):
            fill_state_dict(live, tmp_path / "saved")
