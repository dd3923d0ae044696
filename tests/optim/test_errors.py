"""What torch refuses, ours refuses with the same exception and the same words; what torch takes, ours takes.

Nothing here is written down twice: each misuse is tried on torch, and what torch said is what ours must say.
"""

from __future__ import annotations

import copy
import inspect
import math
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import required

import optimstate.optim as optim
from tests import cases, oracle
from tests.optim import database

Act = Callable[[Any], Any]

# Values that no hyperparameter, or only some, can take.
BAD_NUMBERS = (-1, -0.5, 0, 0.5, 1, 1.0, 1.5, math.nan, math.inf, -math.inf, True, "0.1", None)
BAD_TENSORS = (torch.tensor([0.1, 0.2]), torch.tensor([]), torch.tensor(-0.1), torch.tensor([[0.1]]), torch.tensor(0.1))
BAD_PAIRS = (
    (1.0, 0.9),
    (0.9, 1.0),
    (-0.1, 0.9),
    (0.9, -0.1),
    (0.5, 0.5),
    (0.0, 1.2),
    (None, -1.0),
    (-1.0, 1e-3),
    (torch.tensor(0.9), 0.99),
    (0.9, torch.tensor(0.99)),
    (torch.tensor([0.9, 0.8]), torch.tensor(0.99)),
    (torch.tensor(0.9), torch.tensor([0.99, 0.9])),
    (torch.tensor(1.5), torch.tensor(0.9)),
    (0.9,),
    0.9,
    None,
)
BAD_VALUES = (*BAD_NUMBERS, *BAD_TENSORS, *BAD_PAIRS)

# Combinations of options that exclude or demand one another.
BAD_TOGETHER: tuple[dict[str, Any], ...] = (
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"foreach": True, "differentiable": True},
    {"fused": True, "foreach": True, "differentiable": True},
    {"foreach": True, "lr": torch.tensor(0.1)},
    {"foreach": True, "lr": torch.tensor([0.1, 0.1])},
    {"foreach": True, "betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"foreach": True, "capturable": True},
    {"capturable": True},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"adjust_lr_fn": "nonsense"},
    {"line_search_fn": "nonsense"},
    {"ns_steps": 200},
    {"ns_coefficients": (1.0, 2.0)},
)


class Outcome(NamedTuple):
    """The type and words of what was raised (a warning counts), empty if nothing was.

    `stated` says whether torch raised it on purpose, in a `raise` of its own; else a tensor operation or Python did.
    """

    kind: str = ""
    words: str = ""
    stated: bool = False


def outcome(act: Act, module: Any) -> Outcome:
    try:
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(True):  # type: ignore[no-untyped-call]
            warnings.simplefilter("error")
            act(module)
    except Exception as error:  # noqa: BLE001 (whatever torch raises is the expectation)
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        stated = "/optim/" in innermost.filename and (innermost.line or "").startswith(("raise ", "warnings.warn("))
        return Outcome(type(error).__name__, str(error), stated)
    return Outcome()


def same(act: Act, what: str) -> bool:
    """Check that ours does as torch does; whether torch refused on purpose.

    Where torch only stumbles (over a tensor operation, or over Python), ours may stumble elsewhere, or not at all.
    """
    expected, found = outcome(act, torch.optim), outcome(act, optim)
    if expected.stated or not expected.kind:
        assert found[:2] == expected[:2], f"{what}: torch raised {expected}, ours {found}"
    return expected.stated


def parameters(name: str) -> list[Tensor]:
    shapes = ((3, 2), (2, 4)) if cases.TABLE[name].problem == "matrices" else ((3, 2), (5,))
    return [oracle.numbers(shape, torch.float32, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def make_and_step(name: str, options: dict[str, Any]) -> Act:
    """Construct with the options and, if that works, make two steps."""

    def act(module: Any) -> None:
        params = parameters(name)
        optimizer = getattr(module, name)(params, **copy.deepcopy(options))
        if name == "LBFGS" and any(isinstance(value, float) and not math.isfinite(value) for value in options.values()):
            return  # it would never end
        for seed in (5, 6):
            for p in params:
                gradient = oracle.numbers(tuple(p.shape), p.dtype, seed)
                p.grad = gradient.to_sparse(1) if name == "SparseAdam" else gradient
            optimizer.step(*([lambda: oracle.curved_loss(params)] if name == "LBFGS" else []))

    return act


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_bad_hyperparameters_raise_what_torch_raises(name: str) -> None:
    arguments = set(inspect.signature(getattr(torch.optim, name)).parameters) - {"params"}
    raised = 0
    for argument in sorted(arguments):
        for value in BAD_VALUES:
            raised += same(make_and_step(name, {argument: value}), f"{name}({argument}={value!r})")
    assert raised >= len(arguments)


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_options_that_exclude_one_another_raise_what_torch_raises(name: str) -> None:
    raised = sum(same(make_and_step(name, options), f"{name}(**{options})") for options in BAD_TOGETHER)
    assert raised >= (name != "SparseAdam")  # which has no such options


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_an_unknown_argument_is_a_type_error_as_in_torch(name: str) -> None:
    expected, found = (outcome(make_and_step(name, {"no_such_option": 1}), module) for module in (torch.optim, optim))
    assert found == expected
    assert expected.kind == "TypeError"


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_arguments_have_torchs_names_order_and_defaults(name: str) -> None:
    def shape_of(module: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(getattr(module, name)).parameters.values()
        return [(argument.name, argument.kind, argument.default) for argument in found]

    assert shape_of(optim)[: len(shape_of(torch.optim))] == shape_of(torch.optim)
    # Ours may add keyword options after torch's, never change them.
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in shape_of(optim)[len(shape_of(torch.optim)) :])


# --- parameters -------------------------------------------------------------------------------------------------------


def param() -> Tensor:
    return oracle.numbers((3, 2), torch.float32, seed=1).requires_grad_()


def twice(p: Tensor) -> list[Tensor]:
    return [p, p]


BAD_PARAMETERS: dict[str, Callable[[], Any]] = {
    "a tensor": param,
    "nothing": list,
    "None": lambda: None,
    "a number": lambda: 3,
    "a string": lambda: "weights",
    "numbers": lambda: [1, 2],
    "a list of lists": lambda: [[param()]],
    "a set": lambda: [{"params": {param(), param()}}],
    "an empty dict": lambda: [{}],
    "a dict without params": lambda: [{"lr": 0.1}],
    "a dict among tensors": lambda: [param(), {"params": [param()]}],
    "a tensor among dicts": lambda: [{"params": [param()]}, param()],
    "a non-leaf": lambda: [param() * 2],
    "a non-leaf in a dict": lambda: [{"params": [param() * 2]}],
    "one tensor twice": lambda: twice(param()),
    "one tensor twice in a dict": lambda: [{"params": twice(param())}],
    "one tensor in two groups": lambda: [{"params": [p]} for p in twice(param())],
    "names for some": lambda: [("weight", param()), param()],
    "names for the later": lambda: [param(), ("weight", param())],
    "names in one group": lambda: [{"params": [("weight", param())]}, {"params": [param()]}],
    "names in the second group": lambda: [{"params": [param()]}, {"params": [("weight", param())]}],
    "a name for a number": lambda: [("weight", 3)],
    "integers": lambda: [torch.ones(2, 2, dtype=torch.int64)],
    "complex": lambda: [oracle.numbers((3, 2), torch.complex64, 1).requires_grad_()],
    "sparse": lambda: [torch.zeros(3, 2).to_sparse().requires_grad_()],
    "sparse in a dict": lambda: [{"params": [torch.zeros(3, 2).to_sparse().requires_grad_()]}],
    "a vector": lambda: [oracle.numbers((3,), torch.float32, 1).requires_grad_()],
    "an empty tensor": lambda: [torch.zeros(0, 3).requires_grad_()],
    "a generator": lambda: (p for p in [param()]),
    "a dict of names": lambda: {"weight": param()},
}


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_bad_parameters_raise_what_torch_raises(name: str) -> None:
    raised = 0
    for what, make in BAD_PARAMETERS.items():
        raised += same(lambda module, make=make: getattr(module, name)(make()), f"{name} given {what}")
    assert raised >= 15


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_bad_groups_added_later_raise_what_torch_raises(name: str) -> None:
    raised = 0
    later: dict[str, Callable[[Tensor], Any]] = {
        "a list": lambda p: [param()],
        "a tensor": lambda p: param(),
        "the same parameter": lambda p: {"params": [p]},
        "names": lambda p: {"params": [("weight", param())]},
        "a set": lambda p: {"params": {param()}},
        "nothing": lambda p: {},
        "a number": lambda p: {"params": [3]},
        "a parameter": lambda p: {"params": [param()], "lr": 0.5},
        "a bare tensor": lambda p: {"params": param()},
    }
    for what, make in later.items():

        def act(module: Any, make: Callable[[Tensor], Any] = make) -> None:
            first = param()
            getattr(module, name)([first]).add_param_group(make(first))

        raised += same(act, f"{name}: adding {what}")
    assert raised >= 6


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_what_torchs_database_calls_errors_raises_what_torch_raises(name: str) -> None:
    raised = 0
    for what, params, options, when in database.load()[name].errors:
        if params is None:
            act = make_and_step(name, options)
        else:

            def act(module: Any, params: Any = params, options: Any = options, when: str = when) -> None:
                given = copy.deepcopy(params)
                optimizer = getattr(module, name)(given, **options)
                if when == "STEP_ERROR":
                    for p in given:
                        p.grad = torch.ones_like(p)
                    optimizer.step()

        raised += same(act, f"{name}: {what}")
    assert raised == len(database.load()[name].errors)


# --- steps ------------------------------------------------------------------------------------------------------------


def step_with(
    name: str, options: dict[str, Any], gradient: Callable[[], Tensor], dtype: torch.dtype = torch.float32
) -> Act:
    def act(module: Any) -> None:
        p = oracle.numbers((3, 2), dtype, seed=1).requires_grad_()
        optimizer = getattr(module, name)([p], **options)
        p.grad = gradient()
        optimizer.step()

    return act


@pytest.mark.parametrize("name", [name for name in cases.OPTIMIZERS if name != "LBFGS"])
def test_gradients_that_do_not_fit_raise_what_torch_raises(name: str) -> None:
    row = cases.TABLE[name]
    raised = 0
    for implementation in row.implementations:
        flags = dict(cases.FLAGS[implementation])
        gradients: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
            "sparse": (lambda: torch.ones(3, 2).to_sparse(1), torch.float32),
            "dense": (lambda: torch.ones(3, 2), torch.float32),
            "complex": (lambda: torch.ones(3, 2, dtype=torch.complex64), torch.complex64),
            "float64": (lambda: torch.ones(3, 2, dtype=torch.float64), torch.float64),
        }
        for what, (gradient, dtype) in gradients.items():
            more = [{}, {"weight_decay": 0.1}] if "weight_decay" in row.product else [{}]
            for options in more:
                given = {**flags, **options}
                if implementation == "differentiable" and what == "dense":
                    continue  # a leaf that requires gradients cannot be stepped; see test_parity
                raised += same(step_with(name, given, gradient, dtype), f"{name}(**{given}) with a {what} gradient")
    assert raised >= 1


def test_lbfgs_without_a_closure_and_with_groups_raises_what_torch_raises() -> None:
    for module in (torch.optim, optim):
        assert outcome(lambda module: module.LBFGS([param()]).step(), module).kind == "TypeError"
    assert same(lambda module: module.LBFGS([{"params": [param()]}, {"params": [param()]}]), "two groups")

    def search_that_does_not_exist(module: Any) -> None:
        p = param()
        module.LBFGS([p], line_search_fn="other").step(lambda: oracle.curved_loss([p, p]).backward() or p.sum())

    assert same(search_that_does_not_exist, "line search")


def test_the_base_class_raises_what_torch_raises() -> None:
    assert same(lambda module: module.Optimizer([param()], {}).step(), "step of the base class")
    assert same(lambda module: module.Optimizer(param(), {}), "a tensor")
    assert same(lambda module: module.Optimizer([param()], {"lr": required}), "a required option")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_fused_steps_on_what_kernels_cannot_take_raise_what_torch_raises(name: str) -> None:
    raised = 0
    for dtype in (torch.complex64, torch.int64, torch.float32):
        given = torch.ones(3, 2, dtype=dtype)

        def act(module: Any, given: Tensor = given) -> None:
            p = given.clone()
            optimizer = getattr(module, name)([p], fused=True)
            p.grad = torch.ones_like(p)
            optimizer.step()

        raised += same(act, f"fused {name} of {dtype}")
    assert raised == 2
