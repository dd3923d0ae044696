"""Between torch's optimizers and bitsandbytes': its own optimizers load what comes out, and train on."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import MigrationError, PlanError
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.apply.explain import explained
from optimstate.plan.language.plan import Plan
from optimstate.plan.slots import quantized
from optimstate.plan.slots.outcomes import flat_slots
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.compute import to_torch
from tests.plan.lazy import lazy_tree

bnb = pytest.importorskip("bitsandbytes")

WIDTH = 100


def network() -> torch.nn.Module:
    """Its first weight has 5000 elements, which are coded, the others stay in 32 bits."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 50), torch.nn.Tanh(), torch.nn.Linear(50, 10))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, WIDTH, generator=generator)
        loss = (model(x) - x[:, :10]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(kind: Any, **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model, its optimizer after 20 steps, and the optimizer's state with names."""
    model = network()
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    train(model, optimizer, 20, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    return model, optimizer, OptimizerState.from_node(saved).named([n for n, _ in model.named_parameters()]).to_node()


def converted(node: dict[str, Any], target: str, text: str = "") -> tuple[OptimizerState, Any]:
    state = OptimizerState.from_node(node)
    plan = Plan.from_toml(f'optimizer = "{target}"\n{text}' if target else text)
    migration = plan_optimizer(plan, state)
    return execute_optimizer(migration.sections["optimizer"], state), migration


def tensors(slots: Any) -> dict[Any, Any]:
    return {path[-1]: value for path, value in flat_slots(slots)}


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "AdamW32bit", "Adam32bit"])
def test_bitsandbytes_trains_on_as_torch_would(name: str) -> None:
    source = torch.optim.AdamW if name.startswith("AdamW") else torch.optim.Adam
    model, optimizer, saved = trained(source, weight_decay=0.01)
    weights = copy.deepcopy(model.state_dict())
    expected = train(model, optimizer, 5, 1)
    model.load_state_dict(weights)
    if source is torch.optim.Adam:
        saved["param_groups"][0]["weight_decay"] = 0.0  # coupled in torch's Adam, decoupled in bitsandbytes'
        optimizer.load_state_dict({**saved, "state": copy.deepcopy(saved["state"])})
        expected = train(model, optimizer, 5, 1)
        model.load_state_dict(weights)
    state, migration = converted(saved, name)
    other = getattr(bnb.optim, name)(model.parameters(), lr=1.0)
    other.load_state_dict(state.to_node())
    assert other.param_groups[0]["lr"] == 1e-3
    got = train(model, other, 5, 1)
    assert got == pytest.approx(expected, rel=1e-6 if "32" in name else 1e-3)
    outcomes = {row.slot: row.outcome for row in explained(migration) if row.how.endswith(name)}
    kind = "exact" if "32" in name else "approximate"
    assert outcomes == {"step": "exact", "exp_avg": kind, "exp_avg_sq": kind}


def test_the_state_has_the_form_that_bitsandbytes_itself_saves() -> None:
    _, _, saved = trained(torch.optim.AdamW)
    _, own, _ = trained(bnb.optim.AdamW8bit)
    state, _ = converted(saved, "AdamW8bit")
    made, theirs = state.to_node(), own.state_dict()
    assert made["param_groups"][0].keys() - {"param_names"} == theirs["param_groups"][0].keys()
    for key, slots in theirs["state"].items():
        ours = dict(flat_slots(made["state"][key]))
        expected = dict(flat_slots(slots))
        assert ours.keys() == expected.keys()
        for path, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert (ours[path].dtype, ours[path].shape) == (value.dtype, value.shape), path
        if ("__bnb_optimizer_quant_state__", "qmap1") in expected:
            for table in ("qmap1", "qmap2"):
                path = ("__bnb_optimizer_quant_state__", table)
                assert torch.equal(ours[path], expected[path])


def test_coded_moments_stay_within_the_bound_and_come_back_as_what_the_codes_stand_for() -> None:
    _, _, saved = trained(torch.optim.AdamW)
    state, _ = converted(saved, "AdamW8bit")
    back, _ = converted(state.to_node(), "AdamW")
    for key, slots in saved["state"].items():
        for slot, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            was, now = slots[slot].flatten(), back.state[key][slot].flatten()
            if was.numel() < quantized.SMALL:
                assert torch.equal(was, now)
                continue
            assert not torch.equal(was, now)
            pieces = zip(was.split(quantized.BLOCK), now.split(quantized.BLOCK), strict=True)
            bound = quantized.error_bound(signed=signed)
            assert all((a - b).abs().max() <= bound * a.abs().max() for a, b in pieces)
            parts = tensors(state.state[key])
            number = "1" if signed else "2"
            codes = parts[f"state{number}"].flatten().long()
            scale = parts[f"absmax{number}"].repeat_interleave(quantized.BLOCK)[: codes.numel()]
            assert torch.equal(now, parts[f"qmap{number}"][codes] * scale)
        assert torch.equal(back.state[key]["step"], slots["step"])


def test_torch_trains_on_from_bitsandbytes() -> None:
    model, optimizer, saved = trained(bnb.optim.AdamW32bit, weight_decay=0.01)
    weights = copy.deepcopy(model.state_dict())
    expected = train(model, optimizer, 5, 1)
    model.load_state_dict(weights)
    state, _ = converted(saved, "AdamW")
    other = torch.optim.AdamW(model.named_parameters(), lr=1.0)
    other.load_state_dict(state.to_node())
    assert train(model, other, 5, 1) == pytest.approx(expected, rel=1e-5)


def test_between_its_own_optimizers_codes_stay_what_they_are() -> None:
    model, _, saved = trained(bnb.optim.AdamW8bit)
    state, migration = converted(saved, "Adam8bit")
    for key, slots in saved["state"].items():
        ours, theirs = tensors(state.state[key]), tensors(slots)
        assert ours.keys() == theirs.keys()
        assert all(ours[n] == v if isinstance(v, int) else torch.equal(ours[n], v) for n, v in theirs.items())
    assert {row.outcome for row in explained(migration) if row.how} == {"exact"}
    wide, _ = converted(saved, "AdamW32bit")
    other = bnb.optim.AdamW32bit(model.parameters(), lr=1.0)
    other.load_state_dict(wide.to_node())
    assert all(loss == loss for loss in train(model, other, 3, 1))


@pytest.mark.parametrize("name", ["Lion8bit", "Lion32bit"])
def test_lion_takes_the_first_moment(name: str) -> None:
    model, _, saved = trained(torch.optim.AdamW)
    state, migration = converted(saved, name)
    other = getattr(bnb.optim, name)(model.parameters(), lr=1.0)
    other.load_state_dict(state.to_node())
    assert other.param_groups[0]["betas"] == (0.9, 0.99)
    first = train(model, other, 5, 1)
    assert first[-1] < first[0]
    lost = {row.slot: row.outcome for row in explained(migration) if row.how}
    assert lost == {"exp_avg": "approximate", "exp_avg_sq": "dropped", "step": "dropped"}
    again, _ = converted(state.to_node(), "Lion")
    assert {slot for slots in again.state.values() for slot in slots} == {"exp_avg"}


@pytest.mark.parametrize("source", [torch.optim.AdamW, bnb.optim.AdamW8bit])
def test_files_convert_as_live_states_do(source: Any) -> None:
    _, _, saved = trained(source)
    target = "AdamW8bit" if source is torch.optim.AdamW else "AdamW"
    live, _ = converted(saved, target)
    late, _ = converted(lazy_tree(saved), target)
    for key, slots in live.state.items():
        ours, theirs = tensors(late.state[key]), tensors(slots)
        assert ours.keys() == theirs.keys()
        for slot, value in theirs.items():
            read = ours[slot] if isinstance(value, int) else to_torch(ours[slot])
            assert read == value if isinstance(value, int) else torch.equal(read, value), slot


def test_elements_of_a_file_can_be_read_from_the_middle_of_a_block() -> None:
    _, _, saved = trained(torch.optim.AdamW)
    live, late = saved["state"][0]["exp_avg"], lazy_tree(saved)["state"][0]["exp_avg"]
    codes = quantized.coded(live, "1", signed=True)["state1"].flatten()
    made = quantized.coded(late, "1", signed=True)["state1"].reshape((5000,))
    assert torch.equal(to_torch(made.narrow(0, 300, 77)), codes[300:377])


@pytest.mark.parametrize("name", ["LAMB8bit", "AdEMAMix8bit", "RMSprop8bit", "SGD8bit"])
def test_what_its_slots_do_not_hold_is_refused(name: str) -> None:
    _, _, saved = trained(getattr(bnb.optim, name), **({"momentum": 0.9} if name == "SGD8bit" else {}))
    with pytest.raises(MigrationError, match="no meaning"):
        converted(saved, "AdamW")


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, saved = trained(torch.optim.AdamW)
    for cached in (quantized.library, quantized.table, quantized.error_bound):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(PlanError, match="pip install bitsandbytes"):
        converted(saved, "AdamW8bit")
    state, _ = converted(saved, "AdamW32bit")
    assert torch.equal(tensors(state.state[0])["state1"], saved["state"][0]["exp_avg"])


def test_coded_slots_are_joined_only_when_asked() -> None:
    _, _, saved = trained(bnb.optim.AdamW8bit)
    with pytest.raises(MigrationError, match="requantize"):
        converted(saved, "", '[[rule]]\nfrom = "0.weight"\nto = "a.{e=0..1}.weight"\nsplit = 0')


def test_coded_slots_are_decoded_joined_and_coded_again() -> None:
    _, _, saved = trained(bnb.optim.AdamW8bit)
    text = '[policy]\nquantized = "requantize"\n[[rule]]\nfrom = "0.weight"\nto = "{e=a|b}.weight"\nsplit = 0'
    text = text.replace("split = 0", "split = { dim = 0, sizes = [45, 5] }")
    state, migration = converted(saved, "", text)
    by_name = {name: tensors(slots) for _, name, slots in state.parameters()}
    before = tensors(saved["state"][0])
    whole = quantized.decoded(before, "1")
    assert by_name["a.weight"]["state1"].dtype == torch.uint8  # 4500 elements
    assert torch.equal(by_name["b.weight"]["state1"], whole[45:])  # 500 elements, in 32 bits
    again, greatest = quantized.decoded(by_name["a.weight"], "1"), whole.abs().max()
    assert (again - whole[:45]).abs().max() <= quantized.error_bound(signed=True) * greatest
    rest = tensors(saved["state"][1])
    assert by_name["0.bias"]["state1"] is rest["state1"], "what is moved whole stays as it is"
    outcomes = {row.slot: row.outcome for row in explained(migration) if row.target == "a.weight"}
    assert outcomes == {"step": "exact", "state1": "approximate", "state2": "approximate"}
    lazy, _ = converted(lazy_tree(saved), "", text)
    for (_, name, slots), (_, _, other) in zip(state.parameters(), lazy.parameters(), strict=True):
        for slot, value in tensors(slots).items():
            read = tensors(other)[slot]
            assert read == value if isinstance(value, int) else torch.equal(to_torch(read), value), (name, slot)


def test_a_plan_that_refuses_approximations_refuses_codes() -> None:
    _, _, saved = trained(torch.optim.AdamW)
    with pytest.raises(MigrationError, match="exp_avg can only be approximated"):
        converted(saved, "AdamW8bit", '[policy]\napproximate = "refuse"')
    converted(saved, "AdamW32bit", '[policy]\napproximate = "refuse"')


def test_files_are_converted_there_and_back(tmp_path: Path) -> None:
    model, _, saved = trained(torch.optim.AdamW)
    old, coded, back = (tmp_path / name for name in ("old.pt", "coded.pt", "back.pt"))
    torch.save({"model": model.state_dict(), "optimizer": saved}, old)
    report = optimstate.convert(old, coded, optimizer="AdamW8bit")
    assert [(line.slot, line.outcome) for line in next(iter(report.optimizers.values())).slots] == [
        ("step", "exact"),
        ("exp_avg", "approximate"),
        ("exp_avg_sq", "approximate"),
    ]
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1.0)
    optimizer.load_state_dict(torch.load(coded)["optimizer"])
    assert train(model, optimizer, 3, 1)[-1] < 1.0
    again = optimstate.convert(coded, back, optimizer="AdamW")
    assert {line.slot: line.outcome for line in next(iter(again.optimizers.values())).slots} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "exact"
    )
    assert "first updates can be large" in next(iter(again.optimizers.values())).slots[2].reason
    twin = torch.optim.AdamW(model.named_parameters())
    twin.load_state_dict(torch.load(back)["optimizer"])
    assert train(model, twin, 3, 1)[-1] < 1.0


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit"])
def test_coded_state_of_large_tensors_is_renamed_reordered_and_copied_as_it_is(name: str, tmp_path: Path) -> None:
    options = {"momentum": 0.9} if name == "SGD8bit" else {}
    kind = getattr(bnb.optim, name)

    def parts(*names: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(len(names))
        model = torch.nn.Sequential()
        for each in names:
            model.add_module(each, torch.nn.Linear(WIDTH, WIDTH))
        return model, kind(model.parameters(), lr=1e-3, **options)

    def stepped(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    old, before = parts("a", "b")
    stepped(old, before)
    assert before.state[old.a.weight]["state1"].dtype == torch.uint8
    torch.save({"model": old.state_dict(), "optimizer": before.state_dict()}, tmp_path / "saved.pt")
    renamed, copied = Plan.from_options(rename=["a=x"]), Plan.from_options(duplicate=["a=x,y"])
    inserted = Plan.from_options(rename=["a=x"], fresh=["new"])
    for plan, names in ((renamed, ("b", "x")), (copied, ("x", "b", "y")), (inserted, ("x", "new", "b"))):
        model, optimizer = parts(*names)
        done = optimstate.resume(tmp_path / "saved.pt", model=model, optimizer=optimizer, plan=plan)
        assert not done.problems, done.problems
        for parameter, saved in model.named_parameters():
            module, _, leaf = parameter.partition(".")
            slots = optimizer.state.get(saved, {})
            if module == "new":
                assert not slots
                continue
            source = before.state[getattr(old.b if module == "b" else old.a, leaf)]
            assert slots.keys() == source.keys()
            assert all(torch.equal(torch.as_tensor(slots[key]), torch.as_tensor(source[key])) for key in slots)
        coded = [optimizer.state[p]["state1"].data_ptr() for p in model.parameters() if optimizer.state.get(p)]
        assert len(set(coded)) == len(coded)
        stepped(model, optimizer)
    model = torch.nn.Sequential()
    model.add_module("a", torch.nn.Linear(WIDTH, WIDTH))
    model.add_module("b", torch.nn.Linear(WIDTH, WIDTH + 28))
    grown = '[[rule]]\nfrom = "b.{p}"\nto = "b.{p}"\nresize = { dim = 0, size = 128, fill = 0.0 }\n'
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    with pytest.raises(MigrationError, match='quantized = "requantize" in'):
        optimstate.resume(tmp_path / "saved.pt", model=model, optimizer=optimizer, plan=Plan.from_toml(grown))
    requantized = Plan.from_toml(grown + '[policy]\nquantized = "requantize"\n')
    done = optimstate.resume(tmp_path / "saved.pt", model=model, optimizer=optimizer, plan=requantized)
    assert "b.weight" in done.reports["optimizer"].approximate
    assert tuple(optimizer.state[model.b.weight]["state1"].shape) == (128, WIDTH)
    stepped(model, optimizer)
