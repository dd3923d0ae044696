"""Whole checkpoints: weights, averages, optimizers and schedulers by one plan, from real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import MigrationError
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.apply.stamps import STAMP
from optimstate.plan.language.plan import Plan
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import difference
from tests.plan.lazy import lazy
from tests.plan.models import WIDTH, Attention, Twins
from tests.plan.training import batches, train
from tests.support import seeded


def saved(tmp_path: Path, content: Any) -> Any:
    torch.save(content, tmp_path / "old.pt")
    return open_checkpoint(tmp_path / "old.pt").tree


def loaded(tmp_path: Path, tree: Any) -> Any:
    document = open_checkpoint(tmp_path / "old.pt")
    get_format(document.format).write(tree, tmp_path / "new.pt", like=document)
    return torch.load(tmp_path / "new.pt", weights_only=True)


SPLIT = '[[rule]]\nfrom = "qkv.{p}"\nto = "{x=q|k|v}.{p}"\nsplit = 0\n'


def everything(groups: bool = False) -> dict[str, Any]:
    model = seeded(lambda: Attention("fused"))
    average = torch.optim.swa_utils.AveragedModel(model)
    named = list(model.named_parameters())
    parameters: Any = [{"params": named[:2]}, {"params": named[2:], "lr": 0.02}] if groups else named
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    train(model, optimizer, batches(4, WIDTH), scheduler)
    average.update_parameters(model)
    return {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
    }


def test_weights_average_and_optimizer_move_together(tmp_path: Path) -> None:
    old = everything()
    tree, migration, notes = apply_plan(Plan.from_toml(SPLIT), saved(tmp_path, old))
    new = loaded(tmp_path, tree)
    assert set(migration.sections) == {"model model", "ema ema", "optimizer optimizer"}
    model = Attention("separate")
    model.load_state_dict(new["model"])
    torch.optim.swa_utils.AveragedModel(model).load_state_dict(new["ema"])
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.load_state_dict(new["optimizer"])
    assert torch.equal(new["model"]["k.weight"], old["model"]["qkv.weight"][WIDTH : 2 * WIDTH])
    assert torch.equal(new["ema"]["module.k.bias"], old["ema"]["module.qkv.bias"][WIDTH : 2 * WIDTH])
    names = new["optimizer"]["param_groups"][0]["param_names"]
    place = names.index("v.weight")
    assert torch.equal(
        new["optimizer"]["state"][place]["exp_avg"], old["optimizer"]["state"][0]["exp_avg"][2 * WIDTH :]
    )
    assert new["epoch"] == 3
    assert next(iter(new["ema"])) == "n_averaged"
    assert notes == []


def test_splitting_at_dimension_0_reads_nothing(tmp_path: Path) -> None:
    """The results are places in the file, not bytes in memory."""
    tree = saved(tmp_path, everything())
    moved, _, _ = apply_plan(Plan.from_toml(SPLIT), tree)
    source = tree["model"]["qkv.weight"].storage.pieces[0].source
    for name in ("q.weight", "k.weight", "v.weight"):
        tensor = moved["model"][name]
        assert isinstance(tensor, LazyTensor)
        assert [piece.source for piece in tensor.storage.pieces] == [source]
        assert tensor.storage.nbytes == tensor.nbytes


def test_the_scheduler_follows_the_groups(tmp_path: Path) -> None:
    old = everything(groups=True)
    plan = Plan.from_toml(
        '[[group]]\nmatch = "out.*"\nset = { weight_decay = 0.0 }\n'
        '[[group]]\nmatch = "qkv.*"\n[[group]]\nmatch = "**"\n'
    )
    tree, migration, _ = apply_plan(plan, saved(tmp_path, old))
    new = loaded(tmp_path, tree)
    assert migration.sections["optimizer optimizer"].group_map == [[1], [0], [1]]
    assert new["scheduler"]["base_lrs"] == [0.02, 0.01, 0.02]
    assert new["scheduler"]["_last_lr"] == [old["scheduler"]["_last_lr"][i] for i in (1, 0, 1)]
    groups = new["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.01, 0.01]
    assert [g["param_names"] for g in groups] == [
        ["out.weight", "out.bias"],
        ["qkv.weight", "qkv.bias"],
        ["norm.weight", "norm.bias"],
    ]
    assert torch.equal(new["optimizer"]["state"][2]["exp_avg"], old["optimizer"]["state"][0]["exp_avg"])


def test_wrappers_are_transparent(tmp_path: Path) -> None:
    model = torch.nn.DataParallel(seeded(Twins))
    optimizer = torch.optim.Adam(model.named_parameters())
    train(model, optimizer, batches(2, WIDTH))
    tree = saved(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    moved, _, _ = apply_plan(Plan.from_options(rename=["a.{p}=first.{p}"]), tree)
    assert list(moved["model"])[:2] == ["module.first.weight", "module.first.bias"]
    assert moved["optimizer"]["param_groups"][0]["param_names"][0] == "module.first.weight"


def test_an_unnamed_optimizer_is_left_alone_named_or_refused(tmp_path: Path) -> None:
    model = seeded(Twins)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, batches(2, WIDTH))
    tree = saved(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    _, _, notes = apply_plan(Plan.from_options(rename=["a.{p}=first.{p}"]), tree)
    assert notes == ["optimizer optimizer: no parameter names, left as it is"]
    halve = Plan.from_toml('[[rule]]\nfrom = "a.{p}"\nto = "a{n=0..1}.{p}"\nsplit = 0\n')
    with pytest.raises(MigrationError, match="it cannot follow what is dropped, duplicated or cut"):
        apply_plan(halve, tree)
    names = [name for name, _ in model.named_parameters()]
    moved, _, notes = apply_plan(halve, tree, names={"optimizer": names})
    assert notes == []
    assert moved["optimizer"]["state"][0]["exp_avg"].shape == (WIDTH // 2, WIDTH)
    assert moved["optimizer"]["param_groups"][0]["param_names"][0] == "a0.weight"


def test_a_plan_for_one_application_is_noted_and_refused_again(tmp_path: Path) -> None:
    plan = Plan.from_toml('[guard]\nonce = true\n[[rule]]\nfrom = "{m=norm|out}.{p}"\nto = "{m=out|norm}.{p}"\n')
    tree = saved(tmp_path, everything())
    moved, _, _ = apply_plan(plan, tree)
    assert moved[STAMP] == [plan.digest]
    with pytest.raises(MigrationError, match="applied to this checkpoint already"):
        apply_plan(plan, moved)
    with pytest.raises(MigrationError, match="a dict of sections"):
        apply_plan(plan, tree["model"])


def test_there_and_back_is_the_same_tree(tmp_path: Path) -> None:
    from optimstate.plan.solve.inverse import inverse

    tree = saved(tmp_path, everything())
    plan = Plan.from_toml(SPLIT)
    moved, migration, _ = apply_plan(plan, tree)
    names = {name: tensor.shape for name, tensor in tree["model"].items()}
    back, _, _ = apply_plan(inverse(plan, names), moved)
    assert difference(tree, back) is None
    assert migration.sections


def test_metadata_follows_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tree = saved(tmp_path, model.state_dict())
    moved, _, _ = apply_plan(Plan.from_options(rename=["1.{p}=bn.{p}"]), tree)
    assert vars(moved)["_metadata"]["bn"] == {"version": 2}


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        ("{p**}=net.{p**}", ["", "net", "net.0", "net.1", "net.2"]),
        ("0.{p}=a.{p}", ["", "a", "1", "2"]),
    ],
)
def test_metadata_of_modules_without_parameters_follows_the_root(
    tmp_path: Path, rename: str, expected: list[str]
) -> None:
    from optimstate.plan.solve.inverse import inverse

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2))
    tree = saved(tmp_path, model.state_dict())
    plan = Plan.from_options(rename=[rename])
    moved, _, _ = apply_plan(plan, tree)
    assert list(vars(moved)["_metadata"]) == expected
    back, _, _ = apply_plan(inverse(plan, {name: value.shape for name, value in tree.items()}), moved)
    assert vars(back)["_metadata"] == vars(tree)["_metadata"]
    if "net" in rename:
        holder = nn.Module()
        holder.net = model
        assert vars(moved)["_metadata"] == vars(holder.state_dict())["_metadata"]


def test_a_rate_that_is_set_says_what_the_schedule_began_with(tmp_path: Path) -> None:
    tree = saved(tmp_path, everything())
    group = '[[group]]\nmatch = "**"\nlike = 0\nset = {{ {} }}\n'
    merge = '[policy]\nmerge = "first"\n'
    moved, _, notes = apply_plan(Plan.from_toml(merge + group.format("lr = 0.5")), tree)
    made = moved["optimizer"]["param_groups"][0]
    factor = 0.5 / tree["optimizer"]["param_groups"][0]["lr"]
    assert made["lr"] == 0.5
    assert moved["scheduler"]["base_lrs"] == [made["initial_lr"]] == [pytest.approx(0.01 * factor)]
    assert any("has initial_lr = 0.5" in note and "CosineAnnealingLR" in note for note in notes)
    both = Plan.from_toml(merge + group.format("lr = 0.5, initial_lr = 0.7"))
    moved, _, notes = apply_plan(both, tree)
    assert moved["scheduler"]["base_lrs"] == [0.7]
    assert any("has lr = 0.5 now, but CosineAnnealingLR gives 0.6" in note for note in notes)


def test_composed_schedules_start_from_the_new_initial_rate_though_groups_stay(tmp_path: Path) -> None:
    model = seeded(Twins)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    parts = [torch.optim.lr_scheduler.StepLR(optimizer, 2), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
    train(model, optimizer, batches(2, WIDTH), scheduler)
    tree = saved(tmp_path, {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    plan = Plan.from_toml('[[group]]\nmatch = "**"\nset = { initial_lr = 0.3 }\n')
    moved, _, _ = apply_plan(plan, tree)
    assert [nested["base_lrs"] for nested in moved["scheduler"]["_schedulers"]] == [[0.3], [0.3]]
    assert [nested["base_lrs"] for nested in tree["scheduler"]["_schedulers"]] == [[0.1], [0.1]]


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("value", [5, None, "text", b"bytes", [1, 2], {"a": 1}])
def test_a_tensor_takes_the_place_of_no_other_entry(value: Any, wrapper: str) -> None:
    weights = {f"{wrapper}{i}.weight": lazy(torch.ones(2, 2)) for i in range(4)}
    model = {**weights, f"{wrapper}2.bits": value}
    plan = Plan.from_toml('[[rule]]\nfrom = "0.weight"\nto = "2.bits"')
    with pytest.raises(MigrationError, match=r"2\.bits.* would become a tensor, but the model has"):
        apply_plan(plan, {"model": model})
    made, *_ = apply_plan(Plan.from_toml('[[rule]]\nfrom = "0.weight"\nto = "0.bits"'), {"model": model})
    assert list(made["model"]) == [f"{wrapper}0.bits", *(name for name in model if name != f"{wrapper}0.weight")]
    assert made["model"][f"{wrapper}2.bits"] == value
