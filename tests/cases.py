"""What every optimizer is tried with: one table of optimizer × options × dtype × implementation.

A test asks for `cases(...)` and gets plain data. The table says only what torch accepts; `tests/optim/test_parity.py`
runs all of it on torch itself first, so a row torch refuses fails there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optimstate.installed_torch import LBFGS_MAXIMIZES, MUON_ADJUSTMENTS
from tests.releases import SQUEEZES_BETAS

Options = Mapping[str, Any]

REAL = ("float32", "float64", "bfloat16", "float16")
COMPLEX = ("complex64",)
# "mixed" puts several dtypes in one group, so that foreach and fused must sort them.
EVERY_DTYPE = (*REAL, *COMPLEX, "mixed")
REAL_ONLY = (*REAL, "mixed_real")
FUSED_DTYPES = (*REAL, "mixed_wide")

LOOPS = ("default", "forloop", "foreach")
FLAGS: Mapping[str, Options] = {
    "default": {},
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
}


@dataclass(frozen=True)
class Row:
    """One optimizer's line of the table.

    Args:
        product: Options of which every combination is tried.
        extras: Option sets tried besides, each alone.
        implementations: Keys of `FLAGS` that torch's class has.
        dtypes: Dtypes torch accepts in the loops; fused kernels take `FUSED_DTYPES`.
        problem: Which parameters and gradients suit it; see `tests.oracle.Problem`.
        second_group: Options of the second param group, or None where only one group is allowed.
    """

    product: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    extras: Sequence[Options] = ()
    implementations: Sequence[str] = (*LOOPS, "differentiable")
    dtypes: Sequence[str] = EVERY_DTYPE
    problem: str = "dense"
    second_group: Options | None = field(default_factory=lambda: {"lr": 0.05})

    def option_sets(self) -> Iterator[Options]:
        for values in itertools.product(*self.product.values()):
            yield dict(zip(self.product, values, strict=True))
        yield from self.extras


@dataclass(frozen=True)
class Case:
    """One way to run one optimizer."""

    optimizer: str
    options: Options
    dtype: str
    implementation: str
    problem: str
    second_group: Options | None = None

    def kwargs(self) -> dict[str, Any]:
        """Arguments for the constructor; tensors among them are fresh, since an optimizer keeps and may change them."""
        return copy.deepcopy({**self.options, **FLAGS[self.implementation]})

    @property
    def capturable(self) -> bool:
        return bool(self.options.get("capturable"))

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not False)
        return f"{self.optimizer}({options}) {self.dtype} {self.implementation} {self.problem}"


BOTH = (False, True)
DECAY = (0, 0.1)
TENSOR_LR = torch.tensor(0.02)
TENSOR_LR_1D = torch.tensor([0.02], dtype=torch.float64)
TENSOR_BETAS = (torch.tensor(0.85), torch.tensor([[0.97]] if SQUEEZES_BETAS else 0.97))

TENSOR_LRS: Sequence[Options] = ({"lr": TENSOR_LR}, {"lr": TENSOR_LR_1D, "maximize": True})


def capturable(*option_sets: Options) -> Sequence[Options]:
    """Capturable steps have bodies of their own: alone, with tensor learning rates, and with the given options."""
    return tuple({**options, "capturable": True} for options in ({}, *TENSOR_LRS, *option_sets))


# Adam refuses tensors in a foreach step that is not capturable, so they come only together.
ADAM_PRODUCT = {"weight_decay": DECAY, "maximize": BOTH, "amsgrad": BOTH}
ADAM_OPTIONS: Sequence[Options] = (
    {"lr": 0.1},
    {"betas": (0.5, 0.8), "eps": 1e-3},
    {"betas": (0.0, 0.9)},
    *capturable(
        {"weight_decay": 0.1, "amsgrad": True},
        {"lr": TENSOR_LR, "betas": TENSOR_BETAS},
        {"betas": TENSOR_BETAS, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
    ),
)
WITH_FUSED = (*LOOPS, "fused", "differentiable")

# A loss that falls without end: few steps, or the search for its top overflows.
LBFGS_MAXIMIZE: Sequence[Options] = (
    {"maximize": True, "lr": 1e-3, "max_iter": 2},
    {"maximize": True, "line_search_fn": "strong_wolfe", "max_iter": 2, "lr": 1e-3},
)

TABLE: Mapping[str, Row] = {
    "ASGD": Row(
        product={"weight_decay": DECAY, "maximize": BOTH},
        extras=(
            {"lambd": 0.1, "alpha": 0.5},
            {"t0": 3.0, "lr": 0.1},
            *TENSOR_LRS,
            *capturable({"t0": 3.0, "weight_decay": 0.1}),
        ),
    ),
    "Adadelta": Row(
        product={"weight_decay": DECAY, "maximize": BOTH},
        extras=(
            {"lr": 0.01},
            {"rho": 0.95, "weight_decay": 0.9},
            {"eps": 1e-3},
            *TENSOR_LRS,
            *capturable({"weight_decay": 0.1}),
        ),
    ),
    "Adafactor": Row(
        product={"weight_decay": DECAY, "maximize": BOTH},
        extras=({"lr": 0.5}, {"beta2_decay": -0.3}, {"eps": (1e-3, 1e-2)}, {"d": 1.5}, *TENSOR_LRS),
        implementations=LOOPS,
        dtypes=REAL_ONLY,
        problem="nonempty",  # torch divides by the length
    ),
    "Adagrad": Row(
        product={"weight_decay": DECAY, "maximize": BOTH, "lr_decay": (0, 0.5)},
        extras=({"lr": 0.1}, {"initial_accumulator_value": 0.1}, {"eps": 1e-3}, *TENSOR_LRS),
        implementations=WITH_FUSED,
    ),
    "Adam": Row(
        product=ADAM_PRODUCT,
        extras=(*ADAM_OPTIONS, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
        implementations=WITH_FUSED,
    ),
    "AdamW": Row(product=ADAM_PRODUCT, extras=ADAM_OPTIONS, implementations=WITH_FUSED),
    "Adamax": Row(
        product={"weight_decay": DECAY, "maximize": BOTH},
        extras=({"lr": 0.1}, {"betas": (0.5, 0.8), "eps": 1e-3}, *TENSOR_LRS, *capturable({"weight_decay": 0.1})),
    ),
    "LBFGS": Row(
        product={"line_search_fn": (None, "strong_wolfe"), "max_iter": (1, 4)},
        extras=(
            {"lr": 0.1, "max_iter": 4},
            {"lr": TENSOR_LR, "max_iter": 4},
            {"history_size": 2, "max_iter": 5},
            {"max_eval": 3},
            {"max_eval": 3, "line_search_fn": "strong_wolfe"},
            {"tolerance_grad": 1e2},
            {"tolerance_change": 1e-1},
            {"tolerance_change": 1e-1, "line_search_fn": "strong_wolfe"},
            *(LBFGS_MAXIMIZE if LBFGS_MAXIMIZES else ()),
        ),
        implementations=("default",),
        dtypes=("float32", "float64", "complex64"),
        problem="closure",
        second_group=None,
    ),
    "Muon": Row(
        product={"weight_decay": (0, 0.1), "nesterov": BOTH, "adjust_lr_fn": MUON_ADJUSTMENTS},
        extras=({"lr": 0.1, "momentum": 0.0}, {"ns_steps": 2, "eps": 1e-3}, {"ns_coefficients": (3.0, -3.2, 1.2)}),
        implementations=("default",),
        dtypes=REAL_ONLY,
        problem="matrices",
    ),
    "NAdam": Row(
        product={"weight_decay": DECAY, "maximize": BOTH, "decoupled_weight_decay": BOTH},
        extras=(
            {"lr": 0.1, "momentum_decay": 0.1},
            {"betas": (0.5, 0.8), "eps": 1e-3},
            *TENSOR_LRS,
            *capturable({"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ),
    ),
    "RAdam": Row(
        product={"weight_decay": DECAY, "maximize": BOTH, "decoupled_weight_decay": BOTH},
        extras=(
            {"lr": 0.1},
            {"betas": (0.5, 0.8), "eps": 1e-3},
            *TENSOR_LRS,
            *capturable({"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ),
    ),
    "RMSprop": Row(
        product={
            "weight_decay": DECAY,
            "maximize": BOTH,
            "centered": BOTH,
            "momentum": (0, 0.9),
        },
        extras=(
            {"lr": 0.1},
            {"alpha": 0.5, "eps": 1e-3},
            *TENSOR_LRS,
            *capturable({"weight_decay": 0.1, "centered": True, "momentum": 0.9}),
        ),
    ),
    "Rprop": Row(
        product={"maximize": BOTH},
        extras=({"lr": 0.1}, {"etas": (0.3, 1.5)}, {"step_sizes": (1e-3, 0.02)}, *TENSOR_LRS, *capturable()),
    ),
    "SGD": Row(
        product={"weight_decay": DECAY, "maximize": BOTH, "momentum": (0, 0.9), "dampening": (0, 0.3)},
        extras=(
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True, "maximize": True},
            {"lr": 0.1},
            {"lr": TENSOR_LR},
            {"lr": TENSOR_LR, "momentum": 0.9, "weight_decay": 0.1},
        ),
        implementations=WITH_FUSED,
    ),
    "SparseAdam": Row(
        product={"maximize": BOTH},
        extras=({"lr": 0.1}, {"lr": TENSOR_LR}, {"betas": (0.5, 0.8), "eps": 1e-3}),
        implementations=("default",),
        dtypes=("float32", "float64"),
        problem="sparse",
    ),
}

# Dense optimizers that also take sparse gradients, without the options that torch refuses beside them.
SPARSE_TABLE: Mapping[str, Row] = {
    "Adagrad": Row(
        product={"maximize": BOTH, "lr_decay": (0, 0.5)},
        implementations=LOOPS,
        dtypes=("float32", "float64"),
        problem="sparse",
    ),
    "SGD": Row(
        product={"maximize": BOTH, "momentum": (0, 0.9)},
        implementations=LOOPS,
        dtypes=("float32", "float64"),
        problem="sparse",
    ),
}

OPTIMIZERS = tuple(TABLE)


def dtypes_of(row: Row, implementation: str) -> tuple[str, ...]:
    """The dtypes of a row that an implementation takes: fused kernels know real numbers only."""
    if implementation == "fused":
        return FUSED_DTYPES
    # A differentiable step is the for-loop with gradients on: one real and one complex dtype tell.
    return ("float32", "complex64") if implementation == "differentiable" else tuple(row.dtypes)


def problem_of(optimizer: str, row: Row, implementation: str) -> str:
    """torch's fused SGD raises a TypeError where momentum meets its first gradient later than its neighbours do."""
    return "steady" if (optimizer, implementation) == ("SGD", "fused") else row.problem


def combinations() -> Iterator[tuple[str, str, str, str]]:
    """(optimizer, implementation, dtype, problem) of the whole table: one test each."""
    for table in (TABLE, SPARSE_TABLE):
        for name, row in table.items():
            for implementation in row.implementations:
                for dtype in dtypes_of(row, implementation):
                    yield name, implementation, dtype, problem_of(name, row, implementation)


def cases(optimizer: str, implementation: str, dtype: str, problem: str | None = None) -> Iterator[Case]:
    """Every option set of one optimizer for one implementation and dtype."""
    table = SPARSE_TABLE if problem == "sparse" and optimizer in SPARSE_TABLE else TABLE
    row = table[optimizer]
    for options in row.option_sets():
        yield Case(
            optimizer, options, dtype, implementation, problem_of(optimizer, row, implementation), row.second_group
        )


def telling(optimizer: str, implementation: str, dtype: str, problem: str | None = None) -> list[Case]:
    """A few cases where all would take too long: the first, the one with the most options acting, and the last."""
    found = list(cases(optimizer, implementation, dtype, problem))

    def acting(case: Case) -> int:
        values = case.options.values()
        return -1 if case.capturable else sum(isinstance(value, torch.Tensor) or bool(value) for value in values)

    return [found[0], max(found, key=acting), found[-1]]
