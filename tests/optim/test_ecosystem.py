"""What people do with an optimizer besides stepping it, done with torch's class and with ours, gives the same."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import optimstate.optim as optim
from tests import cases, oracle
from tests.cases import Case
from tests.releases import adagrad_of_2_10

Act = Callable[[Any], Any]
BOTH = (torch.optim, optim)
DENSE = tuple(name for name, row in cases.TABLE.items() if row.problem not in {"sparse", "closure"})
EVERY = cases.OPTIMIZERS


def same(act: Act) -> list[str]:
    """What differs between doing something with torch's module and with ours."""
    return oracle.differences(act(torch.optim), act(optim))


def begun(module: Any, name: str, steps: int = 3, **options: Any) -> oracle.Run:
    row = cases.TABLE[name]
    run = oracle.Run(
        getattr(module, name), Case(name, options, row.dtypes[0], "default", row.problem, row.second_group)
    )
    run.steps(0, steps)
    return run


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))


def data(step: int) -> tuple[Tensor, Tensor]:
    return oracle.numbers((5, 4), torch.float32, 100 + step), oracle.numbers((5, 2), torch.float32, 200 + step)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = 4) -> list[float]:
    losses = []
    for number in range(start, stop):
        x, y = data(number)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- the class --------------------------------------------------------------------------------------------------------


def test_adamw_is_an_adam_as_in_torch() -> None:
    assert issubclass(optim.AdamW, optim.Adam)


# --- copies -----------------------------------------------------------------------------------------------------------


def pickled(run: oracle.Run) -> oracle.Run:
    return pickle.loads(pickle.dumps(run))  # type: ignore[no-any-return]


def saved(run: oracle.Run) -> oracle.Run:
    file = io.BytesIO()
    torch.save(run, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, saved], ids=["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("name", EVERY)
def test_a_copied_optimizer_goes_on_with_the_same_bits(name: str, copied: Callable[[oracle.Run], oracle.Run]) -> None:
    torchs, ours = begun(torch.optim, name), copied(begun(optim, name))
    torchs.steps(3, 6)
    ours.steps(3, 6)
    expected, found = torchs.view(), ours.view()
    del expected["defaults"], found["defaults"]  # copying adds to them, in torch too
    assert oracle.differences(expected, found) == []
    # The copy is whole: it takes hooks, groups and state.
    seen: list[str] = []
    ours.optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    ours.steps(6, 7)
    assert seen == ["stepped"]
    ours.optimizer.load_state_dict(ours.optimizer.state_dict())


# --- groups and names -------------------------------------------------------------------------------------------------


def given(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every way to say what to optimize."""
    pairs = list(network.named_parameters())
    tensors = [parameter for _, parameter in pairs]
    yield "tensors", tensors
    yield "a generator", (tensor for tensor in tensors)
    yield "a tuple", tuple(tensors)
    yield "dicts", [{"params": tensors[:1], "lr": 0.5}, {"params": tensors[1:]}]
    yield "dicts of one tensor", [{"params": tensors[0]}, {"params": tensors[1], "lr": 0.5}]
    yield "dicts of generators", [{"params": (tensor for tensor in tensors)}]
    yield "pairs", pairs
    yield "a generator of pairs", network.named_parameters()
    yield "dicts of pairs", [{"params": pairs[:1], "lr": 0.5}, {"params": pairs[1:]}]
    yield "a dict's items", dict(pairs).items()


@pytest.mark.parametrize("name", DENSE)
def test_every_way_to_name_parameters_gives_torchs_groups_and_losses(name: str) -> None:
    for index, (what, _) in enumerate(given(model())):

        def act(module: Any, index: int = index) -> Any:
            network = model()
            optimizer = getattr(module, name)(list(given(network))[index][1], lr=0.1)
            losses = train(network, optimizer)
            return {"losses": losses, "state": optimizer.state_dict(), "repr": repr(optimizer)}

        assert same(act) == [], what


@pytest.mark.parametrize("name", [pytest.param(n, marks=adagrad_of_2_10 if n == "Adagrad" else ()) for n in DENSE])
def test_a_group_added_in_the_middle_gives_torchs_bits(name: str) -> None:
    def act(module: Any) -> Any:
        network = model()
        first, second = network.named_parameters()
        optimizer = getattr(module, name)([first], lr=0.1)
        losses = train(network, optimizer, 0, 2)
        optimizer.add_param_group({"params": [second], "lr": 0.01, "mine": "kept"})
        losses += train(network, optimizer, 2, 5)
        return losses, optimizer.state_dict(), repr(optimizer)

    assert same(act) == []


# Every option of any class, with a value that tells.
TELLING: dict[str, Any] = {
    "adjust_lr_fn": "original", "alpha": 0.7, "amsgrad": True, "beta2_decay": -0.3, "betas": (0.3, 0.4),
    "capturable": True, "centered": True, "d": 2.0, "dampening": 0.2, "decoupled_weight_decay": True,
    "differentiable": True, "eps": 0.5, "etas": (0.2, 3.0), "foreach": True, "history_size": 2,
    "initial_accumulator_value": 0.5, "lambd": 0.3, "line_search_fn": "strong_wolfe", "lr_decay": 0.1,
    "max_eval": 1, "max_iter": 2, "maximize": True, "momentum": 0.5, "momentum_decay": 0.1, "nesterov": True,
    "ns_coefficients": (1.0, 1.0, 1.0), "ns_steps": 2, "rho": 0.5, "step_sizes": (0.1, 0.2), "t0": 2,
    "tolerance_change": 0.5, "tolerance_grad": 0.5, "weight_decay": 0.3,
}  # fmt: skip
# `fused` is an option of ours where torch has no kernel, and LBFGS's `maximize` is heeded before torch has it.
OURS_ALONE = {("LBFGS", "maximize")}


def defaults_of(name: str) -> dict[str, Any]:
    return dict(getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))]).defaults)


@pytest.mark.parametrize("name", EVERY)
def test_options_of_other_algorithms_in_a_group_have_no_effect_as_in_torch(name: str) -> None:
    """Trainers give every optimizer the same groups: each option that the class has not, alone and with decay."""
    own = defaults_of(name)
    assert set(own) <= {*TELLING, "lr", "fused"}
    decayed = {"weight_decay": 0.1} if "weight_decay" in own else {}
    for option in TELLING.keys() - own.keys():
        if (name, option) in OURS_ALONE:
            continue

        def act(module: Any, option: str = option) -> Any:
            shape = (3, 2)
            p = nn.Parameter(oracle.numbers(shape, torch.float32, 1))
            optimizer = getattr(module, name)([{"params": [p], option: TELLING[option], **decayed}])
            for step in range(3):
                p.grad = oracle.numbers(shape, torch.float32, 2 + step)
                if name == "SparseAdam":
                    p.grad = p.grad.to_sparse()
                optimizer.step(*[lambda: p.detach().square().sum()] * (name == "LBFGS"))
            return [p.detach(), optimizer.state_dict()]

        assert same(act) == [], option


@pytest.mark.parametrize("name", EVERY)
def test_options_that_an_old_group_lacks_come_in_torchs_order(name: str) -> None:
    def act(module: Any) -> list[str]:
        optimizer = getattr(module, name)([nn.Parameter(torch.ones(2, 2))])
        (group,) = optimizer.param_groups
        for option in ("foreach", "maximize", "differentiable", "capturable", "fused"):
            group.pop(option, None)
        optimizer.__setstate__(optimizer.__getstate__())
        return list(group)

    assert same(act) == []


def test_zero_grad_as_in_torch() -> None:
    def act(module: Any) -> Any:
        found = []
        for implementation in ("default", "foreach", "fused"):
            for to_none in (True, False):
                network = model()
                optimizer = module.Adam(network.parameters(), **cases.FLAGS[implementation])
                train(network, optimizer, 0, 1)
                parameters = list(network.parameters())
                parameters[0].grad = (parameters[0] * 2).sum(1, keepdim=True) * torch.ones_like(parameters[0])
                optimizer.zero_grad(set_to_none=to_none)
                found.append([parameter.grad for parameter in parameters])
        return found

    assert same(act) == []


def test_a_closure_is_called_once_with_gradients_on_and_its_result_returned() -> None:
    for name in DENSE:

        def act(module: Any, name: str = name) -> Any:
            network, seen = model(), []
            optimizer = getattr(module, name)(network.parameters(), lr=0.1)

            def closure() -> Tensor:
                seen.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                x, y = data(len(seen))
                loss = nn.functional.mse_loss(network(x), y)
                torch.autograd.backward(loss)
                return loss

            with torch.no_grad():
                results = [optimizer.step(closure), optimizer.step(closure=closure)]
            return seen, [result.detach() for result in results], optimizer.state_dict()

        assert same(act) == [], name


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_run_in_torchs_order_and_their_handles_remove_them() -> None:
    def act(module: Any) -> list[str]:
        network, seen = model(), []
        optimizer = module.Adam(network.parameters())

        def note(what: str) -> Callable[..., None]:
            return lambda *_: seen.append(what)

        handles = [
            optimizer.register_step_pre_hook(note("step pre")),
            optimizer.register_step_post_hook(note("step post")),
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            register = getattr(optimizer, f"register_{kind}_hook")
            handles += [
                register(note(f"{kind} 1")),
                register(note(f"{kind} 2")),
                register(note(f"{kind} 0"), prepend=True),
            ]
        for _ in range(2):
            train(network, optimizer, 0, 1)
            optimizer.load_state_dict(optimizer.state_dict())
            seen.append("removed")
            for handle in handles:
                handle.remove()
        return seen

    expected, found = act(torch.optim), act(optim)
    assert found == expected
    assert len(found) == 4 + 12 + 2


def test_hooks_change_what_they_are_given_as_in_torch() -> None:
    def act(module: Any) -> Any:
        network = model()
        optimizer = module.Adam(network.parameters(), lr=0.1)
        train(network, optimizer, 0, 2)
        optimizer.register_step_pre_hook(
            lambda _, args, kwargs: ((*args, lambda: 3.5), kwargs) if len(args) == 1 else None
        )
        optimizer.register_state_dict_post_hook(lambda _, found: {**found, "more": 1})
        optimizer.register_load_state_dict_pre_hook(
            lambda _, given: {**given, "param_groups": [{**given["param_groups"][0], "lr": 0.25}]}
        )
        result = optimizer.step()
        found = optimizer.state_dict()
        optimizer.load_state_dict(found)
        return result, found, repr(optimizer)

    assert same(act) == []


def test_a_pre_hook_that_returns_nonsense_is_refused_as_in_torch() -> None:
    for module in BOTH:
        optimizer = module.SGD(model().parameters())
        optimizer.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match="must return None or a tuple of"):
            optimizer.step()


# --- schedulers and scaling -------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Adafactor", "Muon"])
def test_torchs_schedulers_drive_ours(name: str, scheduler: str) -> None:
    def act(module: Any) -> Any:
        options = {"momentum": 0.9} if name in {"SGD", "RMSprop", "Muon"} else {}
        if scheduler == "OneCycleLR" and name == "Adafactor":
            return None  # no momentum and no betas to cycle
        network = model()
        optimizer = getattr(module, name)(network.parameters(), lr=0.1, **options)
        schedule = SCHEDULERS[scheduler](optimizer)
        losses = []
        for number in range(8):
            losses += train(network, optimizer, number, number + 1)
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        return losses, optimizer.state_dict(), schedule.state_dict() if scheduler != "LambdaLR" else None

    assert same(act) == []


@pytest.mark.parametrize("implementation", ["default", "foreach", "fused"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_gradient_scaling_gives_torchs_bits(name: str, implementation: str) -> None:
    """Overflow in one step included: it is skipped, and the scale backs off."""

    def act(module: Any) -> Any:
        network = model()
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(module, name)(network.parameters(), lr=0.1, **options, **cases.FLAGS[implementation])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        found = []
        for number in range(6):
            x, y = data(number)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(network(x), y) * (torch.inf if number == 3 else 1.0)
            torch.autograd.backward(scaler.scale(loss))
            if number == 1:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            found.append(scaler.get_scale())
        leftovers = [hasattr(optimizer, attribute) for attribute in ("grad_scale", "found_inf")]
        return found, leftovers, optimizer.state_dict(), [p.detach() for p in network.parameters()]

    assert same(act) == []
    assert torch.isfinite(act(optim)[3][0]).all()


# --- distributed checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_distributed_checkpoint_functions_work_as_with_torchs_class(name: str, flat: bool) -> None:
    """State by parameter name, taken from one and set in a fresh other, both ways and by both pairs of functions."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found, losses = [], []
    for source, target in ((torch.optim, torch.optim), (optim, torch.optim), (torch.optim, optim), (optim, optim)):
        network = model()
        optimizer = getattr(source, name)(network.parameters(), lr=0.1)
        train(network, optimizer)
        state = get_optimizer_state_dict(network, optimizer, options=options)
        fresh_network = copy.deepcopy(network)
        fresh = getattr(target, name)(fresh_network.parameters(), lr=0.3)
        set_optimizer_state_dict(fresh_network, fresh, copy.deepcopy(state), options=options)
        losses.append(train(fresh_network, fresh, 4, 7))
        found.append((state, get_state_dict(fresh_network, fresh, options=options)))
        model_state, optimizer_state = copy.deepcopy(found[-1][1])
        set_state_dict(
            fresh_network, fresh, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
        )
    for other in found[1:]:
        assert oracle.differences(list(found[0]), list(other)) == []
    assert all(other == losses[0] for other in losses)


# --- warnings ---------------------------------------------------------------------------------------------------------

SPARSE_RUN = """
import importlib, sys, torch, warnings
optim = importlib.import_module(sys.argv[1])
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: print(str(message).split("(Triggered")[0])
for name in ("SparseAdam", "Adagrad", "SGD"):
    table = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = getattr(optim, name)(table.parameters(), lr=0.1)
    for rows in ([0, 2], [2, 3, 3]):
        optimizer.zero_grad()
        table(torch.tensor(rows)).square().sum().backward()
        optimizer.step()
"""


def test_sparse_steps_warn_of_nothing_that_torchs_do_not_in_a_fresh_process() -> None:
    """torch warns once in a process, so only a fresh one can tell."""
    if warned := sparse_warnings("optimstate.optim"):  # 2.12 warns in its own step too
        assert warned == sparse_warnings("torch.optim")


def sparse_warnings(library: str) -> str:
    done = subprocess.run([sys.executable, "-c", SPARSE_RUN, library], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
