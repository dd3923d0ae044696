"""Optimizer state by name: inspect, remap and convert PyTorch checkpoints when the model has changed.

The public names are loaded on first use; importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimstate import distributed, hooks, optim, surgery
    from optimstate.certificates.certificate import Certificate
    from optimstate.derivation.derive import derive
    from optimstate.errors import (
        CheckpointError,
        CheckpointNotFoundError,
        CorruptCheckpointError,
        DerivationError,
        DestinationError,
        DestinationExistsError,
        LimitExceededError,
        MigrationError,
        MissingTorchError,
        OptimStateError,
        OptimStateWarning,
        ParameterNameWarning,
        PlanError,
        PlanSyntaxError,
        ProcessEndedError,
        RepresentationError,
        SchedulerStateWarning,
        StateMismatchError,
        TorchError,
        UnrecognizedFormatError,
        UnsupportedCheckpointError,
        UnsupportedTorchError,
        UntestedTorchWarning,
        UsageError,
        UserCodeError,
    )
    from optimstate.formats.registry import open_checkpoint
    from optimstate.plan.language.plan import Plan
    from optimstate.rehearsal import rehearse
    from optimstate.resuming import Resumed, resume
    from optimstate.surgery.comparison.comparing import diff
    from optimstate.surgery.inspection.inspecting import inspect
    from optimstate.surgery.plans.suggesting import suggest
    from optimstate.surgery.scanning import scan
    from optimstate.surgery.verification.verifying import verify
    from optimstate.surgery.writing.converting import convert
    from optimstate.surgery.writing.naming import name
    from optimstate.surgery.writing.remapping import remap

__version__ = "0.1.0"

_HOMES = {
    "Certificate": "certificates.certificate",
    "Plan": "plan.language.plan",
    "Resumed": "resuming",
    "Rule": "plan.language.rules",
    "convert": "surgery.writing.converting",
    "derive": "derivation.derive",
    "diff": "surgery.comparison.comparing",
    "inspect": "surgery.inspection.inspecting",
    "name": "surgery.writing.naming",
    "open_checkpoint": "formats.registry",
    "rehearse": "rehearsal",
    "remap": "surgery.writing.remapping",
    "resume": "resuming",
    "scan": "surgery.scanning",
    "suggest": "surgery.plans.suggesting",
    "verify": "surgery.verification.verifying",
}
_MODULES = ("distributed", "hooks", "optim", "surgery")

__all__ = [
    "Certificate",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "DerivationError",
    "DestinationError",
    "DestinationExistsError",
    "LimitExceededError",
    "MigrationError",
    "MissingTorchError",
    "OptimStateError",
    "OptimStateWarning",
    "ParameterNameWarning",
    "Plan",
    "PlanError",
    "PlanSyntaxError",
    "ProcessEndedError",
    "RepresentationError",
    "Resumed",
    "Rule",
    "SchedulerStateWarning",
    "StateMismatchError",
    "TorchError",
    "UnrecognizedFormatError",
    "UnsupportedCheckpointError",
    "UnsupportedTorchError",
    "UntestedTorchWarning",
    "UsageError",
    "UserCodeError",
    "__version__",
    "convert",
    "derive",
    "diff",
    "distributed",
    "hooks",
    "inspect",
    "name",
    "open_checkpoint",
    "optim",
    "rehearse",
    "remap",
    "resume",
    "scan",
    "suggest",
    "surgery",
    "verify",
]


def __getattr__(attribute: str) -> Any:
    if attribute in _MODULES:
        return import_module(f"{__name__}.{attribute}")
    if attribute not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    home = import_module(f"{__name__}.{_HOMES.get(attribute, 'errors')}")
    value = globals()[attribute] = getattr(home, attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
