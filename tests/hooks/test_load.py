"""Each hook that runs before loading, on torch's optimizers and ours, with one group and with several."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.errors import MigrationError, PlanError, StateMismatchError
from optimstate.plan.language.plan import Plan
from tests import oracle
from tests.hooks.models import (
    MODULES,
    Net,
    adam,
    loaded,
    named_state,
    one_group,
    refused,
    register,
    train,
    trained,
    two_groups,
)
from tests.support import seeded

pytestmark = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
layouts = pytest.mark.parametrize("layout", [one_group, two_groups])


def same_slots(one: Any, other: Any) -> bool:
    return oracle.differences(dict(one), dict(other)) == []


class Renamed(nn.Module):
    """Net, whose parts have other names and stand in another order."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        self.unused, self.fixed, self.attention = net.unused, net.frozen, net.block
        self.wte, self.out = net.embed, net.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.fixed(self.attention(self.wte(tokens))))


NEW_NAMES = {"embed": "wte", "block": "attention", "frozen": "fixed"}


def renamed(model: nn.Module) -> nn.Module:
    """The same weights under the new names."""
    made = Renamed()
    with torch.no_grad():
        new = dict(made.named_parameters())
        for name, p in model.named_parameters():
            head, _, rest = name.partition(".")
            new[f"{NEW_NAMES.get(head, head)}.{rest}"].copy_(p)
    return made


@layouts
def test_rename_and_go_on_as_if_nothing_had_happened(module: Any, layout: Any) -> None:
    model, optimizer = trained(module, layout)
    changed = renamed(model)
    resumed = adam(module, layout(changed))
    hook = hooks.rename(NEW_NAMES)
    lines = loaded(resumed, copy.deepcopy(optimizer.state_dict()), hook)
    assert lines == ["rename: 11 exact"]
    assert hook.report is not None
    assert hook.report.sources["wte.weight"] == ("embed.weight",)
    assert "wte.weight: exact, from embed.weight" in str(hook.report)
    assert train(changed, resumed, 10, start=3) == train(model, optimizer, 10, start=3)


@layouts
def test_match_names_whatever_the_order(module: Any, layout: Any) -> None:
    model, optimizer = trained(module, layout)
    twin = seeded(Net, 1)
    twin.load_state_dict(model.state_dict())
    groups = layout(twin)
    if layout is one_group:
        groups = list(groups)[::-1]
    else:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    resumed = adam(module, groups)
    loaded(resumed, copy.deepcopy(optimizer.state_dict()), hooks.match_names())
    assert same_slots(named_state(resumed, twin), named_state(optimizer, model))
    assert train(twin, resumed, 10, start=3) == train(model, optimizer, 10, start=3)


def test_what_is_not_changed_is_not_copied(module: Any) -> None:
    model, optimizer = trained(module)
    changed = renamed(model)
    resumed = adam(module, changed.named_parameters())
    loaded(resumed, optimizer.state_dict(), hooks.rename(NEW_NAMES))
    old, new = named_state(optimizer, model), named_state(resumed, changed)
    assert new["wte.weight"]["exp_avg"] is old["embed.weight"]["exp_avg"]
    assert new["attention.q.bias"]["step"] is old["block.q.bias"]["step"]


def file_behind(tensor: torch.Tensor) -> str | None:
    """The file that a tensor's memory is a map of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, last = line.split()
        start, stop = (int(place, 16) for place in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return last
    return None


class WithoutUnused(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.unused


MAPPED: dict[str, tuple[Any, list[Any]]] = {
    "match_names": (Net, [hooks.match_names()]),
    "rename": (Renamed, [hooks.rename(NEW_NAMES)]),
    "drop": (WithoutUnused, [hooks.drop_unexpected("unused")]),
    "hyperparameters": (Net, [hooks.hyperparameters("live")]),
    "fuse": (lambda: Net(fused=True), [hooks.fuse({"block.qkv": ["block.q", "block.k", "block.v"]})]),
    "resize": (lambda: Net(rows=8), [hooks.resize("embed.weight")]),
    "cast_state": (Net, [hooks.cast_state({"exp_avg": "float64"})]),
}
# Slots that a hook makes anew; all others must stay where the file is mapped.
NEW_SLOTS = {"fuse": {"block.qkv.weight", "block.qkv.bias"}, "resize": {"embed.weight"}}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read as Linux shows them")
@pytest.mark.parametrize("case", MAPPED)
def test_what_is_not_changed_stays_mapped(case: str, module: Any, tmp_path: Path) -> None:
    _, optimizer = trained(module)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    make, given = MAPPED[case]
    changed = seeded(make)
    resumed = adam(module, changed.named_parameters())
    saved = torch.load(tmp_path / "optimizer.pt", mmap=True)
    pointers = {value.data_ptr() for slots in saved["state"].values() for value in slots.values()}
    register(resumed, *given)
    resumed.load_state_dict(saved)
    count = 0
    for name, slots in named_state(resumed, changed).items():
        for slot, value in slots.items():
            if (name in NEW_SLOTS.get(case, ()) and slot != "step") or (case == "cast_state" and slot == "exp_avg"):
                assert value.data_ptr() not in pointers
            else:
                assert value.data_ptr() in pointers, (name, slot)
                assert file_behind(value) == str(tmp_path / "optimizer.pt")
                count += 1
    assert count >= 5


def test_what_a_new_optimizer_has_loads_into_itself(module: Any) -> None:
    """As Accelerate does when it prepares one: nothing is resumed yet, whatever names are given for the checkpoint."""
    model, optimizer = trained(module)
    saved = copy.deepcopy(optimizer.state_dict())
    names = saved["param_groups"][0].pop("param_names")
    changed = renamed(model)
    changed.side = nn.Linear(4, 4)
    resumed = adam(module, changed.parameters())
    given = (
        hooks.match_names(changed, saved=names),
        hooks.rename(NEW_NAMES),
        hooks.fill_missing({"side": "attention.q"}),
    )
    loaded(resumed, resumed.state_dict(), *given)
    assert not resumed.state
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state[changed.wte.weight]["exp_avg"], optimizer.state[model.embed.weight]["exp_avg"])


def test_one_name_where_several_belong_is_refused(module: Any) -> None:
    for hook in (hooks.duplicate, hooks.split, hooks.fuse):
        with pytest.raises(PlanError, match="'fc' is given 'abc', expected a list of names"):
            hook({"fc": "abc"})
    with pytest.raises(PlanError, match="expected one name"):
        hooks.rename({"fc": ["a", "b"]})  # type: ignore[dict-item]


def test_strip_prefix_in_any_nesting(module: Any) -> None:
    model, optimizer = trained(module)
    prefixes = ["module.", "_orig_mod.module.", "module._orig_mod._fsdp_wrapped_module."]
    for prefix in prefixes:
        saved = optimizer.state_dict()
        group = saved["param_groups"][0]
        group["param_names"] = [
            prefix + name.replace("block.", "block._checkpoint_wrapped_module.") for name in group["param_names"]
        ]
        twin = seeded(Net, 1)
        resumed = adam(module, twin.named_parameters())
        assert "nothing fills 'embed.weight'" in refused(resumed, saved, hooks.match_names())
        resumed = adam(module, twin.named_parameters())
        loaded(resumed, saved, hooks.strip_prefix(), hooks.match_names())
        assert same_slots(named_state(resumed, twin), named_state(optimizer, model))
        # the other way round: the live model is wrapped, and keeps its names
        wrapped = adam(module, [(prefix + name, p) for name, p in twin.named_parameters()])
        loaded(wrapped, optimizer.state_dict(), hooks.strip_prefix())
        assert same_slots(named_state(wrapped, twin), named_state(optimizer, model))
        assert wrapped.param_groups[0]["param_names"][0] == prefix + "embed.weight"
    late = adam(module, twin.named_parameters())
    told = refused(late, saved, hooks.rename({"x": "y"}), hooks.strip_prefix())
    assert "Register it before them" in told


@layouts
def test_fuse_and_split_are_each_others_inverse_and_exact(module: Any, layout: Any) -> None:
    model, optimizer = trained(module, layout)
    fused = seeded(lambda: Net(fused=True), 1)
    weights = model.state_dict()
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"block.{x}.{kind}") for x in "qkv"]
        weights[f"block.qkv.{kind}"] = torch.cat(parts)
    fused.load_state_dict(weights)
    resumed = adam(module, layout(fused))
    loaded(resumed, copy.deepcopy(optimizer.state_dict()), hooks.fuse({"block.qkv": ["block.q", "block.k", "block.v"]}))
    expected = torch.cat([optimizer.state[getattr(model.block, x).weight]["exp_avg_sq"] for x in "qkv"])
    assert torch.equal(resumed.state[fused.block.qkv.weight]["exp_avg_sq"], expected)
    back = seeded(Net, 2)
    back.load_state_dict(model.state_dict())
    undone = adam(module, layout(back))
    loaded(undone, copy.deepcopy(resumed.state_dict()), hooks.split({"block.qkv": ["block.q", "block.k", "block.v"]}))
    assert same_slots(named_state(undone, back), named_state(optimizer, model))
    losses = train(model, optimizer, 10, start=3)
    assert train(back, undone, 10, start=3) == losses
    assert train(fused, resumed, 10, start=3) == pytest.approx(losses, rel=1e-4)  # one product instead of three


@layouts
def test_duplicate_copies(module: Any, layout: Any) -> None:
    _model, optimizer = trained(module, layout)
    twin = seeded(Net, 1)
    twin.extra = nn.Linear(4, 4)
    resumed = adam(module, layout(twin))
    hook = hooks.duplicate({"block.q": ["block.q", "extra"]})
    loaded(resumed, optimizer.state_dict(), hook)
    one, other = resumed.state[twin.block.q.weight], resumed.state[twin.extra.weight]
    assert same_slots(one, other)
    assert not {v.data_ptr() for v in one.values()} & {v.data_ptr() for v in other.values()}
    assert hook.report is not None
    assert "each copy gets the whole state" in str(hook.report)


@pytest.mark.parametrize("fill", [None, "zeros", "mean", 0.5])
def test_resize_to_the_live_shape(module: Any, fill: Any) -> None:
    model, optimizer = trained(module)
    grown = seeded(lambda: Net(rows=8), 1)
    resumed = adam(module, grown.named_parameters())
    told = refused(adam(module, grown.named_parameters()), optimizer.state_dict(), hooks.match_names())
    assert "embed.weight" in told
    assert "[6, 4]" in told
    assert "[8, 4]" in told
    assert 'resize("name")' in told
    hook = hooks.resize("embed.weight", fill=fill)
    loaded(resumed, optimizer.state_dict(), hook)
    old, new = optimizer.state[model.embed.weight], resumed.state[grown.embed.weight]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(new[slot][:6], old[slot])
        mean = old[slot].mean(0).expand(2, 4)
        wanted = {"zeros": torch.zeros(2, 4), "mean": mean, 0.5: torch.full((2, 4), 0.5)}
        default = torch.zeros(2, 4) if slot == "exp_avg" else mean
        torch.testing.assert_close(new[slot][6:], default if fill is None else wanted[fill])
    assert hook.report is not None
    assert list(hook.report.approximate) == ["embed.weight"]
    train(grown, resumed, 10)
    shrunk = seeded(Net)
    resumed = adam(module, shrunk.named_parameters())
    loaded(resumed, adam_like(optimizer, model, module, grown), hooks.resize("embed.weight"))
    assert resumed.state[shrunk.embed.weight]["exp_avg"].shape == (6, 4)


def adam_like(optimizer: Any, model: Any, module: Any, grown: nn.Module) -> Any:
    made = adam(module, grown.named_parameters())
    train(grown, made)
    return made.state_dict()


class Grown(Net):
    """Net with a part that the checkpoint does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) + self.head(self.side(self.embed(tokens)))


@layouts
def test_fill_missing(module: Any, layout: Any) -> None:
    model, optimizer = trained(module, layout)
    saved = copy.deepcopy(optimizer.state_dict())
    told = refused(adam(module, layout(seeded(Grown))), saved, hooks.match_names())
    assert "nothing fills 'side.weight'" in told
    assert "fill_missing()" in told

    fresh = seeded(Grown)
    resumed = adam(module, layout(fresh))
    hook = hooks.fill_missing()
    loaded(resumed, copy.deepcopy(saved), hook)
    assert fresh.side.weight not in resumed.state
    assert hook.report is not None
    assert hook.report.fresh == {"side.weight": "not in the checkpoint", "side.bias": "not in the checkpoint"}
    train(fresh, resumed)
    assert [resumed.state[p]["step"].item() for p in (fresh.side.weight, fresh.embed.weight)] == [3, 6]

    zeros = seeded(Grown)
    resumed = adam(module, layout(zeros))
    loaded(resumed, saved, hooks.fill_missing("zeros"))
    slots = resumed.state[zeros.side.weight]
    assert slots["step"].item() == 3
    assert not slots["exp_avg"].any()
    assert slots["exp_avg_sq"].shape == (4, 4)
    assert slots["step"] is not resumed.state[zeros.block.q.weight]["step"]

    like = seeded(Grown)
    resumed = adam(module, layout(like))
    loaded(resumed, saved, hooks.fill_missing({"side": "block.v"}))
    assert same_slots(resumed.state[like.side.bias], optimizer.state[model.block.v.bias])
    assert resumed.state[like.side.bias]["exp_avg"] is not resumed.state[like.block.v.bias]["exp_avg"]
    told = refused(adam(module, layout(seeded(Grown))), saved, hooks.fill_missing({"side.bias": "embed.weight"}))
    assert "shape" in told or "nothing fills 'side.weight'" in told


@layouts
def test_drop_unexpected(module: Any, layout: Any) -> None:
    model = seeded(Grown)
    optimizer = adam(module, layout(model))
    train(model, optimizer)
    saved = optimizer.state_dict()
    told = refused(adam(module, layout(seeded(Net))), saved, hooks.match_names())
    assert "'side.weight' is not in the target" in told
    for hook in (hooks.drop_unexpected(), hooks.drop_unexpected("side")):
        smaller = seeded(Net)
        resumed = adam(module, layout(smaller))
        loaded(resumed, saved, hook)
        old, new = named_state(optimizer, model), named_state(resumed, smaller)
        assert {name: same_slots(slots, old[name]) for name, slots in new.items()} == dict.fromkeys(
            [name for name in old if not name.startswith("side")], True
        )
        assert hook.report is not None
        assert set(hook.report.dropped) == {"side.weight", "side.bias"}
    both = hooks.drop_unexpected("side"), hooks.drop_unexpected("absent")
    assert "drop absent" in refused(adam(module, layout(seeded(Net))), saved, *both)


def test_state_that_belongs_to_no_parameter_is_refused(module: Any) -> None:
    _, optimizer = trained(module)
    saved = optimizer.state_dict()
    saved["state"][77] = saved["state"][0]
    model = seeded(Net)
    assert "77" in refused(adam(module, model.named_parameters()), saved, hooks.match_names())
    hook = hooks.drop_unexpected()
    resumed = adam(module, model.named_parameters())
    loaded(resumed, saved, hook)
    assert all(isinstance(key, torch.Tensor) for key in resumed.state)
    assert hook.report is not None
    assert hook.report.dropped == {"77": "belongs to no parameter"}


def test_groups_that_part_and_meet(module: Any) -> None:
    model, optimizer = trained(module)
    saved = optimizer.state_dict()
    told = refused(adam(module, two_groups(seeded(Net))), saved, hooks.match_names())
    assert "differ in lr" in told or "differ in" in told
    assert 'hyperparameters("live")' in told
    for hook in (hooks.hyperparameters("live"), hooks.hyperparameters(sources={"lr": "live", "weight_decay": "live"})):
        twin = seeded(Net, 1)
        resumed = adam(module, two_groups(twin))
        loaded(resumed, saved, hook)
        assert [group["lr"] for group in resumed.param_groups] == [2e-2, 1e-2]
        assert resumed.param_groups[0]["weight_decay"] == 0.0
        assert {n: same_slots(s, named_state(optimizer, model)[n]) for n, s in named_state(resumed, twin).items()}

    _, optimizer = trained(module, two_groups)
    saved = optimizer.state_dict()
    told = refused(adam(module, one_group(seeded(Net))), saved, hooks.match_names())
    assert "joins the old param groups 0 and 1, which differ in" in told
    for merge, lr in (("first", 2e-2), ("min", 1e-2), ("max", 2e-2)):
        resumed = adam(module, one_group(seeded(Net)))
        loaded(resumed, saved, hooks.regroup(merge=merge))
        assert resumed.param_groups[0]["lr"] == lr
    resumed = adam(module, two_groups(seeded(Net)))
    loaded(resumed, saved, hooks.regroup({"{rest**}.bias": {"lr": 7.0}, "**": {"weight_decay": 0.5}}))
    assert [group["lr"] for group in resumed.param_groups] == [7.0, 1e-2]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.0, 0.5]


def test_hyperparameters(module: Any) -> None:
    _, optimizer = trained(module)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.125
    del saved["param_groups"][0]["amsgrad"]

    def options(*given: Any) -> dict[str, Any]:
        resumed = adam(module, one_group(seeded(Net)), eps=1e-6)
        loaded(resumed, saved, *given)
        return resumed.param_groups[0]

    assert options(hooks.match_names())["lr"] == 0.125
    assert options(hooks.hyperparameters())["eps"] == 1e-8
    assert options(hooks.hyperparameters("live"))["lr"] == 1e-2
    merged = options(hooks.hyperparameters("merge"))
    assert (merged["lr"], merged["eps"], merged["amsgrad"]) == (0.125, 1e-8, False)
    mixed = options(hooks.hyperparameters(sources={"eps": "live"}, lr=3.0, betas=(0.5, 0.75)))
    assert (mixed["lr"], mixed["eps"], mixed["betas"], mixed["weight_decay"]) == (3.0, 1e-6, (0.5, 0.75), 0.01)
    with pytest.raises(PlanError, match="both a source and a value"):
        hooks.hyperparameters(sources={"lr": "live"}, lr=1)
    with pytest.raises(PlanError, match="expected 'file', 'live' or 'merge'"):
        hooks.hyperparameters("all")  # type: ignore[arg-type]
    twice = hooks.hyperparameters(lr=1.0), hooks.hyperparameters(lr=2.0)
    assert "two hyperparameters() hooks" in refused(adam(module, one_group(seeded(Net))), saved, *twice)


def test_reset(module: Any) -> None:
    model, optimizer = trained(module)
    saved = optimizer.state_dict()
    for names, gone in ((("all",), 9), (("none",), 0), (("block",), 6), (("block.{x}.bias", "embed.weight"), 4)):
        twin = seeded(Net, 1)
        resumed = adam(module, twin.named_parameters())
        hook = hooks.reset(*names)
        loaded(resumed, saved, hook)
        assert len(named_state(optimizer, model)) - len(named_state(resumed, twin)) == min(gone, 7)
    with pytest.raises(PlanError, match="expected names"):
        hooks.reset()


def test_cast_state(module: Any) -> None:
    _model, optimizer = trained(module)
    saved = optimizer.state_dict()
    half = seeded(Net).to(torch.bfloat16)

    def dtypes(given: Any) -> list[torch.dtype]:
        resumed = adam(module, half.named_parameters())
        hook = hooks.cast_state(given)
        loaded(resumed, saved, hook)
        resumed.load_state_dict(saved)  # a second load is no other
        slots = resumed.state[half.embed.weight]
        return [slots[name].dtype for name in ("step", "exp_avg", "exp_avg_sq")]

    wide, narrow = torch.float32, torch.bfloat16
    assert dtypes("param") == [wide, narrow, narrow]
    assert dtypes("file") == [wide, wide, wide]
    assert dtypes({"exp_avg_sq": "float32"}) == [wide, narrow, wide]
    assert dtypes({"*": torch.float16, "exp_avg": "param"}) == [wide, narrow, torch.float16]
    resumed = adam(module, half.named_parameters())
    loaded(resumed, saved, hooks.cast_state("file"))
    assert resumed.state[half.embed.weight]["exp_avg"] is saved["state"][0]["exp_avg"]
    with pytest.raises(PlanError, match="no dtype is called 'float33'"):
        hooks.cast_state("float33")


def test_migrate(module: Any, tmp_path: Path) -> None:
    model, optimizer = trained(module)
    text = "".join(f'[[rule]]\nfrom = "{old}.{{rest**}}"\nto = "{new}.{{rest}}"\n' for old, new in NEW_NAMES.items())
    (tmp_path / "plan.toml").write_text(text)
    for plan in (tmp_path / "plan.toml", str(tmp_path / "plan.toml"), Plan.from_toml(text)):
        changed = renamed(model)
        resumed = adam(module, changed.named_parameters())
        loaded(resumed, optimizer.state_dict(), hooks.migrate(plan))
        assert same_slots(resumed.state[changed.wte.weight], optimizer.state[model.embed.weight])


def test_hooks_side_by_side_act_as_one_in_any_order(module: Any) -> None:
    model, optimizer = trained(module)
    saved = optimizer.state_dict()
    parts = [hooks.rename({"block": "attention"}), hooks.fill_missing(), hooks.drop_unexpected()]
    for wishes in (parts, parts[::-1]):
        twin = seeded(Grown)
        twin.attention, twin.block = twin.block, None
        resumed = adam(module, twin.named_parameters())
        lines = loaded(resumed, saved, *wishes)
        assert len(lines) == 1
        assert same_slots(resumed.state[twin.attention.q.bias], optimizer.state[model.block.q.bias])
        assert twin.side.weight not in resumed.state
        assert all(hook.report is wishes[0].report for hook in wishes)
    # rules in the order of registration
    twin = seeded(Net)
    resumed = adam(module, twin.named_parameters())
    loaded(resumed, saved, hooks.rename({"block.q": "x"}), hooks.rename({"x": "block.q"}))
    assert same_slots(resumed.state[twin.block.q.bias], optimizer.state[model.block.q.bias])
    twice = hooks.match_names()
    assert "registered twice" in refused(adam(module, twin.named_parameters()), saved, twice, twice)
    groups = Plan.from_toml('[[group]]\nmatch = "**"\n')
    both = hooks.regroup({"**": {}}), hooks.migrate(groups)
    assert "two hooks say which param groups" in refused(adam(module, twin.named_parameters()), saved, *both)


def test_a_foreign_hook_among_ours_gets_a_dict_that_fits(module: Any) -> None:
    model, optimizer = trained(module)
    changed = renamed(model)
    resumed = adam(module, changed.named_parameters())
    seen = []

    def foreign(optimizer: Any, state_dict: Any) -> None:
        seen.append(state_dict["param_groups"][0]["param_names"])

    loaded(resumed, optimizer.state_dict(), hooks.rename(NEW_NAMES), foreign, hooks.match_names())
    assert seen == [[name for name, _ in changed.named_parameters()]]


def test_unnamed_optimizers_and_checkpoints(module: Any) -> None:
    model, optimizer = trained(module)
    twin = seeded(Net, 1)
    bare = adam(module, twin.parameters())
    told = refused(bare, optimizer.state_dict(), hooks.match_names())
    assert "no names" in told
    assert "hooks.match_names(model=model)" in told
    resumed = adam(module, list(twin.parameters())[::-1])
    loaded(resumed, optimizer.state_dict(), hooks.match_names(twin))
    assert same_slots(named_state(resumed, twin), named_state(optimizer, model))
    assert "param_names" not in resumed.param_groups[0]

    saved = optimizer.state_dict()
    names = saved["param_groups"][0].pop("param_names")
    told = refused(adam(module, twin.named_parameters()), saved, hooks.match_names())
    assert "the 11 parameters of the checkpoint's optimizer have no names" in told
    resumed = adam(module, twin.named_parameters())
    loaded(resumed, saved, hooks.match_names(saved=names))
    assert same_slots(named_state(resumed, twin), named_state(optimizer, model))
    with pytest.raises(StateMismatchError, match="10 names for an optimizer of 11"):
        hooks.match_names(saved=names[1:])(resumed, saved)
    with pytest.raises(StateMismatchError, match="is not one of the model's"):
        hooks.match_names(nn.Linear(2, 2))(resumed, saved)


def test_keys_of_parameters_are_found_at_once(module: Any) -> None:
    _, optimizer = trained(module, two_groups)
    resumed = adam(module, two_groups(seeded(Net)))
    made = hooks.match_names()(resumed, optimizer.state_dict())
    assert made is not None
    first, second = (group["params"] for group in made["param_groups"])
    assert first == list(range(len(first)))
    assert second == list(range(len(first), len(first) + len(second)))
    assert all(key in first and key not in second for key in range(len(first)))
    assert "x" not in first
    assert 1.5 not in first
    first.append(99)
    assert 99 in first
    again = pickle.loads(pickle.dumps(made["param_groups"]))
    assert type(again[1]["params"]) is list
    assert again[1]["params"] == second


def test_shapes_that_differ_are_named_with_both(module: Any) -> None:
    _, optimizer = trained(module)
    other = seeded(lambda: Net(rows=9))
    told = refused(adam(module, other.named_parameters()), optimizer.state_dict(), hooks.match_names())
    assert "embed.weight" in told
    with pytest.raises(MigrationError, match="matches no parameter of the checkpoint"):
        hooks.resize("absent")(adam(module, other.named_parameters()), optimizer.state_dict())


def test_a_script_can_be_resumed_again_with_the_hooks_it_was_resumed_with(module: Any) -> None:
    model, optimizer = trained(module)
    changed = renamed(model)
    changed.side = nn.Linear(4, 4)
    given = [hooks.rename(NEW_NAMES), hooks.fill_missing({"side": "attention.q"}), hooks.resize("wte.weight")]
    first = adam(module, changed.named_parameters())
    loaded(first, copy.deepcopy(optimizer.state_dict()), *given)
    train(changed, first, 2)
    second = adam(module, changed.named_parameters())
    loaded(second, first.state_dict(), *given)
    assert oracle.differences(first.state_dict(), second.state_dict()) == []
    third = adam(module, changed.named_parameters())
    loaded(third, third.state_dict(), *given)
    assert not third.state
    some = first.state_dict()
    some["param_groups"][0]["param_names"][0] = "other"
    assert "'embed.{rest**}' matches none" in refused(third, some, hooks.rename({"embed.{rest**}": "wte.{rest}"}))


def test_a_whole_checkpoint_is_no_state_dict(module: Any) -> None:
    _, optimizer = trained(module)
    resumed = adam(module, seeded(Net).named_parameters())
    told = refused(resumed, {"optimizer": optimizer.state_dict()}, hooks.match_names())
    assert "it has 'optimizer'" in told
    assert "optimstate.resume()" in told


def test_once_is_held_by_the_metadata(module: Any) -> None:
    _model, optimizer = trained(module)
    plan = Plan.from_toml('[guard]\nonce = true\n[[rule]]\nfrom = "embed.weight"\nto = "embed.weight"\n')
    resumed = adam(module, seeded(Net).named_parameters())
    loaded(resumed, optimizer.state_dict(), hooks.migrate(plan))
    resumed.register_state_dict_post_hook(hooks.add_metadata(plan=plan))
    again = adam(module, seeded(Net).named_parameters())
    assert "applied to this checkpoint already" in refused(again, resumed.state_dict(), hooks.migrate(plan))


def test_options_of_the_file_alone_are_not_merged_with_live_ones(module: Any) -> None:
    """An option that only the live optimizer has is there with `merge`, and not with `file`."""
    model = torch.nn.Linear(2, 2)
    saved = module.SGD(model.named_parameters(), lr=0.1, momentum=0.9).state_dict()
    del saved["param_groups"][0]["nesterov"]
    for source, there in (("file", False), ("merge", True)):
        optimizer = module.SGD(model.named_parameters(), lr=0.5, momentum=0.9, nesterov=True)
        optimizer.register_load_state_dict_pre_hook(hooks.hyperparameters(source))  # type: ignore[arg-type]
        seen: list[dict[str, object]] = []
        optimizer.register_load_state_dict_pre_hook(lambda _, state, seen=seen: seen.append(state))  # type: ignore[misc]
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert ("nesterov" in seen[0]["param_groups"][0]) == there, source  # type: ignore[index]


def test_several_optimizers_at_once_are_no_state_dict(module: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = module.AdamW(model.named_parameters())
    optimizer.register_load_state_dict_pre_hook(hooks.match_names())
    own = optimizer.state_dict()
    for several, told in (({"gen": own, "dis": own}, "it has 'gen', 'dis'"), ([own, own], "it is a list of 2")):
        with pytest.raises(StateMismatchError, match=told) as caught:
            optimizer.load_state_dict(several)
        assert "the whole to optimstate.resume()" in str(caught.value)
