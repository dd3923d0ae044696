"""The verbs on checkpoint files, as functions; the command line only renders the reports they return.

None of them imports torch unless elements of a tensor must be read or rearranged, and none executes anything from a
file.
A module is called by what its verb is doing (`writing.remapping` has `remap`), so that no module hides the function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe

if TYPE_CHECKING:
    from optimstate.surgery.comparison.comparing import DiffReport, diff
    from optimstate.surgery.inspection.inspecting import inspect
    from optimstate.surgery.inspection.report import Inspection
    from optimstate.surgery.plans.checking import CheckReport, check_plan
    from optimstate.surgery.plans.files import save_plan
    from optimstate.surgery.plans.inverting import InvertReport, invert_plan
    from optimstate.surgery.plans.showing import ShowReport, show_plan
    from optimstate.surgery.plans.suggesting import SuggestReport, suggest
    from optimstate.surgery.plans.suggesting import suggest as suggest_plan
    from optimstate.surgery.scanning import ScanReport, scan
    from optimstate.surgery.verification.findings import VerifyReport
    from optimstate.surgery.verification.verifying import verify, verify_against
    from optimstate.surgery.writing.converting import ConvertReport, convert
    from optimstate.surgery.writing.naming import NameReport, name
    from optimstate.surgery.writing.remapping import RemapReport, remap
    from optimstate.surgery.writing.settings import with_options

_HOMES = {
    "CheckReport": "plans.checking",
    "ConvertReport": "writing.converting",
    "DiffReport": "comparison.comparing",
    "Inspection": "inspection.report",
    "InvertReport": "plans.inverting",
    "Lineage": "verification.certifying",
    "NameReport": "writing.naming",
    "RemapReport": "writing.remapping",
    "ScanReport": "scanning",
    "ShowReport": "plans.showing",
    "SuggestReport": "plans.suggesting",
    "VerifyReport": "verification.verifying",
    "check_plan": "plans.checking",
    "convert": "writing.converting",
    "diff": "comparison.comparing",
    "inspect": "inspection.inspecting",
    "invert_plan": "plans.inverting",
    "log": "verification.certifying",
    "name": "writing.naming",
    "remap": "writing.remapping",
    "save_plan": "plans.files",
    "scan": "scanning",
    "show_plan": "plans.showing",
    "suggest": "plans.suggesting",
    "suggest_plan": "plans.suggesting",
    "verify": "verification.verifying",
    "verify_against": "verification.verifying",
    "with_options": "writing.settings",
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
