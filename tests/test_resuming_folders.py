"""`optimstate.resume` on what frameworks wrote: folders and files are known by their structure, names are concluded."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.formats.registry import open_checkpoint
from optimstate.state.names import unwrapped
from optimstate.state.sections import find_sections
from tests.corpus import Case, case

WRITTEN = [
    "accelerate/save_state_unsafe_bin_custom", "composer/decoupled_adamw", "deepspeed/z2_ws2_fp32_adam_sched",
    "deepspeed/z3_ws2_bf16_adamw", "fastai/adam_discriminative", "mmengine/sgd_paramwise",
    "timm/checkpoint_saver_ema_layerdecay", "torch_ema/adamw_ema",
]  # fmt: skip


class AnyOptimizer(torch.optim.Optimizer):
    """Takes whatever state a checkpoint has."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})


def live_model(tensors: dict[str, Any], trained: set[str]) -> nn.Module:
    """A module that has these names, with parameters of zeros where they are trained."""
    top = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = top
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        value = torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype))
        if name in trained:
            module.register_parameter(leaf, nn.Parameter(value))
        else:
            module.register_buffer(leaf, value)
    return top


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("found", [case(name) for name in WRITTEN], ids=str)
def test_what_a_framework_wrote_resumes_with_the_state_that_it_had(found: Case) -> None:
    truth = found.truth()
    rename = unwrapped(truth["state"])
    expected = {rename(name): slots for name, slots in truth["state"].items()}
    (section, *_) = [s for s in find_sections(open_checkpoint(found.entry).tree) if s.kind == "model"]
    plain = unwrapped(section.tensors())
    weights = {plain(name): tensor for name, tensor in section.tensors().items()}
    groups = truth.get("groups")
    lists = [[rename(name) for name in group["params"]] for group in groups] if groups else [list(expected)]
    order = [name for names in lists for name in names if name in weights]
    model = live_model({name: weights[name] for name in dict.fromkeys([*order, *weights])}, set(order))
    parameters = dict(model.named_parameters())
    assert order
    optimizer = AnyOptimizer([{"params": [(name, parameters[name]) for name in names]} for names in lists])
    optimstate.resume(found.entry, model=model, optimizer=optimizer)
    compared = 0
    for name, slots in expected.items():
        for slot, known in slots.items():
            value = optimizer.state[parameters[name]].get(slot)
            if isinstance(value, torch.Tensor) and known.get("sha256") and str(value.dtype).endswith(known["dtype"]):
                assert digest(value) == known["sha256"], (name, slot)
                compared += 1
    assert compared >= len(expected)
