"""Weights in full precision that stand beside an optimizer by position follow its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import MigrationError
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.tensors.compute import to_torch
from tests.plan.lazy import lazy_tree


def checkpoint(key: str = "fp32_groups", groups: int = 1, flat: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2)).half()
    names = [name for name, _ in model.named_parameters()]
    copies = {name: p.detach().float() + 1e-5 for name, p in model.named_parameters()}
    parts = [names[n::groups] for n in range(groups)]
    optimizer = torch.optim.Adam([{"params": [(n, nn.Parameter(copies[n].clone())) for n in part]} for part in parts])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    masters: Any = [[copies[name] for name in part] for part in parts]
    if flat:
        masters = tuple(copies[name] for part in parts for name in part)
    inner = {"optimizer": optimizer.state_dict(), key: masters, "overflow": False}
    return {"model": model.state_dict(), "optim": inner}, copies


def applied(text: str, tree: Any) -> tuple[list[list[str]], Any]:
    made = apply_plan(Plan.from_toml(text), lazy_tree(tree))[0]
    key = next(key for key in made["optim"] if key not in ("optimizer", "overflow"))
    return [group["param_names"] for group in made["optim"]["optimizer"]["param_groups"]], made["optim"][key]


RULES = {
    "drop": '[[rule]]\ndrop = "0.bias"\n',
    "rows": '[[rule]]\nfrom = "0.{p}"\nto = "0.{p}"\nslice = { dim = 0, start = 1, stop = 3 }\n',
    "copies": '[[rule]]\nfrom = "2"\nto = ["2", "3"]\n',
    "order": '[[group]]\nmatch = ["2.weight", "0.bias", "0.weight", "1.bias", "1.weight", "2.bias"]\n',
    "half": '[[rule]]\nfrom = "0.{p}"\nto = "0.{p}"\nops = [{ scale = 0.5 }, { cast = "bfloat16" }]\n',
    "mean": '[[rule]]\nfrom = "0.weight"\nto = "0.weight"\nresize = { dim = 0, size = 6, fill = "mean" }\n',
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("groups", "flat"), [(1, False), (2, False), (1, True)])
def test_they_follow(rule: str, groups: int, flat: bool) -> None:
    if rule == "order" and groups == 2:
        pytest.skip("one table is one group")
    tree, copies = checkpoint("fp32_from_fp16", groups, flat)
    names, masters = applied(RULES[rule], tree)
    wanted = {
        "rows": lambda name, value: value[1:3] if name[0] == "0" else value,
        "half": lambda name, value: value * 0.5 if name[0] == "0" else value,
        "mean": lambda name, value: torch.cat([value, value.mean(0).expand(2, 4)]) if name == "0.weight" else value,
    }.get(rule, lambda _, value: value)
    parts = [masters] if flat else masters
    assert isinstance(masters, tuple) == flat
    for group, found in zip(names, parts, strict=True):
        assert len(group) == len(found)
        for name, tensor in zip(group, found, strict=True):
            assert tensor.dtype == "float32"
            assert torch.allclose(to_torch(tensor), wanted(name, copies[name.replace("3.", "2.")]), atol=1e-7)


def test_a_rename_leaves_them_as_they_are() -> None:
    tree, copies = checkpoint()
    _, masters = applied('[[rule]]\nfrom = "0"\nto = "first"\n', tree)
    assert all(torch.equal(to_torch(a), b) for a, b in zip(masters[0], copies.values(), strict=True))


def test_a_parameter_that_joins_gets_its_weight_from_the_model() -> None:
    tree, copies = checkpoint()
    group = tree["optim"]["optimizer"]["param_groups"][0]
    group["params"].pop()
    group["param_names"].pop()
    tree["optim"]["fp32_groups"][0].pop()
    del tree["optim"]["optimizer"]["state"][5]
    names, masters = applied('[[rule]]\nfresh = "2.bias"\n', tree)
    assert names[0][-1] == "2.bias"
    assert torch.equal(to_torch(masters[0][-1]), tree["model"]["2.bias"].float())
    assert len(masters[0]) == len(copies)


@pytest.mark.parametrize("spoil", ["short", "shape"])
def test_lists_that_do_not_fit_are_refused(spoil: str) -> None:
    tree, _ = checkpoint()
    if spoil == "short":
        tree["optim"]["fp32_groups"][0].pop()
    else:
        tree["optim"]["fp32_groups"][0][0] = torch.zeros(7)
    with pytest.raises(MigrationError, match="cannot follow the parameters"):
        applied(RULES["drop"], tree)


def test_other_lists_are_left_alone() -> None:
    tree, _ = checkpoint("history")
    tree["optim"]["history"] = [torch.zeros(3), torch.zeros(9)]
    _, found = applied(RULES["drop"], tree)
    assert [tensor.shape for tensor in found] == [(3,), (9,)]


def test_optimizers_with_masters_are_not_divided() -> None:
    tables = '[[optimizer]]\npath = "a"\nmatch = "0"\n[[optimizer]]\npath = "b"\nmatch = "**"\n'
    with pytest.raises(MigrationError, match="cannot be divided"):
        applied(tables, checkpoint()[0])
