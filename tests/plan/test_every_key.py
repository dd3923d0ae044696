"""For every key of the plan language, at every door: a plan whose only effect is that key changes the result or is
refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
import torch

from optimstate.plan.apply.stamps import STAMP
from optimstate.plan.language.operations import OPERATIONS
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Policy
from tests.plan.doors import DOORS, differs, outcome


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
GROUP = '[[group]]\nmatch = "**"\nset = { lr = 0.3, initial_lr = 0.3 }\n'
NEW = '[[rule]]\nto = "x"\nfresh = true\ngroup = 0\n'
# What each key is added to, and the key with a value; the plan without the key does something else, or nothing.
KEYS: dict[str, tuple[str, str]] = {
    "rule.from": ('[[rule]]\nto = "x"\nfresh = true\n', 'from = "0.weight"\n'),
    "rule.to": ('[[rule]]\nfrom = "0.weight"\nfresh = true\n', 'to = "x"\n'),
    "rule.drop": ("", '[[rule]]\ndrop = "0.weight"\n'),
    "rule.fresh": ("", '[[rule]]\nfresh = "0.weight"\n'),
    "rule.group": ('[[rule]]\nfresh = "2"\n', "group = 1\n"),
    "rule.only": (RULE + "scale = 0.5\n", 'only = "model"\n'),
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
    "average": JOIN.replace("concat = 0", "average = [0.5, 0.5]") + '[policy]\nstep = "max"\nmerge = "first"\n' + GROUP,
    "gather": RULE + "gather = { dim = 0, index = [3, 0, 0, 1] }\n",
    "flip": RULE + "flip = 1\n",
    "shift": RULE + "shift = 1.0\n",
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
# For policies the plan that they are added to, and for live doors the plan whose result the live run looks like.
POLICIES: dict[tuple[str, str], tuple[str, str]] = {
    ("unused", "ignore"): ('[[rule]]\ndrop = "nowhere.*"\n[[rule]]\nfrom = "0"\nto = "a"\n', ""),
    ("step", "min"): (JOIN + GROUP, ""),
    ("step", "max"): (JOIN + GROUP, ""),
    ("step", "keep"): (JOIN + GROUP, ""),
    ("approximate", "refuse"): (RULE + "resize = { dim = 0, size = 6 }\n", RULE + "resize = { dim = 0, size = 6 }\n"),
    ("merge", "first"): ('[[group]]\nmatch = "**"\n', ""),
    ("merge", "min"): ('[[group]]\nmatch = "**"\n', ""),
    ("merge", "max"): ('[[group]]\nmatch = "**"\n', ""),
    ("missing", "fresh"): ("", NEW),
    ("unexpected", "drop"): ("", '[[rule]]\ndrop = "1.weight"\n'),
    ("hyperparameters", "live"): ("", ""),
    ("schedule", "live"): ("", ""),
}
IN_FILES = {("missing", "fresh"), ("unexpected", "drop")}
"""Policies about a target, which a file has none of: there is nothing that they could relax."""
ELSEWHERE = {("quantized", "requantize")}
"""Policies about bitsandbytes' state: the tests of coded slots have them."""
LIVE = [door for door in DOORS if door != "file"]


@pytest.fixture(scope="module", autouse=True)
def _processes() -> Iterator[None]:
    """A group of one process, for sharded parameters."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def judged(door: str, base: str, more: str, wanted: str | None = None) -> None:
    wanted = base + more if wanted is None else wanted
    without, made = (outcome(door, text, TREE, wanted) for text in (base, base + more))
    assert differs(without, made), f"{more!r} has no effect"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_the_result_or_is_refused(key: str, door: str) -> None:
    base, more = KEYS[key]
    if door != "file" and key == "rule.group":  # a live run has its groups: the plan can only say the same
        judged(door, base, "group = 1\n", base + "group = 0\n")
    elif door != "file" and key == "guard.once":
        plan = Plan.from_toml(more)
        again = {**TREE, STAMP: [plan.digest], "optimizer": {**TREE["optimizer"], STAMP: [plan.digest]}}
        assert "applied to this checkpoint already" in outcome(door, more, again, "")
    elif door == "file" or key != "optimizer.path":  # in memory, an optimizer has no path
        judged(door, base, more)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("key", OPERATION_KEYS)
def test_an_operation_changes_the_result(key: str, door: str) -> None:
    text = OPERATION_KEYS[key]
    made = outcome(door, text, TREE, text)
    assert not isinstance(made, str), made
    assert differs(outcome(door, "", TREE, text), made)


def test_every_operation_is_tried() -> None:
    assert OPERATION_KEYS.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("policy", "value"), POLICIES)
def test_a_policy_changes_the_result_where_it_is_about(policy: str, value: str, door: str) -> None:
    if door == "file" and (policy, value) in IN_FILES:
        return
    base, wanted = POLICIES[policy, value]
    more = f'[policy]\n{policy} = "{value}"\n'
    judged(door, base, more, wanted or base + more)
    if value != "refuse" and (door, policy) not in {
        ("file", "hyperparameters"),
        ("file", "schedule"),
        ("hooks", "schedule"),
    }:
        made = outcome(door, base + more, TREE, wanted or base + more)
        assert not isinstance(made, str), made


def test_every_policy_is_tried() -> None:
    hints = get_type_hints(Policy)
    everything = {(name, value) for name in Policy._fields for value in get_args(hints[name])[1:]}
    assert everything == POLICIES.keys() | ELSEWHERE


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "text",
    [
        "[[group]]\nset = { weight_decai = 0.5 }\n",
        '[[group]]\nset = { lr = "high" }\n',
        '[[group]]\noptimizer = "elsewhere"\nset = { lr = 0.3 }\n',
        '[[group]]\nmatch = "0"\n[[group]]\nmatch = "1"\n[[group]]\nmatch = "nowhere"\nset = { lr = 0.3 }\n',
        "[[group]]\nnumber = 7\nset = { lr = 0.3 }\n",
        '[[optimizer]]\npath = "optimizer"\nmatch = "**"\nset = { weight_decai = 0.5 }\n',
        '[[optimizer]]\npath = "a"\nmatch = "0"\n[[optimizer]]\npath = "b"\nmatch = "nowhere"\n',
        'optimizer = "Novel"\n',
        '[scheduler]\npath = "elsewhere"\nset = { step_size = 1 }\n',
        "[scheduler]\nset = { T_max = 5 }\n",
        "[[group]]\nset = { lr = 0.3 }\n[[group]]\nset = { lr = 0.4 }\n",
        "[[group]]\nnumber = 1\nset = { lr = 0.3 }\n[[group]]\nset = { lr = 0.4 }\n",
        '[[scheduler]]\nset = { step_size = 1 }\n[[scheduler]]\npath = "scheduler"\nset = { step_size = 2 }\n',
        '[slots]\nexp_agv = { kind = "scalar" }\n',
    ],
)
def test_what_reaches_nothing_is_refused(text: str, door: str) -> None:
    assert isinstance(outcome(door, text, TREE, ""), str)
