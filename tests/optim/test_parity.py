"""The same bits as torch: every option, dtype and implementation of the table, and of torch's own options database."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optimstate.optim as optim
from optimstate.installed_torch import fused_sgd_takes_half_precision
from optimstate.optim import _blocks
from tests import cases, oracle
from tests.cases import Case
from tests.optim import database

# What of torch before 2.14 cannot serve as the oracle, and why. Nothing else is left out.
DEFECTS = (
    {}
    if fused_sgd_takes_half_precision()
    else {
        ("SGD", "fused", "bfloat16"): "the CPU kernel skips whole vectors and leaves momentum uninitialised",
        ("SGD", "fused", "float16"): "the CPU kernel skips whole vectors and leaves momentum uninitialised",
    }
)
COMBINATIONS = [found for found in cases.combinations() if found[:3] not in DEFECTS]

# Those whose for-loop may run block by block.
ELEMENTWISE = tuple(name for name, row in cases.TABLE.items() if row.problem == "dense")
WITH_DIFFERENTIABLE = tuple(name for name, row in cases.TABLE.items() if "differentiable" in row.implementations)


def reference(name: str) -> type[torch.optim.Optimizer]:
    return getattr(torch.optim, name)  # type: ignore[no-any-return]


def candidate(name: str) -> type[torch.optim.Optimizer]:
    return getattr(optim, name)  # type: ignore[no-any-return]


def compare_all(found: Iterator[Case], steps: int = oracle.STEPS) -> None:
    """Compare ours with torch on every case, and fail once with all that differs."""
    told = [
        line
        for case in found
        for line in oracle.compare(reference(case.optimizer), candidate(case.optimizer), case, steps)
    ]
    assert not told, f"{len(told)} differences from torch:\n" + "\n".join(told[:20])


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_every_option_gives_torchs_bits(combination: tuple[str, str, str, str]) -> None:
    name, implementation, dtype, problem = combination
    if implementation == "default" and dtype != "float32" and "forloop" in cases.TABLE[name].implementations:
        # By default small CPU tensors take the for-loop, whose every option runs in every dtype under its own name.
        compare_all(iter(cases.telling(name, implementation, dtype, problem)))
    else:
        compare_all(cases.cases(*combination))


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_every_option_of_torchs_database_gives_torchs_bits(name: str) -> None:
    compare_all(database_cases(name))


def database_cases(name: str) -> Iterator[Case]:
    entry = database.load()[name]
    row = cases.TABLE[name]
    for implementation in (
        "default",
        *(("forloop",) if "foreach" in entry.implementations else ()),
        *entry.implementations,
    ):
        problem = cases.problem_of(name, row, implementation)
        for options in entry.options:
            yield Case(name, options, "float32", implementation, problem, row.second_group)


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_float64_default_makes_float64_step_counts_as_in_torch(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        compare_all(one_of_each_implementation(name, "float64"))
    finally:
        torch.set_default_dtype(torch.float32)


def one_of_each_implementation(name: str, dtype: str) -> Iterator[Case]:
    row = cases.TABLE[name]
    for implementation in row.implementations:
        yield next(cases.cases(name, implementation, dtype, row.problem))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_option_gives_torchs_bits_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "BLOCK", 64)
    monkeypatch.setattr(_blocks, "WORTH_BLOCKING", 100)
    compare_all(
        Case(name, case.options, dtype, "default", "alike", case.second_group)
        for dtype in ("float32", "float64")
        for case in cases.cases(name, "default", dtype)
    )


@pytest.mark.parametrize("dtype", cases.REAL)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_million_elements_give_torchs_bits(name: str, dtype: str) -> None:
    _, busiest, *_ = cases.telling(name, "default", dtype)
    compare_all(iter([Case(name, busiest.options, dtype, "default", "large", None)]), steps=3)


class LargestOperand(TorchDispatchMode):
    """Notes the most elements any operation worked on: the cutting into views is none, nor is making memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "SGD"])
def test_a_large_tensor_is_updated_in_blocks_by_default(name: str) -> None:
    _, busiest, *_ = cases.telling(name, "default", "float32")
    for options in ({}, busiest.options):
        run = oracle.Run(candidate(name), Case(name, options, "float32", "default", "large"))
        run.steps(0, 1)
        with LargestOperand() as seen:
            run.optimizer.step()
        assert 0 < seen.elements < run.parameters[0].numel() // 2, options


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_a_step_leaves_gradients_as_they_were(name: str) -> None:
    row = cases.TABLE[name]
    for implementation in row.implementations:
        for case in cases.cases(name, implementation, "float32", row.problem):
            if case.problem == "closure":
                continue
            run = oracle.Run(candidate(name), case)
            for number in range(2):
                run.steps(number, number + 1)
                mine = [parameter.grad for parameter in run.parameters]
                told = oracle.differences(run.problem.gradients(number), mine, "gradient")
                assert not told, f"{case}: {told}"


# --- what is left out, and whether the oracle can tell ----------------------------------------------------------------


@pytest.mark.parametrize("defect", DEFECTS, ids="-".join)
def test_torchs_defects_are_still_there_and_not_ours(defect: tuple[str, str, str]) -> None:
    name, implementation, dtype = defect
    case = Case(name, {"lr": 0.1, "momentum": 0.9}, dtype, implementation, "steady")
    loop = oracle.Run(reference(name), Case(name, case.options, dtype, "forloop", "steady"))
    torchs, ours = oracle.Run(reference(name), case), oracle.Run(candidate(name), case)
    # Differently laid out, but the same numbers elementwise.
    for run in (loop, torchs, ours):
        run.steps(0, 3)

    def distance(run: oracle.Run) -> float:
        pairs = zip(run.parameters, loop.parameters, strict=True)
        return max(float((one - other).detach().abs().max()) for one, other in pairs if one.numel())

    assert not distance(torchs) < 0.1, "torch is right now: take this out of DEFECTS"
    assert distance(ours) < 0.01


def test_the_table_has_every_optimizer_and_every_argument() -> None:
    assert set(cases.TABLE) == set(torch.optim.__all__ if hasattr(torch.optim, "__all__") else dir(torch.optim)) & {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and value is not torch.optim.Optimizer
    }
    for name, row in cases.TABLE.items():
        arguments = set(inspect.signature(reference(name)).parameters) - {
            "params",
            "foreach",
            "fused",
            "differentiable",
        }
        tried = {option for options in row.option_sets() for option in options}
        assert arguments - tried == set(), f"{name}: no case tries {arguments - tried}"


def called_adam(perturbed: type) -> type:
    """The class under Adam's name, so that its `repr` gives nothing away."""
    perturbed.__name__ = "Adam"
    return perturbed


@called_adam
class Nudged(torch.optim.Adam):
    """Adam, with one element of one parameter moved to the next float after every step."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            element = self.param_groups[0]["params"][0].view(-1)[5:6]
            element.copy_(element.nextafter(torch.tensor(torch.inf)))
        return result


class Zero(torch.optim.Adam):
    """Adam, with a zero in its state."""

    zero = 0.0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["exp_avg_sq"][0, 0] = self.zero
        return result


@called_adam
class PositiveZero(Zero):
    pass


@called_adam
class NegativeZero(Zero):
    zero = -0.0


@called_adam
class ExtraState(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["more"] = 1
        return result


@called_adam
class FloatStep(torch.optim.Adam):
    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        found["state"] = {
            key: {slot: value.item() if slot == "step" else value for slot, value in state.items()}
            for key, state in found["state"].items()
        }
        return found


@called_adam
class IntegerDecay(torch.optim.Adam):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"weight_decay": 0.0, **options})


@called_adam
class OtherStrides(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        state = self.state[self.param_groups[0]["params"][0]]
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()
        return result


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        (torch.optim.Adam, Nudged, "parameter 0: "),
        (PositiveZero, NegativeZero, "exp_avg_sq: 1 of"),
        (torch.optim.Adam, ExtraState, "keys"),
        (torch.optim.Adam, FloatStep, "step: type Tensor != float"),
        (torch.optim.Adam, IntegerDecay, "weight_decay: type int != float"),
        (torch.optim.Adam, OtherStrides, "exp_avg: stride"),
        (torch.optim.Adam, torch.optim.AdamW, "weight_decay: "),
    ],
)
def test_the_oracle_sees_what_differs(one: Any, other: Any, place: str) -> None:
    case = Case("Adam", {"lr": 0.01}, "float32", "forloop", "dense")
    told = oracle.compare(one, other, case)
    assert any(place in line for line in told), told


def test_the_oracle_sees_no_difference_where_there_is_none() -> None:
    for case in one_of_each_implementation("Adam", "float32"):
        assert oracle.compare(torch.optim.Adam, torch.optim.Adam, case) == []


# --- gradients through the step ---------------------------------------------------------------------------------------


def through_steps(
    make: Callable[..., torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype, steps: int
) -> list[Tensor | None]:
    """Gradients of a function of two parameters after some steps, by their starts, gradients and tensor options."""
    starts = [oracle.numbers(shape, dtype, seed=1).requires_grad_() for shape in ((3, 2), (2,))]
    parameters = [start.clone() for start in starts]
    for parameter in parameters:
        parameter.retain_grad()
    optimizer = make(parameters, **options, differentiable=True)
    grads = []
    for number in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = oracle.numbers(
                tuple(parameter.shape), dtype, seed=9 + number + 50 * index
            ).requires_grad_()
            grads.append(parameter.grad)
        optimizer.step()
    tensors = [value for value in options.values() if isinstance(value, Tensor) and value.requires_grad]
    result = sum((parameter * parameter.conj()).real.sum() for parameter in parameters)
    return list(torch.autograd.grad(result, [*starts, *grads, *tensors], allow_unused=True))


@pytest.mark.parametrize("name", WITH_DIFFERENTIABLE)
def test_differentiable_steps_have_torchs_gradients(name: str) -> None:
    compared = 0
    every_lr: tuple[dict[str, Any], ...] = ({}, {"lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)})
    choices = itertools.product(cases.TABLE[name].option_sets(), every_lr, (torch.float64, torch.complex128), (3, 1))
    for options, lr, dtype, steps in choices:
        given = {**options, **lr}
        with oracle.capturable_on_cpu():
            try:
                expected = through_steps(reference(name), given, dtype, steps)
            except (RuntimeError, TypeError, UserWarning):
                continue  # torch overwrites what its graph needs, or takes the tensor for a number
            found = through_steps(candidate(name), given, dtype, steps)
        compared += 1
        told = oracle.differences(expected, found)
        assert told == [], f"{name}({given}) in {dtype}, {steps} steps"
    assert compared >= 8
