"""What a terminal shows: the words of the report, in columns and colours, at any width; and when nothing is drawn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimstate.cli.render import drawn as drawing
from optimstate.cli.render.drawn import drawn
from optimstate.surgery.text import table
from tests.cli.running import run
from tests.cli.test_manners import LINES, on_terminal

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    return COLOUR.sub("", text)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("command", LINES)
def test_a_terminal_has_the_words_of_the_report(command: str, width: int, checkpoints: Path) -> None:
    text = run(*LINES[command]).out
    shown = plain(drawn(text, width=width))
    # Words may be cut where a column is narrower, and cells stand in other lines: the letters are all there.
    assert sorted("".join(shown.split())) == sorted("".join(text.split()))
    assert all(len(line) <= width or " " not in line.strip() for line in shown.splitlines())
    bare = drawn(text, width=width, colour=False)
    assert [line.rstrip() for line in shown.splitlines()] == bare.splitlines()


@given(
    st.lists(
        st.lists(st.from_regex(r"[a-z.*0-9]{1,30}", fullmatch=True), min_size=3, max_size=3), min_size=1, max_size=6
    ),
    st.integers(40, 120),
)
def test_tables_keep_their_cells(rows: list[list[str]], width: int) -> None:
    text = table(("slot", "parameters", "why"), rows)
    shown = plain(drawn(text, width=width))
    assert sorted("".join(shown.split())) == sorted("".join(text.split()))
    assert max(map(len, shown.splitlines())) <= width


def test_colours_mean_something() -> None:
    text = "fault: a: b [c]\nx.pt: 1 fault; checked all\n  slot  outcome\n  a     exact\n  b     dropped\n  - gone  x"
    shown = drawn(text, width=80)
    assert "\x1b[1;31mfault\x1b[0m:" in shown
    assert "\x1b[32mexact" in shown
    assert "\x1b[1;31mdropped" in shown
    assert "\x1b[31m- gone" in shown


def test_a_real_terminal_is_drawn_on_unless_colour_is_not_wanted(checkpoints: Path) -> None:
    coloured = on_terminal("inspect", "checkpoint.pt", columns=80, PAGER="cat")
    assert COLOUR.search(coloured)
    piped = run("inspect", "checkpoint.pt").out
    assert plain(coloured).split() == piped.split()
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_terminal("inspect", "checkpoint.pt", columns=80, **environment).split() == piped.split()


def test_what_is_longer_than_the_screen_goes_through_the_pager(checkpoints: Path, tmp_path: Path) -> None:
    script = tmp_path / "pager"
    script.write_text(f"#!{sys.executable}\nimport sys\nprint('paged', len(sys.stdin.read().splitlines()) > 24)\n")
    script.chmod(0o755)
    assert on_terminal("inspect", "checkpoint.pt", "--params", columns=80, PAGER=str(script)).strip() == "paged True"
    assert "paged" not in on_terminal("inspect", "checkpoint.pt", columns=200, PAGER="no-such-pager")


def test_a_pipe_never_meets_rich(checkpoints: Path) -> None:
    code = "import sys; from optimstate.cli import app; app.run(); print('rich' in sys.modules, file=sys.stderr)"
    for words in (["inspect", "checkpoint.pt"], ["remap", "old.pt", "--dry-run", "--plan", "plan.toml"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, env={**os.environ}
        )
        assert done.stderr.strip() == "False"


def test_names_cannot_steer_the_terminal() -> None:
    assert "\x1b]0;" not in drawn("  \x1b]0;owned\x07name  x 3", width=80, colour=False)
    assert (
        drawing.drawn("[bold]no markup[/bold] :smile:", width=80, colour=False).strip()
        == "[bold]no markup[/bold] :smile:"
    )
