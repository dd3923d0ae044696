"""A mixture of experts under transformers' Trainer: saved in the hub's layout, resumed in the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate import hooks

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=4,
        architectures=["Qwen3MoeForCausalLM"],
    ),
}  # fmt: skip


def run(folder: Path, kind: str, seed: int, steps: int, resume: Any = None, hooked: bool = False) -> list[float]:
    """The losses of each step."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    if hooked:
        hooks.hub_layout(model)
    rows = [{"input_ids": torch.arange(n, n + 8) % 32, "labels": torch.arange(n, n + 8) % 32} for n in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant", seed=7,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", CONFIGS)
def test_trainer_goes_on_with_the_losses_of_the_run_that_was_never_interrupted(kind: str, tmp_path: Path) -> None:
    whole = run(tmp_path, kind, 0, 6)
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = run(tmp_path / "resumed", kind, 1, 6, checkpoint, hooked=True)
    assert resumed[-3:] == whole[-3:]
    lost = run(tmp_path / "lost", kind, 1, 6, checkpoint)
    assert lost[-3:] != whole[-3:]  # without the hook the experts start anew


def test_weights_in_the_live_layout_load_as_ever() -> None:
    torch.manual_seed(0)
    model, other = (transformers.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]()) for _ in range(2))
    hooks.hub_layout(model)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
