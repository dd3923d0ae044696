"""`optimstate.resume`: weights, average, optimizer, scheduler and scaler of a changed model, all of them or none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optimstate
from optimstate import hooks
from optimstate.errors import MigrationError, OptimStateError, StateMismatchError
from optimstate.plan.language.plan import Plan
from tests import oracle
from tests.hooks.models import MODULES, Net, adam, one_group, two_groups
from tests.support import seeded

FUSE = Plan.from_toml(
    '[[rule]]\nfrom = "block.{x=q|k|v}.{kind}"\nto = "block.qkv.{kind}"\nconcat = 0\n'
    '[[rule]]\nfrom = "unused.{rest**}"\nto = "spare.{rest}"\n'
)


class Changed(Net):
    """Net with fused projections and a renamed part."""

    def __init__(self) -> None:
        super().__init__(fused=True)
        self.spare, self.unused = self.unused, None


class Run:
    """Everything a training script has."""

    def __init__(self, model: nn.Module, module: Any = torch.optim, layout: Callable[[nn.Module], Any] = one_group):
        self.model = model
        self.optimizer = adam(module, layout(model))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)

    def train(self, steps: int, start: int = 0) -> list[float]:
        losses = []
        for step in range(start, start + steps):
            tokens = torch.randint(6, (9,), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(tokens), tokens.roll(1))
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.ema.update_parameters(self.model)
            losses.append(loss.item())
        return losses

    def parts(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("model", "optimizer", "scheduler", "ema", "scaler")}

    def state(self) -> dict[str, Any]:
        return {key: copy.deepcopy(part.state_dict()) for key, part in self.parts().items()}


def saved(tmp_path: Path, run: Run, kind: str) -> Any:
    if kind == "dict":
        return run.state()
    torch.save(run.state(), tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("kind", ["dict", "file"])
def test_an_unchanged_run_goes_on_bit_for_bit(tmp_path: Path, kind: str, module: Any) -> None:
    run = Run(seeded(Net), module)
    run.train(5)
    other = Run(seeded(Net, 1), module)
    made = optimstate.resume(saved(tmp_path, run, kind), **other.parts())
    assert oracle.differences(run.state(), other.state()) == []
    assert made.problems == ()
    assert run.train(10, 5) == other.train(10, 5)
    assert oracle.differences(run.state(), other.state()) == []


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
@pytest.mark.parametrize("kind", ["dict", "file"])
def test_a_changed_model_goes_on_as_if_it_had_always_been_so(tmp_path: Path, kind: str, wrap: Any) -> None:
    run = Run(seeded(Net))
    run.train(5)
    other = Run(wrap(seeded(Changed, 1)))
    made = optimstate.resume(saved(tmp_path, run, kind), plan=FUSE, **other.parts())
    assert set(made.reports) == {"model", "ema", "optimizer"}
    assert made.problems == ()
    assert "block.qkv.weight" in str(made)
    new = other.model.module if isinstance(other.model, nn.DataParallel) else other.model
    assert torch.equal(new.block.qkv.weight[:4], run.model.block.q.weight)
    assert torch.equal(
        other.optimizer.state[new.block.qkv.weight]["exp_avg"][4:8],
        run.optimizer.state[run.model.block.k.weight]["exp_avg"],
    )
    assert other.scheduler.last_epoch == 5
    assert other.ema.n_averaged.item() == 5
    losses = run.train(10, 5)
    assert other.train(10, 5) == pytest.approx(losses, rel=1e-4)
    average = {name.replace("module.", ""): p for name, p in other.ema.state_dict().items()}
    torch.testing.assert_close(average["spare.weight"], run.ema.module.unused.weight)
    torch.testing.assert_close(average["block.qkv.bias"][8:], run.ema.module.block.v.bias)


def test_the_scheduler_follows_the_groups(tmp_path: Path) -> None:
    run = Run(seeded(Net))
    run.train(5)
    other = Run(seeded(Net, 1), layout=two_groups)
    plan = Plan.from_toml(
        '[[group]]\nmatch = "{rest**}.bias"\nset = { weight_decay = 0.0 }\n[[group]]\nmatch = "**"\nset = { }\n'
    )
    with pytest.raises(MigrationError, match="differ in"):
        optimstate.resume(run.state(), **other.parts())
    plan = Plan.from_toml(
        '[[group]]\nmatch = "{rest**}.bias"\nset = { weight_decay = 0.0, lr = 0.02, initial_lr = 0.02 }\n'
        '[[group]]\nmatch = "**"\nset = { weight_decay = 0.01, lr = 0.01, initial_lr = 0.01 }\n'
    )
    optimstate.resume(run.state(), plan=plan, **other.parts())
    assert other.scheduler.base_lrs == [0.02, 0.01]
    assert len(other.train(5, 5)) == 5


def test_a_scaler_that_was_disabled_changes_nothing() -> None:
    run = Run(seeded(Net))
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.train(2)
    other = Run(seeded(Net, 1))
    made = optimstate.resume(run.state(), **other.parts())
    assert other.scaler.get_scale() == 8.0
    assert any("keeps its own state" in note for note in made.notes)
    without = run.state()
    del without["scaler"]
    with pytest.raises(StateMismatchError, match="no state of a gradient scaler"):
        optimstate.resume(without, **other.parts())


@pytest.mark.parametrize("key", ["model", "ema", "optimizer", "scheduler", "scaler"])
def test_all_or_nothing(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(seeded(Net))
    run.train(5)
    other = Run(seeded(Net, 1))
    other.train(2, 20)
    before = other.state()
    cls = type(getattr(other, key))
    original = cls.load_state_dict
    broken = [True]

    def loads_and_breaks(self: Any, state: Any) -> Any:
        original(self, state)
        if broken.pop() if broken else False:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(cls, "load_state_dict", loads_and_breaks)
    with pytest.raises(RuntimeError, match="interrupted"):
        optimstate.resume(run.state(), **other.parts())
    assert not broken
    assert oracle.differences(before, other.state()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("optimizer"), "has no optimizer"),
        (lambda state: state.pop("model"), "has no model"),
        (lambda state: state.pop("scheduler"), "has no scheduler"),
        (lambda state: state.pop("ema"), "has no ema"),
        (lambda state: state["model"].pop("block.q.weight"), "block.q.weight"),
        (lambda state: state["ema"].pop("module.block.q.weight"), "block.q.weight"),
        (lambda state: state.update(model_2=dict(state["model"])), "several parts"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    run = Run(seeded(Net))
    run.train(5)
    other = Run(seeded(Net, 1))
    before = other.state()
    state = run.state()
    change(state)
    with pytest.raises(OptimStateError, match=message):
        optimstate.resume(state, **other.parts())
    assert oracle.differences(before, other.state()) == []


def test_a_rule_need_only_match_somewhere_but_it_must() -> None:
    run = Run(seeded(Net))
    run.model.register_buffer("scale", torch.ones(2))
    other = Run(seeded(Net, 1))
    other.model.register_buffer("factor", torch.zeros(2))
    plan = Plan.from_options(rename=["scale=factor"])
    optimstate.resume({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, plan=plan,
                      model=other.model, optimizer=other.optimizer)  # fmt: skip
    assert other.model.factor.tolist() == [1, 1]
    both = Plan.from_options(rename=["unused.{p}=spare.{p}", "scale=factor"])
    changed = seeded(Net)
    changed.spare, changed.unused = changed.unused, None
    with pytest.raises(MigrationError, match="'scale' matches none"):
        optimstate.resume(
            run.optimizer.state_dict(), plan=both, optimizer=adam(torch.optim, changed.named_parameters())
        )
    optimstate.resume(run.optimizer.state_dict(), plan=plan, optimizer=other.optimizer)  # it has the names already
    guard = Plan.from_toml('[guard]\nlacks = ["block.q.weight"]\n')
    with pytest.raises(MigrationError, match="excludes"):
        optimstate.resume(run.optimizer.state_dict(), plan=guard, optimizer=other.optimizer)


def test_modules_load_by_the_same_plan() -> None:
    model, changed = seeded(Net), seeded(Changed, 1)
    hook = hooks.migrate_model(FUSE)
    changed.register_load_state_dict_pre_hook(hook)
    given = model.state_dict()
    keys = list(given)
    changed.load_state_dict(given)
    assert list(given) == keys
    assert torch.equal(changed.block.qkv.bias[4:8], model.block.k.bias)
    assert hook.report is not None
    assert hook.report.sources["spare.bias"] == ("unused.bias",)

    average, new = AveragedModel(model), AveragedModel(seeded(Changed, 1))
    average.update_parameters(model)
    new.register_load_state_dict_pre_hook(hooks.migrate_model(FUSE))
    new.load_state_dict(average.state_dict())
    assert new.n_averaged.item() == 1
    assert torch.equal(new.module.spare.weight, model.unused.weight)

    # as a part of a larger module
    outer, other = nn.ModuleDict({"net": seeded(Net)}), nn.ModuleDict({"net": seeded(Changed, 1)})
    other["net"].register_load_state_dict_pre_hook(hooks.migrate_model(FUSE))
    other.load_state_dict(outer.state_dict())
    assert torch.equal(other["net"].block.qkv.weight[8:], outer["net"].block.v.weight)

    wrong = seeded(Changed, 2)
    before = copy.deepcopy(wrong.state_dict())
    wrong.register_load_state_dict_pre_hook(hooks.migrate_model(Plan()))
    with pytest.raises(MigrationError, match=r"nothing fills 'block\.qkv\.weight'"):
        wrong.load_state_dict(model.state_dict())
    assert oracle.differences(before, wrong.state_dict()) == []
    lenient = seeded(Changed, 2)
    lenient.register_load_state_dict_pre_hook(
        hooks.migrate_model(Plan().with_policy(missing="fresh", unexpected="drop"))
    )
    lenient.load_state_dict(model.state_dict())
    assert torch.equal(lenient.embed.weight, model.embed.weight)
    assert torch.equal(lenient.block.qkv.weight, before["block.qkv.weight"])


def test_a_new_parameter_keeps_its_value() -> None:
    model, changed = seeded(Net), seeded(Net, 1)
    changed.side = nn.Linear(2, 2)
    weight = changed.side.weight.detach().clone()
    changed.register_load_state_dict_pre_hook(hooks.migrate_model(Plan.from_options(fresh=["side.{kind}"])))
    changed.load_state_dict(model.state_dict())
    assert torch.equal(changed.side.weight, weight)
    assert torch.equal(changed.embed.weight, model.embed.weight)


def test_what_stands_in_several_places_is_looked_at_once() -> None:
    """A dict and a tuple doubled 40 times are small in memory, and trees of a million million entries."""
    doubled: Any = {"a": 1}
    pairs: Any = ()
    for _ in range(40):
        doubled, pairs = {"left": doubled, "right": doubled}, (pairs, pairs)
    model = torch.nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu")
    saved = {"model": model.state_dict(), "a": doubled, "b": pairs, "scaler": scaler.state_dict()}
    optimstate.resume(saved, model=model, scaler=scaler)


def test_what_is_not_resumed_and_what_is_replaced_is_said() -> None:
    run, other = Run(seeded(Net)), Run(seeded(Net, 1))
    run.train(2)
    saved = copy.deepcopy({key: part.state_dict() for key, part in run.parts().items()})
    for group in other.optimizer.param_groups:
        group["weight_decay"], group["lr"] = 0.7, 0.5
    notes = optimstate.resume(saved, model=other.model, optimizer=other.optimizer).notes
    assert any("weight_decay is" in note and "0.7 here: the checkpoint's is used" in note for note in notes)
    assert any(note.startswith("not resumed") and "scheduler" in note and "ema" in note for note in notes)
    assert not any("lr is" in note for note in notes)  # which schedules change
    again = optimstate.resume(
        saved, model=other.model, optimizer=other.optimizer, scheduler=other.scheduler, ema=other.ema
    )
    assert not any("is used" in note or "not resumed" in note for note in again.notes)
    plan = Plan.from_toml('[[rule]]\nfrom = "embed.weight"\nto = "embed.weight"\nscale = 0.5\nonly = "ema"\n')
    idle = optimstate.resume(saved, model=other.model, optimizer=other.optimizer, plan=plan)
    assert any("rule 1 has no effect: nothing is given that is 'ema'" in note for note in idle.notes)


def test_optimizer_state_of_an_unknown_form_is_not_called_absent() -> None:
    run = Run(seeded(Net))
    saved = {"model": run.model.state_dict(), "optimizer": {"m": [torch.ones(2, 2)], "v": [torch.ones(2, 2)]}}
    with pytest.raises(StateMismatchError, match=r"optimizer state .* of a form that is not known"):
        optimstate.resume(saved, model=run.model, optimizer=run.optimizer)


def test_a_scheduler_of_ones_own_needs_no_more_than_its_state() -> None:
    class Own:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.count = optimizer, 0

        def state_dict(self) -> dict[str, Any]:
            return {"num_steps": self.count, "rates": [0.1]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["num_steps"]

    run = Run(seeded(Net))
    run.train(1)
    own = Own(run.optimizer)
    saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "scheduler": own.state_dict()}
    optimstate.resume({**saved, "scheduler": {"num_steps": 7, "rates": [0.1]}}, optimizer=run.optimizer, scheduler=own)
    assert own.count == 7
