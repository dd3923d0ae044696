"""`ResumeMixin` in live runs of the Trainer: its optimizers, tied weights, adapters, a longer schedule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import OptimStateError
from optimstate.plan.language.plan import Plan
from tests import oracle

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


def gpt2(words: int = 12, layers: int = 2, width: int = 8) -> Any:
    torch.manual_seed(layers)
    config = transformers.GPT2Config(vocab_size=words, n_positions=8, n_embd=width, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trainer(folder: Path, model: Any, steps: int, *, mixed: bool = True, **options: Any) -> Any:
    from optimstate.integrations.transformers import ResumeMixin

    bases = (ResumeMixin, transformers.Trainer) if mixed else (transformers.Trainer,)
    kind = type("Run", bases, {})
    given = {"save_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    given |= {"learning_rate": 1e-2, "max_grad_norm": 0, "weight_decay": 0.1, **options}
    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, **given)
    rows = [{"input_ids": torch.arange(i, i + 6) % 11, "labels": torch.arange(i, i + 6) % 11} for i in range(8)]
    return kind(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_bnb_8bit", "lion_32bit"])
def test_an_unchanged_run_goes_on_as_the_trainer_lets_it(optim: str, tmp_path: Path) -> None:
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    trainer(tmp_path, gpt2(), 2, optim=optim).train()
    models = []
    for mixed in (True, False):
        run = trainer(tmp_path / str(mixed), model := gpt2(), 4, mixed=mixed, optim=optim)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        models.append(model.state_dict())
    assert not oracle.differences(*models)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_bnb_8bit"])
def test_a_vocabulary_grows_and_a_layer_is_inserted(optim: str, tmp_path: Path) -> None:
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    width = 40 if "8bit" in optim else 8  # from 4096 elements on, bitsandbytes keeps codes
    old = gpt2(width=width)
    first = trainer(tmp_path, old, 2, optim=optim)
    first.train()
    run = trainer(tmp_path, new := gpt2(14, 3, width), 3, optim=optim)
    run.resume_plan = Plan.from_toml(
        'rule = [\n{ from = "transformer.h.1.{p**}", to = "transformer.h.2.{p}" },\n{ fresh = "transformer.h.1.**" },\n'
        '{ from = "{p**}.wte.weight", to = "{p}.wte.weight", resize = { dim = 0, size = 14, fill = 0.0 } },\n'
        '{ from = "lm_head.weight", to = "lm_head.weight", resize = { dim = 0, size = 14, fill = 0.0 } },\n]\n'
        '[policy]\nunused = "ignore"\n'
    )
    seen: dict[str, Any] = {}
    load = run._load_optimizer_and_scheduler

    def noted(checkpoint: str) -> None:
        load(checkpoint)
        seen.update({name: p.detach().clone() for name, p in new.named_parameters()})
        seen["state"] = copy.deepcopy({n: run.optimizer.state.get(p, {}) for n, p in new.named_parameters()})

    run._load_optimizer_and_scheduler = noted
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    was = dict(old.named_parameters())
    assert torch.equal(seen["transformer.h.2.attn.c_attn.weight"], was["transformer.h.1.attn.c_attn.weight"])
    assert torch.equal(seen["transformer.wte.weight"][:12], was["transformer.wte.weight"])
    assert not seen["state"]["transformer.h.1.attn.c_attn.weight"]
    saved = first.optimizer.state[was["transformer.h.1.attn.c_attn.weight"]]
    assert ("8bit" in optim) == (saved.get("state1", torch.ones(1)).dtype == torch.uint8)
    for slot, value in seen["state"]["transformer.h.2.attn.c_attn.weight"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved[slot])), slot


def test_an_adapter_and_the_empty_group_beside_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(7)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0)
        return peft.get_peft_model(gpt2(), config)

    constant = {"lr_scheduler_type": "constant"}
    trainer(tmp_path / "one", whole := adapted(), 4, **constant).train()
    trainer(tmp_path / "two", adapted(), 2, **constant).train()
    saved = torch.load(tmp_path / "two" / "checkpoint-2" / "optimizer.pt")
    assert [len(group["params"]) for group in saved["param_groups"]] == [4, 0]
    trainer(tmp_path / "two", resumed := adapted(), 4, **constant).train(resume_from_checkpoint=True)
    assert not oracle.differences(
        {k: v for k, v in whole.state_dict().items() if "lora" in k},
        {k: v for k, v in resumed.state_dict().items() if "lora" in k},
    )


class Rates(transformers.TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, *_: Any, **options: Any) -> None:
        self.seen.append(options["optimizer"].param_groups[0]["lr"])


def test_more_steps_with_the_schedule_of_this_run(tmp_path: Path) -> None:
    trainer(tmp_path, gpt2(), 2, lr_scheduler_type="cosine").train()
    resumed, whole = Rates(), Rates()
    run = trainer(tmp_path, gpt2(), 10, lr_scheduler_type="cosine")
    run.resume_schedule = "live"
    run.add_callback(resumed)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    longer = trainer(tmp_path / "whole", gpt2(), 10, lr_scheduler_type="cosine")
    longer.add_callback(whole)
    longer.train()
    assert resumed.seen == pytest.approx(whole.seen[2:])


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt"])
def test_an_extended_run_has_the_rates_that_the_trainer_gives_it(schedule: str, tmp_path: Path) -> None:
    """`max_steps` changed, and with it the horizon: the Trainer computes rates from this run's."""
    options = {"lr_scheduler_type": schedule, "warmup_steps": 1}
    trainer(tmp_path, gpt2(), 2, **options).train()
    seen = []
    for mixed in (True, False):
        run = trainer(tmp_path / str(mixed), gpt2(), 6, mixed=mixed, **options)
        run.add_callback(rates := Rates())
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        seen.append(rates.seen)
    assert seen[0] == pytest.approx(seen[1])
    assert len(seen[0]) == 4


def test_an_older_checkpoint_without_names_says_what_is_missing(tmp_path: Path) -> None:
    first = trainer(tmp_path, gpt2(), 2, mixed=False)
    first.train()
    unchanged = trainer(tmp_path, gpt2(), 3)
    unchanged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "config.json").unlink()
    plan = Plan.from_options(rename=["transformer.h.1.{p**}=transformer.h.2.{p}"], fresh=["transformer.h.1.**"])
    changed = trainer(tmp_path, gpt2(layers=3), 3)
    changed.resume_plan = plan
    with pytest.raises(OptimStateError, match="does not keep the model's order"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    names = {id(p): name for name, p in first.model.named_parameters()}
    changed = trainer(tmp_path, gpt2(layers=3), 3)
    changed.resume_plan = plan
    changed.resume_saved = [names[id(p)] for group in first.optimizer.param_groups for p in group["params"]]
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
