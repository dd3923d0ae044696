"""The verbs on checkpoint files. The command line only renders what these return.

None of them imports torch unless elements of a tensor must be rearranged, and none executes anything from a file. Each
is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimstate.surgery._convert import ConvertReport, convert
    from optimstate.surgery._diff import DiffReport, diff
    from optimstate.surgery._inspect import inspect
    from optimstate.surgery._inspection import Inspection
    from optimstate.surgery._name import NameReport, name
    from optimstate.surgery._remap import RemapReport, remap
    from optimstate.surgery._scan import ScanReport, scan
    from optimstate.surgery._verify import VerifyReport, verify, verify_against

_HOMES = {
    "ConvertReport": "_convert",
    "DiffReport": "_diff",
    "Inspection": "_inspection",
    "NameReport": "_name",
    "RemapReport": "_remap",
    "ScanReport": "_scan",
    "VerifyReport": "_verify",
    "convert": "_convert",
    "diff": "_diff",
    "inspect": "_inspect",
    "name": "_name",
    "remap": "_remap",
    "scan": "_scan",
    "verify": "_verify",
    "verify_against": "_verify",
}

__all__ = [
    "ConvertReport",
    "DiffReport",
    "Inspection",
    "NameReport",
    "RemapReport",
    "ScanReport",
    "VerifyReport",
    "convert",
]
__all__ += ["diff", "inspect", "name", "remap", "scan", "verify", "verify_against"]


def __getattr__(attribute: str) -> Any:
    if attribute not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[attribute]}"), attribute)
