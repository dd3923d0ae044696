"""A run may change hands between torch and optimstate through `state_dict`, either way, with the same bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import optimstate.optim as optim
from tests import cases, oracle
from tests.cases import Case

HALFWAY, END = 7, 15

Make = Callable[..., torch.optim.Optimizer]
EVERYWHERE = [(name, implementation) for name, row in cases.TABLE.items() for implementation in row.implementations]


def handed_over(first: Make, second: Make, case: Case, *, through_file: bool) -> oracle.Run:
    """A run that `first` begins and `second` ends, in an optimizer made anew with other hyperparameters."""
    begun = oracle.Run(first, case)
    begun.steps(0, HALFWAY)
    state = begun.optimizer.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        state = copy.deepcopy(state)
    ended = oracle.Run(second, case)
    for parameter, other in zip(ended.parameters, begun.parameters, strict=True):
        parameter.data.copy_(other.data)
    for group in ended.optimizer.param_groups:
        group["lr"] = 123.0  # to be overwritten by what is loaded
    ended.optimizer.load_state_dict(state)
    ended.results = begun.results
    ended.steps(HALFWAY, END)
    return ended


@pytest.mark.parametrize(("name", "implementation"), EVERYWHERE)
def test_a_run_that_changes_hands_goes_on_with_the_same_bits(name: str, implementation: str) -> None:
    torchs, ours = getattr(torch.optim, name), getattr(optim, name)
    takes = cases.dtypes_of(cases.TABLE[name], implementation)
    for dtype in (dtype for dtype in ("float32", "bfloat16", "complex64") if dtype in takes):
        if (name, implementation, dtype) == ("SGD", "fused", "bfloat16"):
            continue  # torch's kernel is no oracle there: see DEFECTS in test_parity.py
        for number, case in enumerate(cases.telling(name, implementation, dtype)):
            # What loading itself changes, torch changes too: so torch alone makes the same journey.
            expected = handed_over(torchs, torchs, case, through_file=number == 0)
            for first, second in ((torchs, ours), (ours, torchs)):
                found = handed_over(first, second, case, through_file=number == 0)
                told = oracle.differences(expected.view(), found.view())
                assert not told, f"{case}, {first.__module__} to {second.__module__}: {told[:5]}"


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_the_state_dict_of_a_fresh_optimizer_loads_either_way(name: str) -> None:
    row = cases.TABLE[name]
    case = next(cases.cases(name, "default", row.dtypes[0]))
    for first, second in ((torch.optim, optim), (optim, torch.optim)):
        found = handed_over_fresh(getattr(first, name), getattr(second, name), case)
        expected = handed_over_fresh(getattr(torch.optim, name), getattr(torch.optim, name), case)
        told = oracle.differences(expected.view(), found.view())
        assert not told, told


def handed_over_fresh(first: Make, second: Make, case: Case) -> oracle.Run:
    ended = oracle.Run(second, case)
    ended.optimizer.load_state_dict(oracle.Run(first, case).optimizer.state_dict())
    ended.steps(0, 3)
    return ended


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_the_whole_optimizer_of_one_loads_in_the_other_by_its_state_alone(name: str) -> None:
    """The pickled attributes are the same three, so tools that read them see no difference."""
    case = next(cases.cases(name, "default", cases.TABLE[name].dtypes[0]))
    torchs, ours = oracle.Run(getattr(torch.optim, name), case), oracle.Run(getattr(optim, name), case)
    for run in (torchs, ours):
        run.steps(0, 2)
    one, other = torchs.optimizer.__getstate__(), ours.optimizer.__getstate__()  # type: ignore[attr-defined]
    assert list(one) == list(other)
    assert not oracle.differences(values(one), values(other))


def values(pickled: dict[str, Any]) -> dict[str, Any]:
    """What is pickled, with parameters out of the keys."""
    return {**pickled, "state": list(pickled["state"].values())}
