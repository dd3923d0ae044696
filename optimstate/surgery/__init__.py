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
    from optimstate.surgery._options import with_options
    from optimstate.surgery._plan import (
        CheckReport,
        InvertReport,
        ShowReport,
        check_plan,
        invert_plan,
        show_plan,
    )
    from optimstate.surgery._plan_files import check_plan_destination, save_plan
    from optimstate.surgery._remap import RemapReport, remap
    from optimstate.surgery._scan import ScanReport, scan
    from optimstate.surgery._suggest import SuggestReport, suggest_plan
    from optimstate.surgery._verify import VerifyReport, verify, verify_against

_HOMES = {
    "CheckReport": "_plan",
    "ConvertReport": "_convert",
    "DiffReport": "_diff",
    "Inspection": "_inspection",
    "InvertReport": "_plan",
    "NameReport": "_name",
    "RemapReport": "_remap",
    "ScanReport": "_scan",
    "ShowReport": "_plan",
    "SuggestReport": "_suggest",
    "VerifyReport": "_verify",
    "check_plan": "_plan",
    "check_plan_destination": "_plan_files",
    "convert": "_convert",
    "diff": "_diff",
    "inspect": "_inspect",
    "invert_plan": "_plan",
    "name": "_name",
    "remap": "_remap",
    "save_plan": "_plan_files",
    "scan": "_scan",
    "show_plan": "_plan",
    "suggest_plan": "_suggest",
    "verify": "_verify",
    "verify_against": "_verify",
    "with_options": "_options",
}

__all__ = [
    "CheckReport",
    "ConvertReport",
    "DiffReport",
    "Inspection",
    "InvertReport",
    "NameReport",
    "RemapReport",
    "ScanReport",
    "ShowReport",
    "SuggestReport",
    "VerifyReport",
]
__all__ += ["check_plan", "check_plan_destination", "convert", "diff", "inspect", "invert_plan", "name", "remap"]
__all__ += ["save_plan", "scan", "show_plan", "suggest_plan", "verify", "verify_against", "with_options"]


def __getattr__(attribute: str) -> Any:
    if attribute not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[attribute]}"), attribute)
