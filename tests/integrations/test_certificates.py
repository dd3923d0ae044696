"""In every trainer: an untouched resume passes its certificate, and each way to lose or change state fails."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import OptimStateError
from tests.losses import WAYS

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own

Change = Callable[[dict[str, Any]], None]
WITHOUT_SCHEDULE = [way for way in WAYS if "schedule" not in way]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))


def changed(folder: Path, change: Change, weights: str, optimizer: str, scheduler: str) -> None:
    """Change the files of a folder."""
    from safetensors.torch import load_file, save_file

    parts = {"weights": load_file(folder / weights)}
    for part, file in (("optimizer", optimizer), ("scheduler", scheduler)):
        parts[part] = torch.load(folder / file, weights_only=False)
    change(parts)
    save_file(parts["weights"], folder / weights, {"format": "pt"})
    for part, file in (("optimizer", optimizer), ("scheduler", scheduler)):
        torch.save(parts[part], folder / file)


# --- transformers -----------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """What the Trainer calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


def trainer(folder: Path, steps: int) -> Any:
    transformers = pytest.importorskip("transformers")
    from optimstate.integrations.transformers import ResumeMixin

    kind = type("Run", (ResumeMixin, transformers.Trainer), {"resume_certificate": True})
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, weight_decay=0.1,
        per_device_train_batch_size=2, lr_scheduler_type="cosine", warmup_steps=1,
    )  # fmt: skip
    rows = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    return kind(model=Rows(), args=arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def trainer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    trainer(folder, 2).train()
    return folder / "checkpoint-2"


def test_trainer_untouched(trainer_folder: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, 3)
    run.train(resume_from_checkpoint=str(trainer_folder))
    assert run.resumed is not None


@pytest.mark.parametrize("way", WAYS)
def test_trainer_changed(way: str, trainer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trainer_folder, tmp_path / "checkpoint-2"))
    changed(folder, WAYS[way], "model.safetensors", "optimizer.pt", "scheduler.pt")
    run = trainer(tmp_path / "new", 3)
    with pytest.raises(OptimStateError, match=r"certified|checkpoint"):
        run._load_optimizer_and_scheduler(_prepared(run, str(folder)))


def _prepared(run: Any, folder: str) -> str:
    """What `train` does before it loads."""
    run.create_optimizer_and_scheduler(num_training_steps=3)
    return folder


# --- accelerate -------------------------------------------------------------------------------------------------------


def accelerated() -> tuple[Any, list[Any]]:
    accelerate = pytest.importorskip("accelerate")
    from optimstate.integrations.accelerate import Resume

    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    accelerator = accelerate.Accelerator(cpu=True)
    Resume(accelerator, certificate=True)
    return accelerator, list(accelerator.prepare(model, optimizer, scheduler))


@pytest.fixture(scope="module")
def accelerate_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerate")
    accelerator, (model, optimizer, scheduler) = accelerated()
    for _ in range(3):
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder / "checkpoint"))
    return folder / "checkpoint"


def test_accelerate_untouched(accelerate_folder: Path) -> None:
    accelerated()[0].load_state(str(accelerate_folder))


@pytest.mark.parametrize("way", WAYS)
def test_accelerate_changed(way: str, accelerate_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(accelerate_folder, tmp_path / "checkpoint"))
    changed(folder, WAYS[way], "model.safetensors", "optimizer.bin", "scheduler.bin")
    with pytest.raises(OptimStateError, match=r"certified|checkpoint"):
        accelerated()[0].load_state(str(folder))


# --- lightning --------------------------------------------------------------------------------------------------------


def fit(folder: Path, epochs: int, path: Path | None = None) -> Any:
    lightning = pytest.importorskip("pytorch_lightning")
    from optimstate.integrations.lightning import ResumeCallback

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    run = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[ResumeCallback(certificate=True)], default_root_dir=folder,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    run.fit(Task(), torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=path and str(path))
    return run


@pytest.fixture(scope="module")
def lightning_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lightning")
    fit(folder, 1).save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_lightning_untouched(lightning_file: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, 2, lightning_file).current_epoch == 2


@pytest.mark.parametrize("way", WAYS)
def test_lightning_changed(way: str, lightning_file: Path, tmp_path: Path) -> None:
    found = torch.load(lightning_file, weights_only=False)
    WAYS[way](
        {
            "weights": found["state_dict"],
            "optimizer": found["optimizer_states"][0],
            "scheduler": found["lr_schedulers"][0],
        }
    )
    torch.save(found, tmp_path / "changed.ckpt")
    with pytest.raises(OptimStateError, match=r"certified|checkpoint"):
        fit(tmp_path, 2, tmp_path / "changed.ckpt")


# --- stable-baselines3 ------------------------------------------------------------------------------------------------


def agent() -> Any:
    gymnasium, numpy = pytest.importorskip("gymnasium"), pytest.importorskip("numpy")
    baselines = pytest.importorskip("stable_baselines3")

    class Still(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = gymnasium.spaces.Box(-1, 1, (4,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: Any = None, **_: Any) -> Any:
            super().reset(seed=seed)
            return numpy.ones(4, numpy.float32), {}

        def step(self, action: Any) -> Any:
            return numpy.ones(4, numpy.float32), float(action), True, False, {}

    return baselines.PPO("MlpPolicy", Still(), n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [4]})


@pytest.fixture(scope="module")
def agent_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = agent()
    from optimstate.integrations.stable_baselines3 import certify_algorithm

    certify_algorithm(made)
    made.learn(8)
    path = tmp_path_factory.mktemp("agent") / "ppo.zip"
    made.save(path)
    return path


def test_baselines_untouched(agent_file: Path) -> None:
    from optimstate.integrations.stable_baselines3 import resume_algorithm

    resume_algorithm(agent(), agent_file, certificate=True)


@pytest.mark.parametrize("way", WITHOUT_SCHEDULE)
def test_baselines_changed(way: str, agent_file: Path, tmp_path: Path) -> None:
    from optimstate.integrations.stable_baselines3 import resume_algorithm

    with zipfile.ZipFile(agent_file) as old, zipfile.ZipFile(tmp_path / "ppo.zip", "w") as new:
        read = {name: old.read(name) for name in old.namelist()}
        parts = {
            part: torch.load(io.BytesIO(read[name]), weights_only=False)
            for part, name in (("weights", "policy.pth"), ("optimizer", "policy.optimizer.pth"))
        }
        WAYS[way](parts)
        for part, name in (("weights", "policy.pth"), ("optimizer", "policy.optimizer.pth")):
            torch.save(parts[part], buffer := io.BytesIO())
            read[name] = buffer.getvalue()
        for name, content in read.items():
            new.writestr(name, content)
    with pytest.raises(OptimStateError, match=r"certified|checkpoint"):
        resume_algorithm(agent(), tmp_path / "ppo.zip", certificate=True)


# --- timm -------------------------------------------------------------------------------------------------------------


def script(certificate: Any = False, path: Path | None = None) -> tuple[Any, Any]:
    """What timm's train.py keeps; its saver writes these keys."""
    from optimstate.integrations.timm import resume_checkpoint

    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    if path is not None:
        resume_checkpoint(model, path, optimizer, certificate=certificate)
    return model, optimizer


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from optimstate import hooks

    model, optimizer = script()
    for _ in range(3):
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    optimizer.register_state_dict_post_hook(hooks.certify(model))
    saved = {"epoch": 3, "arch": "net", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = tmp_path_factory.mktemp("timm") / "last.pth.tar"
    torch.save({**saved, "version": 2}, path)
    return path


def test_timm_untouched(timm_file: Path) -> None:
    script(True, timm_file)


@pytest.mark.parametrize("way", WITHOUT_SCHEDULE)
def test_timm_changed(way: str, timm_file: Path, tmp_path: Path) -> None:
    found = torch.load(timm_file, weights_only=False)
    WAYS[way]({"weights": found["state_dict"], "optimizer": found["optimizer"]})
    torch.save(found, tmp_path / "changed.pth.tar")
    with pytest.raises(OptimStateError, match=r"certified|checkpoint"):
        script(True, tmp_path / "changed.pth.tar")
