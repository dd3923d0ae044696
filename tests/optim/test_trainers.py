"""Trainers that ask for torch's classes by `isinstance` drive ours. Skipped where they are not installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate.optim as optim
from tests import oracle

LIBRARIES = {"torch": torch.optim, "ours": optim}


class Model(nn.Module):
    """One map that learns the identity; its metric stalls, so that a plateau is seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.map(x) - x).square().mean()


def vectors() -> list[torch.Tensor]:
    return list(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))


def outcome(model: nn.Module, optimizer: Any, plateau: Any) -> dict[str, Any]:
    state = {key: value for key, value in plateau.state_dict().items() if isinstance(value, int | float | list)}
    return {"weights": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "plateau": state}


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_lightning_steps_our_plateau_with_the_metric(name: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self, library: Any) -> None:
            super().__init__()
            self.model, self.library = Model(), library

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss = self.model(batch)
            self.log("worse", float(self.current_epoch))
            return loss

        def configure_optimizers(self) -> Any:
            self.optimizer = getattr(self.library, name)(self.model.named_parameters(), lr=0.1)
            self.plateau = self.library.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0, factor=0.5)
            return {"optimizer": self.optimizer, "lr_scheduler": self.plateau, "monitor": "worse"}

    found = {}
    for which, library in LIBRARIES.items():
        task = Task(library)
        trainer = lightning.Trainer(
            max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(vectors(), batch_size=2))
        trainer.save_checkpoint(tmp_path / f"{which}.ckpt")
        found[which] = outcome(task.model, task.optimizer, task.plateau)
        found[which]["saved"] = torch.load(tmp_path / f"{which}.ckpt", weights_only=False)["lr_schedulers"]
    assert found["ours"]["plateau"]["_last_lr"] == [0.1 * 0.5**3]
    assert oracle.differences(found["torch"], found["ours"]) == []


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_transformers_trainer_steps_our_plateau_with_the_metric(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
            return model(inputs["x"])

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            self.seen = getattr(self, "seen", 0.0) + 1.0
            metrics = {"eval_loss": self.seen}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    found = {}
    for which, library in LIBRARIES.items():
        model = Model()
        optimizer = getattr(library, name)(model.named_parameters(), lr=0.1)
        plateau = library.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / which), num_train_epochs=4, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", eval_strategy="epoch",
            save_strategy="epoch", metric_for_best_model="eval_loss", load_best_model_at_end=False, seed=1,
        )  # fmt: skip
        rows = [{"x": x} for x in vectors()]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, plateau)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Trainer's own, on saving
            trainer.train()
        found[which] = outcome(model, optimizer, plateau)
    assert found["ours"]["plateau"]["_last_lr"] == [0.1 * 0.5**3]
    assert oracle.differences(found["torch"], found["ours"]) == []
