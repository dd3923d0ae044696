"""Means over rows and columns, under every change of layout, against the means of the full second moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.compute import to_torch
from tests.plan.lazy import lazy_tree

FORMS: dict[str, tuple[tuple[str, str, str], dict[str, Any], bool]] = {
    "torch": (("row_var", "col_var", "variance"), {"beta2_decay": -0.8, "d": 1.0, "eps": (None, 1e-3)}, True),
    "transformers": (
        ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
        {"clip_threshold": 1.0, "decay_rate": -0.8, "scale_parameter": True, "relative_step": True},
        False,
    ),
}


def factored(full: dict[str, torch.Tensor], form: str) -> dict[str, dict[str, torch.Tensor]]:
    """The slots that stand for these full second moments."""
    (row, col, whole), _, keep = FORMS[form]
    return {
        name: {row: v.mean(-1, keepdim=keep), col: v.mean(-2, keepdim=keep)} if v.ndim > 1 else {whole: v}
        for name, v in full.items()
    }


def migrated(text: str, full: dict[str, torch.Tensor], form: str, *, lazy: bool = False) -> tuple[dict[str, Any], Any]:
    slots = factored(full, form)
    node: dict[str, Any] = {
        "state": {n: {"step": torch.tensor(3.0), **slots[name]} for n, name in enumerate(full)},
        "param_groups": [{"lr": 0.1, **FORMS[form][1], "params": list(range(len(full))), "param_names": list(full)}],
    }
    state = OptimizerState.from_node(lazy_tree(node) if lazy else node)
    section = plan_optimizer(Plan.from_toml(text), state).sections["optimizer"]
    made = {str(name): dict(found or {}) for _, name, found in execute_optimizer(section, state).parameters()}
    return made, section


EXACT = {
    "concat rows": (
        'from = "{x=a|b}"\nto = "y"\nconcat = 0',
        {"a": (2, 3), "b": (4, 3)},
        lambda f: {"y": torch.cat([f["a"], f["b"]])},
    ),
    "concat columns": (
        'from = "{x=a|b}"\nto = "y"\nconcat = 1',
        {"a": (2, 3), "b": (2, 5)},
        lambda f: {"y": torch.cat([f["a"], f["b"]], 1)},
    ),
    "transpose": ('from = "a"\nto = "y"\ntranspose = true', {"a": (2, 3)}, lambda f: {"y": f["a"].t()}),
    "stack": (
        'from = "{x=a|b}"\nto = "y"\nstack = 0',
        {"a": (2, 3), "b": (2, 3)},
        lambda f: {"y": torch.stack([f["a"], f["b"]])},
    ),
    "unstack": (
        'from = "a"\nto = "y.{e=0..1}"\nunstack = 0',
        {"a": (2, 4, 3)},
        lambda f: {"y.0": f["a"][0], "y.1": f["a"][1]},
    ),
    "stack vectors": (
        'from = "{x=a|b}"\nto = "y"\nstack = 0',
        {"a": (5,), "b": (5,)},
        lambda f: {"y": torch.stack([f["a"], f["b"]])},
    ),
    "scale": ('from = "a"\nto = "y"\nscale = { param = 0.5, grad = 2.0 }', {"a": (2, 3)}, lambda f: {"y": f["a"] * 4}),
    "heads": (
        'from = "a"\nto = "y"\nops = [{ reshape = { dim = 0, to = [2, 3] } }, { permute = [1, 0] }, '
        "{ reshape = { dim = 0, from = [3, 2], to = [6] } }]",
        {"a": (6, 4)},
        lambda f: {"y": f["a"].unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1)},
    ),
    "repeat": (
        'from = "a"\nto = "y"\nrepeat = { dim = 0, times = 2, each = true }',
        {"a": (2, 3)},
        lambda f: {"y": f["a"].repeat_interleave(2, 0)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_called_exact_are_the_means_of_the_result(name: str, form: str, lazy: bool) -> None:
    text, shapes, function = EXACT[name]
    torch.manual_seed(0)
    full = {key: torch.rand(shape, dtype=torch.float64) for key, shape in shapes.items()}
    made, section = migrated(f"[[rule]]\n{text}\n", full, form, lazy=lazy)
    assert {outcome.level for move in section.moves for outcome in move.slots.values()} == {"exact"}
    for target, slots in factored(function(full), form).items():
        assert made[target].keys() - {"step"} == slots.keys()
        for slot, value in slots.items():
            ours = to_torch(made[target][slot]) if lazy else made[target][slot]
            assert ours.shape == value.shape
            assert torch.allclose(ours, value, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("text", "slot"),
    [
        ('from = "a"\nto = "y{e=0..1}"\nsplit = 0', 1),
        ('from = "a"\nto = "y{e=0..1}"\nsplit = 1', 0),
        ('from = "a"\nto = "y"\nslice = { dim = 0, stop = 2 }', 1),
        ('from = "a"\nto = "y"\nresize = { dim = 0, size = 6 }', 1),
    ],
)
def test_what_the_means_do_not_tell_is_called_approximate(text: str, slot: int, form: str) -> None:
    made, section = migrated(f"[[rule]]\n{text}\n", {"a": torch.rand(4, 4)}, form)
    name = FORMS[form][0][slot]
    for move in section.moves:
        assert move.slots[(name,)].level == "approximate"
        assert move.slots[(name,)].reason
    assert all(torch.isfinite(value).all() for slots in made.values() for value in slots.values())


def test_a_matrix_cannot_become_vectors() -> None:
    with pytest.raises(MigrationError, match="it is a mean over rows or columns, and the result has the shape"):
        migrated('[[rule]]\nfrom = "a"\nto = "y{e=0..1}"\nunstack = 0\n', {"a": torch.rand(2, 3)}, "torch")
