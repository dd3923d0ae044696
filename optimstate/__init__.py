"""Optimizer state by name: inspect, remap and convert PyTorch checkpoints when the model has changed.

The public names are loaded on first use; importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "OptimStateError": "optimstate.errors",
    "Resumed": "optimstate._resume",
    "resume": "optimstate._resume",
}

__all__ = ["OptimStateError", "Resumed", "__version__", "resume"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
