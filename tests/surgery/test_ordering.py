"""Files in the order of the new model: loaded by torch alone, by position, they go on as a load by name does."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, MigrationError
from optimstate.plan.language.plan import Plan
from optimstate.surgery.writing.ordering import read_like

Shapes = dict[str, tuple[int, ...]]


class Net(torch.nn.Module):
    """Parameters of given names and shapes; each is drawn to a point of its own, at a pace of its own."""

    def __init__(self, shapes: Shapes, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            owner: torch.nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, torch.nn.Parameter(torch.randn(shape)))

    def loss(self) -> torch.Tensor:
        total = torch.zeros(())
        for name, parameter in self.named_parameters():
            pace = 1 + zlib.crc32(name.encode()) % 7
            total = total + pace * (parameter - pace).square().sum()
        return total


def one(model: Net) -> Any:
    return model.named_parameters()


def two(model: Net) -> Any:
    named = list(model.named_parameters())
    small = [pair for pair in named if pair[1].ndim < 2]
    return [
        {"params": [pair for pair in named if pair[1].ndim > 1], "weight_decay": 0.1},
        {"params": small, "weight_decay": 0.0},
    ]


def unnamed(groups: Any) -> Any:
    groups = list(groups)
    if isinstance(groups[0], tuple):
        return [parameter for _, parameter in groups]
    return [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]


def train(model: Net, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers(names: Sequence[str], leaves: Sequence[str] = ("weight", "bias")) -> Shapes:
    return {f"{name}.{leaf}": (4, 4) if leaf == "weight" else (4,) for name in names for leaf in leaves}


QKV = {f"attn.{x}.weight": (4, 4) for x in "qkv"} | {"out.weight": (4, 4)}
FUSED = {"out.weight": (4, 4), "attn.qkv.weight": (12, 4)}

# For each kind of change: the old model, the new one in its own order, the plan, and how both are grouped.
CHANGES: dict[str, tuple[Shapes, Shapes, str, Callable[[Net], Any], Callable[[Net], Any]]] = {
    "a rename that moves": (
        layers("abc"),
        layers("zab"),
        '[[rule]]\nfrom = "c.{p}"\nto = "z.{p}"\n',
        one,
        one,
    ),
    "a layer in front": (
        layers(["block.0", "block.1"]),
        layers(["block.0", "block.1", "block.2"]),
        '[[rule]]\nfrom = "block.{i}.{p}"\nto = "block.{i+1}.{p}"\n'
        '[[rule]]\nfresh = ["block.0.weight", "block.0.bias"]\n',
        one,
        one,
    ),
    "a parameter between": (
        layers("qv"),
        layers("qkv"),
        '[[rule]]\nfresh = ["k.weight", "k.bias"]\ngroup = 0\n',
        one,
        one,
    ),
    "experts": (
        layers(["mlp.up", "mlp.down"]),
        layers(["router", "experts.0.up", "experts.0.down", "experts.1.up", "experts.1.down"]),
        '[[rule]]\nfrom = "mlp.{m}.{p}"\nto = "experts.{e=0..1}.{m}.{p}"\n'
        '[[rule]]\nfresh = ["router.weight", "router.bias"]\n',
        one,
        one,
    ),
    "fused": (QKV, FUSED, '[[rule]]\nfrom = "attn.{x=q|k|v}.weight"\nto = "attn.qkv.weight"\nconcat = 0\n', one, one),
    "split": (
        FUSED,
        {name: QKV[name] for name in ("attn.k.weight", "attn.q.weight", "out.weight", "attn.v.weight")},
        '[[rule]]\nfrom = "attn.qkv.weight"\nto = "attn.{x=q|k|v}.weight"\nsplit = 0\n',
        one,
        one,
    ),
    "dropped": (layers("abc"), layers("ca"), '[[rule]]\ndrop = "b.{p}"\n', one, one),
    "grown": (
        layers(["embed", "head"], ["weight"]),
        {"head.weight": (6, 4), "embed.weight": (6, 4)},
        '[[rule]]\nfrom = "{x}.weight"\nto = "{x}.weight"\nresize = { dim = 0, size = 6 }\n',
        one,
        one,
    ),
    "other groups": (
        layers("abc"),
        layers("cab"),
        '[[group]]\nmatch = "**.weight"\nset = { weight_decay = 0.1 }\n'
        '[[group]]\nmatch = "**.bias"\nset = { weight_decay = 0.0 }\n',
        one,
        two,
    ),
    "within two groups": (layers("abc"), layers("cab"), "", two, two),
    "an untied head": (
        layers(["embed", "norm"]),
        layers(["head", "norm", "embed"]),
        '[[rule]]\nfrom = "embed.{p}"\nto = ["embed.{p}", "head.{p}"]\n',
        one,
        one,
    ),
}


def went_on(made: dict[str, Any], shapes: Shapes, groups: Callable[[Net], Any]) -> list[float]:
    """The losses after torch alone has loaded it, by position, without any name."""
    model = Net(shapes, seed=5)
    model.load_state_dict({**model.state_dict(), **made["model"]})
    optimizer = torch.optim.AdamW(unnamed(groups(model)), lr=0.3)
    optimizer.load_state_dict(made["optimizer"])
    return train(model, optimizer, 6)


def saved(name: str, folder: Path) -> tuple[Plan, list[float]]:
    """Save it before the change, and after it in its own order: the plan, and the losses of a load by name."""
    old, new, text, before, after = CHANGES[name]
    model = Net(old)
    optimizer = torch.optim.AdamW(before(model), lr=0.03)
    train(model, optimizer, 4)
    tree = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    torch.save(tree, folder / "old.pt")
    plan = Plan.from_toml(text)
    live = Net(new, seed=5)
    resumed = torch.optim.AdamW(after(live), lr=0.3)
    made = optimstate.remap(folder / "old.pt", folder / "plain.pt", plan)
    assert made.written
    live.load_state_dict({**live.state_dict(), **torch.load(folder / "plain.pt")["model"]})
    optimstate.resume({"optimizer": tree["optimizer"]}, optimizer=resumed, plan=plan)
    return plan, train(live, resumed, 6)


@pytest.mark.parametrize("how", ["weights", "names", "optimizer"])
@pytest.mark.parametrize("name", CHANGES)
def test_torch_goes_on_with_the_same_losses(name: str, how: str, tmp_path: Path) -> None:
    _, new, _, _, after = CHANGES[name]
    plan, losses = saved(name, tmp_path)
    model = Net(new)
    like = tmp_path / ("like.txt" if how == "names" else "like.pt")
    if how == "names":
        like.write_text("".join(f"{parameter}\n" for parameter, _ in model.named_parameters()))
    elif how == "weights":
        torch.save({"model": model.state_dict()}, like)
    else:
        optimizer = torch.optim.AdamW(after(model), lr=0.03)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, like)
    optimstate.remap(tmp_path / "old.pt", tmp_path / "new.pt", plan, like=like)
    assert went_on(torch.load(tmp_path / "new.pt"), new, after) == losses


def test_without_the_order_most_of_them_go_wrong_and_the_report_says_so(tmp_path: Path) -> None:
    wrong = set()
    for name, (_, new, _, _, after) in CHANGES.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        plan, losses = saved(name, folder)
        report = optimstate.remap(folder / "old.pt", None, plan, dry_run=True)
        said = any("torch loads it by position" in note for note in report.notes)
        try:
            right = went_on(torch.load(folder / "plain.pt"), new, after) == losses
        except (RuntimeError, ValueError):
            continue  # torch noticed
        if not right:
            wrong.add(name)
        adds = name in ("a layer in front", "a parameter between", "experts", "an untied head", "split", "fused")
        assert said or not adds, name
    assert wrong >= {"a rename that moves", "a parameter between", "experts", "an untied head"}


def test_a_plain_rename_has_no_note(tmp_path: Path) -> None:
    saved("a rename that moves", tmp_path)
    plan = Plan.from_options(rename=["c.{p}=d.{p}"], drop=["a.{p}"])
    assert optimstate.remap(tmp_path / "old.pt", None, plan, dry_run=True).notes == ()


def test_what_the_new_model_lacks_or_has_besides_is_said(tmp_path: Path) -> None:
    saved("a parameter between", tmp_path)
    (tmp_path / "less.txt").write_text("q.weight\nq.bias\n")
    with pytest.raises(MigrationError, match=r"does not have 'v.weight', 'v.bias'"):
        optimstate.remap(tmp_path / "old.pt", None, Plan(), like=tmp_path / "less.txt", dry_run=True)
    (tmp_path / "more.txt").write_text("".join(f"{name}\n" for name in layers("qkv")))
    report = optimstate.remap(tmp_path / "old.pt", None, Plan(), like=tmp_path / "more.txt", dry_run=True)
    assert any("has k.weight, k.bias, and the result does not" in note for note in report.notes)
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="it names no parameters"):
        read_like(tmp_path / "nothing.pt")


def test_an_order_that_reaches_no_optimizer_is_refused(tmp_path: Path) -> None:
    model = Net(layers("ab"))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "anonymous.pt")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    for name, said in (
        ("anonymous", "has no parameter names, so it cannot be written"),
        ("weights", "has no optimizer"),
    ):
        with pytest.raises(MigrationError, match=said):
            optimstate.remap(tmp_path / f"{name}.pt", tmp_path / "out.pt", Plan(), like=tmp_path / "weights.pt")
    assert not (tmp_path / "out.pt").exists()
