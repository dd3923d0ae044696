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
from rich.cells import cell_len

from optimstate.cli.render import drawn as drawing
from optimstate.cli.render import terminal
from optimstate.cli.render.drawn import drawn
from optimstate.describe import escaped
from optimstate.surgery.text import joined, table
from tests.cli.running import run
from tests.cli.test_manners import LINES, on_terminal

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    return COLOUR.sub("", text)


def letters(text: str) -> list[str]:
    return sorted("".join(text.split()))


@pytest.mark.parametrize("command", LINES)
def test_a_terminal_has_the_words_of_the_report(
    command: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    monkeypatch.setattr(terminal, "escaped", lambda text, **how: reports.append(text) or escaped(text, **how))
    piped = run(*LINES[command]).out
    text = reports[0] if reports else piped  # a plan alone is no report
    for width in (40, 60, 80, 200):
        shown = plain(drawn(text, width=width))
        # Words may be cut where a column is narrower, and cells stand in other lines: the letters are all there.
        assert letters(shown) == letters(piped)
        assert all(cell_len(line) <= width for line in shown.splitlines())
        assert shown == drawn(text, width=width, colour=False)


WORDS = st.from_regex(r"[a-z.*0-9編éＡ]{1,30}", fullmatch=True)
NUMBERS = st.from_regex(r"[0-9]{1,9}", fullmatch=True)


@given(
    st.lists(st.tuples(WORDS, WORDS, NUMBERS, NUMBERS, WORDS), min_size=1, max_size=6),
    st.sampled_from(["parameter", "verdict"]),
    st.booleans(),
    st.integers(40, 120),
)
def test_tables_keep_their_cells(rows: list[tuple[str, ...]], first: str, numbered: bool, width: int) -> None:
    cut = 4 if numbered else 5  # the last column is numbers, or words that can be wrapped
    made = table((first, "slot", "parameters", "x", "why")[:cut], [row[:cut] for row in rows])
    shown = drawn(joined(["before it", made, "  after it"]), width=width, colour=False)
    assert max(map(cell_len, shown.splitlines())) <= width
    assert shown.startswith("before it\n")
    assert shown.endswith("  after it\n")
    names = [row[0] for row in rows]
    if first == "verdict" or len(set(names)) == len(names):  # a name that several rows have may be said once
        assert letters(shown) == letters(f"before it {made} after it")
    # A number that is cut in two is two numbers.
    numbers = [number for row in rows for number in row[2:4]]
    assert all(re.search(rf"(?<!\S){number}(?!\S)", shown) for number in numbers)


def test_rows_that_are_too_wide_stand_below_their_names() -> None:
    rows = [("h.0.attn.c_attn.weight", slot, "1", "0.6207", "1.442e-05", "0%") for slot in ("exp_avg", "exp_avg_sq")]
    shown = drawn(
        joined([table(("parameter", "slot", "x", "norm", "min", "zeros"), rows)]), width=50, colour=False
    ).splitlines()
    assert shown == [
        "  parameter",
        "    slot        x    norm        min  zeros",
        "  h.0.attn.c_attn.weight",
        "    exp_avg     1  0.6207  1.442e-05     0%",
        "    exp_avg_sq  1  0.6207  1.442e-05     0%",
    ]


def test_tables_one_after_the_other_keep_their_own_columns() -> None:
    several = joined([table(("tensor", "x"), [("a.b.weight", "1")]), table(("group", "slots"), [("0", "step 3")])])
    shown = drawn(several, width=80, colour=False)
    assert shown == f"{several}\n"


def test_lines_are_broken_between_words_and_never_within_a_shape() -> None:
    shown = drawn("  group 0: 4 parameters, betas [0.9, 0.999], type float32[64, 16]", width=40, colour=False)
    assert shown == "  group 0: 4 parameters, betas\n      [0.9, 0.999], type float32[64, 16]\n"
    shown = drawn("  keys [1, 2, 3, 4, 5, 6, 7, 8, 9]", width=20, colour=False)
    assert shown == "  keys [1, 2, 3, 4,\n      5, 6, 7, 8, 9]\n"
    shown = drawn("x.pt: 1 pickle, names: 1 dangerous", width=24)
    assert "\x1b[1;31m1 dangerous\x1b[0m" in shown


def test_colours_mean_something() -> None:
    outcomes = table(("slot", "outcome"), [("a", "exact"), ("b", "dropped")])
    shown = drawn(joined(["fault: a: b [c]\nx.pt: 1 fault; checked all", outcomes, "  - gone  x"]), width=80)
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
