"""`torch.compile` over every class and implementation: torch's numbers, with no more graph breaks."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import optimstate.optim as optim
from tests import cases, oracle

# The compiler itself uses what torch has deprecated, and is told to say nothing of what it cannot do.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower"),  # on Python 3.13.0
]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "weight_decay": 0.1}, "Rprop": {"maximize": True}}


def compiled(library: Any, name: str, flags: dict[str, Any], backend: str) -> tuple[Any, int]:
    """Parameters and state after four compiled steps, and how often the graph broke."""
    torch._dynamo.reset()
    counters.clear()
    parameters = [nn.Parameter(oracle.numbers(shape, torch.float32, seed=5)) for shape in ((4, 3), (3, 2), (4, 4))]
    options = OPTIONS.get(name, {"weight_decay": 0.1})
    optimizer = getattr(library, name)(parameters, lr=0.1, **options, **flags)
    step = torch.compile(optimizer.step, backend=backend)
    for number in range(4):
        for index, p in enumerate(parameters):
            p.grad = oracle.numbers(tuple(p.shape), torch.float32, seed=10 * number + index)
        step()
    state = [{**optimizer.state[p]} for p in parameters]
    return ([p.detach() for p in parameters], state), sum(counters["graph_break"].values())


def combinations(*names: str) -> list[tuple[str, str]]:
    """Each class with its for-loop, lists and kernel; not LBFGS and SparseAdam, which torch hides from compilers."""
    return [
        (name, flag if flag in cases.TABLE[name].implementations else "default")
        for name in names or sorted(set(cases.TABLE) - {"LBFGS", "SparseAdam"})
        for flag in ("forloop", "foreach", "fused")
        if flag == "forloop" or flag in cases.TABLE[name].implementations
    ]


FUSED = [("Adam", "fused"), ("Adagrad", "fused")]


@pytest.mark.parametrize(("name", "implementation"), combinations(), ids=str)
def test_traced(name: str, implementation: str) -> None:
    compare(name, implementation, "eager")


@pytest.mark.parametrize(("name", "implementation"), combinations("AdamW", "SGD", "NAdam") + FUSED, ids=str)
def test_made_functional(name: str, implementation: str) -> None:
    compare(name, implementation, "aot_eager")


def compare(name: str, implementation: str, backend: str) -> None:
    flags = dict(cases.FLAGS[implementation])
    try:
        expected, torchs_breaks = compiled(torch.optim, name, flags, backend)
    except AssertionError as error:  # Adafactor's lists until torch 2.9 at least
        pytest.skip(f"torch's own class does not compile: {error}")
    found, breaks = compiled(optim, name, flags, backend)
    assert oracle.differences(list(expected), list(found)) == []
    assert breaks <= torchs_breaks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="generated code needs a compiler")
def test_generated_code() -> None:
    """Generated kernels fuse and round as they like, torch's class and ours not always alike."""
    (expected, _), _ = compiled(torch.optim, "SGD", {"foreach": True}, "inductor")
    (found, _), _ = compiled(optim, "SGD", {"foreach": True}, "inductor")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
