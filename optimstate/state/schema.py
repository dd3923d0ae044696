"""What is known of optimizers: how to recognise one, and what each slot is.

A slot's kind says how it follows its parameter; its degree is the power of the gradient it grows with (`exp_avg` 1,
`exp_avg_sq` 2), which is what a rescaled weight needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ALGORITHMS", "Algorithm", "Slot", "SlotKind", "recognise"]

SlotKind = Literal["like_param", "scalar", "row", "col", "flat", "opaque"]


@dataclass(frozen=True)
class Slot:
    """One named piece of state per parameter.

    Attributes:
        kind: `like_param` has the parameter's shape; `scalar` is one number; `row` is (..., m, 1) and `col` (..., 1, n)
            for a matrix (m, n); `flat` is one vector over all parameters; `opaque` has a form of its own.
        degree: The power of the gradient it scales with.
    """

    kind: SlotKind
    degree: int = 0


@dataclass(frozen=True)
class Algorithm:
    """An optimizer that can be recognised from its state dict.

    Attributes:
        name: The class.
        slots: Every slot it can have.
        options: Options that every group has.
        lacks: Options that no group has.
        values: Options and the value that tells it from a sibling.
    """

    name: str
    slots: Mapping[str, Slot]
    options: frozenset[str]
    lacks: frozenset[str] = frozenset()
    values: tuple[tuple[str, Any], ...] = ()

    def matches(self, slots: Iterable[str], options: Mapping[str, Any]) -> bool:
        """Whether slots and a group's options are this algorithm's."""
        return (
            set(slots) <= self.slots.keys()
            and self.options <= options.keys()
            and not self.lacks & options.keys()
            and all(options.get(key) == value for key, value in self.values)
        )


_LIKE1, _LIKE2, _LIKE0 = Slot("like_param", 1), Slot("like_param", 2), Slot("like_param", 0)
_SCALAR, _FLAT = Slot("scalar"), Slot("flat")
_ADAM = {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2, "max_exp_avg_sq": _LIKE2}


def _algorithm(name: str, slots: Mapping[str, Slot], options: str, lacks: str = "", **values: Any) -> Algorithm:
    return Algorithm(name, slots, frozenset(options.split()), frozenset(lacks.split()), tuple(values.items()))


# In order: the first that matches is taken, so what has more marks stands before what has fewer.
ALGORITHMS: tuple[Algorithm, ...] = (
    _algorithm("AdamW", _ADAM, "betas eps amsgrad fused", decoupled_weight_decay=True),
    _algorithm("Adam", _ADAM, "betas eps amsgrad fused", decoupled_weight_decay=False),
    _algorithm("Adam or AdamW", _ADAM, "betas eps weight_decay amsgrad", lacks="decoupled_weight_decay"),
    _algorithm(
        "NAdam",
        {"step": _SCALAR, "mu_product": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2},
        "betas eps momentum_decay",
    ),
    _algorithm(
        "RAdam",
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2},
        "betas eps weight_decay decoupled_weight_decay capturable",
        lacks="amsgrad momentum_decay",
    ),
    _algorithm(
        "Adamax",
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_inf": _LIKE1},
        "betas eps weight_decay maximize",
        lacks="amsgrad decoupled_weight_decay fused caution",
    ),
    _algorithm(
        "SparseAdam",
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2},
        "betas eps maximize",
        lacks="weight_decay",
    ),
    _algorithm("Adagrad", {"step": _SCALAR, "sum": _LIKE2}, "lr_decay eps initial_accumulator_value"),
    _algorithm("Adadelta", {"step": _SCALAR, "square_avg": _LIKE2, "acc_delta": _LIKE0}, "rho eps weight_decay"),
    _algorithm(
        "Adafactor",
        {"step": _SCALAR, "row_var": Slot("row", 2), "col_var": Slot("col", 2), "variance": _LIKE2},
        "beta2_decay d eps",
    ),
    _algorithm("ASGD", {"step": _SCALAR, "eta": _SCALAR, "mu": _SCALAR, "ax": _LIKE0}, "lambd alpha t0"),
    _algorithm(
        "RMSprop",
        {"step": _SCALAR, "square_avg": _LIKE2, "momentum_buffer": _LIKE1, "grad_avg": _LIKE1},
        "alpha eps centered momentum",
    ),
    _algorithm("Rprop", {"step": _SCALAR, "prev": _LIKE1, "step_size": _LIKE0}, "etas step_sizes"),
    _algorithm("SGD", {"momentum_buffer": _LIKE1}, "momentum dampening nesterov"),
    _algorithm("Muon", {"momentum_buffer": _LIKE1}, "momentum nesterov ns_coefficients ns_steps"),
    _algorithm(
        "LBFGS",
        {
            "func_evals": _SCALAR,
            "n_iter": _SCALAR,
            "al": Slot("opaque"),
            "d": _FLAT,
            "t": _SCALAR,
            "old_dirs": _FLAT,
            "old_stps": _FLAT,
            "ro": Slot("opaque"),
            "H_diag": _SCALAR,
            "prev_flat_grad": _FLAT,
            "prev_loss": _SCALAR,
        },
        "max_iter max_eval tolerance_grad history_size",
    ),
)


def recognise(slots: Iterable[str], options: Mapping[str, Any]) -> Algorithm | None:
    """The algorithm whose state has these slots and whose groups have these options, or None."""
    slots = list(slots)
    return next((algorithm for algorithm in ALGORITHMS if algorithm.matches(slots, options)), None)
