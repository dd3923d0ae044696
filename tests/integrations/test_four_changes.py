"""A layer inserted, heads added, a vocabulary grown, a rename in every trainer: the losses of a change by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from tests.integrations.changes import (
    CHANGES,
    TOKENS,
    Net,
    changed,
    expected_losses,
    is_new,
    move_by_hand,
    plan,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own

OLD, MORE = 3, 3
OPTIONS = {"lr": 1e-2, "weight_decay": 0.0}
Resumed = list[float]


def with_trainer(folder: Path, change: str) -> Resumed:
    transformers = pytest.importorskip("transformers")
    from optimstate.integrations.transformers import ResumeMixin

    kind = type("Run", (ResumeMixin, transformers.Trainer), {"resume_plan": plan(change)})
    options = {"save_steps": OLD, "report_to": [], "use_cpu": True, "disable_tqdm": True, "optim": "adamw_torch"}
    options |= {"learning_rate": 1e-2, "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    rows = [{"tokens": row} for row in TOKENS] * 3

    def run(net: Net, steps: int, path: str | None) -> Resumed:
        given = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=len(TOKENS), **options
        )
        # In the order of the rows, so that every batch is the same.
        made = kind(model=net, args=given, train_dataset=rows)
        made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        made.train(resume_from_checkpoint=path)
        return net.losses

    run(Net(), OLD, None)
    return run(changed(change), OLD + MORE, str(folder / f"checkpoint-{OLD}"))


def with_accelerate(folder: Path, change: str) -> Resumed:
    accelerate = pytest.importorskip("accelerate")
    from optimstate.integrations.accelerate import Resume

    def prepared(net: Net) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(net, torch.optim.AdamW(net.named_parameters(), **OPTIONS))

    accelerator, net, optimizer = prepared(Net())
    train(net, optimizer, OLD)
    accelerator.save_state(str(folder / "saved"))
    accelerator, net, optimizer = prepared(changed(change))
    Resume(accelerator, plan(change))
    accelerator.load_state(str(folder / "saved"))
    return train(net, optimizer, MORE)


def with_lightning(folder: Path, change: str) -> Resumed:
    lightning = pytest.importorskip("pytorch_lightning")
    from optimstate.integrations.lightning import ResumeCallback

    class Task(lightning.LightningModule):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(batch[0])["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), **OPTIONS)

    def fit(net: Net, epochs: int, callbacks: list[Any], path: str | None) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=callbacks,
        )  # fmt: skip
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS), batch_size=len(TOKENS))
        trainer.fit(Task(net), data, ckpt_path=path)
        return trainer

    fit(Net(), OLD, [], None).save_checkpoint(folder / "last.ckpt")
    net = changed(change)
    inside = optimstate.Plan.from_toml(_inside("net", CHANGES[change][1]))
    fit(net, OLD + MORE, [ResumeCallback(inside)], str(folder / "last.ckpt"))
    return net.losses


def _inside(module: str, text: str) -> str:
    """A plan for the same model as a part of another."""
    for key in ("from", "to", "fresh"):
        text = text.replace(f'{key} = "', f'{key} = "{"{x}.net" if key == "to" and "{x=" in module else module}.')
    return text


def with_a_loop(folder: Path, change: str) -> Resumed:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, OLD)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")
    net = changed(change)
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    optimstate.resume(folder / "last.pt", model=net, optimizer=optimizer, plan=plan(change))
    return train(net, optimizer, MORE)


def with_dcp(folder: Path, change: str) -> Resumed:
    from torch.distributed import checkpoint

    from optimstate.distributed import NamedSavePlanner, optimizer_names

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, OLD)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    planner = NamedSavePlanner(list(optimizer_names(optimizer, net)))
    checkpoint.save(state, checkpoint_id=folder / "saved", planner=planner)
    net = changed(change)
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    optimstate.resume(folder / "saved", model=net, optimizer=optimizer, plan=plan(change))
    return train(net, optimizer, MORE)


def with_dcp_load(folder: Path, change: str) -> Resumed:
    """`torch.distributed.checkpoint.load` itself, as torchtitan calls it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from optimstate.distributed import PlanLoadPlanner

    def parts(net: Net) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
        if not (folder / "saved").exists():
            train(net, optimizer, OLD)
        weights, state = get_state_dict(net, optimizer)
        return optimizer, {"model": weights, "optimizer": state}

    checkpoint.save(parts(Net())[1], checkpoint_id=folder / "saved")
    optimizer, state = parts(net := changed(change))
    planner = PlanLoadPlanner(folder / "saved", plan(change))
    checkpoint.load(state, checkpoint_id=folder / "saved", planner=planner)
    assert any("new" in note for note in planner.notes) == (change == "a layer inserted")
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return train(net, optimizer, MORE)


def with_timm(folder: Path, change: str) -> Resumed:
    pytest.importorskip("timm")
    from timm.utils import CheckpointSaver

    from optimstate.integrations.timm import resume_checkpoint

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, OLD)
    CheckpointSaver(net, optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder)).save_checkpoint(epoch=2)
    net = changed(change)
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIONS)
    assert resume_checkpoint(net, folder / "last.pth.tar", optimizer, plan=plan(change)) == 3
    return train(net, optimizer, MORE)


def with_composer(folder: Path, change: str) -> Resumed:
    composer = pytest.importorskip("composer")

    class Task(composer.ComposerModel):  # type: ignore[misc,name-defined]
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Any) -> Any:
            return self.net(batch)["loss"]

        def loss(self, outputs: Any, batch: Any) -> Any:
            return outputs

    def trainer(net: Net, steps: int, **options: Any) -> Any:
        data = torch.utils.data.DataLoader(TOKENS, batch_size=len(TOKENS))
        optimizer = torch.optim.AdamW((task := Task(net)).parameters(), **OPTIONS)
        options |= {"progress_bar": False, "device": "cpu", "save_interval": f"{OLD}ba"}
        return composer.Trainer(
            model=task, optimizers=optimizer, train_dataloader=data, max_duration=f"{steps}ba", **options
        )

    trainer(Net(), OLD, save_folder=str(folder), save_filename="last.pt").fit()
    path, net = folder / "last.pt", changed(change)
    ignored = ["state/model", "state/optimizers"]
    run = trainer(net, OLD + MORE, load_path=str(path), load_ignore_keys=ignored)
    inside = optimstate.Plan.from_toml(_inside("net", CHANGES[change][1]))
    optimstate.resume(path, model=run.state.model, optimizer=run.state.optimizers[0], plan=inside)
    run.fit()
    return net.losses


def with_torchtitan(folder: Path, change: str) -> Resumed:
    pytest.importorskip("torchtitan")
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

    from optimstate.integrations.torchtitan import Resume

    def parts(net: Net) -> tuple[Any, Any]:
        group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=OPTIONS)
        config = OptimizersContainer.Config(param_groups=[group], implementation="for-loop")
        optimizers = OptimizersContainer(config, model_parts=[net])
        rates = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0)
        given = {"dataloader": None, "states": {}, "sd_adapter": None, "base_folder": str(folder)}
        config = CheckpointManager.Config(enable=True, interval=OLD, keep_latest_k=0)
        schedulers = rates.build(optimizers=optimizers, training_steps=OLD + MORE)
        return optimizers, CheckpointManager(
            config, model_parts=[net], optimizers=optimizers, lr_schedulers=schedulers, **given
        )

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        optimizers, manager = parts(net := Net())
        train(net, optimizers, OLD)
        manager.save(OLD)
        optimizers, manager = parts(net := changed(change))
        Resume(manager, plan(change))
        assert manager.load()
        return train(net, optimizers, MORE)
    finally:
        torch.distributed.destroy_process_group()


def fastai_learner(folder: Path, net: Net, optimizer: Any) -> Any:
    pytest.importorskip("fastai")
    import fastai.callback.progress  # noqa: F401  # has `no_bar`
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    data = DataLoaders(DataLoader([(TOKENS, TOKENS)], bs=None), DataLoader([], bs=None))
    options = {"lr": OPTIONS["lr"], "wd": OPTIONS["weight_decay"], "path": folder, "model_dir": "."}
    return Learner(
        data, net, lambda made, _: made["loss"], optimizer, splitter=lambda m: [[*m.parameters()]], **options
    )


def fitted(learner: Any, epochs: int) -> Resumed:
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs)
    losses: Resumed = learner.model.losses[-epochs:]
    return losses


def with_fastai(folder: Path, change: str) -> Resumed:
    pytest.importorskip("fastai")
    from fastai.optimizer import OptimWrapper

    from optimstate.integrations.fastai import resume_learner

    wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)
    fitted(old := fastai_learner(folder, Net(), wrapped), OLD)
    old.save("last")
    learner = fastai_learner(folder, changed(change), wrapped)
    resume_learner(learner, folder / "last.pth", plan=plan(change))
    return fitted(learner, MORE)


RUNS: list[Callable[[Path, str], Resumed]] = [with_a_loop, with_trainer, with_accelerate, with_lightning, with_dcp]
RUNS += [with_dcp_load, with_timm, with_composer, with_torchtitan, with_fastai]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_changed_run_goes_on_as_one_that_was_changed_by_hand(
    run: Callable[[Path, str], Resumed], change: str, tmp_path: Path
) -> None:
    found = run(tmp_path, change)
    assert len(found) == MORE
    new_step = 1 if run is with_dcp_load else None  # torch makes state for `get_state_dict` by a step without gradients
    assert found == expected_losses(change, OLD, MORE, new_step=new_step, **OPTIONS)


@pytest.mark.parametrize("change", CHANGES)
def test_the_optimizer_of_fastai(change: str, tmp_path: Path) -> None:
    pytest.importorskip("fastai")
    from fastai.optimizer import Adam

    from optimstate.integrations.fastai import resume_learner

    old, new, hand = (fastai_learner(tmp_path, net, Adam) for net in (Net(), changed(change), changed(change)))
    fitted(old, OLD)
    old.save("last")
    resume_learner(new, tmp_path / "last.pth", plan=plan(change))
    hand.create_opt()
    move_by_hand(change, (old.model, old.opt.state), (hand.model, hand.opt.state))
    assert fitted(new, MORE) == fitted(hand, MORE)


@pytest.mark.parametrize("change", CHANGES)
def test_a_policy_of_stable_baselines3(change: str, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    gymnasium = pytest.importorskip("gymnasium")
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    from optimstate.integrations.stable_baselines3 import resume_algorithm

    class Features(BaseFeaturesExtractor):  # type: ignore[misc]
        def __init__(self, space: Any, net: Callable[[], Net]) -> None:
            super().__init__(space, 4)
            self.net = net()

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            x = self.net.emb(observations.long()[:, 0] % 6)
            for block in self.net.blocks:
                x = block(x)
            return x + getattr(self.net, self.net.out_name)(x)

    class Walk(gymnasium.Env):  # type: ignore[misc]
        observation_space = gymnasium.spaces.Box(0, 9, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, **_: Any) -> Any:
            super().reset(seed=seed)
            self.x = self.observation_space.low.copy()
            return self.x, {}

        def step(self, action: Any) -> Any:
            self.x = (self.x + 1 + action) % 6
            return self.x, float(action), False, False, {}

    def agent(net: Callable[[], Net]) -> Any:
        kwargs = {"features_extractor_class": Features, "features_extractor_kwargs": {"net": net}, "net_arch": []}
        return sb3.PPO("MlpPolicy", Walk(), n_steps=8, batch_size=8, n_epochs=1, device="cpu", policy_kwargs=kwargs)

    class Losses(Logger):  # type: ignore[misc]
        def record(self, key: str, value: Any, exclude: Any = None) -> None:
            if key == "train/loss":
                self.found.append(value)

    def losses(agent: Any) -> list[float]:
        agent.set_random_seed(2)
        agent.action_space.seed(2)
        agent.set_logger(logger := Losses(None, []))
        logger.found = []
        agent.learn(24, reset_num_timesteps=False)
        return list(logger.found)

    old, new, hand = agent(Net), agent(lambda: changed(change)), agent(lambda: changed(change))
    old.learn(8)
    old.save(tmp_path / "ppo.zip")
    # The state dict of a policy has its one extractor under three names.
    shared = "{x=features_extractor|pi_features_extractor|vf_features_extractor}.net"
    inside = optimstate.Plan.from_toml(_inside(shared, CHANGES[change][1]))
    before = {name: p.detach().clone() for name, p in new.policy.named_parameters()}
    resume_algorithm(new, tmp_path / "ppo.zip", plan=inside)
    for name, parameter in new.policy.named_parameters():
        if is_new(change, name):
            assert torch.equal(parameter, before[name])
            hand.policy.get_parameter(name).data.copy_(parameter)
            assert not new.policy.optimizer.state.get(parameter)
    move_by_hand(change, (old.policy, old.policy.optimizer.state), (hand.policy, hand.policy.optimizer.state))
    hand.num_timesteps, hand._n_updates = old.num_timesteps, old._n_updates
    found = losses(new)
    assert found == losses(hand)
    assert len(found) == 3
    assert new.num_timesteps == 32
