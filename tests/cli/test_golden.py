"""Every command prints what it printed when someone last looked: `python -m tests.cli.golden` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.golden import CASES, FOLDER, VERBS, equip, golden, same_help
from tests.cli.place import PLAN_VERBS


@pytest.fixture(scope="module")
def equipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    equip(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_is_printed(name: str, equipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(equipped)
    printed, kept = golden(CASES[name]), (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert same_help(printed, kept) if name.startswith("help-") else printed == kept


def test_every_command_has_one_and_no_file_is_left_over() -> None:
    commands = [*VERBS, *(f"plan {verb}" for verb in PLAN_VERBS)]
    for command in commands:
        assert any(line.startswith(f"optimstate {command} ") and "--help" not in line for line in CASES.values())
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_lines_fit_their_terminal_and_have_no_colour(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert not re.search(r"^ +(-\w, )?--[A-Z]", text, re.MULTILINE), "the metavar was taken for the option"
    for columns in (80, 120):
        (shown,) = re.findall(rf"^--- [^\n]*{columns} columns[^\n]*\n(.*?)(?=^--- |\Z)", text, re.MULTILINE | re.DOTALL)
        for line in shown.splitlines():
            if line.startswith("stderr: "):
                continue
            # A word alone may be longer than a line: a path, a name, a template.
            assert len(line) <= columns or " " not in line.strip(), line
