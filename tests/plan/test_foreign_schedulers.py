"""Schedulers that are not torch's follow the param groups of the result, or the plan is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import MigrationError
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.state.sections import find_sections
from optimstate.tree import nodes


class Inner:
    """A scheduler that another one keeps as an object."""

    def __init__(self) -> None:
        self.base_lrs = [0.1]


LIKE_TORCH = {"last_epoch": 3, "base_lrs": [0.1], "_last_lr": [0.1]}
FOREIGN: dict[str, Any] = {
    "of mmengine": {"last_step": 3, "base_values": [0.1], "_last_value": [0.1], "param_name": "lr"},
    "of timm": {"base_values": [0.1], "param_group_field": "lr", "lr_min": 0.0, "noise_type": "normal"},
    "one in another": {**LIKE_TORCH, "after_scheduler": {**LIKE_TORCH, "T_max": 9}, "finished": False},
    "a list of them": {"multiplier": 2, "phases": [LIKE_TORCH, {"rest": {"base_lrs": [0.1]}}]},
}
UNKNOWN: dict[str, Any] = {
    "lists of its own": {"num_steps": 3, "current_rates": [0.1]},
    "deeper lists": {"num_steps": 3, "warmup": {"rates": (0.1,)}},
    "an object": {**LIKE_TORCH, "after_scheduler": Inner()},
}
SPLIT = Plan.from_toml('[[group]]\nmatch = "a"\n[[group]]\nmatch = "**"\n')


def beside_an_optimizer(folder: Path, state: Any, key: str = "lr_scheduler") -> Any:
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1], "param_names": ["a", "b"]}]}
    model = {"a": torch.ones(2, 2), "b": torch.ones(2)}
    torch.save({"model": model, "optimizer": optimizer, key: state}, folder / "a.pt")
    return open_checkpoint(folder / "a.pt").tree


@pytest.mark.parametrize("form", FOREIGN)
def test_every_list_of_a_foreign_scheduler_follows_the_groups(form: str, tmp_path: Path) -> None:
    made = apply_plan(SPLIT, beside_an_optimizer(tmp_path, FOREIGN[form]))[0]["lr_scheduler"]
    lists = [node for node in nodes(made) if isinstance(node, list) and all(isinstance(n, float) for n in node)]
    assert lists == [[0.1, 0.1]] * len([node for node in nodes(FOREIGN[form]) if node == [0.1]])


@pytest.mark.parametrize("form", UNKNOWN)
@pytest.mark.parametrize("key", ["lr_scheduler", "scheduler.pt", "lr_sched", "scheduler_state_dict"])
def test_a_scheduler_of_an_unknown_form_is_not_left_with_other_groups(form: str, key: str, tmp_path: Path) -> None:
    tree = beside_an_optimizer(tmp_path, UNKNOWN[form], key)
    with pytest.raises(MigrationError, match=r"as many as there are param groups|lists of its own"):
        apply_plan(SPLIT, tree)
    set_lr = Plan.from_toml("[[group]]\nset = { lr = 0.5 }\n")
    assert any("check the next rates" in note for note in apply_plan(set_lr, tree)[2])


@pytest.mark.parametrize("state", [{}, {"name": "cosine", "steps": 3}, {"weight": torch.ones(2), "steps": 3}, None])
def test_a_configuration_of_a_scheduler_is_none(state: Any, tmp_path: Path) -> None:
    assert all(section.kind != "scheduler" for section in find_sections(beside_an_optimizer(tmp_path, state)))
