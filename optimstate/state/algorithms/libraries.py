"""Optimizers of other libraries."""

from __future__ import annotations

from optimstate.state.algorithms.slots import (
    COL,
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


# The first that matches is taken, so more specific entries come first.
ALGORITHMS: tuple[Algorithm, ...] = (
    algorithm(
        "Adafactor (transformers)",
        {
            "step": SCALAR,
            "exp_avg": GRADIENT,
            "exp_avg_sq": SQUARE,
            "exp_avg_sq_row": ROW,
            "exp_avg_sq_col": COL,
            "RMS": Slot("scalar", 0, 1),
        },
        "clip_threshold decay_rate scale_parameter relative_step",
        whole=True,
    )._replace(needs=needed("exp_avg:beta1")),
    algorithm(
        "AdafactorBigVision (timm)",
        {"step": SCALAR, "exp_avg": GRADIENT, "exp_avg_sq": SQUARE, "exp_avg_sq_r": ROW, "exp_avg_sq_c": COL},
        "min_dim_size_to_factor clipping_threshold beta2_cap",
        whole=True,
    ),
    algorithm(
        "Adafactor (pytorch_optimizer)",
        {
            "exp_avg": GRADIENT,
            "exp_avg_sq": SQUARE,
            "exp_avg_sq_row": ROW,
            "exp_avg_sq_col": COL,
            "RMS": Slot("scalar", 0, 1),
        },
        "betas ams_bound eps1 eps2 scale_parameter relative_step",
        whole=True,
    ),
    algorithm(
        "CAME",
        {
            "step": SCALAR,
            "exp_avg": GRADIENT,
            "exp_avg_sq": SQUARE,
            "exp_avg_sq_row": ROW,
            "exp_avg_sq_col": COL,
            "exp_avg_res_row": Slot("row", 0),
            "exp_avg_res_col": Slot("col", 0),
            "RMS": Slot("scalar", 0, 1),
        },
        "betas ams_bound eps1 eps2",
        lacks="scale_parameter relative_step",
        whole=True,
    ),
    algorithm("LAMB", MOMENTS, "betas eps max_grad_norm trust_clip", whole=True),
    algorithm(
        "Adan",
        {
            "step": SCALAR,
            "exp_avg": GRADIENT,
            "exp_avg_diff": GRADIENT,
            "exp_avg_sq": SQUARE,
            "neg_pre_grad": GRADIENT,
            "previous_grad": GRADIENT,
        },
        "betas eps no_prox",
    ),
    algorithm(
        "SOAP",
        # The second moment is stored in the preconditioner's eigenbasis.
        {"step": SCALAR, "exp_avg": GRADIENT, "exp_avg_sq": OPAQUE, "GG": OPAQUE, "Q": OPAQUE}
        | dict.fromkeys(("precondition_frequency", "shampoo_beta"), SCALAR),
        "betas precondition_frequency max_precondition_dim",
        whole=True,
    ),
    algorithm(
        "Shampoo",
        {
            "step": SCALAR,
            "momentum_buffer": GRADIENT,
            "precond_": OPAQUE,
            "inv_precond_": OPAQUE,
            "pre_conds": OPAQUE,
            "inv_pre_conds": OPAQUE,
        },
        "lr momentum epsilon update_freq",
        whole=True,
    ),
    algorithm(
        "Shampoo",
        {"step": SCALAR, "momentum": GRADIENT, "pre_conds": OPAQUE, "inv_pre_conds": OPAQUE},
        "lr momentum matrix_eps preconditioning_compute_steps",
        whole=True,
    ),
    algorithm("Sophia", {"step": SCALAR, "exp_avg": GRADIENT, "hessian": SQUARE}, "betas rho"),
    algorithm(
        "SophiaH",
        {"step": SCALAR, "momentum": GRADIENT, "hessian_moment": SQUARE, "hessian": SQUARE},
        "betas update_period num_samples",
    ),
    algorithm(
        "Kron (PSGD)",
        {"step": SCALAR, "update_counter": SCALAR, "momentum_buffer": GRADIENT, "Q": OPAQUE},
        "preconditioner_update_probability max_size_triangular",
        whole=True,
    ),
    algorithm(
        "Prodigy",
        {"step": SCALAR, "exp_avg": GRADIENT, "exp_avg_sq": SQUARE, "s": OPAQUE, "p0": OPAQUE},
        "betas d d0 d_coef",
        whole=True,
    ),
    algorithm(
        "RAdam (schedule-free)",
        {"step": SCALAR, "z": WEIGHT, "exp_avg_sq": SQUARE},
        "betas weight_sum r lr_max silent_sgd_phase",
    ),
    algorithm(
        "AdamW (schedule-free)",
        {"step": SCALAR, "z": WEIGHT, "exp_avg_sq": SQUARE},
        "betas weight_sum r lr_max",
        lacks="silent_sgd_phase",
    ),
    algorithm("SGD (schedule-free)", {"z": WEIGHT}, "momentum weight_sum r lr_max"),
    algorithm("AdEMAMix", {**MOMENTS, "exp_avg_slow": GRADIENT}, "betas alpha t_alpha_beta3"),
    algorithm(
        "AdaBelief", {"step": SCALAR, "exp_avg": GRADIENT, "exp_avg_var": SQUARE}, "betas rectify weight_decouple"
    ),
    algorithm(
        "StableAdamW",
        {**MOMENTS, "kahan_comp": Slot("like_param", 0, 1), "eps_sq": SCALAR},
        "kahan_sum eps",
        whole=True,
    ),
    algorithm("NAdamW (timm)", MOMENTS, "betas eps clipping_threshold caution"),
    algorithm("RAdam (torch-optimizer)", MOMENTS, "betas eps buffer"),
    algorithm(
        "Adam (fastai)",
        {"step": SCALAR, "grad_avg": GRADIENT, "sqr_avg": SQUARE} | dict.fromkeys(("do_wd", "force_train"), SCALAR),
        "mom sqr_mom wd",
    ),
    algorithm("Lion", {"exp_avg": GRADIENT, "step": SCALAR}, "lr betas weight_decay", lacks="eps amsgrad"),
)
