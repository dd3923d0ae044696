"""A mixture of experts under transformers' Trainer: saved in the hub's layout, resumed in the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import optimstate
from optimstate import hooks
from optimstate.derivation.transformers import derive_transformers
from tests.cli.running import run as command
from tests.derivation.by_fork import derived_by_fork

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


Trained = Callable[[str], tuple[Path, list[float]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A checkpoint after three steps of six, and the losses of all."""
    known: dict[str, tuple[Path, list[float]]] = {}

    def make(kind: str) -> tuple[Path, list[float]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = (folder / "checkpoint-3", run(folder, kind, 0, 6))
        return known[kind]

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_trainer_goes_on_with_the_losses_of_the_run_that_was_never_interrupted(
    kind: str, tmp_path: Path, trained: Trained
) -> None:
    folder, whole = trained(kind)
    checkpoint = str(folder)
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


VIEW = '[view]\nplan = "to-live.toml"\n'
MOVED = '[[rule]]\nfrom = "model.layers.1.{p**}"\nto = "model.layers.2.{p}"\n'


def mixtral(seed: int, layers: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model and an optimizer with the groups that Trainer makes."""
    torch.manual_seed(seed)
    config = CONFIGS["mixtral"]()
    config.num_hidden_layers = layers
    model = transformers.AutoModelForCausalLM.from_config(config)
    decayed, rest = ([(n, p) for n, p in model.named_parameters() if ("norm" in n) is norm] for norm in (False, True))
    return model, torch.optim.AdamW([{"params": decayed}, {"params": rest}], lr=1e-3, weight_decay=0.0)


def losses(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(3):
        words = torch.arange(step, step + 8)[None] % 32
        found.append(model(input_ids=words, labels=words).loss)
        optimizer.zero_grad()
        found[-1].backward()
        optimizer.step()
    return [loss.item() for loss in found]


def test_every_command_reads_a_checkpoint_of_trainer_through_its_view(tmp_path: Path, trained: Trained) -> None:
    folder, _ = trained("mixtral")
    checkpoint, view, named = str(folder), str(tmp_path / "to-live.toml"), str(tmp_path / "named")
    with derived_by_fork():
        derived = command("plan", "derive", checkpoint, "--transformers", checkpoint, "--to", "live", "-o", view)
    assert (derived.code, "3 rules" in derived.out) == (0, True), derived.err
    stored = load_file(folder / "model.safetensors")
    back = derive_transformers(folder, to="hub", shapes=stored)
    (tmp_path / "to-hub.toml").write_text(back.plan.to_toml())
    assert back.notes[0].startswith(
        "the checkpoint stands in the hub layout already: the plan leads there from the live"
    )

    assert "another layout than the optimizer's, for 4 parameters" in command("verify", checkpoint).out
    seen = command("verify", checkpoint, "--view", view)
    assert (seen.code, "another layout" in seen.out) == (0, False)
    assert "model.layers.1.mlp.experts.down_proj" in command("inspect", checkpoint, "--params", "--view", view).out
    assert command("name", checkpoint, named, "--hf", checkpoint, "--view", view).code == 0
    assert command("verify", named, "--view", view).code == 0

    # The layer after a new one, by hand: weights as the library loads them, state by Trainer's order.
    old = transformers.AutoModelForCausalLM.from_pretrained(folder)
    decayed, rest = ([n for n, _ in old.named_parameters() if ("norm" in n) is norm] for norm in (False, True))
    state = torch.load(folder / "optimizer.pt")["state"]
    model, optimizer = mixtral(1, 3)
    new = dict(model.named_parameters())
    for index, name in enumerate([*decayed, *rest]):
        parameter = new[name.replace("layers.1.", "layers.2.")]
        parameter.data.copy_(old.get_parameter(name))
        optimizer.state[parameter] = state[index]
    expected = losses(model, optimizer)

    (tmp_path / "insert.toml").write_text(VIEW + MOVED + '[[rule]]\nfresh = "model.layers.1.**"\n')
    model, optimizer = mixtral(1, 3)
    optimstate.resume(named, model=model, optimizer=optimizer, plan=tmp_path / "insert.toml")
    assert losses(model, optimizer) == expected

    (tmp_path / "move.toml").write_text(f'{VIEW}back = "to-hub.toml"\n{MOVED}')
    moved = str(tmp_path / "moved")
    assert command("remap", named, moved, "--plan", str(tmp_path / "move.toml")).code == 0
    found = load_file(tmp_path / "moved" / "model.safetensors")
    assert found.keys() == {name.replace("layers.1.", "layers.2.") for name in stored}
    assert all(torch.equal(found[name.replace("layers.1.", "layers.2.")], value) for name, value in stored.items())
    assert command("verify", moved, "--view", view).code == 0
    (tmp_path / "after.toml").write_text(VIEW + '[[rule]]\nfresh = "model.layers.1.**"\n')
    model, optimizer = mixtral(1, 3)
    optimstate.resume(moved, model=model, optimizer=optimizer, plan=tmp_path / "after.toml")
    assert losses(model, optimizer) == expected
