"""Trainers of other libraries resume a changed model through a hook. Skipped where they are not installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.plan.rules import Plan
from tests import oracle

pytestmark = pytest.mark.filterwarnings("ignore")
PLAN = Plan.from_options(rename=["fc.{p}=body.{p}", "out.{p}=head.{p}"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(previous)


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.fc(x)))


class New(nn.Module):
    """Old with other names, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def data() -> list[torch.Tensor]:
    return list(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x[..., :2]).square().mean()


def hooked(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that, like its model, loads what was saved under the old names."""
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    optimizer.register_load_state_dict_pre_hook(hooks.migrate(PLAN))
    model.register_load_state_dict_pre_hook(hooks.migrate_model(PLAN))
    return optimizer


def same(old: nn.Module, old_optimizer: Any, new: nn.Module, new_optimizer: Any) -> None:
    """The new run has the old one's weights and state under the new names."""
    weights = dict(new.named_parameters())
    for name, p in old.named_parameters():
        other = weights[name.replace("fc.", "body.").replace("out.", "head.")]
        assert torch.equal(p, other)
        assert oracle.differences(dict(old_optimizer.state[p]), dict(new_optimizer.state[other])) == []


def test_accelerate_load_state(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(model: nn.Module, optimizer: Any, folder: Path | None, steps: int) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        made, prepared = accelerator.prepare(model, optimizer)
        if folder is not None:
            accelerator.load_state(str(folder))
        for x in data()[:steps]:
            prepared.zero_grad()
            accelerator.backward(loss_of(made, x))
            prepared.step()
        return accelerator

    torch.manual_seed(0)
    old = Old()
    old_optimizer = torch.optim.AdamW(old.named_parameters(), lr=1e-2)
    accelerator = run(old, old_optimizer, None, 3)
    accelerator.save_state(str(tmp_path / "saved"))
    new = New()
    new_optimizer = hooked(new)
    run(new, new_optimizer, tmp_path / "saved", 0)
    same(old, old_optimizer, new, new_optimizer)


def test_lightning_ckpt_path(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module, optimizer: Any) -> None:
            super().__init__()
            self.model, self.made = model, [optimizer]

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Any:
            return self.made[0]

    def fit(task: Any, epochs: int, **options: Any) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(data(), batch_size=2), **options)
        return trainer

    torch.manual_seed(0)
    old = Old()
    old_task = Task(old, torch.optim.AdamW(old.named_parameters(), lr=1e-2))
    fit(old_task, 2).save_checkpoint(tmp_path / "last.ckpt")
    new = New()
    # Lightning loads through the task, whose names have its own prefix: the hook belongs to the model inside.
    new_task = Task(new, hooked(new))
    fit(new_task, 4, ckpt_path=tmp_path / "last.ckpt")
    fit(old_task, 4, ckpt_path=tmp_path / "last.ckpt")
    same(old, old_task.made[0], new, new_task.made[0])


def test_trainer_resume_from_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> Any:
            return {"loss": loss_of(self.model, x)}

    def trainer(model: nn.Module, optimizer: Any, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        rows = [{"x": x} for x in data()]
        return transformers.Trainer(
            model=Wrapped(model), args=arguments, train_dataset=rows, optimizers=(optimizer, schedule)
        )

    torch.manual_seed(0)
    old = Old()
    old_optimizer = torch.optim.AdamW(old.named_parameters(), lr=1e-2)
    trainer(old, old_optimizer, 4).train()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    new = New()
    new_optimizer = hooked(new)
    trainer(new, new_optimizer, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(old, old_optimizer, new, new_optimizer)
