"""`[[optimizer]]` tables: one optimizer becomes several, several become one, and what it means for each slot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import hooks
from optimstate.errors import MigrationError, OptimStateError, PlanError, PlanSyntaxError
from optimstate.installed_torch import HAS_MUON
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.apply.explain import explained
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.inverse import inverse
from optimstate.tensors.compute import to_torch
from optimstate.tree import walk
from tests.plan.lazy import applied, kinds, lazy_tree

MUON = '[[optimizer]]\npath = "muon"\nmatch = "blocks.*.weight"\nalgorithm = "Muon"\n'
REST = '[[optimizer]]\npath = "adamw"\nmatch = "**"\n'


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x).tanh()
        return x


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 3) -> list[float]:
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(torch.randint(6, (8,))).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def trained(beta: float = 0.95, groups: int = 1, schedule: bool = False) -> tuple[Model, Any]:
    model = Model()
    named = list(model.named_parameters())
    parts = [{"params": named[n::groups], "lr": 1e-3 / (n + 1)} for n in range(groups)]
    optimizer = torch.optim.AdamW(parts, betas=(beta, 0.999))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(model, [optimizer])
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    if schedule:
        scheduler.step()
        tree |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return model, copy.deepcopy(tree)


def live(node: Any) -> Any:
    """A tree with its tensors in memory."""
    if isinstance(node, dict):
        return {key: live(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(map(live, node))
    return to_torch(node) if hasattr(node, "storage") else node


def apply(text: str, tree: Any) -> Any:
    return live(applied(text, tree))


def by_name(state: Any) -> dict[str, Any]:
    return {
        name: state["state"].get(key, {})
        for group in state["param_groups"]
        for name, key in zip(group["param_names"], group["params"], strict=True)
    }


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_every_parameter_is_in_one_optimizer_with_its_state(groups: int) -> None:
    _, tree = trained(groups=groups)
    made, old = apply(MUON + REST, tree), by_name(tree["optimizer"])
    assert list(made) == ["model", "epoch", "muon", "adamw"]
    muon, adamw = by_name(made["muon"]), by_name(made["adamw"])
    assert muon.keys() | adamw.keys() == old.keys()
    assert not muon.keys() & adamw.keys()
    for name, slots in muon.items():
        assert list(slots) == ["momentum_buffer"]
        assert torch.equal(slots["momentum_buffer"], old[name]["exp_avg"])
    assert all(same(slots, old[name]) for name, slots in adamw.items())
    for state in (made["muon"], made["adamw"]):
        assert [key for group in state["param_groups"] for key in group["params"]] == list(range(len(by_name(state))))
    rates = {name: group["lr"] for group in tree["optimizer"]["param_groups"] for name in group["param_names"]}
    for group in (*made["muon"]["param_groups"], *made["adamw"]["param_groups"]):
        assert {rates[name] for name in group["param_names"]} == {group["lr"]}


@pytest.mark.parametrize(("beta", "outcome"), [(0.95, "exact"), (0.9, "approximate")])
def test_momentum_is_exact_where_the_decay_rates_are_the_same(beta: float, outcome: str) -> None:
    _, tree = trained(beta)
    _, migration, _ = apply_plan(Plan.from_toml(MUON + REST), lazy_tree(tree))
    rows = [row for row in explained(migration) if row.section == "optimizer muon"]
    found = {row.slot: row.outcome for row in rows}
    assert found["momentum_buffer"] == outcome
    assert found["exp_avg_sq"] == found["step"] == "dropped"
    assert {row.outcome for row in explained(migration) if row.section == "optimizer adamw"} == {"exact"}
    chosen = MUON + f"set = {{ momentum = {beta} }}\n" + REST
    _, migration, _ = apply_plan(Plan.from_toml(chosen), lazy_tree(tree))
    assert {row.outcome for row in explained(migration) if row.slot == "momentum_buffer"} == {"exact"}


def test_there_and_back_the_part_that_stays_is_the_same_bit_for_bit() -> None:
    _, tree = trained()
    divided = apply(MUON + REST, tree)
    back = apply('[[optimizer]]\npath = "optimizer"\nmatch = "**"\nalgorithm = "AdamW"\n', divided)
    old, new = by_name(tree["optimizer"]), by_name(back["optimizer"])
    assert new.keys() == old.keys()
    for name, slots in new.items():
        assert same(slots, old[name]) if not name.startswith("blocks") or "bias" in name else slots == {}
    again = Model()
    again.load_state_dict(back["model"])
    named = dict(again.named_parameters())
    groups = [{"params": [(n, named[n]) for n in g["param_names"]]} for g in back["optimizer"]["param_groups"]]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(back["optimizer"])
    train(again, [optimizer])


def test_two_of_one_algorithm_train_on_as_the_one_would_have() -> None:
    model, tree = trained()
    made = apply(
        '[[optimizer]]\npath = "optim.blocks"\nmatch = "blocks"\n'
        '[[optimizer]]\npath = "optim.embed"\nmatch = "embed"\n',
        tree,
    )
    wanted = torch.optim.AdamW(model.named_parameters())
    wanted.load_state_dict(tree["optimizer"])
    again = copy.deepcopy(model)
    parts = []
    for key in ("blocks", "embed"):
        own = [(name, p) for name, p in again.named_parameters() if name.startswith(key)]
        parts.append(torch.optim.AdamW(own))
        parts[-1].load_state_dict(made["optim"][key])
    assert train(model, [wanted]) == train(again, [*parts])


def test_two_become_one_again_with_rules_in_between() -> None:
    _, tree = trained(groups=2)
    halves = '[[optimizer]]\npath = "a"\nmatch = "blocks"\n[[optimizer]]\npath = "b"\nmatch = "**"\n'
    renamed = '[[rule]]\nfrom = "blocks"\nto = "layers"\n' + halves.replace("blocks", "layers")
    made = apply('[[optimizer]]\npath = "optimizer"\nmatch = "**"\n', apply(renamed, tree))
    old = {name.replace("blocks", "layers"): slots for name, slots in by_name(tree["optimizer"]).items()}
    new = by_name(made["optimizer"])
    assert new.keys() == old.keys()
    assert all(same(slots, old[name]) for name, slots in new.items())


def test_schedulers_are_divided_and_joined_with_their_groups() -> None:
    _, tree = trained(groups=2, schedule=True)
    made = apply(MUON + REST, tree)
    assert made["scheduler"].keys() == {"muon", "adamw"}
    for key, state in made["scheduler"].items():
        assert state["last_epoch"] == tree["scheduler"]["last_epoch"]
        assert len(state["base_lrs"]) == len(made[key]["param_groups"])
        assert state["_last_lr"] == [group["lr"] for group in made[key]["param_groups"]]
    back = apply('[[optimizer]]\npath = "optimizer"\nmatch = "**"\nalgorithm = "AdamW"\n', made)
    (found,) = [node for _, node in walk(back) if isinstance(node, dict) and "base_lrs" in node]
    assert found["_last_lr"] == [group["lr"] for group in back["optimizer"]["param_groups"]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (MUON, "group"),
        (MUON + REST + '[[optimizer]]\npath = "third"\nmatch = "nowhere.*"\n', "unmatched"),
        (MUON.replace("blocks.*.weight", "**"), "conversion"),
        (MUON.replace("Muon", "Novel") + REST, "conversion"),
        (MUON + "set = { momentun = 0.9 }\n" + REST, "setting"),
        (MUON.replace('"muon"', '"model"') + REST, "conflict"),
        (MUON.replace('"muon"', '"epoch.muon"') + REST, "conflict"),
        ('[[optimizer]]\npath = "sgd"\nmatch = "**"\nalgorithm = "SGD"\n', "conversion"),
    ],
)
def test_what_cannot_be_is_refused(text: str, kind: str) -> None:
    assert kind in kinds(text, trained()[1])


def test_state_of_two_algorithms_is_not_one_optimizer() -> None:
    divided = apply(MUON + REST, trained()[1])
    assert "conversion" in kinds('[[optimizer]]\npath = "optimizer"\nmatch = "**"\n', divided)


def test_an_anonymous_optimizer_is_not_divided_silently() -> None:
    _, tree = trained()
    for group in tree["optimizer"]["param_groups"]:
        del group["param_names"]
    assert kinds(MUON + REST, tree) == {"unreached"}


def test_tables_are_written_and_read() -> None:
    plan = Plan.from_toml(MUON + "set = { lr = 0.02 }\n" + REST)
    assert Plan.from_toml(plan.to_toml()) == plan
    with pytest.raises(PlanError, match="divides the optimizer") as error:
        inverse(plan)
    said = [str(problem) for problem in error.value.problems]
    assert any("makes state of Muon: of AdamW's state it drops exp_avg_sq, step" in text for text in said)
    assert any("sets lr and does not say what they were" in text for text in said)
    for text in (
        '[[optimizer]]\nmatch = "**"\n',
        '[[optimizer]]\npath = "a"\n',
        '[[optimizer]]\npath = ""\nmatch = "a"\n',
    ):
        with pytest.raises(PlanSyntaxError, match=r"plan:\d: optimizer 1"):
            Plan.from_toml(text)


# --- into live optimizers ---------------------------------------------------------------------------------------------


def parts(model: nn.Module, beta: float = 0.95) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    if not HAS_MUON:
        pytest.skip("torch's first Muon is that of 2.9")
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if name.startswith("blocks") and p.dim() == 2]
    rest = [pair for pair in named if pair[0] not in dict(matrices)]
    return torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3, betas=(beta, 0.999))


def judged(muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer, tree: Any) -> None:
    old = by_name(tree["optimizer"])
    for optimizer, slot in ((muon, "momentum_buffer"), (adamw, "")):
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                state = optimizer.state[parameter]
                assert same(state, {slot: old[name]["exp_avg"]} if slot else old[name]), name


@pytest.mark.parametrize("tables", [True, False], ids=["tables", "by name"])
def test_resume_divides_among_live_optimizers(tables: bool) -> None:
    old, tree = trained()
    model = Model()
    muon, adamw = parts(model)
    plan = Plan.from_toml(MUON + "set = { lr = 0.5 }\n" + REST) if tables else None
    optimstate.resume(tree, model=model, optimizer=[muon, adamw], plan=plan)
    judged(muon, adamw, tree)
    assert muon.param_groups[0]["lr"] == (0.5 if tables else 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), old.parameters(), strict=True))
    train(model, [muon, adamw], 1)


def test_a_hook_takes_the_part_that_is_its_optimizers() -> None:
    _, tree = trained()
    model = Model()
    muon, adamw = parts(model)
    for optimizer in (muon, adamw):
        optimizer.register_load_state_dict_pre_hook(hooks.migrate(Plan.from_toml(MUON + REST)))
        optimizer.load_state_dict(copy.deepcopy(tree["optimizer"]))
    judged(muon, adamw, tree)


def test_live_optimizers_that_are_not_the_tables_are_refused_and_unchanged() -> None:
    _, tree = trained()
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.register_load_state_dict_pre_hook(hooks.migrate(Plan.from_toml(MUON + REST)))
    with pytest.raises(MigrationError, match=r"parameters of .*'adamw'.* and .*'muon'"):
        optimizer.load_state_dict(copy.deepcopy(tree["optimizer"]))
    assert not optimizer.state


def test_a_parameter_that_no_live_optimizer_has_is_refused() -> None:
    _, tree = trained()
    model = Model()
    muon, adamw = parts(model)
    name, _ = adamw.param_groups[0]["param_names"].pop(), adamw.param_groups[0]["params"].pop()
    with pytest.raises(MigrationError, match=f"{name!r} is not in the target"):
        optimstate.resume(tree, model=model, optimizer=[muon, adamw])
    assert not muon.state


JOINED = '[[optimizer]]\npath = "optimizer"\nmatch = "**"\nalgorithm = "AdamW"\n'


def halves(schedule: bool = False) -> tuple[Any, Any]:
    """A checkpoint of one optimizer, and what `[[optimizer]]` tables make of it: one for blocks, one for the rest."""
    _, tree = trained(groups=2, schedule=schedule)
    text = '[[optimizer]]\npath = "blocks"\nmatch = "blocks"\n[[optimizer]]\npath = "rest"\nmatch = "**"\n'
    return tree, apply(text, tree)


def test_resume_joins_several_saved_optimizers() -> None:
    tree, divided = halves()
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=9.0)
    with pytest.raises(OptimStateError, match="differ in "):
        optimstate.resume(divided, model=model, optimizer=optimizer, plan=Plan.from_toml(JOINED))
    assert not optimizer.state
    plan = Plan.from_toml(JOINED + "set = { lr = 0.5, initial_lr = 0.5 }\n")
    found = optimstate.resume(divided, model=model, optimizer=optimizer, plan=plan)
    old = by_name(tree["optimizer"])
    assert all(same(optimizer.state[p], old[n]) for n, p in model.named_parameters())
    assert optimizer.param_groups[0]["lr"] == 0.5
    (report,) = (report for key, report in found.reports.items() if key.startswith("optimizer"))
    assert len(report.exact) == len(old)


@pytest.mark.parametrize("schedule", [False, True])
def test_what_was_divided_and_is_joined_trains_on_as_it_would_have(schedule: bool) -> None:
    tree, divided = halves(schedule)
    rates = {name: g["lr"] for g in tree["optimizer"]["param_groups"] for name in g["param_names"]}
    ends = []
    for checkpoint, plan in ((tree, None), (divided, Plan.from_toml(JOINED))):
        model = Model()
        named = list(model.named_parameters())
        parts = [{"params": [(n, p) for n, p in named if rates[n] == rate]} for rate in dict.fromkeys(rates.values())]
        optimizer = torch.optim.AdamW(parts, lr=9.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        given = scheduler if schedule else None
        optimstate.resume(checkpoint, model=model, optimizer=optimizer, scheduler=given, plan=plan)
        losses = train(model, [optimizer])
        for _ in range(3 * schedule):
            scheduler.step()
            losses += train(model, [optimizer])
        ends.append((losses, [group["lr"] for group in optimizer.param_groups]))
    assert ends[0] == ends[1]


def test_two_of_two_algorithms_become_one() -> None:
    _, tree = trained()
    divided = apply(MUON + REST, tree)
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=9.0)
    plan = Plan.from_toml(JOINED).with_policy(merge="first")
    found = optimstate.resume(divided, model=model, optimizer=optimizer, plan=plan)
    old = by_name(tree["optimizer"])
    for name, parameter in model.named_parameters():
        matrix = name.startswith("blocks") and name.endswith("weight")
        assert same(optimizer.state.get(parameter, {}), {} if matrix else old[name])
    (report,) = (report for key, report in found.reports.items() if key.startswith("optimizer"))
    assert all("starts without state" in report.fresh[f"blocks.{n}.weight"] for n in range(2))
    train(model, [optimizer], 1)


def test_two_become_three_with_rules_in_between() -> None:
    tree, divided = halves()
    text = (
        '[[rule]]\nfrom = "embed"\nto = "words"\n'
        '[[optimizer]]\npath = "a"\nmatch = "words"\n'
        '[[optimizer]]\npath = "b"\nmatch = "blocks.0"\n'
        '[[optimizer]]\npath = "c"\nmatch = "**"\nset = { weight_decay = 0.25 }\n'
    )
    model = Model()
    model.words = model.embed
    del model.embed
    starts = {"a": "words", "b": "blocks.0", "c": "blocks.1"}
    own = {key: [(n, p) for n, p in model.named_parameters() if n.startswith(start)] for key, start in starts.items()}
    optimizers = {key: torch.optim.AdamW(pairs, lr=9.0) for key, pairs in own.items()}
    plan = Plan.from_toml(text).with_policy(merge="first")
    optimstate.resume(divided, model=model, optimizer=optimizers, plan=plan)
    old = by_name(tree["optimizer"])
    for key, pairs in own.items():
        for name, parameter in pairs:
            assert same(optimizers[key].state[parameter], old[name.replace("words", "embed")])
    assert optimizers["c"].param_groups[0]["weight_decay"] == 0.25
    wrong = {"b": optimizers["a"], "a": optimizers["b"], "c": optimizers["c"]}
    with pytest.raises(MigrationError, match="the optimizer given as 'b'"):
        optimstate.resume(divided, model=model, optimizer=wrong, plan=plan)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (JOINED.replace('"**"', '"blocks"'), "group"),
        (JOINED + '[[optimizer]]\npath = "third"\nmatch = "nowhere"\n', "unmatched"),
        ('[[rule]]\ndrop = "nowhere"\n' + JOINED, "unmatched"),
        ('[[rule]]\ndrop = "embed"\n' + JOINED, "unfilled"),
        (JOINED + "set = { lrr = 1.0 }\n", "setting"),
        ('[slots]\nnone = { kind = "scalar" }\n' + JOINED, "unmatched"),
        ('[[group]]\noptimizer = "nowhere"\nset = { lr = 1.0 }\n' + JOINED, "unreached"),
        ("[scheduler]\nset = { step_size = 3 }\n" + JOINED, "unreached"),
    ],
)
def test_joining_refuses_what_it_cannot_do(text: str, kind: str) -> None:
    _, divided = halves()
    model = Model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=9.0)
    before = copy.deepcopy(model.state_dict())
    plan = Plan.from_toml(text).with_policy(merge="first")
    with pytest.raises(MigrationError) as error:
        optimstate.resume(divided, optimizer=optimizer, plan=plan)
    assert kind in {problem.kind for problem in error.value.problems}
    assert not optimizer.state
    assert same(before, model.state_dict())
