"""What a plan asks is done or refused: names of modules, new parameters, groups, and checkpoints it cannot reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimstate.tensors.compute import to_torch
from tests.plan.lazy import applied, kinds, lazy_tree


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 2)


def checkpoint(trained: tuple[str, ...] = ("blocks", "norm", "head"), groups: int = 1, named: bool = True) -> Any:
    model = Net()
    names = [name for name, _ in model.named_parameters() if name.startswith(trained)]
    parameters = dict(model.named_parameters())
    parts = [names[n::groups] for n in range(groups)]
    pairs = [
        {"params": [(n, parameters[n]) if named else parameters[n] for n in part], "lr": 1 / (i + 1)}
        for i, part in enumerate(parts)
    ]
    optimizer = torch.optim.SGD(pairs, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def names(tree: Any) -> list[list[str]]:
    return [group["param_names"] for group in tree["optimizer"]["param_groups"]]


def test_a_plain_name_is_the_module_and_not_what_begins_with_it() -> None:
    tree = applied('[[rule]]\ndrop = "blocks.1"\n', checkpoint())
    left = [name for name in tree["model"] if name.startswith("blocks.1")]
    assert left == ["blocks.10.weight", "blocks.10.bias"]
    assert "blocks.1.weight" not in names(tree)[0]
    tree = applied('[[rule]]\nfrom = "blocks"\nto = "layers"\n', checkpoint())
    assert sum(name.startswith("layers.") for name in tree["model"]) == 22
    tree = applied('[[rule]]\nfrom = "head"\nto = ["head", "head2"]\n', checkpoint())
    assert torch.equal(to_torch(tree["model"]["head2.weight"]), to_torch(tree["model"]["head.weight"]))


def test_a_parameter_goes_before_a_module_of_the_same_name() -> None:
    tree = {"model": {"a": torch.zeros(2, 2), "a.b": torch.ones(2, 2), "c.d": torch.ones(2, 2)}}
    assert list(applied('[[rule]]\ndrop = "a"\n', tree)["model"]) == ["a.b", "c.d"]


def test_groups_and_guards_read_modules_too() -> None:
    text = '[guard]\nhas = "head"\nlacks = "tail"\n'
    text += '[[group]]\nmatch = "head"\nset = { lr = 0.5 }\n[[group]]\nmatch = "**"\n'
    tree = applied(text, checkpoint())
    assert names(tree)[0] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("match", ['"head"', '["head.weight", "head.bias"]', '"head.**"'])
def test_frozen_parameters_join_the_optimizer(match: str) -> None:
    tree = applied(f"[[rule]]\nfresh = {match}\n", checkpoint(("blocks",)))
    assert sorted(names(tree)[0][-2:]) == ["head.bias", "head.weight"]
    tree = applied(f"[[rule]]\nfresh = {match}\ngroup = 1\n", checkpoint(("blocks",), groups=2))
    assert {"head.weight", "head.bias"} <= set(names(tree)[1])


def test_buffers_do_not_join_it() -> None:
    tree = applied('[[rule]]\nfresh = "norm.**"\n', checkpoint(("blocks",)))
    assert names(tree)[0][-2:] == ["norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('[[rule]]\nfresh = "head"\ngroup = 7\n', "group"),
        ('[[rule]]\nfresh = "head"\n', "group"),
        ('[[rule]]\nfresh = "blocks.0.weight"\ngroup = 1\n', "unreached"),
        ('[[rule]]\nfresh = "head"\ngroup = 0\n[[group]]\nmatch = "**"\nset = { lr = 1.0 }\n', "unreached"),
    ],
)
def test_a_group_that_cannot_be_is_refused(text: str, kind: str) -> None:
    assert kind in kinds(text, checkpoint(("blocks",), groups=2))


@pytest.mark.parametrize(
    "text",
    [
        '[[group]]\nmatch = "**"\n',
        'optimizer = "Adam"\n',
        '[slots]\nhidden = { kind = "scalar" }\n',
        '[[rule]]\nfresh = "head"\ngroup = 0\n',
    ],
)
@pytest.mark.parametrize("weights", [False, True], ids=["anonymous", "without an optimizer"])
def test_what_is_asked_of_optimizers_reaches_one_or_is_refused(text: str, weights: bool) -> None:
    tree = checkpoint(named=False)
    assert kinds(text, {"model": tree["model"]} if weights else tree) == {"unreached"}


def order(tree: Any) -> list[list[float]]:
    """The names by what each parameter's buffer is."""
    return [
        [to_torch(tree["optimizer"]["state"][key]["momentum_buffer"]).sum().item() for key in g["params"]]
        for g in tree["optimizer"]["param_groups"]
    ]


@pytest.mark.parametrize("groups", [1, 2])
def test_tables_that_only_reorder_are_obeyed(groups: int) -> None:
    before = checkpoint(("head", "norm"), groups)
    wanted = [list(reversed(part)) for part in names(before)]
    text = "".join(f"[[group]]\nmatch = {part}\n".replace("'", '"') for part in wanted)
    after = applied(text, before)
    assert names(after) == wanted
    assert order(after) == [list(reversed(part)) for part in order(lazy_tree(before))]
    swapped = applied("".join(f"[[group]]\nmatch = {part}\n".replace("'", '"') for part in names(before)[::-1]), before)
    assert names(swapped) == names(before)[::-1]
    assert order(swapped) == order(lazy_tree(before))[::-1]
