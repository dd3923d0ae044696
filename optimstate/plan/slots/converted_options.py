"""The group options of each algorithm, and what they become when state is converted to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.plan.expressions.evaluate import number_of

__all__ = ["DEFAULTS", "TARGETS", "converted_options", "option_names", "other_average"]

_BASIC = {"lr": 1e-3, "weight_decay": 0.0, "maximize": False, "foreach": None}
_TRACED = {"capturable": False, "differentiable": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, **_BASIC, **_TRACED, "fused": None}
    | {"decoupled_weight_decay": False},
    "NAdam": {"betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3, **_BASIC, **_TRACED}
    | {"decoupled_weight_decay": False},
    "RAdam": {"betas": (0.9, 0.999), "eps": 1e-8, **_BASIC, **_TRACED, "decoupled_weight_decay": False},
    "Adamax": {"betas": (0.9, 0.999), "eps": 1e-8, **_BASIC, **_TRACED},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "Adafactor": {"beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, **_BASIC},
    "Adafactor (transformers)": {"lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8}
    | {"beta1": None, "weight_decay": 0.0, "scale_parameter": True, "relative_step": True, "warmup_init": False},
    "SGD": {"momentum": 0.9, "dampening": 0.0, "nesterov": False, **_BASIC, "differentiable": False, "fused": None},
    "Muon": {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "eps": 1e-7, "ns_steps": 5}
    | {"ns_coefficients": (3.4445, -4.775, 2.0315), "adjust_lr_fn": None},
}
_CODED = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_CODED_ADAM = {**_CODED, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
_CODED_LION = {**_CODED, "lr": 1e-4, "betas": (0.9, 0.99), "eps": 0.0}


DEFAULTS |= {f"{name}{bits}bit": _CODED_ADAM for name in ("Adam", "AdamW") for bits in (8, 32)}
DEFAULTS |= {f"Lion{bits}bit": _CODED_LION for bits in (8, 32)}
DEFAULTS["AdamW"] = {**DEFAULTS["Adam"], "decoupled_weight_decay": True}
TARGETS = tuple(DEFAULTS)
"""The optimizers that there is a conversion to."""
# Keys that schedulers store in groups; kept as they are.
_SCHEDULED = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "name")
# The same word for other things: epsilons and decay rates do not carry over between these families.
_OWN = {
    "Adafactor": {"eps"},
    "Adafactor (transformers)": {"eps"},
    "Muon": {"eps"},
    "Lion8bit": {"eps"},
    "Lion32bit": {"eps"},
}


def converted_options(
    target: str, old: Mapping[str, Any], *, keeps_betas: bool, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The options of a group: those that both algorithms have are kept, the others get the new defaults."""
    own = _OWN.get(target, set()) | ({"eps"} if isinstance(old.get("eps"), tuple | list) else set())
    own = (own | {"decoupled_weight_decay"} | (set() if keeps_betas else {"betas"})) - given
    made = {key: old.get(key, value) if key not in own else value for key, value in DEFAULTS[target].items()}
    return {**made, **{key: old[key] for key in _SCHEDULED if key in old}}


def option_names(target: str) -> tuple[str, ...]:
    """The options that groups of an algorithm have, and those that schedulers add."""
    return (*DEFAULTS.get(target, ()), *_SCHEDULED) if target in DEFAULTS else ()


def other_average(group: Mapping[str, Any], given: frozenset[str]) -> bool:
    """Whether Muon would continue with another decay rate than that of Adam's first moment."""
    momentum = converted_options("Muon", group, keeps_betas=True, given=given)["momentum"]
    return "betas" not in group or number_of(group["betas"][0]) != number_of(momentum)
