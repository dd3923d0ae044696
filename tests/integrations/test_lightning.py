"""`ResumeCallback` beside a callback that keeps an average by the model's names, and where a plan does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import OptimStateError
from optimstate.plan.language.plan import Plan
from tests import oracle

lightning = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # the framework's own


class Task(lightning.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 4))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return getattr(self, self.name)(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Average(lightning.Callback):
    """An average of the weights, which it swaps in for validation, as many projects write their own."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.weights[name] = self.weights.get(name, value.detach().clone()).lerp(value.detach(), 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": 0.5, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = dict(state_dict["weights"])


class Saved(lightning.Callback):
    """Saves in the middle of a run: at its end `WeightAveraging` puts the average into the model."""

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(folder: Path, task: Task, epochs: int, *callbacks: Any, path: str | None = None) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=folder,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.ones(4, 4))
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=path)
    return trainer


def test_what_other_callbacks_keep_gets_the_new_names(tmp_path: Path) -> None:
    from optimstate.integrations.lightning import ResumeCallback

    average = Average()
    path = str(tmp_path / "last.ckpt")
    fit(tmp_path, Task("old"), 1, average).save_checkpoint(path)
    expected = {name.replace("old.", "new."): value.clone() for name, value in average.weights.items()}
    later = Average()
    resume = ResumeCallback(Plan.from_options(rename=["old.{p}=new.{p}"]))
    fit(tmp_path, Task("new"), 1, resume, later, path=path)  # nothing is left to train
    assert later.weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in later.weights.items())


def test_a_plan_that_does_not_fit_stops_the_run(tmp_path: Path) -> None:
    from optimstate.integrations.lightning import ResumeCallback

    path = str(tmp_path / "last.ckpt")
    fit(tmp_path, Task("old"), 1).save_checkpoint(path)
    with pytest.raises(OptimStateError, match=r"new\.weight"):
        fit(tmp_path, Task("new"), 2, ResumeCallback(), path=path)


@pytest.mark.parametrize("first", [True, False])
def test_the_average_that_lightning_saves_as_the_model_stays_the_average(first: bool, tmp_path: Path) -> None:
    """`WeightAveraging` puts the average in the place of the weights; the oracle is the file with names changed."""
    from pytorch_lightning.callbacks import EMAWeightAveraging

    from optimstate.integrations.lightning import ResumeCallback

    path, by_hand = str(tmp_path / "last.ckpt"), str(tmp_path / "by-hand.ckpt")
    fit(tmp_path, Task("old"), 2, EMAWeightAveraging(decay=0.5), Saved(path, 3))
    saved = torch.load(path, weights_only=False)
    for key in ("state_dict", "current_model_state"):
        saved[key] = {name.replace("old.", "new."): value for name, value in saved[key].items()}
    assert not torch.equal(saved["state_dict"]["new.weight"], saved["current_model_state"]["new.weight"])
    torch.save(saved, by_hand)
    fit(tmp_path, expected := Task("new"), 4, mine := EMAWeightAveraging(decay=0.5), path=by_hand)
    resume = ResumeCallback(Plan.from_options(rename=["old.{p}=new.{p}"]))
    average = EMAWeightAveraging(decay=0.5)
    callbacks = [resume, average] if first else [average, resume]
    fit(tmp_path, task := Task("new"), 4, *callbacks, path=path)
    assert not oracle.differences(task.state_dict(), expected.state_dict())
    assert not oracle.differences(average._average_model.state_dict(), mine._average_model.state_dict())
