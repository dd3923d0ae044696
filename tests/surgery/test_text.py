"""`str()` of every report is what the command line prints."""

from __future__ import annotations

import html
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from optimstate import surgery
from optimstate.plan.language.plan import Plan
from optimstate.surgery.text import table
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
    report = REPORTS[line]()
    assert str(report) + "\n" == run(*shlex.split(line)).out
    assert html.unescape(report._repr_html_()) == f"<pre>{report}</pre>"


def test_no_name_of_a_file_becomes_markup_in_a_notebook(tmp_path: Path) -> None:
    torch.save({"model": {"<script>alert(1)</script>": torch.ones(2), "b": torch.ones(2)}}, tmp_path / "a.pt")
    shown = surgery.verify(tmp_path / "a.pt")._repr_html_() + surgery.inspect(tmp_path / "a.pt")._repr_html_()
    assert "<script" not in shown


@given(st.lists(st.text(st.sampled_from("ab層ワ한e\u0301é\u0327 ü"), max_size=6), min_size=1, max_size=4))
def test_columns_stand_under_each_other_whatever_the_script(names: list[str]) -> None:
    rows = [(name + ".", "x") for name in names]
    lines = table(["parameter", "dtype"], rows).splitlines()
    assert len({cell_len(line.removesuffix("dtype").removesuffix("x")) for line in lines}) == 1
