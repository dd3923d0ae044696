"""`str()` of every report is what the command line prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from optimstate import surgery
from optimstate.plan.language.plan import Plan
from tests.cli.place import furnish
from tests.cli.running import run

REPORTS = {
    "inspect old.pt": lambda: surgery.inspect("old.pt"),
    "scan old.pt": lambda: surgery.scan("old.pt"),
    "verify old.pt": lambda: surgery.verify("old.pt"),
    "diff old.pt new-model.pt": lambda: surgery.diff("old.pt", "new-model.pt"),
    "convert old.pt out.safetensors --dry-run": lambda: surgery.convert("old.pt", "out.safetensors", dry_run=True),
    "remap old.pt --dry-run --plan plan.toml": lambda: surgery.remap(
        "old.pt", None, Plan.from_file("plan.toml"), dry_run=True
    ),
    "plan check plan.toml old.pt": lambda: surgery.check_plan("plan.toml", "old.pt"),
    "plan invert plan.toml": lambda: surgery.invert_plan("plan.toml"),
    "plan suggest old.pt new-model.pt": lambda: surgery.suggest("old.pt", "new-model.pt"),
}


@pytest.mark.parametrize("line", REPORTS)
def test_a_report_as_text_is_what_is_printed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert str(REPORTS[line]()) + "\n" == run(*shlex.split(line)).out
