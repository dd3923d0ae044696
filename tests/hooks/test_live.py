"""Trainers of other libraries resume a changed model through a hook. Skipped where they are not installed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.plan.language.plan import Plan
from tests import oracle

pytestmark = pytest.mark.usefixtures("quiet")


class Maps(nn.Module):
    """Two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.out(torch.tanh(self.fc(x))) - x[..., :2]).square().mean()


class Reordered(nn.Module):
    """Maps with other names, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.head(torch.tanh(self.body(x))) - x[..., :2]).square().mean()


def language(name: str, adapted: bool) -> nn.Module:
    """A small GPT-2 from its configuration, with a tied head and a frozen part; adapted, beside a new part."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )

    class Language(transformers.PreTrainedModel):
        config_class = transformers.GPT2Config
        _tied_weights_keys: ClassVar = {f"{name}.lm_head.weight": f"{name}.transformer.wte.weight"}

        def __init__(self) -> None:
            super().__init__(config)
            if adapted:
                self.adapter = nn.Linear(8, 8)  # takes no part in the loss
            setattr(self, name, transformers.GPT2LMHeadModel(config))
            getattr(self, name).transformer.wpe.weight.requires_grad_(False)
            self.post_init()

        def forward(self, x: torch.Tensor) -> Any:
            return getattr(self, name)(x, labels=x).loss

    return Language()


class Change:
    """A model before and after, the plan that says what changed, and data."""

    def __init__(self, old: Any, new: Any, data: Any, renamed: dict[str, str], fresh: list[str]) -> None:
        self.old, self.new, self.data, self.renamed = old, new, data, renamed
        rules = [f"{name}.{{p**}}={new}.{{p}}" for name, new in renamed.items()]
        self.plan = Plan.from_options(rename=rules, fresh=fresh)

    def before(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = self.old()
        return model, torch.optim.AdamW(model.named_parameters(), lr=1e-2)

    def after(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model and an optimizer that load what was saved under the old names."""
        torch.manual_seed(1)
        model = self.new()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
        optimizer.register_load_state_dict_pre_hook(hooks.migrate(self.plan))
        # Trainers save tied weights once, so that of two names one may be missing.
        model.register_load_state_dict_pre_hook(hooks.migrate_model(self.plan.with_policy(missing="fresh")))
        return model, optimizer

    def check(self, old: nn.Module, old_optimizer: Any, new: nn.Module, new_optimizer: Any) -> None:
        """The new run has the old one's weights and state under the new names."""
        weights = dict(new.named_parameters())
        having = 0
        for name, p in old.named_parameters():
            head, _, rest = name.partition(".")
            other = weights.pop(f"{self.renamed[head]}.{rest}")
            assert torch.equal(p, other), name
            assert oracle.differences(dict(old_optimizer.state[p]), dict(new_optimizer.state[other])) == [], name
            having += bool(old_optimizer.state[p])
        assert having >= 4
        assert not any(p in new_optimizer.state for p in weights.values())


def vectors() -> list[torch.Tensor]:
    return list(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def tokens() -> list[torch.Tensor]:
    return list(torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(0)))


CHANGES = {
    "maps": Change(Maps, Reordered, vectors, {"fc": "body", "out": "head"}, []),
    "language": Change(
        partial(language, "lm", False), partial(language, "backbone", True), tokens, {"lm": "backbone"}, ["adapter.{p}"]
    ),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
def test_accelerate_load_state(change: Change, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(model: nn.Module, optimizer: Any, folder: Path | None, steps: int) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        made, prepared = accelerator.prepare(model, optimizer)
        if folder is not None:
            # Strict, it counts names of tied weights by their spelling in the file.
            accelerator.load_state(str(folder), strict=False)
        for x in change.data()[:steps]:
            prepared.zero_grad()
            accelerator.backward(made(x[None]))
            prepared.step()
        return accelerator

    old, old_optimizer = change.before()
    accelerator = run(old, old_optimizer, None, 3)
    accelerator.save_state(str(tmp_path / "saved"))
    new, new_optimizer = change.after()
    run(new, new_optimizer, tmp_path / "saved", 3)
    run(old, old_optimizer, None, 3)
    change.check(old, old_optimizer, new, new_optimizer)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@changes
def test_lightning_ckpt_path(change: Change, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module, optimizer: Any) -> None:
            super().__init__()
            self.model, self.made = model, [optimizer]

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.model(batch)

        def configure_optimizers(self) -> Any:
            return self.made[0]

    def fit(task: Any, epochs: int, **options: Any) -> Any:
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(task, torch.utils.data.DataLoader(change.data(), batch_size=2), **options)
        return trainer

    old, old_optimizer = change.before()
    old_task = Task(old, old_optimizer)
    fit(old_task, 2).save_checkpoint(tmp_path / "last.ckpt")
    new, new_optimizer = change.after()
    # Lightning loads through the task, whose names have its own prefix: the hook belongs to the model inside.
    fit(Task(new, new_optimizer), 4, ckpt_path=tmp_path / "last.ckpt")
    fit(old_task, 4, ckpt_path=tmp_path / "last.ckpt")
    change.check(old, old_optimizer, new, new_optimizer)


def trainer(folder: Path, model: nn.Module, data: list[torch.Tensor], steps: int, given: Any, *added: Any) -> Any:
    """A Trainer with an optimizer that is given, or with its own, which has no names."""
    transformers = pytest.importorskip("transformers")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
            return model(inputs["x"])

        def create_optimizer(self, *args: Any, **options: Any) -> Any:
            optimizer = super().create_optimizer(*args, **options)
            for hook in added:
                optimizer.register_load_state_dict_pre_hook(hook)
            return optimizer

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", weight_decay=0.1,
        max_grad_norm=0,  # clipping adds norms up in the order of the parameters, which rounds by model
    )  # fmt: skip
    schedule = given and torch.optim.lr_scheduler.ConstantLR(given, 1.0)
    rows = [{"x": x} for x in data]
    return Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(given, schedule))


@changes
def test_trainer_resume_from_checkpoint(change: Change, tmp_path: Path) -> None:
    old, old_optimizer = change.before()
    trainer(tmp_path, old, change.data(), 4, old_optimizer).train()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    new, new_optimizer = change.after()
    resumed = trainer(tmp_path, new, change.data(), 4, new_optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    change.check(old, old_optimizer, new, new_optimizer)


@changes
def test_trainer_with_its_own_optimizer_which_has_no_names(change: Change, tmp_path: Path) -> None:
    old, _ = change.before()
    first = trainer(tmp_path, old, change.data(), 4, None)
    first.train()
    names = {p: name for name, p in old.named_parameters()}
    saved = [names[p] for group in first.optimizer.param_groups for p in group["params"]]
    new, _ = change.after()
    given = hooks.match_names(new, saved=saved), hooks.migrate(change.plan)
    resumed = trainer(tmp_path, new, change.data(), 4, None, *given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    change.check(old, first.optimizer.optimizer, new, resumed.optimizer.optimizer)
