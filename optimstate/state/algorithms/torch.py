"""The optimizers of torch.optim."""

from __future__ import annotations

from optimstate.state.algorithms.slots import (
    COL,
    FLAT,
    GRADIENT,
    MOMENTS,
    OPAQUE,
    ROW,
    SCALAR,
    SQUARE,
    WEIGHT,
    Algorithm,
    Slot,
    algorithm,
    needed,
)

__all__ = ["ALGORITHMS"]

_ADAM = {**MOMENTS, "max_exp_avg_sq": SQUARE}

# The first that matches is taken, so more specific entries come first.
_TABLE: tuple[Algorithm, ...] = (
    algorithm("AdamW", _ADAM, "betas eps amsgrad fused", decoupled_weight_decay=True),
    algorithm("Adam", _ADAM, "betas eps amsgrad fused", decoupled_weight_decay=False),
    algorithm("Adam or AdamW", _ADAM, "betas eps weight_decay amsgrad", lacks="decoupled_weight_decay"),
    algorithm("NAdam", {**MOMENTS, "mu_product": SCALAR}, "betas eps momentum_decay"),
    algorithm(
        "RAdam",
        MOMENTS,
        "betas eps weight_decay decoupled_weight_decay capturable",
        lacks="amsgrad momentum_decay",
    ),
    algorithm(
        "Adamax",
        {"step": SCALAR, "exp_avg": GRADIENT, "exp_inf": GRADIENT},
        "betas eps weight_decay maximize",
        lacks="amsgrad decoupled_weight_decay fused caution",
    ),
    algorithm("SparseAdam", MOMENTS, "betas eps maximize", lacks="weight_decay decoupled_weight_decay foreach"),
    algorithm("Adagrad", {"step": SCALAR, "sum": SQUARE}, "lr_decay eps initial_accumulator_value"),
    algorithm(
        "Adadelta",
        {"step": SCALAR, "square_avg": SQUARE, "acc_delta": Slot("like_param", 0, 2)},
        "rho eps weight_decay",
    ),
    algorithm(
        "Adafactor",
        {"step": SCALAR, "row_var": ROW, "col_var": COL, "variance": SQUARE},
        "beta2_decay d eps",
        whole=True,
    ),
    algorithm("ASGD", {"step": SCALAR, "eta": SCALAR, "mu": SCALAR, "ax": WEIGHT}, "lambd alpha t0"),
    algorithm(
        "RMSprop",
        {"step": SCALAR, "square_avg": SQUARE, "momentum_buffer": Slot("like_param", 0), "grad_avg": GRADIENT},
        "alpha eps centered momentum",
    ),
    algorithm("Rprop", {"step": SCALAR, "prev": GRADIENT, "step_size": Slot("like_param", 0, 1)}, "etas step_sizes"),
    algorithm("SGD", {"momentum_buffer": GRADIENT}, "momentum dampening nesterov"),
    algorithm("Muon", {"momentum_buffer": GRADIENT}, "momentum nesterov ns_coefficients ns_steps", whole=True),
    algorithm(
        "LBFGS",
        {
            "func_evals": SCALAR,
            "n_iter": SCALAR,
            "al": OPAQUE,
            "d": FLAT,
            "t": SCALAR,
            "old_dirs": FLAT,
            "old_stps": FLAT,
            "ro": OPAQUE,
            "H_diag": SCALAR,
            "prev_flat_grad": FLAT,
            "prev_loss": SCALAR,
        },
        "max_iter max_eval tolerance_grad history_size",
        whole=True,
    ),
)

# Every option of each algorithm in any release, besides those that most optimizers have.
_OWN = {
    "SGD": "momentum dampening nesterov",
    "Adam": "betas eps amsgrad",
    "AdamW": "betas eps amsgrad",
    "Adam or AdamW": "betas eps amsgrad",
    "NAdam": "betas eps momentum_decay",
    "RAdam": "betas eps",
    "Adamax": "betas eps",
    "SparseAdam": "betas eps",
    "Adagrad": "lr_decay eps initial_accumulator_value",
    "Adadelta": "rho eps",
    "Adafactor": "beta2_decay d eps",
    "ASGD": "lambd alpha t0",
    "RMSprop": "momentum alpha eps centered",
    "Rprop": "etas step_sizes",
    "Muon": "momentum nesterov eps ns_coefficients ns_steps adjust_lr_fn spectral_unclamped",
}
# Slots that the next step reads, each followed by the option that requires it, if any.
_NEEDS = {
    "Adam": "step exp_avg exp_avg_sq max_exp_avg_sq:amsgrad",
    "AdamW": "step exp_avg exp_avg_sq max_exp_avg_sq:amsgrad",
    "Adam or AdamW": "step exp_avg exp_avg_sq max_exp_avg_sq:amsgrad",
    "NAdam": "step exp_avg exp_avg_sq mu_product",
    "RAdam": "step exp_avg exp_avg_sq",
    "Adamax": "step exp_avg exp_inf",
    "SparseAdam": "step exp_avg exp_avg_sq",
    "Adagrad": "step sum",
    "Adadelta": "step square_avg acc_delta",
    "Adafactor": "step",
    "ASGD": "step eta mu ax",
    "RMSprop": "step square_avg grad_avg:centered momentum_buffer:momentum",
    "Rprop": "step prev step_size",
    "LBFGS": " ".join(f"{slot}:n_iter" for slot in ("d", "t", "old_dirs", "old_stps", "ro", "prev_flat_grad")),
}
_ADAM_READS = "lr betas:numbers eps weight_decay"
# Options that the next step reads, each followed by its form if it is not one number.
_READS = {
    "SGD": "lr momentum dampening weight_decay",
    "Adam": _ADAM_READS,
    "AdamW": _ADAM_READS,
    "Adam or AdamW": _ADAM_READS,
    "NAdam": f"{_ADAM_READS} momentum_decay",
    "RAdam": _ADAM_READS,
    "Adamax": _ADAM_READS,
    "SparseAdam": "lr betas:numbers eps",
    "Adagrad": "lr lr_decay eps weight_decay",
    "Adadelta": "lr rho eps weight_decay",
    "Adafactor": "lr beta2_decay eps:numbers d weight_decay maximize:flag",
    "ASGD": "lr lambd alpha t0 weight_decay",
    "RMSprop": "lr alpha eps weight_decay momentum:optional",
    "Rprop": "lr etas:numbers step_sizes:numbers",
    "Muon": "lr weight_decay momentum nesterov:flag ns_coefficients:numbers eps ns_steps adjust_lr_fn:text",
    "LBFGS": "lr max_iter max_eval tolerance_grad tolerance_change history_size line_search_fn:text",
}

ALGORITHMS: tuple[Algorithm, ...] = tuple(
    found._replace(
        own=frozenset(_OWN.get(found.name, "").split()),
        needs=needed(_NEEDS.get(found.name, "")),
        reads={option: form or "number" for option, form in needed(_READS.get(found.name, "")).items()},
    )
    for found in _TABLE
)
