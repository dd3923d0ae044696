"""`optimstate.resume` of several parts, of anonymous optimizers, and of averages in plain dicts."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import optimstate
from optimstate.errors import MigrationError, OptimStateError, StateMismatchError
from optimstate.plan.language.plan import Plan
from optimstate.surgery.writing.remapping import remap
from tests import oracle

S = torch.optim.lr_scheduler


def part(key: str, lr: float, steps: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = nn.ModuleDict({key: nn.Linear(4, 4)})
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr)
    scheduler = S.StepLR(optimizer, 1, 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p**2).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def tree_of(parts: list[Any], keys: tuple[str, ...] = ("models", "optimizers", "schedulers")) -> dict[str, Any]:
    return copy.deepcopy({key: [p[i].state_dict() for p in parts] for i, key in enumerate(keys)})


def image(parts: Any) -> Any:
    return copy.deepcopy([[each.state_dict() for each in p] for p in parts])


@pytest.mark.parametrize("swapped", [False, True])
def test_lists_are_in_order_unless_names_say_otherwise(swapped: bool) -> None:
    old = [part("a", 0.1, 2), part("b", 0.01, 2)]
    new = [part("a", 1.0), part("b", 1.0)]
    given = new[::-1] if swapped else new
    # Schedules have no names: their order is the checkpoint's.
    optimstate.resume(
        tree_of(old), model=[p[0] for p in given], optimizer=[p[1] for p in given], scheduler=[p[2] for p in new]
    )
    assert not oracle.differences(image(new), image(old))


def test_paths_say_which_part_is_meant(tmp_path: Path) -> None:
    old = [part("a", 0.1, 2), part("a", 0.01, 2)]
    torch.save(tree_of(old), tmp_path / "two.pt")
    new = part("a", 1.0)
    model, optimizer, scheduler = new
    with pytest.raises(StateMismatchError, match=r"several parts.*\n.*model=\{\"models\[0\]\": \.\.\."):
        optimstate.resume(tmp_path / "two.pt", model=model)
    with pytest.raises(StateMismatchError, match=r"no optimizer at 'optimizers\[2\]'"):
        optimstate.resume(tmp_path / "two.pt", optimizer={"optimizers[2]": optimizer})
    found = optimstate.resume(
        tmp_path / "two.pt",
        model={"models[1]": model},
        optimizer={"optimizers[1]": optimizer},
        scheduler={"schedulers[1]": scheduler},
    )
    assert not oracle.differences(image([new]), image(old[1:]))
    assert set(found.reports) == {"model", "optimizer"}


def test_one_part_that_fails_leaves_all_as_they_were() -> None:
    old = [part("a", 0.1, 2), part("b", 0.01, 2)]
    new = [part("a", 1.0), part("c", 1.0)]
    before = image(new)
    with pytest.raises(OptimStateError):
        optimstate.resume(tree_of(old), optimizer=[p[1] for p in new])
    assert not oracle.differences(image(new), before)


def net(*names: str) -> nn.Sequential:
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    model.add_module("out", nn.Linear(4, 2))
    return model


def anonymous(model: nn.Module, steps: int = 1) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("where", ["dict", "torch", "safetensors"])
def test_names_are_concluded_where_they_are_determined(where: str, tmp_path: Path) -> None:
    """A folder of safetensors has lost the order, and a live model with the same parameters has it."""
    from safetensors.torch import save_file

    old = net("z", "a")
    source = anonymous(old)
    tree: Any = copy.deepcopy({"model": old.state_dict(), "optimizer": source.state_dict()})
    if where == "torch":
        torch.save(tree, tmp_path / "c.pt")
        tree = tmp_path / "c.pt"
    elif where == "safetensors":
        save_file(dict(old.state_dict()), tmp_path / "model.safetensors")
        torch.save(source.state_dict(), tmp_path / "optimizer.pt")
        tree = tmp_path
    new = net("z", "a")
    optimizer = anonymous(new, 0)
    optimstate.resume(tree, model=new, optimizer=optimizer)
    assert not oracle.differences(optimizer.state_dict(), source.state_dict())


def test_an_optimizer_alone_is_loaded_by_order_and_that_is_said() -> None:
    old = net("a")
    source = anonymous(old)
    optimizer = anonymous(net("a"), 0)
    found = optimstate.resume({"optimizer": source.state_dict()}, optimizer=optimizer)
    assert not oracle.differences(optimizer.state_dict(), source.state_dict())
    assert any("live optimizer's order" in note for note in found.notes)
    other = anonymous(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)), 0)
    with pytest.raises(StateMismatchError, match=r"'0' has the shape \[2, 4\].*\[4, 4\]"):
        optimstate.resume({"optimizer": source.state_dict()}, optimizer=other)
    assert not other.state


def test_names_that_are_given_are_taken() -> None:
    old = net("a", "b")
    source = anonymous(old)
    new = net("b", "c")
    optimizer = torch.optim.AdamW(new.named_parameters(), lr=1e-2)
    tree = {"optimizer": source.state_dict()}
    plan = Plan.from_options(rename=["a.{p}=c.{p}"])
    saved = [name for name, _ in old.named_parameters()]
    optimstate.resume(tree, optimizer=optimizer, plan=plan, saved=saved)
    assert torch.equal(optimizer.state[new.c.weight]["exp_avg"], source.state[old.a.weight]["exp_avg"])
    assert torch.equal(optimizer.state[new.b.weight]["exp_avg"], source.state[old.b.weight]["exp_avg"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_average_in_a_plain_dict(wrapped: bool) -> None:
    model, average = net("a"), net("a")
    tree = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    new, ema = net("a"), net("a")
    live: nn.Module = AveragedModel(ema) if wrapped else ema
    found = optimstate.resume(tree, model=new, ema=live)
    own = live.module if isinstance(live, AveragedModel) else live
    assert not oracle.differences(own.state_dict(), average.state_dict())
    assert not oracle.differences(new.state_dict(), model.state_dict())
    assert any("how many models were averaged" in note for note in found.notes) == wrapped


class Stopped(BaseException):
    """What ends a run in the middle."""


@pytest.mark.parametrize(
    "make",
    [
        lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.5, 3), S.ExponentialLR(o, 0.9)], [2]),
        lambda o: S.ChainedScheduler([S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], [2])], optimizer=o),
        lambda o: S.MultiStepLR(o, [2, 4, 4]),
    ],
    ids=["sequential", "chained", "milestones"],
)
def test_schedulers_inside_schedulers_are_put_back(make: Any) -> None:
    def run(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = net("a")
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
        scheduler = make(optimizer)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return model, optimizer, scheduler

    old, new = run(5), run(1)
    tree = {key: each.state_dict() for key, each in zip(("model", "optimizer", "scheduler"), old, strict=True)}

    def stop(*_: Any) -> None:
        raise Stopped

    before = image([new])
    handle = new[0].register_load_state_dict_pre_hook(stop)
    with pytest.raises(Stopped):
        optimstate.resume(tree, model=new[0], optimizer=new[1], scheduler=new[2])
    assert not oracle.differences(image([new]), before)
    handle.remove()
    optimstate.resume(tree, model=new[0], optimizer=new[1], scheduler=new[2])
    assert not oracle.differences(new[2].state_dict(), old[2].state_dict())


class Tied(nn.Module):
    """An embedding whose weight is the output's too, as language models have it."""

    def __init__(self, name: str, words: int = 6) -> None:
        super().__init__()
        self.add_module(name, nn.Embedding(words, 4))
        self.body, self.out, self.name = nn.Linear(4, 4), nn.Linear(4, words, bias=False), name
        self.out.weight = getattr(self, name).weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(getattr(self, self.name)(x)))


@pytest.mark.parametrize("kept", ["emb.weight", "out.weight"])
@pytest.mark.parametrize("words", [6, 9])
def test_a_tied_parameter_is_saved_once_under_either_name(kept: str, words: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    old = Tied("emb")
    source = torch.optim.AdamW(old.named_parameters())
    old(torch.arange(6)).square().sum().backward()
    source.step()
    save_file(
        {k: v for k, v in old.state_dict().items() if k in (kept, "body.weight", "body.bias")},
        tmp_path / "model.safetensors",
    )
    torch.save(source.state_dict(), tmp_path / "optimizer.pt")
    new = Tied("words", words)
    optimizer = torch.optim.AdamW(new.named_parameters())
    grow = f"resize = {{ dim = 0, size = {words}, fill = 0.0 }}"
    rename = f'{{ from = "emb.weight", to = "words.weight", {grow} }}'
    text = f'rule = [{rename}, {{ from = "out.weight", to = "out.weight", {grow} }}]\n'
    optimstate.resume(tmp_path, model=new, optimizer=optimizer, plan=Plan.from_toml(text).with_policy(unused="ignore"))
    assert new.out.weight is new.words.weight
    assert torch.equal(new.words.weight[:6], old.emb.weight)
    assert torch.equal(optimizer.state[new.words.weight]["exp_avg"][:6], source.state[old.emb.weight]["exp_avg"])


def test_anonymous_optimizers_of_several_models_in_a_folder(tmp_path: Path) -> None:
    """As Accelerate writes it: weights sorted by name, one model's names among another's."""
    from safetensors.torch import save_file

    models = [net("a"), net("a", "b")]
    sources = [anonymous(model) for model in models]
    for end, model, source in zip(("", "_1"), models, sources, strict=True):
        save_file(dict(model.state_dict()), tmp_path / f"model{end}.safetensors")
        torch.save(source.state_dict(), tmp_path / f"optimizer{end}.bin")
    new = [net("a"), net("a", "b")]
    optimizers = [anonymous(model, 0) for model in new]
    optimstate.resume(tmp_path, model=new, optimizer=optimizers)
    for optimizer, source in zip(optimizers, sources, strict=True):
        assert not oracle.differences(optimizer.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "saved", [{"optimizer": ["a.weight", "a.bias"]}, {"optimizers[0]": ["a.weight", "a.bias"], "optimizers[7]": ["x"]}]
)
def test_names_for_an_optimizer_that_is_not_resumed_are_refused(saved: dict[str, list[str]]) -> None:
    model, optimizer, _ = part("a", 1.0)
    with pytest.raises(OptimStateError, match=r"no optimizer at .* is resumed"):
        optimstate.resume(tree_of([part("a", 0.1, 2)]), model=model, optimizer=[optimizer], saved=saved)
    with pytest.raises(OptimStateError, match="no optimizer is resumed"):
        optimstate.resume(tree_of([part("a", 0.1, 2)]), model=model, saved=["a.weight", "a.bias"])


def test_what_had_no_effect_is_said() -> None:
    model, optimizer, _ = part("a", 1.0)
    plan = Plan.from_toml('[guard]\nonce = true\n[[rule]]\nfrom = "old"\nto = "a"\n')
    notes = optimstate.resume(tree_of([part("a", 0.1, 2)]), model=model, optimizer=optimizer, plan=plan).notes
    assert any("rule 1 matches nothing" in note for note in notes)
    assert any("once" in note for note in notes)
    hook = optimstate.hooks.migrate(plan)
    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(part("a", 0.1, 2)[1].state_dict())
    assert hook.report is not None
    assert any("rule 1 matches nothing" in note for note in hook.report.notes)


def _frozen(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model[0].requires_grad_(False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def test_an_optimizer_built_as_the_saved_one_takes_its_names_when_that_is_said() -> None:
    """Of three layers alike two are trained: nothing in the checkpoint says which."""
    (old, first), (new, second) = _frozen(0), _frozen(1)
    saved = _stepped(old, first)
    with pytest.raises(StateMismatchError, match="nothing says which") as refused:
        optimstate.resume(saved, model=new, optimizer=second)
    assert "saved='live'" in str(refused.value)
    made = optimstate.resume(saved, model=new, optimizer=second, saved="live")
    assert any("taken to be in the live optimizer's order" in note for note in made.notes)
    assert torch.equal(second.state[new[1].weight]["exp_avg"], first.state[old[1].weight]["exp_avg"])
    other = torch.optim.AdamW(new.parameters())
    with pytest.raises(StateMismatchError, match=r"\[4\] parameters, the live ones \[6\]"):
        optimstate.resume(saved, model=new, optimizer=other, saved="live")
    with pytest.raises(StateMismatchError, match="a list of names, or 'live'"):
        optimstate.resume(saved, model=new, optimizer=second, saved="alive")


def test_names_that_contradict_the_checkpoint_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    names = [name for name, _ in model.named_parameters()]
    saved = _stepped(model, torch.optim.AdamW(model.parameters()))
    live = torch.optim.AdamW(model.parameters())
    with pytest.raises(StateMismatchError, match=r"parameter 0 has shape \[2, 4\], but '1.weight' has \[4, 2\]"):
        optimstate.resume(saved, model=model, optimizer=live, saved=names[2:] + names[:2])
    with pytest.raises(StateMismatchError, match="3 names are given for 4 parameters"):
        optimstate.resume(saved, model=model, optimizer=live, saved=names[:3])
    named = _stepped(model, torch.optim.AdamW(model.named_parameters()))
    optimstate.resume(named, model=model, optimizer=live, saved=names)
    with pytest.raises(StateMismatchError, match="already has names, and '0"):
        optimstate.resume(named, model=model, optimizer=live, saved=names[2:] + names[:2])


def test_weights_beside_the_optimizer_are_a_model(tmp_path: Path) -> None:
    """Torchtitan's layout: names of weights at the top, everything else beside them."""
    (old, first), (new, second) = _frozen(0), _frozen(1)
    first = torch.optim.AdamW(old.named_parameters())
    second = torch.optim.AdamW(new.named_parameters())
    saved = _stepped(old, first)
    flat = {**saved["model"], "optimizer": saved["optimizer"], "epoch": 3, "rng": torch.zeros(3)}
    torch.save(flat, tmp_path / "flat.pt")
    for taken in ("epoch", "optimizer"):
        with pytest.raises(
            MigrationError, match=f"a weight is called '{taken}', and so is another entry of the same mapping: give"
        ):
            remap(tmp_path / "flat.pt", tmp_path / "new.pt", Plan.from_options(rename=[f"0.weight={taken}"]))
    assert not (tmp_path / "new.pt").exists()
    plan = Plan.from_options(rename=["0.{p}=zero.{p}"])
    remap(tmp_path / "flat.pt", tmp_path / "new.pt", plan)
    made = torch.load(tmp_path / "new.pt")
    assert {key for key in made if "." in key} == {key.replace("0.", "zero.") for key in saved["model"]}
    assert torch.equal(made["zero.weight"], old[0].weight)
    assert (made["epoch"], made["optimizer"]["param_groups"][0]["param_names"][0]) == (3, "zero.weight")
    assert "no weights" not in str(optimstate.inspect(tmp_path / "new.pt"))
    for source in (flat, tmp_path / "flat.pt"):
        optimstate.resume(source, model=new, optimizer=second)
        assert torch.equal(new[1].weight, old[1].weight)
        assert torch.equal(second.state[new[1].weight]["exp_avg"], first.state[old[1].weight]["exp_avg"])


def test_a_path_may_be_its_last_key() -> None:
    (old, first), (new, second) = _frozen(0), _frozen(1)
    saved = _stepped(old, first)
    parts = {
        "model": saved["model"],
        "optimizers": {"adam": saved["optimizer"], "other": {"state": {}, "param_groups": []}},
    }
    optimstate.resume(parts, model=new, optimizer={"adam": second}, saved={"optimizers['adam']": "live"})
    assert second.state


def test_a_folder_with_several_checkpoints_is_told_by_its_file_latest(tmp_path: Path) -> None:
    (old, first), (new, second) = _frozen(0), _frozen(1)
    first, second = (torch.optim.AdamW(model.named_parameters()) for model in (old, new))
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        torch.save(_stepped(old, first), tmp_path / f"step-{step}" / "state.pt")
    with pytest.raises(StateMismatchError, match="several parts") as refused:
        optimstate.resume(tmp_path, model=new, optimizer=second)
    assert "Or give the path of one of the folders" in str(refused.value)
    (tmp_path / "latest").write_text("step-2\n")
    made = optimstate.resume(tmp_path, model=new, optimizer=second)
    assert second.state[new[1].weight]["step"] == 2
    assert any("'step-2', which is resumed" in note for note in made.notes)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(StateMismatchError, match="several parts"):
        optimstate.resume(tmp_path, model=new, optimizer=second)


SCHEDULES: dict[str, Any] = {
    "sequence": lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=2), S.CosineAnnealingLR(o, 10)], [2]),
    "chain": lambda o: S.ChainedScheduler([S.LinearLR(o, total_iters=4), S.MultiStepLR(o, [1, 4])]),
    "cycle": lambda o: S.OneCycleLR(o, 1e-2, total_steps=20),
    "plateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "milestones": lambda o: S.MultiStepLR(o, [1, 2, 5]),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 5),
    "function": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_from_a_file_in_other_groups(name: str, tmp_path: Path) -> None:
    """Losses are numbers of NumPy in many a script, and a plateau keeps the best of them."""

    def parts(*, split: bool) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.Linear(2, 2)
        groups = [{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)]}]
        optimizer = torch.optim.SGD(groups if split else list(model.named_parameters()), lr=numpy.float64(0.1))
        return model, optimizer, SCHEDULES[name](optimizer)

    def stepped(scheduler: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            scheduler.step(numpy.float64(step)) if name == "plateau" else scheduler.step()
            rates.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        assert all(len(set(own)) == 1 for own in rates)
        return [own[0] for own in rates]

    model, optimizer, scheduler = parts(split=False)
    scheduler.optimizer = optimizer
    stepped(scheduler, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    model, other, live = parts(split=True)
    live.optimizer = other
    optimstate.resume(tmp_path / "saved.pt", model=model, optimizer=other, scheduler=live)
    assert stepped(live, range(3, 9)) == stepped(scheduler, range(3, 9))
    saved["scheduler"]["last_epoch"] = Fraction(3)
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(OptimStateError, match=r"last_epoch must be a count of steps, not <fractions\.Fraction object>"):
        optimstate.resume(tmp_path / "other.pt", model=model, optimizer=other, scheduler=live)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a")])
def test_an_optimizer_over_two_models(names: tuple[str, str], tmp_path: Path) -> None:
    def parts() -> tuple[list[nn.Module], torch.optim.Optimizer]:
        models = [nn.ModuleDict({name: nn.Linear(2, size)}) for name, size in zip(names, (2, 3), strict=True)]
        parameters = [p for model in models for p in model.parameters()]
        return models, torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:]}])

    (old, before), (new, after) = parts(), parts()
    sum(p.square().sum() for model in old for p in model.parameters()).backward()  # type: ignore[union-attr]
    before.step()
    saved = {"one": old[0].state_dict(), "two": old[1].state_dict(), "optimizer": before.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    models = {"one": new[0], "two": new[1]}
    done = optimstate.resume(tmp_path / "saved.pt", model=models, optimizer=after, saved="live")
    for source, made in zip(old, new, strict=True):
        for p, q in zip(source.parameters(), made.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(before.state[p]["exp_avg"], after.state[q]["exp_avg"])
    plain = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    prefixed = {f"{number}.{name}.{kind}" for number, name in enumerate(names) for kind in ("weight", "bias")}
    assert set(done.reports["optimizer"].exact) == (plain if len(set(names)) == 2 else prefixed)
