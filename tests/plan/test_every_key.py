"""For every key of the plan language: a plan whose only effect is that key changes the result or is refused."""

from __future__ import annotations

import copy
from typing import Any, get_args, get_type_hints

import pytest
import torch

from optimstate.errors import PlanError
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.operations import OPERATIONS
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Policy
from optimstate.tree import difference
from tests.plan.lazy import lazy_tree


def checkpoint() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 0.1}, {"params": named[2:4], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for step in range(3):
        for name, parameter in named[:4]:
            parameter.grad = torch.randn_like(parameter) if name != "1.bias" or step else None
        optimizer.step()
        scheduler.step()
    node = copy.deepcopy(optimizer.state_dict())
    return {"model": model.state_dict(), "optimizer": node, "scheduler": scheduler.state_dict()}


TREE = checkpoint()
RULE = '[[rule]]\nfrom = "0.weight"\nto = "0.weight"\n'
JOIN = '[[rule]]\nfrom = "{n=0..1}.bias"\nto = "b.bias"\nconcat = 0\n'
GROUP = '[[group]]\nmatch = "**"\nset = { lr = 0.3 }\n'
# What each key is added to, and the key with a value; the plan without the key does something else, or nothing.
KEYS: dict[str, tuple[str, str]] = {
    "rule.from": ('[[rule]]\nto = "x"\nfresh = true\n', 'from = "0.weight"\n'),
    "rule.to": ('[[rule]]\nfrom = "0.weight"\nfresh = true\n', 'to = "x"\n'),
    "rule.drop": ("", '[[rule]]\ndrop = "0.weight"\n'),
    "rule.fresh": ("", '[[rule]]\nfresh = "0.weight"\n'),
    "rule.group": ('[[rule]]\nfresh = "2"\n', "group = 1\n"),
    "rule.ops": (RULE, "ops = [{ scale = 0.5 }]\n"),
    "stage": ("", '[[stage]]\n[[stage.rule]]\nfrom = "0.weight"\nto = "x"\n'),
    "group.match": ("", GROUP),
    "group.set": ('[[group]]\nmatch = "0"\n[[group]]\nmatch = "**"\n', "set = { lr = 0.3 }\n"),
    "group.like": ('[[group]]\nmatch = "0"\n[[group]]\nmatch = "**"\n', "like = 0\n"),
    "group.optimizer": ("[[group]]\nset = { lr = 0.3 }\n", 'optimizer = "elsewhere"\n'),
    "group.number": ("[[group]]\nset = { lr = 0.3 }\n", "number = 1\n"),
    "optimizer": ("", 'optimizer = "Lion"\n'),
    "optimizer.path": ("", '[[optimizer]]\npath = "other"\nmatch = "**"\n'),
    "optimizer.algorithm": ('[[optimizer]]\npath = "optimizer"\nmatch = "**"\n', 'algorithm = "Lion"\n'),
    "optimizer.set": ('[[optimizer]]\npath = "optimizer"\nmatch = "**"\n', "set = { lr = 0.3 }\n"),
    "guard.has": ("", '[guard]\nhas = "nowhere.*"\n'),
    "guard.lacks": ("", '[guard]\nlacks = "0"\n'),
    "guard.once": ("", "[guard]\nonce = true\n"),
    "slots": ("", '[slots]\nnowhere = { kind = "scalar" }\n'),
    "scheduler.set": ("", "[scheduler]\nset = { step_size = 1 }\n"),
}
OPERATION_KEYS = {
    "concat": JOIN + '[policy]\nstep = "max"\nmerge = "first"\n' + GROUP,
    "stack": JOIN.replace("concat", "stack") + '[policy]\nstep = "max"\nmerge = "first"\n' + GROUP,
    "mean": JOIN.replace("concat", "mean") + '[policy]\nstep = "max"\nmerge = "first"\n' + GROUP,
    "split": RULE.replace('to = "0.weight"', 'to = ["0.weight", "x"]') + "split = 0\n",
    "unstack": RULE.replace('to = "0.weight"', 'to = ["a", "b", "c", "d"]') + "unstack = 0\n",
    "transpose": RULE + "transpose = true\n",
    "permute": RULE + "permute = [1, 0]\n",
    "reshape": RULE + "reshape = [16]\n",
    "slice": RULE + "slice = { dim = 0, stop = 2 }\n",
    "select": RULE + "select = { dim = 0, index = [3, 0] }\n",
    "resize": RULE + "resize = { dim = 0, size = 6 }\n",
    "repeat": RULE + "repeat = { dim = 0, times = 2 }\n",
    "scale": RULE + "scale = 0.5\n",
    "fill": RULE + "fill = 0.5\n",
    "cast": RULE + 'cast = "bfloat16"\n',
}
POLICIES: dict[tuple[str, str], str] = {
    ("unused", "ignore"): '[[rule]]\ndrop = "nowhere.*"\n',
    ("step", "min"): JOIN + GROUP,
    ("step", "max"): JOIN + GROUP,
    ("step", "keep"): JOIN + GROUP,
    ("approximate", "refuse"): RULE + "resize = { dim = 0, size = 6 }\n",
    ("merge", "first"): '[[group]]\nmatch = "**"\n',
    ("merge", "min"): '[[group]]\nmatch = "**"\n',
    ("merge", "max"): '[[group]]\nmatch = "**"\n',
}
ELSEWHERE = {("missing", "fresh"), ("unexpected", "drop"), ("hyperparameters", "live"), ("schedule", "live")} | {
    ("quantized", "requantize")
}
"""Policies about a live target, or about bitsandbytes' state: tests of hooks, resume and quantized state have them."""


def outcome(text: str) -> Any:
    """What a plan makes of the checkpoint, or why it is refused."""
    try:
        return apply_plan(Plan.from_toml(text), lazy_tree(TREE))[0]
    except PlanError as error:
        return f"refused: {error}"


def differs(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one != other
    return difference(one, other) is not None


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_the_result_or_is_refused(key: str) -> None:
    base, more = KEYS[key]
    assert differs(outcome(base), outcome(base + more)), key


@pytest.mark.parametrize("key", OPERATION_KEYS)
def test_an_operation_changes_the_result(key: str) -> None:
    made = outcome(OPERATION_KEYS[key])
    assert not isinstance(made, str), made
    assert differs(outcome(""), made)


def test_every_operation_is_tried() -> None:
    assert OPERATION_KEYS.keys() == OPERATIONS.keys()


@pytest.mark.parametrize(("policy", "value"), POLICIES)
def test_a_policy_changes_the_result_where_it_is_about(policy: str, value: str) -> None:
    base = POLICIES[policy, value]
    assert differs(outcome(base), outcome(f'{base}[policy]\n{policy} = "{value}"\n'))


def test_every_policy_is_tried() -> None:
    hints = get_type_hints(Policy)
    everything = {(name, value) for name in Policy._fields for value in get_args(hints[name])[1:]}
    assert everything == POLICIES.keys() | ELSEWHERE
