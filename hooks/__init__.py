"""Hooks that resume a changed model: for any `torch.optim.Optimizer`, for modules, and for schedulers."""

from optimstate.hooks._load import LoadHook
from optimstate.hooks._report import Report
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

__all__ = [
    "LoadHook",
    "Report",
    "cast_state",
    "drop_unexpected",
    "duplicate",
    "fill_missing",
    "fuse",
    "hyperparameters",
    "match_names",
    "migrate",
    "regroup",
    "rename",
    "reset",
    "resize",
    "split",
    "strip_prefix",
]
