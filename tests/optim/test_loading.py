"""Loading state: as torch does where it is right, and refused before anything changes where it cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import optimstate.optim as optim
from optimstate.errors import ParameterNameWarning, StateMismatchError
from tests import cases, oracle

StateDict = dict[str, Any]
Make = Callable[..., torch.optim.Optimizer]

# Options with which every slot of an algorithm is in use.
FULLEST: dict[str, dict[str, Any]] = {
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "SGD": {"momentum": 0.9},
}
KEEPS_STATE = tuple(name for name in cases.OPTIMIZERS if name not in {"LBFGS", "SparseAdam"})


def two_matrices(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [
        oracle.numbers(shape, torch.float32, seed=n).requires_grad_()
        for n, shape in enumerate(shapes or ((4, 3), (2, 5)))
    ]


def make_steps(optimizer: torch.optim.Optimizer, parameters: list[Tensor], *seeds: int) -> None:
    """A step with gradients from each of the seeds."""
    for seed in seeds:
        for parameter in parameters:
            parameter.grad = oracle.numbers(tuple(parameter.shape), parameter.dtype, seed)
        optimizer.step()


def trained(
    make: Make, parameters: list[Tensor], names: list[str] | None = None, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer that has made two steps."""
    given: Any = parameters if names is None else list(zip(names, parameters, strict=True))
    optimizer = make(given, **options)
    make_steps(optimizer, parameters, 7, 8)
    return optimizer


def trained_named(name: str, module: Any = optim, names: list[str] | None = None) -> torch.optim.Optimizer:
    return trained(getattr(module, name), two_matrices(), names, **FULLEST.get(name, {}))


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A deep copy of all that loading could change."""
    return copy.deepcopy({"state_dict": optimizer.state_dict(), "attributes": sorted(vars(optimizer))})


def refused(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> str:
    """Load what must be refused; the message, after checking that neither the optimizer nor the dict changed."""
    before, given = everything(optimizer), copy.deepcopy(state_dict)
    held = [id(value) for state in optimizer.state.values() for value in state.values()]
    with pytest.raises(StateMismatchError) as raised:
        optimizer.load_state_dict(state_dict)
    assert oracle.differences(before, everything(optimizer)) == []
    assert held == [id(value) for state in optimizer.state.values() for value in state.values()]
    assert oracle.differences(given, state_dict) == []
    assert isinstance(raised.value, ValueError)
    return str(raised.value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_state_for_a_parameter_of_another_name_warns_and_names_both() -> None:
    saved = trained(optim.Adam, two_matrices((3, 3), (3, 3)), ["first", "second"]).state_dict()
    live = optim.Adam(list(zip(["second", "third"], two_matrices((3, 3), (3, 3)), strict=True)))
    with pytest.warns(ParameterNameWarning) as warned:
        live.load_state_dict(saved)
    text = str(warned[0].message)
    assert len(warned) == 1
    for word in ("first", "second", "match_names"):
        assert word in text
    # The warning points at the caller, not into the library.
    assert warned[0].filename == __file__
    # Positional, as in torch ...
    given = live.param_groups[0]["params"]
    assert torch.equal(live.state[given[0]]["exp_avg"], saved["state"][0]["exp_avg"])
    # ... but names that lie are not adopted.
    assert live.param_groups[0]["param_names"] == ["second", "third"]


def test_names_that_are_not_as_many_as_parameters_accuse_nobody() -> None:
    saved = trained_named("Adam", names=["first", "second"]).state_dict()
    saved["param_groups"][0]["param_names"] = [
        "second"
    ]  # as torch's set_optimizer_state_dict(strict=False) leaves them
    live = trained_named("Adam", names=["first", "second"])
    live.load_state_dict(saved)  # a warning would be an error
    assert live.param_groups[0]["param_names"] == ["first", "second"]


def test_equal_names_load_in_silence() -> None:
    saved = trained(optim.Adam, two_matrices(), ["first", "second"]).state_dict()
    live = optim.Adam(list(zip(["first", "second"], two_matrices(), strict=True)))
    live.load_state_dict(saved)
    assert oracle.differences(live.state_dict(), saved) == []


def test_names_are_kept_when_none_are_loaded_and_taken_where_none_are_live() -> None:
    nameless = trained(optim.Adam, two_matrices()).state_dict()
    named = trained(optim.Adam, two_matrices(), ["first", "second"]).state_dict()
    live = optim.Adam(list(zip(["a", "b"], two_matrices(), strict=True)))
    live.load_state_dict(nameless)
    assert live.param_groups[0]["param_names"] == ["a", "b"]
    anonymous = optim.Adam(two_matrices())
    anonymous.load_state_dict(named)
    assert anonymous.param_groups[0]["param_names"] == ["first", "second"]


def test_one_warning_tells_of_many_names() -> None:
    names = [f"layer.{n}" for n in range(40)]
    saved = trained(optim.SGD, two_matrices(*[(2, 2)] * 40), names, momentum=0.9).state_dict()
    live = optim.SGD(list(zip(reversed(names), two_matrices(*[(2, 2)] * 40), strict=True)))
    with pytest.warns(ParameterNameWarning) as warned:
        live.load_state_dict(saved)
    assert len(warned) == 1
    assert len(str(warned[0].message)) < 2000


def test_a_hook_that_puts_names_in_order_leaves_nothing_to_warn_about() -> None:
    saved = trained(optim.Adam, two_matrices((4, 3), (2, 5)), ["first", "second"]).state_dict()
    parameters = two_matrices((2, 5), (4, 3))
    live = optim.Adam(list(zip(["second", "first"], parameters, strict=True)))

    def swap(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
        groups = [{**state_dict["param_groups"][0], "param_names": ["second", "first"]}]
        return {"state": {0: state_dict["state"][1], 1: state_dict["state"][0]}, "param_groups": groups}

    live.register_load_state_dict_pre_hook(swap)
    live.load_state_dict(saved)
    assert torch.equal(live.state[parameters[0]]["exp_avg"], saved["state"][1]["exp_avg"])


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEEPS_STATE)
def test_state_of_another_shape_is_refused_naming_parameter_and_shapes(name: str) -> None:
    saved = trained(
        getattr(optim, name), two_matrices((4, 3), (2, 5)), ["first", "wide"], **FULLEST.get(name, {})
    ).state_dict()
    live = trained(getattr(optim, name), two_matrices((4, 3), (2, 6)), ["first", "wide"], **FULLEST.get(name, {}))
    text = refused(live, saved)
    assert "wide" in text
    assert "(2, 6)" in text
    shapes = [tuple(t.shape) for t in saved["state"][1].values() if isinstance(t, Tensor) and t.dim()]
    assert any(str(shape) in text for shape in shapes), text
    assert "match_names" in text
    assert "optimstate remap" in text


def test_a_nameless_parameter_is_named_by_its_place() -> None:
    text = refused(trained(optim.Adam, two_matrices((4, 3), (2, 6))), trained(optim.Adam, two_matrices()).state_dict())
    assert "(2, 6)" in text
    assert "(2, 5)" in text
    assert "1" in text


@pytest.mark.parametrize(("slot", "shape"), [("row_var", (4, 2)), ("col_var", (2, 3)), ("row_var", (4, 3))])
def test_factored_state_is_held_to_its_own_shapes(slot: str, shape: tuple[int, ...]) -> None:
    live = trained_named("Adafactor")
    saved = copy.deepcopy(live.state_dict())
    live.load_state_dict(saved)  # as it is, it fits
    saved["state"][0][slot] = torch.zeros(shape)
    text = refused(live, saved)
    assert slot in text
    assert str(shape) in text


def test_every_slot_is_checked_not_only_the_first() -> None:
    live = trained_named("RMSprop")
    for slot in ("square_avg", "momentum_buffer", "grad_avg"):
        saved = copy.deepcopy(live.state_dict())
        saved["state"][1][slot] = torch.zeros(5, 2)
        text = refused(live, saved)
        assert slot in text
        assert "(5, 2)" in text


def lbfgs(count: int) -> torch.optim.Optimizer:
    parameter = oracle.numbers((count,), torch.float32, seed=1).requires_grad_()
    optimizer = optim.LBFGS([parameter], max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = oracle.curved_loss([parameter, parameter])
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return optimizer


def test_flat_state_of_another_length_is_refused() -> None:
    text = refused(lbfgs(4), lbfgs(6).state_dict())
    assert "4" in text
    assert "6" in text


def test_a_broadcastable_shape_is_still_another_shape() -> None:
    live = trained_named("Adam")
    saved = copy.deepcopy(live.state_dict())
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    assert "exp_avg" in refused(live, saved)


# --- algorithms and options -------------------------------------------------------------------------------------------


def torch_survives(target: str, saved: StateDict) -> bool:
    """Whether torch's own class loads this and then makes two steps."""
    parameters = two_matrices()
    optimizer = getattr(torch.optim, target)(parameters, **FULLEST.get(target, {}))
    try:
        optimizer.load_state_dict(copy.deepcopy(saved))
        make_steps(optimizer, parameters, 3, 4)
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError, ValueError):
        return False
    return True


@pytest.mark.parametrize("target", KEEPS_STATE)
def test_state_of_another_algorithm_is_refused_where_torch_would_fail_later(target: str) -> None:
    doomed = 0
    for source in KEEPS_STATE:
        saved = trained_named(source, torch.optim).state_dict()
        if torch_survives(target, saved):
            continue
        doomed += 1
        text = refused(trained_named(target), saved)
        assert target in text, f"{source} into {target}: {text}"
    assert doomed >= 5


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "AdamW"])
def test_an_option_whose_slot_is_missing_is_refused(name: str) -> None:
    live = trained_named(name)
    saved = copy.deepcopy(live.state_dict())
    slot = {"RMSprop": "grad_avg"}.get(name, "max_exp_avg_sq")
    del saved["state"][1][slot]
    assert slot in refused(live, saved)


def test_adam_and_adamw_exchange_state_as_in_torch() -> None:
    for source, target in (("Adam", "AdamW"), ("AdamW", "Adam")):
        saved = trained_named(source, torch.optim).state_dict()
        loaded = []
        for module in (torch.optim, optim):
            optimizer = getattr(module, target)(two_matrices())
            optimizer.load_state_dict(copy.deepcopy(saved))
            loaded.append(optimizer.state_dict())
        assert oracle.differences(*loaded) == []


def test_groups_that_do_not_match_are_refused_with_both_counts() -> None:
    saved = trained_named("Adam").state_dict()
    first, second = two_matrices()
    split = optim.Adam([{"params": [first]}, {"params": [second]}])
    text = refused(split, saved)
    assert "1" in text
    assert "2" in text
    longer = optim.Adam(two_matrices((4, 3), (2, 5), (1, 1)))
    text = refused(longer, saved)
    assert "2" in text
    assert "3" in text


def test_keys_without_state_or_groups_are_refused_as_what_they_are() -> None:
    model_like = {"weight": torch.zeros(4, 3)}
    with pytest.raises((StateMismatchError, KeyError)):
        optim.Adam(two_matrices()).load_state_dict(model_like)


# --- as torch does ----------------------------------------------------------------------------------------------------


def both_load(name: str, saved: StateDict, **options: Any) -> list[str]:
    """What differs between torch and ours after loading and two more steps."""
    seen = []
    for module in (torch.optim, optim):
        parameters = two_matrices()
        optimizer = getattr(module, name)(parameters, **options)
        optimizer.load_state_dict(copy.deepcopy(saved))
        loaded = copy.deepcopy(optimizer.state_dict())
        make_steps(optimizer, parameters, 3, 4)
        seen.append({"loaded": loaded, "stepped": optimizer.state_dict(), "parameters": parameters})
    return oracle.differences(*seen)


@pytest.mark.parametrize("name", KEEPS_STATE)
def test_checkpoints_from_before_an_option_existed_load_as_in_torch(name: str) -> None:
    saved = trained_named(name, torch.optim).state_dict()
    tried = 0
    for older in older_forms(saved):
        if torch_survives(name, older):
            tried += 1
            assert both_load(name, older) == []
    assert tried >= (1 if name == "Muon" else 3)


def older_forms(saved: StateDict) -> Iterator[StateDict]:
    """The dict without each option in turn, and with step counts as plain numbers."""
    for option in saved["param_groups"][0]:
        if option != "params":
            older = copy.deepcopy(saved)
            del older["param_groups"][0][option]
            yield older
    for convert in (float, int):
        older = copy.deepcopy(saved)
        for state in older["state"].values():
            if "step" in state:
                state["step"] = convert(state["step"])
        yield older


@pytest.mark.parametrize("name", KEEPS_STATE)
def test_only_some_parameters_having_state_loads_as_in_torch(name: str) -> None:
    saved = trained_named(name, torch.optim).state_dict()
    del saved["state"][0]
    if torch_survives(name, saved):
        assert both_load(name, saved) == []


def test_options_and_state_that_torch_does_not_know_are_kept_as_in_torch() -> None:
    saved = trained_named("Adam", torch.optim).state_dict()
    saved["param_groups"][0].update(initial_lr=0.5, note="mine")
    saved["state"]["global"] = {"seen": 3, "tensor": torch.ones(2)}
    saved["state"][0]["extra"] = torch.ones(4, 3, dtype=torch.float64)
    saved["state"][0]["nested"] = {"list": [torch.ones(2), 1], "tuple": (torch.ones(1),)}
    assert both_load("Adam", saved) == []


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("saved_fused", [False, True])
@pytest.mark.parametrize("live_fused", [False, True])
def test_fused_and_loop_checkpoints_load_into_one_another_as_in_torch(
    name: str, saved_fused: bool, live_fused: bool
) -> None:
    parameters = two_matrices()
    source = trained(getattr(torch.optim, name), parameters, **FULLEST.get(name, {}), fused=saved_fused)
    assert both_load(name, source.state_dict(), fused=live_fused) == []


@pytest.mark.parametrize("name", KEEPS_STATE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_state_is_cast_to_its_parameters_dtype_as_in_torch(name: str, dtype: str) -> None:
    saved = trained_named(name, torch.optim).state_dict()
    seen = []
    for module in (torch.optim, optim):
        parameters = [p.detach().to(getattr(torch, dtype)).requires_grad_() for p in two_matrices()]
        optimizer = getattr(module, name)(parameters)
        optimizer.load_state_dict(copy.deepcopy(saved))
        seen.append(optimizer.state_dict())
    assert oracle.differences(*seen) == []


def test_the_dict_that_is_loaded_is_not_changed_by_loading() -> None:
    saved = trained_named("Adam").state_dict()
    given = copy.deepcopy(saved)
    optim.Adam(two_matrices(), lr=0.5).load_state_dict(given)
    assert oracle.differences(given, saved) == []


# --- strides ----------------------------------------------------------------------------------------------------------


def with_other_strides(saved: StateDict) -> StateDict:
    """The same numbers, laid out in memory by columns."""
    turned = copy.deepcopy(saved)
    for state in turned["state"].values():
        for slot, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                state[slot] = value.t().contiguous().t()
    return turned


@pytest.mark.parametrize("implementation", ["forloop", "foreach", "fused"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_state_with_other_strides_is_read_rightly(name: str, implementation: str) -> None:
    options = {**FULLEST.get(name, {}), **cases.FLAGS[implementation]}
    saved = trained(getattr(optim, name), two_matrices((33, 17), (2, 5)), **options).state_dict()
    seen = []
    for given in (saved, with_other_strides(saved)):
        parameters = two_matrices((33, 17), (2, 5))
        optimizer = getattr(optim, name)(parameters, **options)
        optimizer.load_state_dict(copy.deepcopy(given))
        make_steps(optimizer, parameters, 3, 4)
        slots = [list(optimizer.state[parameter].values()) for parameter in parameters]
        seen.append([[[t.contiguous() for t in state] for state in slots], parameters])
    assert oracle.differences(*seen) == []


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_state_assigned_by_hand_with_other_strides_is_read_rightly_by_fused_kernels(name: str) -> None:
    seen = []
    for turn in (False, True):
        parameters = two_matrices((33, 17), (2, 5))
        optimizer = trained(getattr(optim, name), parameters, **FULLEST.get(name, {}), fused=True)
        for state in optimizer.state.values():
            for slot, value in state.items():
                if turn and value.dim() == 2:
                    state[slot] = value.t().contiguous().t()
        make_steps(optimizer, parameters, 9)
        seen.append(parameters)
    assert oracle.differences(*seen) == []


def test_channels_last_parameters_keep_channels_last_state() -> None:
    shape = (2, 3, 4, 5)
    parameter = oracle.channels_last(oracle.numbers(shape, torch.float32, 1)).requires_grad_()
    source = oracle.numbers(shape, torch.float32, 1).requires_grad_()
    saved = trained(optim.AdamW, [source], fused=True).state_dict()
    live = optim.AdamW([parameter], fused=True)
    live.load_state_dict(saved)
    assert live.state[parameter]["exp_avg"].stride() == parameter.stride()
    assert torch.equal(live.state[parameter]["exp_avg"], saved["state"][0]["exp_avg"])
