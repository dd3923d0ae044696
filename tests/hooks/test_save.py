"""The hooks that run when state is saved, and those that look at what was loaded."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.errors import OptimStateWarning, PlanError, StateMismatchError
from optimstate.plan.language.plan import Plan
from tests import oracle
from tests.hooks.models import MODULES, Net, adam, named_state, one_group, register, train, trained, two_groups, unnamed
from tests.support import seeded

pytestmark = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
layouts = pytest.mark.parametrize("layout", [one_group, two_groups])


def saved(optimizer: torch.optim.Optimizer, *given: Any) -> Any:
    """The state dict through hooks, after checking that the live optimizer has not changed."""
    before = copy.deepcopy(optimizer.state_dict())
    live = {id(p): dict(slots) for p, slots in optimizer.state.items()}
    handles = [optimizer.register_state_dict_post_hook(hook) for hook in given]
    made = optimizer.state_dict()
    for handle in handles:
        handle.remove()
    assert oracle.differences(before, optimizer.state_dict()) == []
    assert all(optimizer.state[p][k] is v for p in optimizer.state for k, v in live[id(p)].items())
    return made


def reread(state_dict: Any) -> Any:
    """Through a file, as torch reads what it does not trust."""
    stream = io.BytesIO()
    torch.save(state_dict, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@layouts
def test_name_params_gives_what_a_named_optimizer_would_have(module: Any, layout: Any) -> None:
    model = seeded(Net)
    optimizer = adam(module, unnamed(layout(model)))
    train(model, optimizer)
    assert "param_names" not in optimizer.state_dict()["param_groups"][0]
    hook = hooks.name_params(model)
    made = saved(optimizer, hook)
    assert hook.report == "name_params: 11 parameters named"
    twin, reference = trained(module, layout)
    for group, other in zip(made["param_groups"], reference.state_dict()["param_groups"], strict=True):
        assert group["param_names"] == other["param_names"]
    resumed = adam(module, twin.named_parameters() if layout is one_group else layout(twin))
    register(resumed, hooks.match_names())
    resumed.load_state_dict(reread(made))
    assert oracle.differences(named_state(optimizer, model), named_state(resumed, twin)) == []
    with pytest.raises(StateMismatchError, match="is not one of the model's"):
        hooks.name_params(nn.Linear(1, 1))(optimizer, optimizer.state_dict())
    assert saved(reference, hooks.name_params(twin)) is not None
    liar = adam(module, [("x." + name, p) for name, p in twin.named_parameters()])
    with pytest.raises(StateMismatchError, match=r"calls a parameter 'x\.embed\.weight', which is 'embed\.weight'"):
        hooks.name_params(twin)(liar, liar.state_dict())


@layouts
def test_metadata_is_plain_and_torch_loads_it(module: Any, layout: Any) -> None:
    model, optimizer = trained(module, layout)
    plan = Plan.from_options(rename=["a=b"])
    made = reread(saved(optimizer, hooks.add_metadata(plan=plan)))
    found = made["optimstate"]
    assert found["algorithm"] == "AdamW"
    assert found["shapes"] == {name: list(p.shape) for name, p in model.named_parameters()}
    assert found["plans"] == [plan.digest]
    assert set(found["versions"]) == {"torch", "optimstate"}
    twin = seeded(Net)
    resumed = adam(module, layout(twin))
    resumed.load_state_dict(made)
    bare = adam(module, unnamed(layout(twin)))
    assert saved(bare, hooks.add_metadata())["optimstate"]["shapes"][1]
    assert "embed.weight" in saved(bare, hooks.add_metadata(twin))["optimstate"]["shapes"]


def test_slots_are_dropped_and_cast(module: Any) -> None:
    model, optimizer = trained(module, amsgrad=True)
    drop, cast = hooks.drop_slots("max_exp_avg_sq"), hooks.cast_slots({"*": "bfloat16", "exp_avg": torch.float64})
    made = saved(optimizer, drop, cast)
    slots = made["state"][0]
    assert {name: value.dtype for name, value in slots.items()} == {
        "step": torch.float32,
        "exp_avg": torch.float64,
        "exp_avg_sq": torch.bfloat16,
    }
    assert drop.report == "drop_slots: 7 slots left out"
    assert cast.report == "cast_slots: 14 slots cast"
    with pytest.raises(StateMismatchError, match="no parameter has the slot 'momentum'"):
        hooks.drop_slots("momentum")(optimizer, optimizer.state_dict())
    with pytest.raises(StateMismatchError, match="no parameter has the slot 'momentum'"):
        hooks.cast_slots({"momentum": "float16"})(optimizer, optimizer.state_dict())
    with pytest.raises(PlanError, match="no dtype is called"):
        hooks.cast_slots("float31")
    fresh = adam(module, model.named_parameters())
    assert saved(fresh, hooks.drop_slots("exp_avg"))["state"] == {}


def test_what_is_on_the_cpu_is_not_copied(module: Any) -> None:
    model, optimizer = trained(module)
    hook = hooks.to_cpu()
    made = saved(optimizer, hook)
    assert made["state"][0]["exp_avg"] is optimizer.state[model.embed.weight]["exp_avg"]
    assert hook.report == "to_cpu: 0 tensors moved"
    away = {"state": {0: {"exp_avg": torch.ones(2, device="meta")}}, "param_groups": []}
    with pytest.raises(NotImplementedError, match="meta"):  # it does try to move what is elsewhere
        hook(optimizer, away)


def test_each_hook_logs_one_line(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = trained(module)
    given = [hooks.name_params(model), hooks.add_metadata(), hooks.drop_slots("exp_avg"), hooks.to_cpu()]
    with caplog.at_level(logging.INFO, "optimstate"):
        for hook in given:
            hook(optimizer, optimizer.state_dict())
    assert [record.message for record in caplog.records] == [hook.report for hook in given]


def problems(optimizer: torch.optim.Optimizer, **options: Any) -> list[str]:
    options = {"skip": ["coverage"], **options}
    return [str(problem) for problem in hooks.resume_problems(optimizer, **options)]


@layouts
def test_a_sound_resume_has_no_problem(module: Any, layout: Any) -> None:
    _, optimizer = trained(module, layout)
    assert problems(optimizer) == []
    assert problems(adam(module, layout(seeded(Net))), skip=[]) == []


def test_every_kind_of_problem_is_found_and_named(module: Any) -> None:
    model, optimizer = trained(module)
    slots = optimizer.state[model.embed.weight]
    assert "unused.weight, unused.bias without state, while 7 others" in problems(optimizer, skip=[])[0]

    def spoiled(slot: str, value: Any) -> list[str]:
        before = slots[slot]
        slots[slot] = value
        found = problems(optimizer)
        slots[slot] = before
        return found

    assert "all zero, though steps were made: embed.weight.exp_avg_sq" in spoiled("exp_avg_sq", torch.zeros(6, 4))[0]
    assert spoiled("step", torch.tensor(7.0)) == ["step counts differ: embed.weight at 7, the others at 3"]
    assert "is torch.float64, its parameter torch.float32" in spoiled("exp_avg", slots["exp_avg"].double())[0]
    assert "is on meta, its parameter on cpu" in spoiled("exp_avg", slots["exp_avg"].to("meta"))[0]
    assert "has shape [24], its parameter [6, 4]" in spoiled("exp_avg", slots["exp_avg"].flatten().clone())[0]
    shared = optimizer.state[model.block.q.weight]["step"]
    assert spoiled("step", shared) == [
        "embed.weight.step and block.q.weight.step share memory: each step would update it twice"
    ]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
    optimizer.param_groups[0]["lr"] = 0.7
    assert "is 0.7, but 0.005 is what the scheduler set last" in problems(optimizer, scheduler=scheduler)[0]
    assert "is 0.7, but 1.0 was to be loaded" in problems(optimizer, lrs=[1.0])[0]
    assert "1 param groups, but 2 learning rates" in problems(optimizer, lrs=[1.0, 2.0])[0]


def test_verify_resume_warns_or_raises_and_puts_back(module: Any) -> None:
    _, optimizer = trained(module)
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["step"] += 1
    model = seeded(Net, 1)
    warned = adam(module, model.named_parameters())
    warned.register_load_state_dict_post_hook(hooks.verify_resume("warn", skip=["coverage"]))
    with pytest.warns(OptimStateWarning, match=r"embed\.weight at 4"):
        warned.load_state_dict(copy.deepcopy(broken))

    resumed = adam(module, model.named_parameters())
    train(model, resumed, 1)
    before = copy.deepcopy(resumed.state_dict())
    hook = hooks.verify_resume(skip=["coverage"])
    resumed.register_load_state_dict_pre_hook(hook)
    resumed.register_load_state_dict_post_hook(hook)
    with pytest.raises(StateMismatchError, match=r"embed\.weight at 4"):
        resumed.load_state_dict(broken)
    assert oracle.differences(before, resumed.state_dict()) == []
    assert hook.problems
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert hook.problems == ()
    assert hook.report is not None
    train(model, resumed, 1)


def test_report_says_what_there_is(module: Any) -> None:
    _, optimizer = trained(module, two_groups)
    resumed = adam(module, two_groups(seeded(Net)))
    told: list[str] = []
    hook = hooks.report(told.append)
    resumed.register_load_state_dict_post_hook(hook)
    resumed.load_state_dict(optimizer.state_dict())
    first, second = told[0].splitlines()
    assert first == "group 0: 5 parameters, lr 0.02, step 3; step 3, exp_avg 3, exp_avg_sq 3"
    assert second.startswith("group 1: 6 parameters, lr 0.01, step 3")
    assert hook.report == told[0]


@pytest.mark.parametrize("saved", ["Adam", "AdamW", "SGD", "RMSprop", "Adamax", "NAdam", "Adafactor", "Adadelta"])
@pytest.mark.parametrize("live", ["Adam", "AdamW", "SGD", "RMSprop", "Adamax", "NAdam", "Adafactor", "Adadelta"])
def test_verify_resume_tells_state_of_another_class(saved: str, live: str, module: Any) -> None:
    """Torch loads it without a word, and fails at the first step, or goes on from what means something else."""
    made = []
    for name in (saved, live):
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        made.append(getattr(module, name)([("w", parameter)], lr=0.1, **options))
        parameter.grad = torch.ones(3, 2)
    made[0].step()
    (old,), (new,) = (optimizer.param_groups[0]["params"] for optimizer in made)
    made[1].state[new] = dict(made[0].state[old])
    found = [problem.kind for problem in hooks.resume_problems(made[1])]
    keys = set(made[1].state[new])
    same = {"Adam": "AdamW"}.get(saved, saved) == {"Adam": "AdamW"}.get(live, live)
    assert ("algorithm" in found) == (not same and bool(keys)), (keys, found)
