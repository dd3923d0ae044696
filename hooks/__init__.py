"""Hooks that resume a changed model: for any `torch.optim.Optimizer`, for modules, and for schedulers."""

from optimstate.hooks.certify import certify
from optimstate.hooks.engine.hook import LoadHook, adapt
from optimstate.hooks.engine.report import Report
from optimstate.hooks.hub import hub_layout
from optimstate.hooks.load import (
    cast_state,
    drop_unexpected,
    duplicate,
    fill_missing,
    fuse,
    hyperparameters,
    match_names,
    migrate,
    regroup,
    rename,
    reset,
    resize,
    split,
    strip_prefix,
)
from optimstate.hooks.modules import ModelHook, migrate_model, migrate_scheduler
from optimstate.hooks.save import SaveHook, add_metadata, cast_slots, drop_slots, name_params, to_cpu
from optimstate.hooks.verify import report, resume_problems, verify_resume
from optimstate.installed_torch import require_named_parameters

require_named_parameters()

__all__ = [
    "LoadHook",
    "ModelHook",
    "Report",
    "SaveHook",
    "adapt",
    "add_metadata",
    "cast_slots",
    "cast_state",
    "certify",
    "drop_slots",
    "drop_unexpected",
    "duplicate",
    "fill_missing",
    "fuse",
    "hub_layout",
    "hyperparameters",
    "match_names",
    "migrate",
    "migrate_model",
    "migrate_scheduler",
    "name_params",
    "regroup",
    "rename",
    "report",
    "reset",
    "resize",
    "resume_problems",
    "split",
    "strip_prefix",
    "to_cpu",
    "verify_resume",
]
