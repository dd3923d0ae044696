"""From one optimizer to another: by the definition of each slot, and by training on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.apply.explain import explained
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.compute import to_torch
from tests.plan.lazy import lazy_tree
from tests.plan.models import WIDTH, Twins
from tests.plan.training import batches, train
from tests.releases import ADAM_TELLS_ITS_DECAY, muon
from tests.support import seeded

CLASSES: dict[str, Any] = {
    name: getattr(torch.optim, name)
    for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "SGD", "Muon")
    if hasattr(torch.optim, name)  # Muon's first release is 2.9
}


def trained(source: str, **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = seeded(Twins)
    parameters = [(n, p) for n, p in model.named_parameters() if source != "Muon" or p.ndim == 2]
    optimizer = CLASSES[source](parameters, lr=0.01, **options)
    train(model, optimizer, batches(5, WIDTH))
    return model, optimizer


def converted(optimizer: torch.optim.Optimizer, target: str) -> tuple[OptimizerState, Any]:
    state = OptimizerState.from_node(copy.deepcopy(optimizer.state_dict()))
    migration = plan_optimizer(Plan(optimizer=target), state)
    return execute_optimizer(migration.sections["optimizer"], state), migration


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (a, b)
        for a in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
        for b in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")
        if a != b
    ]
    + [("AdamW", "Adafactor"), ("Adafactor", "AdamW")],
)
def test_the_target_trains_on(source: str, target: str) -> None:
    model, optimizer = trained(source)
    state, migration = converted(optimizer, target)
    names = [(n, p) for n, p in model.named_parameters()]
    new = CLASSES[target](names)
    fresh = CLASSES[target]([torch.nn.Parameter(p.detach().clone()) for _, p in names])
    new.load_state_dict(state.to_node())
    if source in ("Adam", "AdamW") and not ADAM_TELLS_ITS_DECAY:
        pytest.skip("the state of this torch does not say which of the two it is of")
    later = set() if ADAM_TELLS_ITS_DECAY else {"decoupled_weight_decay"}  # written always
    assert new.param_groups[0].keys() - {"param_names", *later} == fresh.param_groups[0].keys() - later
    assert new.param_groups[0]["lr"] == 0.01
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    fresh.step()
    expected = {p.shape: set(fresh.state[p]) for p in fresh.state}
    assert all(set(new.state[p]) == expected[p.shape] for _, p in names)
    losses = train(model, new, batches(3, WIDTH))
    assert all(loss == loss for loss in losses)
    rows = list(explained(migration))
    assert any(row.how == f"{source} to {target}" for row in rows)


def test_the_product_of_nadam_is_the_one_its_steps_compute() -> None:
    _, adam = trained("Adam")
    _, nadam = trained("NAdam")
    state, _ = converted(adam, "NAdam")
    ours = state.state[0]["mu_product"]
    theirs = nadam.state_dict()["state"][0]["mu_product"]
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_means_of_the_second_moment_are_adafactors() -> None:
    _, adam = trained("AdamW")
    state, _ = converted(adam, "Adafactor")
    square = adam.state_dict()["state"][0]["exp_avg_sq"]
    assert torch.equal(state.state[0]["row_var"], square.mean(-1, keepdim=True))
    assert torch.equal(state.state[0]["col_var"], square.mean(-2, keepdim=True))
    assert torch.equal(state.state[1]["variance"], adam.state_dict()["state"][1]["exp_avg_sq"])


@muon
def test_momentum_of_sgd_is_an_average_in_muon() -> None:
    """One and the same gradients: the converted buffer is the one Muon would have."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    twin = torch.nn.Parameter(torch.zeros(4, 4))
    sgd = torch.optim.SGD([("w", weight)], lr=0.0, momentum=0.9)
    muon = torch.optim.Muon([("w", twin)], lr=0.0, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        weight.grad = torch.randn(4, 4, generator=generator)
        twin.grad = weight.grad.clone()
        sgd.step()
        muon.step()
    there, _ = converted(sgd, "Muon")
    assert torch.allclose(
        there.state[0]["momentum_buffer"], muon.state_dict()["state"][0]["momentum_buffer"], rtol=1e-5
    )
    back, _ = converted(muon, "SGD")
    assert torch.allclose(back.state[0]["momentum_buffer"], sgd.state_dict()["state"][0]["momentum_buffer"], rtol=1e-5)


def test_lion_gets_the_first_moment_and_the_rest_is_reported() -> None:
    _, adam = trained("Adam")
    state, migration = converted(adam, "Lion")
    assert set(state.state[0]) == {"exp_avg"}
    lost = {(row.slot, row.outcome) for row in explained(migration) if row.how}
    assert lost == {("exp_avg", "approximate"), ("exp_avg_sq", "dropped"), ("step", "dropped")}


@pytest.mark.parametrize(
    ("source", "target"), [("SGD", "Adam"), ("Adagrad", "Adam"), ("Adam", "SGD"), ("Adam", "LBFGS")]
)
def test_what_has_no_meaning_is_refused(source: str, target: str) -> None:
    CLASSES["Adagrad"] = torch.optim.Adagrad
    options = {"momentum": 0.9} if source == "SGD" else {}
    _, optimizer = trained(source, **options)
    with pytest.raises(MigrationError, match=r"no meaning|no conversion"):
        converted(optimizer, target)


@pytest.mark.parametrize("target", ["Adafactor", "Adamax", "NAdam"])
def test_files_convert_as_live_states_do(target: str) -> None:
    _, optimizer = trained("AdamW")
    live, _ = converted(optimizer, target)
    node = lazy_tree(optimizer.state_dict())
    state = OptimizerState.from_node(node)
    late = execute_optimizer(plan_optimizer(Plan(optimizer=target), state).sections["optimizer"], state)
    for key, slots in live.state.items():
        assert all(torch.equal(to_torch(late.state[key][slot]), value) for slot, value in slots.items())


@pytest.mark.parametrize("target", [*CLASSES, "Lion", "Adafactor (transformers)"])
@pytest.mark.parametrize(("source", "amsgrad"), [*((name, False) for name in CLASSES), ("Adam", True), ("AdamW", True)])
def test_a_report_of_a_conversion_names_every_loss(source: str, target: str, amsgrad: bool) -> None:
    """What is called exact is there with its bits; what is not there is not called exact, unless it became another."""
    options = {"amsgrad": True} if amsgrad else {"momentum": 0.9} if source in ("SGD", "Muon") else {}
    _, optimizer = trained(source, **options)
    try:
        state, migration = converted(optimizer, target)
    except MigrationError:
        return
    old = {name: slots or {} for _, name, slots in OptimizerState.from_node(optimizer.state_dict()).parameters()}
    new = {name: slots or {} for _, name, slots in state.parameters()}
    rows = [row for row in explained(migration) if row.slot]
    for name, slots in old.items():
        said = {row.slot: row for row in rows if row.target == name}
        assert said.keys() >= slots.keys() | new[name].keys(), name
        for slot, row in said.items():
            if row.outcome != "exact":
                continue
            if slot in slots and slot in new[name]:
                scale = {"SGD": 0.1, "Muon": 10.0}[source] if "times 1 - momentum" in row.reason else 1.0
                wanted, found = torch.as_tensor(slots[slot]) * scale, torch.as_tensor(new[name][slot])
                assert torch.allclose(wanted.float(), found.float(), rtol=0 if scale == 1 else 1e-5), row
            else:
                assert slot in new[name] or row.reason.startswith("it became"), row
