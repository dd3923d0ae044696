"""The load hooks that torch.optim's documentation recommends to paste, and its models: to be compared with ours."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn


class OneLayerModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class TwoLayerModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fc1(x) + self.fc2(x)) / 2


class Model1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x


class ModelBypass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.bypass = nn.Linear(5, 5, bias=False)
        torch.nn.init.eye_(self.bypass.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.bypass(x)


DUPLICATED = {"fc1.weight": "fc.weight", "fc1.bias": "fc.bias", "fc2.weight": "fc.weight", "fc2.bias": "fc.bias"}
WITH_BYPASS = {"fc.weight": "fc.weight", "fc.bias": "fc.bias", "bypass.weight": None}


def theirs(lookup: dict[str, str | None]) -> Any:
    """The documentation's first and second recipe, which differ in their table."""

    def adapt(optimizer: Any, state_dict: Any) -> Any:
        adapted_state_dict = deepcopy(optimizer.state_dict())
        for k, v in state_dict["param_groups"][0].items():
            if k not in ["params", "param_names"]:
                adapted_state_dict["param_groups"][0][k] = v
        for param_id, param_name in zip(
            optimizer.state_dict()["param_groups"][0]["params"],
            optimizer.state_dict()["param_groups"][0]["param_names"],
            strict=True,
        ):
            name_in_loaded = lookup[param_name]
            if name_in_loaded in state_dict["param_groups"][0]["param_names"]:
                index = state_dict["param_groups"][0]["param_names"].index(name_in_loaded)
                id_in_loaded = state_dict["param_groups"][0]["params"][index]
                if id_in_loaded in state_dict["state"]:
                    adapted_state_dict["state"][param_id] = deepcopy(state_dict["state"][id_in_loaded])
        return adapted_state_dict

    return adapt


def names_matching(optimizer: Any, state_dict: Any) -> Any:
    """The documentation's third recipe."""
    assert len(state_dict["param_groups"]) == len(optimizer.state_dict()["param_groups"])
    adapted_state_dict = deepcopy(optimizer.state_dict())
    for g_ind in range(len(state_dict["param_groups"])):
        assert len(state_dict["param_groups"][g_ind]["params"]) == len(
            optimizer.state_dict()["param_groups"][g_ind]["params"]
        )
        for k, v in state_dict["param_groups"][g_ind].items():
            if k not in ["params", "param_names"]:
                adapted_state_dict["param_groups"][g_ind][k] = v
        for param_id, param_name in zip(
            optimizer.state_dict()["param_groups"][g_ind]["params"],
            optimizer.state_dict()["param_groups"][g_ind]["param_names"],
            strict=True,
        ):
            index = state_dict["param_groups"][g_ind]["param_names"].index(param_name)
            id_in_loaded = state_dict["param_groups"][g_ind]["params"][index]
            if id_in_loaded in state_dict["state"]:
                adapted_state_dict["state"][param_id] = deepcopy(state_dict["state"][id_in_loaded])
    return adapted_state_dict
