"""Nine kinds of change, each an old and a new model and a short plan, trained before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import MigrationError
from optimstate.installed_torch import adagrad_starts_late
from optimstate.plan.language.plan import Plan
from optimstate.state.scheduler import regroup_scheduler_state
from tests.plan.models import WIDTH, Attention, Deeper, Feed, Tied, Twins
from tests.plan.training import ELEMENTWISE, batches, migrate, slots_by_name, train
from tests.support import seeded

BITWISE, REGROUPED = 0.0, 1e-6


@dataclass(frozen=True)
class Change:
    """A change of architecture that keeps the function, and how closely the losses must follow."""

    old: Callable[[], nn.Module]
    new: Callable[[], nn.Module]
    plan: str
    within: float = BITWISE
    named: bool = True
    skip: Sequence[str] = field(default=())


INTERLEAVED = f"""
[[rule]]
from = "qkv.{{p}}"
to = "{{x=q|k|v}}.{{p}}"
ops = [
  {{ reshape = {{ dim = 0, to = [2, 3, {WIDTH // 2}] }} }},
  {{ unstack = 1 }},
  {{ reshape = {{ dim = 0, from = [2, {WIDTH // 2}], to = [{WIDTH}] }} }},
]
"""
SPLIT = '[[rule]]\nfrom = "qkv.{p}"\nto = "{x=q|k|v}.{p}"\nsplit = 0\n'
FUSE = '[[rule]]\nfrom = "{x=q|k|v}.{p}"\nto = "qkv.{p}"\nconcat = 0\n'
STACK = '[[rule]]\nfrom = "experts.{e=0..2}.{p}"\nto = "experts.{p}"\nstack = 0\n'

CHANGES = {
    "layers renamed, two swap": Change(
        lambda: Twins("a", "b"),
        lambda: Twins("b", "a"),
        '[[rule]]\nfrom = "a.{p}"\nto = "b.{p}"\n[[rule]]\nfrom = "b.{p}"\nto = "a.{p}"\n',
    ),
    "renamed in order": Change(
        lambda: Twins("a", "b"),
        lambda: Twins("first", "second"),
        '[[rule]]\nfrom = "{x=a|b}.{p}"\nto = "{x=first|second}.{p}"\n',
    ),
    "reordered, unnamed": Change(lambda: Twins("a", "b"), lambda: Twins("a", "b", ("b", "out", "a")), "", named=False),
    "fused QKV to separate": Change(lambda: Attention("fused"), lambda: Attention("separate"), SPLIT, REGROUPED),
    "separate QKV to fused": Change(lambda: Attention("separate"), lambda: Attention("fused"), FUSE, REGROUPED),
    "interleaved QKV to separate": Change(
        lambda: Attention("interleaved"), lambda: Attention("separate"), INTERLEAVED, REGROUPED
    ),
    "experts stacked": Change(lambda: Feed(3), lambda: Feed(3, stacked=True), STACK, REGROUPED),
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("name", CHANGES)
def test_training_goes_on_as_if_nothing_had_changed(name: str, kind: str) -> None:
    change = CHANGES[name]
    optimizer_type, options = ELEMENTWISE[kind]
    # In double where sums are regrouped; otherwise in float, because loading casts NAdam's float mu_product to double.
    dtype = torch.float32 if change.within == BITWISE else torch.float64
    old, new = seeded(change.old).to(dtype), seeded(change.new, seed=7).to(dtype)
    inputs = [x.to(dtype) for x in batches(20, WIDTH)]
    named = old.named_parameters() if change.named else old.parameters()
    before = optimizer_type(named, **options)
    train(old, before, inputs[:10])
    after = optimizer_type(new.named_parameters() if change.named else new.parameters(), **options)
    names = None if change.named else [n for n, _ in old.named_parameters()]
    migration = migrate(Plan.from_toml(change.plan), old, before, new, after, names)
    outcomes = [outcome.level for move in migration.sections["optimizer"].moves for outcome in move.slots.values()]
    assert outcomes
    assert set(outcomes) == {"exact"}
    unchanged, changed = train(old, before, inputs[10:]), train(new, after, inputs[10:])
    # The losses must have moved for their agreement to mean anything.
    assert max(unchanged) - min(unchanged) > 1e-3
    if change.within == BITWISE:
        assert changed == unchanged
    else:
        assert changed == pytest.approx(unchanged, rel=change.within, abs=change.within)


@pytest.mark.parametrize("name", CHANGES)
def test_without_the_state_training_differs(name: str) -> None:
    """What the trajectories above would look like if the engine had lost the state."""
    change = CHANGES[name]
    old, new = seeded(change.old).double(), seeded(change.new, seed=7).double()
    inputs = [x.double() for x in batches(20, WIDTH)]
    before = torch.optim.Adam(old.named_parameters(), lr=0.01)
    train(old, before, inputs[:10])
    after = torch.optim.Adam(new.named_parameters(), lr=0.01)
    fresh = Plan.from_toml(change.plan) + Plan()
    migrate(fresh, old, before, new, after)
    after.state.clear()
    assert train(new, after, inputs[10:]) != pytest.approx(train(old, before, inputs[10:]), rel=1e-6)


def test_dense_to_experts_gives_each_its_own_copy() -> None:
    old, new = seeded(Feed), seeded(lambda: Feed(3), seed=7)
    before, after = (torch.optim.AdamW(m.named_parameters(), lr=0.01) for m in (old, new))
    train(old, before, batches(10, WIDTH))
    plan = Plan.from_toml('[[rule]]\nfrom = "mlp.{p}"\nto = "experts.{e=0..2}.{p}"\n')
    migration = migrate(plan, old, before, new, after)
    source = slots_by_name(old, before)
    copies = slots_by_name(new, after)
    pointers = set()
    for expert in range(3):
        for p in ("weight", "bias"):
            assert torch.equal(new.state_dict()[f"experts.{expert}.{p}"], old.state_dict()[f"mlp.{p}"])
            for slot, value in source[f"mlp.{p}"].items():
                copy = copies[f"experts.{expert}.{p}"][slot]
                assert torch.equal(copy, value)
                pointers.add(copy.data_ptr())
    assert len(pointers) == 3 * 2 * 3
    assert any("router" in note for note in migration.notes)
    train(new, after, batches(1, WIDTH))
    assert {float(slots["step"]) for slots in copies.values()} == {11.0}


# Those whose updates do not depend on the gradient's scale.
@pytest.mark.parametrize("kind", ["adam", "nadam", "radam", "adamax", "rmsprop"])
def test_experts_scaled_train_like_the_dense_layer(kind: str) -> None:
    """Two experts of half the weight, summed: with scale, each is updated by half of what the one was."""
    optimizer_type, options = ELEMENTWISE[kind]
    old = seeded(Feed).double()
    before = optimizer_type(old.named_parameters(), **{**options, "lr": 0.01})
    inputs = [x.double() for x in batches(12, WIDTH)]
    train(old, before, inputs[:10])
    new = seeded(lambda: Feed(2), seed=7).double()
    halved = [{"params": [(n, p) for n, p in new.named_parameters() if "expert" in n], "lr": 0.005}]
    rest = [{"params": [(n, p) for n, p in new.named_parameters() if "expert" not in n]}]
    after = optimizer_type(halved + rest, **{**options, "lr": 0.01, "eps": 1e-30})
    plan = Plan.from_toml(
        '[policy]\nhyperparameters = "live"\n'
        '[[rule]]\nfrom = "mlp.{p}"\nto = "experts.{e=0..1}.{p}"\nscale = { param = 0.5, grad = 1.0 }\n'
    )
    migrate(plan, old, before, new, after)
    for group in before.param_groups:
        group["eps"] = 1e-30
    assert train(new, after, inputs[10:]) == pytest.approx(train(old, before, inputs[10:]), rel=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adagrad"])
def test_a_new_layer_in_front_shifts_the_others(kind: str) -> None:
    if kind == "adagrad" and not adagrad_starts_late():
        pytest.skip("torch's Adagrad makes no state in a step")
    optimizer_type, options = ELEMENTWISE[kind]
    old, new = seeded(lambda: Deeper(3)), seeded(lambda: Deeper(3, front=True), seed=7)
    before, after = (optimizer_type(m.named_parameters(), **options) for m in (old, new))
    train(old, before, batches(10, WIDTH))
    plan = Plan.from_toml(
        '[[rule]]\nfrom = "layers.{i:int}.{p}"\nto = "layers.{i+1}.{p}"\n[[rule]]\nfresh = "layers.0.*"\n'
    )
    migrate(plan, old, before, new, after)
    source, moved = slots_by_name(old, before), slots_by_name(new, after)
    assert "layers.0.weight" not in moved
    for layer in range(3):
        for slot, value in source[f"layers.{layer}.weight"].items():
            assert torch.equal(moved[f"layers.{layer + 1}.weight"][slot], value)
    losses = train(new, after, batches(10, WIDTH, seed=3))
    # The new layer starts as nothing, so that the first loss is the old model's.
    assert losses[0] == train(old, before, batches(10, WIDTH, seed=3))[0]


def test_a_tied_vocabulary_grows_in_both_places() -> None:
    old, new = seeded(lambda: Tied(11)), seeded(lambda: Tied(16), seed=7)
    before, after = (torch.optim.AdamW(m.named_parameters(), lr=0.01) for m in (old, new))
    train(old, before, batches(10, WIDTH))
    plan = Plan.from_toml(
        '[[rule]]\nfrom = "{m=embed|head}.weight"\nto = "{m}.weight"\n'
        'resize = { dim = 0, size = 16, fill = { param = "mean" } }\n'
    )
    migration = migrate(plan, old, before, new, after)
    assert new.head.weight is new.embed.weight
    weight = old.embed.weight.detach()
    assert torch.equal(new.embed.weight[:11], weight)
    assert torch.equal(new.embed.weight[11:], weight.mean(0, keepdim=True).expand(5, -1))
    source, grown = slots_by_name(old, before)["embed.weight"], slots_by_name(new, after)["embed.weight"]
    assert torch.equal(grown["step"], source["step"])
    assert torch.equal(grown["exp_avg"], torch.cat([source["exp_avg"], torch.zeros(5, WIDTH)]))
    mean = source["exp_avg_sq"].mean(0, keepdim=True).expand(5, -1)
    assert torch.equal(grown["exp_avg_sq"], torch.cat([source["exp_avg_sq"], mean]))
    outcomes = {
        p[-1]: f
        for m in migration.sections["optimizer"].moves
        if m.target == "embed.weight"
        for p, f in m.slots.items()
    }
    assert outcomes["exp_avg_sq"].level == "approximate"
    assert "5 new rows of dimension 0 are filled with the mean" in outcomes["exp_avg_sq"].reason
    train(new, after, batches(3, WIDTH))


def test_growing_one_of_two_tied_tensors_is_refused() -> None:
    old = seeded(lambda: Tied(11))
    plan = Plan.from_toml('[[rule]]\nfrom = "embed.weight"\nto = "embed.weight"\nresize = { dim = 0, size = 16 }\n')
    from optimstate.plan.solve.planner import plan_model

    with pytest.raises(MigrationError, match=r"'embed.weight' .* 'head.weight', which shares its memory"):
        plan_model(plan, old.state_dict())


def decayed(model: nn.Module, lr: float = 0.01) -> list[dict[str, Any]]:
    weights = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.endswith("weight")]
    return [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": lr}]


@pytest.mark.parametrize("kind", [k for k in ELEMENTWISE if k != "rprop"])
def test_groups_split_and_joined_with_the_scheduler(kind: str) -> None:
    """Two groups that are alike become one, or one becomes two that are alike: training does not notice."""
    optimizer_type, options = ELEMENTWISE[kind]
    old, new = seeded(Twins), seeded(Twins, seed=7)
    names = [n for n, _ in old.named_parameters()]
    one = optimizer_type(old.named_parameters(), **options)
    schedule = torch.optim.lr_scheduler.StepLR(one, 3, 0.7)
    train(old, one, batches(10, WIDTH), schedule)
    pairs = list(new.named_parameters())
    two = optimizer_type([{"params": pairs[1:4]}, {"params": pairs[4:] + pairs[:1]}], **options)
    follower = torch.optim.lr_scheduler.StepLR(two, 3, 0.7)
    migration = migrate(Plan(), old, one, new, two)
    group_map = migration.sections["optimizer"].group_map
    assert group_map == [[0], [0]]
    follower.load_state_dict(regroup_scheduler_state(schedule.state_dict(), group_map))
    more = batches(10, WIDTH, seed=5)
    expected = train(old, one, more, schedule)
    assert train(new, two, more, follower) == expected
    # And back into one group.
    again = seeded(Twins, seed=9)
    joined = optimizer_type(again.named_parameters(), **options)
    back = migrate(Plan(), new, two, again, joined)
    assert back.sections["optimizer"].group_map == [[0, 1]]
    assert [n for n, _ in again.named_parameters()] == names
    assert train(again, joined, more) == train(new, two, more)


def test_groups_that_differ_are_not_joined_by_chance() -> None:
    old, new = seeded(Twins), seeded(Twins)
    two = torch.optim.AdamW(decayed(old), lr=0.01)
    one = torch.optim.AdamW(new.named_parameters(), lr=0.01)
    train(old, two, batches(2, WIDTH))
    with pytest.raises(MigrationError, match=r"weight_decay \(0\.1 and 0\.0\)"):
        migrate(Plan(), old, two, new, one)
    migrate(Plan().with_policy(merge="first"), old, two, new, one)
    assert one.param_groups[0]["weight_decay"] == 0.1
    migrate(Plan.from_toml('[[group]]\nmatch = "**"\nset = { weight_decay = 0.03 }\n'), old, two, new, one)
    assert one.param_groups[0]["weight_decay"] == 0.03


def test_a_split_that_would_lose_the_groups_difference_is_refused() -> None:
    old, new = seeded(Twins), seeded(Twins)
    one = torch.optim.AdamW(old.named_parameters(), lr=0.01, weight_decay=0.1)
    two = torch.optim.AdamW(decayed(new), lr=0.01)
    train(old, one, batches(2, WIDTH))
    with pytest.raises(MigrationError, match=r"both come from group 0 .* weight_decay \(0\.1 and 0\.0\)"):
        migrate(Plan(), old, one, new, two)
    plan = Plan.from_toml('[[group]]\nmatch = "**.weight"\n[[group]]\nmatch = "**"\nset = { weight_decay = 0.0 }\n')
    migrate(plan, old, one, new, two)
    assert [g["weight_decay"] for g in two.param_groups] == [0.1, 0.0]
    assert [g["lr"] for g in two.param_groups] == [0.01, 0.01]


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.named_parameters(), lr=0.05)


def test_qkv_split_under_adafactor_is_approximate_and_says_so() -> None:
    old, new = seeded(lambda: Attention("fused")), seeded(lambda: Attention("separate"))
    before, after = adafactor(old), adafactor(new)
    train(old, before, batches(10, WIDTH))
    migration = migrate(Plan.from_toml(SPLIT), old, before, new, after)
    outcomes = {
        (move.target, path[-1]): outcome
        for move in migration.sections["optimizer"].moves
        for path, outcome in move.slots.items()
    }
    assert outcomes["q.weight", "row_var"].level == "exact"
    assert outcomes["q.weight", "col_var"].level == "approximate"
    assert (
        f"the mean over all {3 * WIDTH} rows of dimension 0 stands for {WIDTH}"
        in outcomes["q.weight", "col_var"].reason
    )
    source, moved = slots_by_name(old, before), slots_by_name(new, after)
    assert torch.equal(moved["k.weight"]["row_var"], source["qkv.weight"]["row_var"][WIDTH : 2 * WIDTH])
    assert torch.equal(moved["k.weight"]["col_var"], source["qkv.weight"]["col_var"])
    assert torch.equal(moved["k.bias"]["variance"], source["qkv.bias"]["variance"][WIDTH : 2 * WIDTH])
    assert any("as a whole" in note for note in migration.notes)
    train(new, after, batches(3, WIDTH))
    with pytest.raises(MigrationError, match=r"q\.weight: col_var can only be approximated"):
        migrate(Plan.from_toml(SPLIT).with_policy(approximate="refuse"), old, before, new, adafactor(new))


def test_qkv_fused_under_adafactor_is_the_weighted_mean() -> None:
    old, new = seeded(lambda: Attention("separate")), seeded(lambda: Attention("fused"))
    before, after = adafactor(old), adafactor(new)
    train(old, before, batches(10, WIDTH))
    migration = migrate(Plan.from_toml(FUSE), old, before, new, after)
    assert {f.level for m in migration.sections["optimizer"].moves for f in m.slots.values()} == {"exact"}
    source, fused = slots_by_name(old, before), slots_by_name(new, after)["qkv.weight"]
    parts = [source[f"{x}.weight"] for x in "qkv"]
    assert torch.equal(fused["row_var"], torch.cat([p["row_var"] for p in parts]))
    assert torch.allclose(fused["col_var"], torch.stack([p["col_var"] for p in parts]).mean(0), rtol=1e-6)
    train(new, after, batches(3, WIDTH))
