"""`fused=True` where torch has none: RMSprop, NAdam and RAdam through the fused Adam kernel.

State must come out bit for bit as from torch's for-loop, parameters within 1e-6 of their largest value, and bit for bit
wherever the kernel does not apply. Under an L2 penalty parameters flow into state, so there it is as close as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optimstate.optim as optim
from tests import cases, oracle
from tests.cases import Case

NAMES = ("NAdam", "RAdam", "RMSprop")
MOST = 1e-6


class FusedCalls(TorchDispatchMode):
    """Counts the tensors handed to fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_fused_" in str(func):
            self.tensors += len(args[0])
        return func(*args, **(kwargs or {}))


def pair(name: str, options: cases.Options, dtype: str) -> tuple[oracle.Run, oracle.Run]:
    """torch's for-loop and our fused run on the same problem."""
    fused = {**options, "fused": True}
    theirs = oracle.Run(getattr(torch.optim, name), Case(name, options, dtype, "forloop", "bulky", {"lr": 0.005}))
    ours = oracle.Run(getattr(optim, name), Case(name, fused, dtype, "default", "bulky", {"lr": 0.005}))
    return theirs, ours


def states(run: oracle.Run) -> list[dict[str, Any]]:
    return list(run.optimizer.state_dict()["state"].values())


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((one - other).detach().abs().max() / one.detach().abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", NAMES)
def test_state_has_torchs_bits_and_parameters_are_within_a_millionth(name: str, dtype: str) -> None:
    every = [case.options for case in cases.cases(name, "default", "float32")]
    few = [case.options for case in cases.telling(name, "default", "float32")]
    for options in every if dtype == "float32" else few:
        theirs, ours = pair(name, options, dtype)
        for run in (theirs, ours):
            run.steps(0, oracle.STEPS)
        if options.get("weight_decay") and not options.get("decoupled_weight_decay"):
            assert oracle.differences(list(map(list, states(theirs))), list(map(list, states(ours)))) == []
            for one, other in zip(states(theirs), states(ours), strict=True):
                for slot in one:
                    assert off(one[slot], other[slot]) <= MOST, f"{name}({options}) {dtype}, {slot}"
        else:
            assert oracle.differences(states(theirs), states(ours)) == [], f"{name}({options}) {dtype}"
        for index, (one, other) in enumerate(zip(theirs.parameters, ours.parameters, strict=True)):
            assert off(one, other) <= MOST, f"{name}({options}) {dtype}, parameter {index}"
            if dtype in {"bfloat16", "complex64"} or index >= 2:
                assert oracle.differences(one, other) == [], f"{name}({options}) {dtype}, parameter {index}"


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_used_for_what_suits_it_and_only_then(name: str) -> None:
    _, ours = pair(name, {}, "float32")
    ours.steps(0, 8)  # RAdam's first steps have a formula of their own
    with FusedCalls() as seen:
        ours.optimizer.step()
    assert seen.tensors >= 2
    _, ours = pair(name, {}, "bfloat16")
    with FusedCalls() as seen:
        ours.steps(0, 10)
    assert seen.tensors == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_option_shows_only_where_it_was_given(name: str) -> None:
    parameters = [torch.ones(3, requires_grad=True)]
    assert "fused" not in getattr(optim, name)(parameters).state_dict()["param_groups"][0]
    assert getattr(optim, name)(parameters, fused=True).param_groups[0]["fused"] is True
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        getattr(optim, name)(parameters, fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        getattr(optim, name)(parameters, fused=True, differentiable=True)


@pytest.mark.parametrize("name", NAMES)
def test_runs_change_hands_between_torch_and_fused(name: str) -> None:
    theirs, ours = pair(name, {}, "float32")
    for run in (theirs, ours):
        run.steps(0, 8)
    into_ours, into_torchs = pair(name, {}, "float32")[1], pair(name, {}, "float32")[0]
    into_ours.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
    assert all(group["fused"] for group in into_ours.optimizer.param_groups)
    assert oracle.differences(states(theirs), states(into_ours)) == []
    into_torchs.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    assert oracle.differences(states(ours), states(into_torchs)) == []
    for run in (into_ours, into_torchs):
        run.steps(8, 10)
