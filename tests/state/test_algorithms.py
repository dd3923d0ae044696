"""Which optimizer a state is of, and what its slots are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.installed_torch import HAS_MUON
from optimstate.state.algorithms.registry import ALGORITHMS, inferred_kind, parameter_shape, recognise
from tests.releases import ADAM_TELLS_ITS_DECAY

TORCH: dict[str, dict[str, Any]] = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "LBFGS": {},
    **({"Muon": {}} if HAS_MUON else {}),
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9},
    "SparseAdam": {},
}


@pytest.mark.parametrize("name", TORCH)
def test_torchs_are_recognised_and_their_shapes_told(name: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = getattr(torch.optim, name)([parameter], **TORCH[name])
    for _ in range(3):

        def closure() -> torch.Tensor:
            loss = parameter.square().sum()
            parameter.grad = parameter.detach() * 2
            if name == "SparseAdam":
                parameter.grad = parameter.grad.to_sparse()
            return loss.detach()

        optimizer.step(closure)
    saved = optimizer.state_dict()
    slots = saved["state"][0]
    algorithm = recognise(slots, saved["param_groups"][0])
    assert algorithm is not None
    untold = name in ("Adam", "AdamW") and not ADAM_TELLS_ITS_DECAY
    assert algorithm.name == ("Adam or AdamW" if untold else name)
    shapes = {slot: tuple(v.shape) if isinstance(v, torch.Tensor) else () for slot, v in slots.items()}
    if name != "LBFGS":
        assert parameter_shape(shapes, algorithm) == (4, 6)
    for slot, shape in shapes.items():
        kind = algorithm.slots[slot].kind
        if kind in ("like_param", "row", "col"):
            assert inferred_kind(shape, (4, 6)) == kind
        if kind == "scalar":
            assert shape == ()


@pytest.mark.parametrize("name", TORCH)
def test_degrees_are_what_a_scaled_gradient_does(name: str) -> None:
    """Twice the gradient, and every slot grows by 2 to the power of its degree."""
    if name in ("LBFGS", "SparseAdam"):
        pytest.skip("flat, or sparse")
    algorithm = next(a for a in ALGORITHMS if a.name == name)
    options = {**TORCH[name], **({"eps": 1e-30} if name in ("Adadelta", "RMSprop") else {})}
    if name != "Rprop":
        options["weight_decay"] = 0.0
    states = []
    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        optimizer = getattr(torch.optim, name)([parameter], **options)
        for _ in range(4):
            parameter.grad = factor * torch.randn(4, 6, dtype=torch.float64)
            optimizer.step()
        states.append(optimizer.state_dict()["state"][0])
    for slot, value in states[0].items():
        meaning = algorithm.slots[slot]
        if meaning.kind == "scalar" or slot == "ax":
            continue
        assert meaning.degree is not None
        assert torch.allclose(states[1][slot], value * 2.0**meaning.degree, rtol=1e-6), slot


@pytest.mark.parametrize(
    ("shape", "parameter", "kind"),
    [
        ((3, 4), (3, 4), "like_param"),
        ((), (3, 4), "scalar"),
        ((3, 1), (3, 4), "row"),
        ((1, 4), (3, 4), "col"),
        ((3, 3), (3, 4), "opaque"),
        (None, (3, 4), "opaque"),
        ((), (), "like_param"),
        ((5,), None, "opaque"),
    ],
)
def test_kinds_by_shape(shape: Any, parameter: Any, kind: str) -> None:
    assert inferred_kind(shape, parameter) == kind


def test_unknown_options_are_no_algorithm() -> None:
    assert recognise(["mystery"], {"lr": 0.1}) is None
    assert recognise(["exp_avg"], {}) is None


def test_algorithms_of_other_packages_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "novel.py").write_text(
        "from optimstate.state.algorithms.slots import GRADIENT, SCALAR, algorithm\n"
        'NOVEL = algorithm("Novel", {"step": SCALAR, "glance": GRADIENT}, "lr novelty")\n'
    )
    package = tmp_path / "novel-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: novel\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[optimstate.algorithms]\nnovel = novel:NOVEL\n")
    code = (
        "from optimstate.state.algorithms.registry import recognise\n"
        "print(recognise(['step', 'glance'], {'lr': 0.1, 'novelty': 1}).name)\n"
        "print(recognise(['step', 'exp_avg'], {'lr': 0.1, 'novelty': 1}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["Novel", "None"]


FOREIGN = {
    "LARS": ({"momentum_buffer"}, "momentum dampening nesterov trust_coeff trust_clip"),
    "SGDP": ({"momentum_buffer"}, "momentum dampening nesterov delta wd_ratio"),
    "LAMB": ({"step", "exp_avg", "exp_avg_sq"}, "betas eps amsgrad fused trust_clip"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_hyperparameter_of_its_own_rules_an_algorithm_out(name: str) -> None:
    slots, options = FOREIGN[name]
    group = {"lr": 0.1, "weight_decay": 0.0, **dict.fromkeys(options.split(), 0.5)}
    assert recognise(slots, group) is None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_what_frameworks_write_into_groups_rules_nothing_out(kind: type[torch.optim.Optimizer]) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    group = dict(kind([p], lr=0.1).param_groups[0])
    notes = {
        "initial_lr": 0.1,
        "lr_scale": 0.5,
        "name": "decay",
        "max_lr": 0.1,
        "lr_mult": 2.0,
        "layer_id": 3,
        "tag": "x",
    }
    assert recognise([], {**group, **notes}) == recognise([], group) is not None
