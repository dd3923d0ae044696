"""A parameter that is listed twice is updated twice, in torch's order; a loaded state has its parameter's dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import optimstate.optim as optim
from tests import cases, oracle

pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")


def stepped(library: Any, name: str, order: str, options: dict[str, Any], dtype: torch.dtype, reload: bool) -> Any:
    parameters = {key: nn.Parameter(oracle.numbers((4, 3), dtype, seed=ord(key))) for key in "abc"}
    optimizer = getattr(library, name)([parameters[key] for key in order], lr=0.1, **options)
    for number in range(5):
        if reload and number == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for index, parameter in enumerate(parameters.values()):
            parameter.grad = oracle.numbers((4, 3), dtype, seed=10 * number + index)
        optimizer.step()
    state = [{**optimizer.state[p]} for p in dict.fromkeys(optimizer.param_groups[0]["params"])]
    return [p.detach() for p in parameters.values()], state


@pytest.mark.parametrize("order", ["aa", "aba", "abcab"])
@pytest.mark.parametrize("implementation", ["default", "forloop", "foreach", "fused"])
@pytest.mark.parametrize("name", sorted(set(cases.OPTIMIZERS) - {"LBFGS", "SparseAdam"}))
def test_tied_parameters_listed_twice(name: str, implementation: str, order: str) -> None:
    if implementation not in cases.TABLE[name].implementations:
        pytest.skip("torch's class has no such implementation")
    # torch's foreach Rprop negates the memory of both twice if it maximizes, and so descends every other step.
    more: dict[str, Any] = {} if name == "Rprop" else {"weight_decay": 0.1, "maximize": name != "Muon"}
    for options in ({}, {option: value for option, value in more.items() if value}):
        given = {**options, **cases.FLAGS[implementation]}
        torchs, ours = (
            stepped(library, name, order, given, torch.float32, reload=False) for library in (torch.optim, optim)
        )
        assert oracle.differences(torchs, ours) == [], options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["forloop", "foreach"])
@pytest.mark.parametrize("name", sorted(set(cases.OPTIMIZERS) - {"LBFGS", "SparseAdam", "Muon"}))
def test_a_loaded_half_precision_state_goes_on_with_torchs_bits(
    name: str, implementation: str, dtype: torch.dtype
) -> None:
    """On loading, every slot but the step takes the parameter's dtype: NAdam's product and ASGD's rates too."""
    given = cases.FLAGS[implementation]
    torchs, ours = (stepped(library, name, "abc", dict(given), dtype, reload=True) for library in (torch.optim, optim))
    assert oracle.differences(torchs, ours) == []


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "RMSprop"])
def test_our_own_fused_steps_take_tied_parameters_one_by_one(name: str) -> None:
    found = []
    for fused in (False, True):
        p = nn.Parameter(torch.ones(200, 200))
        optimizer = getattr(optim, name)([p, p], lr=0.1, fused=fused)
        for _ in range(3):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)
