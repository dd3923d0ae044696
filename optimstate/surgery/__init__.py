"""The verbs on checkpoint files. The command line only renders what these return.

None of them imports torch unless elements of a tensor must be rearranged, and none executes anything from a file. Each
is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimstate.surgery._convert import ConvertReport, convert
    from optimstate.surgery._inspect import Inspection, inspect
    from optimstate.surgery._remap import RemapReport, remap
    from optimstate.surgery._scan import ScanReport, scan

__all__ = ["ConvertReport", "Inspection", "RemapReport", "ScanReport", "convert", "inspect", "remap", "scan"]

_REPORTS = {"ConvertReport": "convert", "Inspection": "inspect", "RemapReport": "remap", "ScanReport": "scan"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}._{_REPORTS.get(name, name)}"), name)
