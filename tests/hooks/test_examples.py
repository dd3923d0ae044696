"""The example in every hook's docstring is valid, and makes what it says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from optimstate import hooks

FUNCTIONS = [
    name
    for name in hooks.__all__
    if inspect.isfunction(getattr(hooks, name)) and name not in ("adapt", "migrate_scheduler")
]


def experts() -> torch.nn.Module:
    """A mixture of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    model: torch.nn.Module = transformers.MixtralForCausalLM(config)
    return model


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_hook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text('[[rule]]\nfrom = "0.{p}"\nto = "1.{p}"\n')
    model = experts() if name == "hub_layout" else torch.nn.Sequential(torch.nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.named_parameters())
    found = re.search(r"Example:\n\s+`([^`]+)`", inspect.getdoc(getattr(hooks, name)) or "")
    assert found, f"hooks.{name} has no example"
    assert f"hooks.{name}(" in found[1]
    assert eval(found[1], {"hooks": hooks, "model": model, "optimizer": optimizer}) is not None
