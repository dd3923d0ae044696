"""Trainers of other libraries resume from converted and renamed files as from their own, without anything of ours.

Skipped where they are not installed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.language.plan import Plan
from optimstate.tree import difference
from tests.formats.deepspeed_worker import QUICK, STAGES

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]
RENAMED = Plan.from_options(
    rename=["model.fc.{p}=model.body.{p}", "model.out.{p}=model.head.{p}", "fc.{p}=body.{p}", "out.{p}=head.{p}"]
)
RENAMED_WRAPPED = Plan.from_options(rename=["model.fc.{p}=model.body.{p}", "model.out.{p}=model.head.{p}"])


class Net(nn.Module):
    """Dropout draws from the random state, which a resumption must restore too."""

    def __init__(self, names: tuple[str, str] = ("fc", "out")) -> None:
        super().__init__()
        self.names = names
        torch.manual_seed(0)
        self.add_module(names[0], nn.Linear(4, 6))
        self.add_module(names[1], nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (getattr(self, name) for name in self.names)
        return second(nn.functional.dropout(torch.tanh(first(x)), 0.25, self.training))


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.named_parameters(), lr=1e-2)


def data() -> list[torch.Tensor]:
    return list(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))


def loss_of(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (net(x) - x[..., :2]).square().mean()


Run = tuple[nn.Module, torch.optim.Optimizer, list[float]]


def assert_same(one: Run, other: Run) -> None:
    """Equal losses, weights and state, bit for bit; only names may differ."""
    assert one[2] == other[2]
    assert one[2]
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
        states = [run[1].state[p] for run, p in ((one, a), (other, b))]
        assert states[0]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][slot], states[1][slot]) for slot in states[0])


# --- Lightning ------------------------------------------------------------------------------------------------------


def lightning_run(folder: Path, names: tuple[str, str], epochs: int, **options: Any) -> tuple[Run, Any]:
    import pytorch_lightning as lightning

    losses: list[float] = []

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net(names)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss = loss_of(self.model, batch)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            self.made = optimizer_of(self.model)
            return [self.made], [torch.optim.lr_scheduler.StepLR(self.made, 1, gamma=0.5)]

    task = Task()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    torch.manual_seed(len(options))
    trainer.fit(task, torch.utils.data.DataLoader(data(), batch_size=2), **options)
    return (task.model, task.made, losses), trainer


def test_lightning_resumes_from_what_was_converted_and_renamed(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    _, trainer = lightning_run(tmp_path, ("fc", "out"), 2)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    optimstate.convert(tmp_path / "own.ckpt", tmp_path / "a.safetensors", options=QUICK)
    optimstate.convert(tmp_path / "a.safetensors", tmp_path / "back.ckpt", options=QUICK)
    optimstate.remap(tmp_path / "back.ckpt", tmp_path / "renamed.ckpt", RENAMED, sync=False)
    expected, _ = lightning_run(tmp_path, ("fc", "out"), 4, ckpt_path=tmp_path / "own.ckpt")
    assert len(expected[2]) == 12
    for file, names in (("back.ckpt", ("fc", "out")), ("renamed.ckpt", ("body", "head"))):
        found, _ = lightning_run(tmp_path, names, 4, ckpt_path=tmp_path / file)
        assert_same(found, expected)


# --- Trainer --------------------------------------------------------------------------------------------------------


def trainer_run(folder: Path, names: tuple[str, str], **options: Any) -> Run:
    import transformers

    losses: list[float] = []

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net(names)

        def forward(self, x: torch.Tensor) -> Any:
            loss = loss_of(self.model, x)
            losses.append(loss.item())
            return {"loss": loss}

    task = Wrapped()
    optimizer = optimizer_of(task)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=8, save_steps=4, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    rows = [{"x": x} for x in data()]
    trainer = transformers.Trainer(model=task, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train(**options)
    return task.model, optimizer, losses[-4:]


def through_safetensors(source: Path, destination: Path) -> None:
    """Every file of a checkpoint folder that can be, by way of safetensors and back into its own container."""
    shutil.copytree(source, destination)
    converted = []
    for name in ("optimizer.pt", "scheduler.pt", "pytorch_model.bin", "model.safetensors"):
        if (destination / name).exists():
            middle = destination / f"{name}.middle.{'pt' if name.endswith('safetensors') else 'safetensors'}"
            optimstate.convert(source / name, middle, options=QUICK)
            optimstate.convert(middle, destination / name, force=True, options=QUICK)
            middle.unlink()
            converted.append(name)
    assert {"optimizer.pt", "scheduler.pt"} < set(converted)


def test_trainer_resumes_from_what_was_converted_and_renamed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    expected = trainer_run(tmp_path / "own", ("fc", "out"))
    own = tmp_path / "own" / "checkpoint-4"
    through_safetensors(own, tmp_path / "back")
    optimstate.remap(tmp_path / "back", tmp_path / "renamed", RENAMED_WRAPPED, sync=False)
    assert_same(trainer_run(tmp_path / "x", ("fc", "out"), resume_from_checkpoint=str(own)), expected)
    for folder, names in (("back", ("fc", "out")), ("renamed", ("body", "head"))):
        found = trainer_run(tmp_path / folder / "out", names, resume_from_checkpoint=str(tmp_path / folder))
        assert_same(found, expected)


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each stage: what a run saved, the universal checkpoint made of it, and the losses of both runs."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, "-m", "tests.formats.deepspeed_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_resumes_from_a_universal_checkpoint_made_of_its_partitions(stage: int, partitions: Path) -> None:
    folder = partitions / str(stage)
    expected, found = (json.loads((folder / f"losses{tag}.json").read_text()) for tag in ("", "universal"))
    assert len(set(expected)) == 4
    assert found == expected


@pytest.mark.slow
def test_a_universal_checkpoint_is_what_deepspeeds_own_tool_makes(partitions: Path) -> None:
    folder = partitions / "3"
    ours, made = (open_checkpoint(folder).tree for folder in (folder / "universal", folder / "theirs"))
    assert {name: w.tobytes() for name, w in ours["model"].items()} == {
        n: w.tobytes() for n, w in made["model"].items()
    }
    for name, slots in ours["optimizer"]["state"].items():
        found = made["optimizer"]["state"][name]
        assert {slot: value.tobytes() for slot, value in slots.items()} == {s: v.tobytes() for s, v in found.items()}
    assert difference(*(side["optimizer"]["param_groups"] for side in (ours, made))) is None
