"""What other releases of torch do otherwise, on the one that is installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optimstate import hooks
from optimstate.installed_torch import adagrad_starts_late


@pytest.mark.parametrize("complex_", [False, True])
def test_adagrad_steps_a_new_parameter_where_only_its_constructor_makes_state(
    complex_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch 2.10, `Adagrad.step` ends in a KeyError for a parameter without state."""
    dtype = torch.complex64 if complex_ else torch.float32

    def made(names: str) -> tuple[dict[str, Any], torch.optim.Optimizer]:
        parameters = {name: torch.nn.Parameter(torch.ones(3, dtype=dtype)) for name in names}
        return parameters, torch.optim.Adagrad(parameters.items(), initial_accumulator_value=0.5)

    old, saved = made("a")
    old["a"].grad = torch.ones(3, dtype=dtype)
    saved.step()
    results = []
    for late in {adagrad_starts_late(), False}:
        monkeypatch.setattr("optimstate.hooks.engine.hook.adagrad_starts_late", lambda late=late: late)
        new, optimizer = made("ba")
        optimizer.register_load_state_dict_pre_hook(hooks.match_names())
        optimizer.register_load_state_dict_pre_hook(hooks.fill_missing())
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))  # a step changes what is loaded in place
        assert (new["b"] in optimizer.state) is not late
        for p in new.values():
            p.grad = torch.full((3,), 0.5, dtype=dtype)
        optimizer.step()
        results.append([new["a"].detach(), new["b"].detach()])
    for found in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], found, strict=True))
