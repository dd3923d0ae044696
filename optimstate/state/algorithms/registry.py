"""What is known of optimizers: how to recognise one, and what each slot is.

A slot's kind says how it follows its parameter; its degree is the power of the gradient it grows with (`exp_avg` 1,
`exp_avg_sq` 2) and its power that of the parameter (an average of weights 1), which is what a rescaled weight needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from optimstate.record import Record

__all__ = [
    "ALGORITHMS",
    "MASTERS",
    "RECOMPUTED",
    "Algorithm",
    "Slot",
    "SlotKind",
    "conventional",
    "inferred_kind",
    "parameter_shape",
    "recognise",
]

SlotKind = Literal["like_param", "scalar", "row", "col", "flat", "opaque"]
Shape = tuple[int, ...]


class Slot(Record):
    """One named piece of state per parameter.

    Attributes:
        kind: `like_param` has the parameter's shape; `scalar` is one number; `row` is the mean over the last dimension,
            (..., m, 1) or (..., m) for a parameter (..., m, n), and `col` that over the one before it, (..., 1, n) or
            (..., n); `flat` is one vector over all parameters; `opaque` has a form of its own.
        degree: The power of the gradient it scales with; None where that is not known.
        power: The power of the parameter it scales with.
    """

    kind: SlotKind
    degree: int | None = 0
    power: int = 0


class Algorithm(Record):
    """An optimizer that can be recognised from its state dict.

    Attributes:
        name: The class.
        slots: Every slot it can have. `precond_` stands for precond_0, precond_1, ...
        options: Options that every group has.
        lacks: Options that no group has.
        values: Options and the value that tells it from a sibling.
        whole: Whether the update of an element depends on the others of its tensor: then fused or split parameters
            train differently from before, however exact their state.
    """

    name: str
    slots: Mapping[str, Slot]
    options: frozenset[str]
    lacks: frozenset[str] = frozenset()
    values: tuple[tuple[str, Any], ...] = ()
    whole: bool = False

    def slot(self, name: str | int) -> Slot | None:
        """What a slot is, or None."""
        return self.slots.get(str(name)) or self.slots.get(_NUMBERED.sub("_", str(name)))

    @property
    def factors_every_matrix(self) -> bool:
        """Whether it keeps the second moment of every matrix as means, and that of vectors in full."""
        return self.name in ("Adafactor", "Adafactor (transformers)", "CAME")

    def holds(self, name: str, rank: int) -> bool:
        """Whether a parameter of so many dimensions has a slot that some parameters have."""
        slot = self.slot(name)
        if slot is None or not self.factors_every_matrix:
            return slot is not None
        return rank >= 2 if slot.kind in ("row", "col") else rank < 2 or slot.degree != 2

    @property
    def is_flat(self) -> bool:
        """Whether it keeps one state for all parameters."""
        return any(slot.kind == "flat" for slot in self.slots.values())

    def matches(self, slots: Iterable[str], options: Mapping[str, Any]) -> bool:
        """Whether slots and a group's options are this algorithm's."""
        return (
            all(self.slot(name) is not None for name in slots)
            and self.options <= options.keys()
            and not self.lacks & options.keys()
            and all(options.get(key) == value for key, value in self.values)
        )


RECOMPUTED = frozenset({"RMS"})
"""Numbers that an optimizer keeps in its state but computes anew at every step."""

MASTERS = frozenset({"fp32_param", "param"})
"""Slots that hold the parameter itself in full precision, for mixed-precision training: DeepSpeed's and Megatron's."""

_NUMBERED = re.compile(r"_\d+$")

_LIKE1, _LIKE2, _WEIGHT = Slot("like_param", 1), Slot("like_param", 2), Slot("like_param", 0, 1)
_SCALAR, _FLAT, _OPAQUE = Slot("scalar"), Slot("flat"), Slot("opaque")
_ROW, _COL = Slot("row", 2), Slot("col", 2)
_MOMENTS = {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2}
_ADAM = {**_MOMENTS, "max_exp_avg_sq": _LIKE2}
_QUANTIZED = {"state1": _LIKE1, "state2": _LIKE2, "step": _SCALAR} | dict.fromkeys(
    ("qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec"), _OPAQUE
)


def _algorithm(
    name: str, slots: Mapping[str, Slot], options: str, lacks: str = "", *, whole: bool = False, **values: Any
) -> Algorithm:
    return Algorithm(name, slots, frozenset(options.split()), frozenset(lacks.split()), tuple(values.items()), whole)


# In order: the first that matches is taken, so what has more marks stands before what has fewer.
ALGORITHMS: tuple[Algorithm, ...] = (
    _algorithm("AdamW", _ADAM, "betas eps amsgrad fused", decoupled_weight_decay=True),
    _algorithm("Adam", _ADAM, "betas eps amsgrad fused", decoupled_weight_decay=False),
    _algorithm("Adam or AdamW", _ADAM, "betas eps weight_decay amsgrad", lacks="decoupled_weight_decay"),
    _algorithm("NAdam", {**_MOMENTS, "mu_product": _SCALAR}, "betas eps momentum_decay"),
    _algorithm(
        "RAdam",
        _MOMENTS,
        "betas eps weight_decay decoupled_weight_decay capturable",
        lacks="amsgrad momentum_decay",
    ),
    _algorithm(
        "Adamax",
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_inf": _LIKE1},
        "betas eps weight_decay maximize",
        lacks="amsgrad decoupled_weight_decay fused caution",
    ),
    _algorithm("SparseAdam", _MOMENTS, "betas eps maximize", lacks="weight_decay"),
    _algorithm("Adagrad", {"step": _SCALAR, "sum": _LIKE2}, "lr_decay eps initial_accumulator_value"),
    _algorithm(
        "Adadelta",
        {"step": _SCALAR, "square_avg": _LIKE2, "acc_delta": Slot("like_param", 0, 2)},
        "rho eps weight_decay",
    ),
    _algorithm(
        "Adafactor",
        {"step": _SCALAR, "row_var": _ROW, "col_var": _COL, "variance": _LIKE2},
        "beta2_decay d eps",
        whole=True,
    ),
    _algorithm("ASGD", {"step": _SCALAR, "eta": _SCALAR, "mu": _SCALAR, "ax": _WEIGHT}, "lambd alpha t0"),
    _algorithm(
        "RMSprop",
        {"step": _SCALAR, "square_avg": _LIKE2, "momentum_buffer": Slot("like_param", 0), "grad_avg": _LIKE1},
        "alpha eps centered momentum",
    ),
    _algorithm("Rprop", {"step": _SCALAR, "prev": _LIKE1, "step_size": _WEIGHT}, "etas step_sizes"),
    _algorithm("SGD", {"momentum_buffer": _LIKE1}, "momentum dampening nesterov"),
    _algorithm("Muon", {"momentum_buffer": _LIKE1}, "momentum nesterov ns_coefficients ns_steps", whole=True),
    _algorithm(
        "LBFGS",
        {
            "func_evals": _SCALAR,
            "n_iter": _SCALAR,
            "al": _OPAQUE,
            "d": _FLAT,
            "t": _SCALAR,
            "old_dirs": _FLAT,
            "old_stps": _FLAT,
            "ro": _OPAQUE,
            "H_diag": _SCALAR,
            "prev_flat_grad": _FLAT,
            "prev_loss": _SCALAR,
        },
        "max_iter max_eval tolerance_grad history_size",
        whole=True,
    ),
    # bitsandbytes: 32-bit states have the parameter's shape; blocks of 8 bits are seen by their dtype.
    _algorithm(
        "bitsandbytes", {**_QUANTIZED, "__bnb_optimizer_quant_state__": _OPAQUE}, "betas eps lr", lacks="foreach"
    ),
    _algorithm(
        "Adafactor (transformers)",
        {
            "step": _SCALAR,
            "exp_avg": _LIKE1,
            "exp_avg_sq": _LIKE2,
            "exp_avg_sq_row": _ROW,
            "exp_avg_sq_col": _COL,
            "RMS": Slot("scalar", 0, 1),
        },
        "clip_threshold decay_rate scale_parameter relative_step",
        whole=True,
    ),
    _algorithm(
        "AdafactorBigVision (timm)",
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2, "exp_avg_sq_r": _ROW, "exp_avg_sq_c": _COL},
        "min_dim_size_to_factor clipping_threshold beta2_cap",
        whole=True,
    ),
    _algorithm(
        "CAME",
        {
            "step": _SCALAR,
            "exp_avg": _LIKE1,
            "exp_avg_sq": _LIKE2,
            "exp_avg_sq_row": _ROW,
            "exp_avg_sq_col": _COL,
            "exp_avg_res_row": Slot("row", 0),
            "exp_avg_res_col": Slot("col", 0),
            "RMS": Slot("scalar", 0, 1),
        },
        "betas ams_bound eps1 eps2",
        whole=True,
    ),
    _algorithm("LAMB", _MOMENTS, "betas eps max_grad_norm trust_clip", whole=True),
    _algorithm(
        "Adan",
        {
            "step": _SCALAR,
            "exp_avg": _LIKE1,
            "exp_avg_diff": _LIKE1,
            "exp_avg_sq": _LIKE2,
            "neg_pre_grad": _LIKE1,
            "previous_grad": _LIKE1,
        },
        "betas eps no_prox",
    ),
    _algorithm(
        "SOAP",
        # The second moment lives in the preconditioner's eigenbasis.
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _OPAQUE, "GG": _OPAQUE, "Q": _OPAQUE}
        | dict.fromkeys(("precondition_frequency", "shampoo_beta"), _SCALAR),
        "betas precondition_frequency max_precondition_dim",
        whole=True,
    ),
    _algorithm(
        "Shampoo",
        {
            "step": _SCALAR,
            "momentum_buffer": _LIKE1,
            "precond_": _OPAQUE,
            "inv_precond_": _OPAQUE,
            "pre_conds": _OPAQUE,
            "inv_pre_conds": _OPAQUE,
        },
        "lr momentum epsilon update_freq",
        whole=True,
    ),
    _algorithm(
        "Shampoo",
        {"step": _SCALAR, "momentum": _LIKE1, "pre_conds": _OPAQUE, "inv_pre_conds": _OPAQUE},
        "lr momentum matrix_eps preconditioning_compute_steps",
        whole=True,
    ),
    _algorithm("Sophia", {"step": _SCALAR, "exp_avg": _LIKE1, "hessian": _LIKE2}, "betas rho"),
    _algorithm(
        "SophiaH",
        {"step": _SCALAR, "momentum": _LIKE1, "hessian_moment": _LIKE2, "hessian": _LIKE2},
        "betas update_period num_samples",
    ),
    _algorithm(
        "Kron (PSGD)",
        {"step": _SCALAR, "update_counter": _SCALAR, "momentum_buffer": _LIKE1, "Q": _OPAQUE},
        "preconditioner_update_probability max_size_triangular",
        whole=True,
    ),
    _algorithm(
        "Prodigy",
        {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_sq": _LIKE2, "s": _OPAQUE, "p0": _OPAQUE},
        "betas d d0 d_coef",
        whole=True,
    ),
    _algorithm(
        "AdamW (schedule-free)", {"step": _SCALAR, "z": _WEIGHT, "exp_avg_sq": _LIKE2}, "betas weight_sum r lr_max"
    ),
    _algorithm("SGD (schedule-free)", {"z": _WEIGHT}, "momentum weight_sum r lr_max"),
    _algorithm("AdEMAMix", {**_MOMENTS, "exp_avg_slow": _LIKE1}, "betas alpha t_alpha_beta3"),
    _algorithm(
        "AdaBelief", {"step": _SCALAR, "exp_avg": _LIKE1, "exp_avg_var": _LIKE2}, "betas rectify weight_decouple"
    ),
    _algorithm("StableAdamW", {**_MOMENTS, "kahan_comp": _WEIGHT, "eps_sq": _SCALAR}, "kahan_sum eps", whole=True),
    _algorithm("NAdamW (timm)", _MOMENTS, "betas eps clipping_threshold caution"),
    _algorithm("RAdam (torch-optimizer)", _MOMENTS, "betas eps buffer"),
    _algorithm(
        "Adam (fastai)",
        {"step": _SCALAR, "grad_avg": _LIKE1, "sqr_avg": _LIKE2} | dict.fromkeys(("do_wd", "force_train"), _SCALAR),
        "mom sqr_mom wd",
    ),
    _algorithm("Lion", {"exp_avg": _LIKE1, "step": _SCALAR}, "lr betas weight_decay", lacks="eps amsgrad"),
)


def recognise(slots: Iterable[str], options: Mapping[str, Any]) -> Algorithm | None:
    """The algorithm whose state has these slots and whose groups have these options, or None."""
    slots = list(slots)
    return next((algorithm for algorithm in ALGORITHMS if algorithm.matches(slots, options)), None)


_CONVENTIONAL: dict[str, Slot] = {
    "exp_avg": _LIKE1,
    "exp_avg_sq": _LIKE2,
    "max_exp_avg_sq": _LIKE2,
    "momentum_buffer": _LIKE1,
    "square_avg": _LIKE2,
    "step": _SCALAR,
}


def conventional(name: str, shape: Shape | None, parameter: Shape | None) -> Slot | None:
    """What a slot of an unknown optimizer is by convention of its name, where its shape agrees."""
    slot = _CONVENTIONAL.get(name)
    if slot is None or (slot.kind == "like_param" and (shape is None or shape != parameter)):
        return None
    return slot


def inferred_kind(shape: Shape | None, parameter: Shape | None) -> SlotKind:
    """What a slot of an unknown optimizer is, by its shape alone.

    Args:
        shape: Of the slot; None for what is no tensor of a plain dtype. A number has shape ().
        parameter: Of its parameter; None where it is not known.
    """
    if shape is None:
        return "opaque"
    if shape == () and parameter != ():
        return "scalar"
    if parameter is None:
        return "opaque"
    if shape == parameter:
        return "like_param"
    if len(parameter) >= 2:
        if shape == (*parameter[:-1], 1):
            return "row"
        if shape == (*parameter[:-2], 1, parameter[-1]):
            return "col"
    return "opaque"


def parameter_shape(slots: Mapping[str, Shape | None], algorithm: Algorithm | None) -> Shape | None:
    """A parameter's shape, told from its slots; None where they do not tell."""
    row = col = None
    for name, shape in slots.items():
        slot = algorithm.slot(name) if algorithm is not None else _CONVENTIONAL.get(name)
        if shape is None or slot is None:
            continue
        if slot.kind == "like_param":
            return shape
        row = shape if slot.kind == "row" else row
        col = shape if slot.kind == "col" else col
    if row is not None and col is not None:
        return _factored_shape(row, col)
    if algorithm is None:
        counts = Counter(shape for shape in slots.values() if shape is not None and shape != ())
        if len(counts) == 1:
            return next(iter(counts))
    return None


def _factored_shape(row: Shape, col: Shape) -> Shape | None:
    """The shape whose means over the last two dimensions these are, with or without the dimension of size 1."""
    if len(row) == len(col) >= 2 and row[-1] == 1 and col[-2] == 1:
        return (*row[:-1], col[-1])
    if len(row) == len(col) >= 1 and row[:-1] == col[:-1]:
        return (*row, col[-1])
    return None
