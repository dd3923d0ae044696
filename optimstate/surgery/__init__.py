"""The verbs on checkpoint files, as functions; the command line only renders the reports they return.

None of them imports torch unless elements of a tensor must be read or rearranged, and none executes anything from a
file.
A module is called by what its verb is doing (`remapping` has `remap`), so that no module hides the function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe

if TYPE_CHECKING:
    from optimstate.surgery.comparing import DiffReport, diff
    from optimstate.surgery.converting import ConvertReport, convert
    from optimstate.surgery.findings import VerifyReport
    from optimstate.surgery.inspecting import inspect
    from optimstate.surgery.naming import NameReport, name
    from optimstate.surgery.plan_checking import CheckReport, check_plan
    from optimstate.surgery.plan_files import save_plan
    from optimstate.surgery.plan_showing import ShowReport, show_plan
    from optimstate.surgery.plans import InvertReport, invert_plan
    from optimstate.surgery.remapping import RemapReport, remap
    from optimstate.surgery.reports import Inspection
    from optimstate.surgery.scanning import ScanReport, scan
    from optimstate.surgery.settings import with_options
    from optimstate.surgery.suggesting import SuggestReport, suggest
    from optimstate.surgery.suggesting import suggest as suggest_plan
    from optimstate.surgery.verifying import verify, verify_against

_HOMES = {
    "CheckReport": "plan_checking",
    "ConvertReport": "converting",
    "DiffReport": "comparing",
    "Inspection": "reports",
    "InvertReport": "plans",
    "Lineage": "certifying",
    "NameReport": "naming",
    "RemapReport": "remapping",
    "ScanReport": "scanning",
    "ShowReport": "plan_showing",
    "SuggestReport": "suggesting",
    "VerifyReport": "verifying",
    "check_plan": "plan_checking",
    "convert": "converting",
    "diff": "comparing",
    "inspect": "inspecting",
    "invert_plan": "plans",
    "log": "certifying",
    "name": "naming",
    "remap": "remapping",
    "save_plan": "plan_files",
    "scan": "scanning",
    "show_plan": "plan_showing",
    "suggest": "suggesting",
    "suggest_plan": "suggesting",
    "verify": "verifying",
    "verify_against": "verifying",
    "with_options": "settings",
}

__all__ = [
    "CheckReport",
    "ConvertReport",
    "DiffReport",
    "Inspection",
    "InvertReport",
    "Lineage",
    "NameReport",
    "RemapReport",
    "ScanReport",
    "ShowReport",
    "SuggestReport",
    "VerifyReport",
    "check_plan",
    "convert",
    "diff",
    "inspect",
    "invert_plan",
    "log",
    "name",
    "remap",
    "save_plan",
    "scan",
    "show_plan",
    "suggest",
    "suggest_plan",
    "verify",
    "verify_against",
    "with_options",
]


def __getattr__(attribute: str) -> Any:
    if attribute not in _HOMES:
        raise AttributeError(f"module {describe(__name__)} has no attribute {describe(attribute)}")
    home = import_module(f"{__name__}.{_HOMES[attribute]}")
    value = globals()[attribute] = getattr(home, attribute.replace("suggest_plan", "suggest"))
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
