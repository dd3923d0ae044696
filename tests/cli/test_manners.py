"""How commands behave: quiet, piped, completed, without colour, with progress, quick to start."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer.main

from optimstate.cli import app
from optimstate.cli.render import terminal
from optimstate.plan.language.plan import Plan
from tests import corpus
from tests.cli.golden import Terminal
from tests.cli.place import PLAN_VERBS
from tests.cli.running import run

ROOT = corpus.FIXTURES.parent

LINES = {
    "inspect": ["inspect", "checkpoint.pt"],
    "diff": ["diff", "checkpoint.pt", "old.pt"],
    "remap": ["remap", "old.pt", "--dry-run", "--plan", "plan.toml"],
    "plan suggest": ["plan", "suggest", "old.pt", "new-model.pt"],
    "plan check": ["plan", "check", "plan.toml", "old.pt"],
    "plan invert": ["plan", "invert", "plan.toml"],
    "plan show": ["plan", "show", "plan.toml", "old.pt"],
    "convert": ["convert", "old.pt", "out.safetensors", "--dry-run"],
    "name": ["name", str(corpus.case("torch/adam_unnamed_wd").entry), "--dry-run"],
    "verify": ["verify", "checkpoint.pt", "--no-numbers"],
    "log": ["log", "certified.pt"],
    "rehearse": ["rehearse", "--script", "resume_check.py"],
    "plan derive": ["plan", "derive", "old.pt", "--function", "converter:renamed"],
    "scan": ["scan", str(corpus.case("optimstate/hostile_zip").entry)],
}


@pytest.mark.parametrize("command", LINES)
def test_quiet_prints_nothing_and_exits_the_same(command: str, checkpoints: Path) -> None:
    loud = run(*LINES[command])
    assert loud.out
    for flag in ("--quiet", "-q"):
        quiet = run(*LINES[command], flag)
        assert (quiet.code, quiet.out, quiet.err) == (loud.code, "", "")
    both = run(*LINES[command], "-q", "--json")
    assert json.loads(both.out)["command"] == command


def single_valued() -> list[tuple[str, str]]:
    """Every command's options that take one value."""
    app.register([])
    found: list[tuple[str, str]] = []
    root = typer.main.get_command(app.app)
    for line in [*LINES, "demo"]:
        command: Any = root
        for word in line.split():
            command = command.commands[word]
        options = [option for option in command.params if option.param_type_name == "option"]
        found += [(line, option.opts[0]) for option in options if not (option.multiple or option.is_flag)]
    return found


@pytest.mark.parametrize(("command", "option"), single_valued())
def test_an_option_of_one_value_given_twice_is_wrong_usage(command: str, option: str, checkpoints: Path) -> None:
    line = LINES.get(command, [command])
    times = 2 + (option in line)
    outcome = run(*line, option, "1", option, "2")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {option} is given {times} times, but it takes one value\n")


@pytest.mark.parametrize(
    "line",
    [
        "inspect checkpoint.pt old.pt --tree",
        "inspect checkpoint.pt old.pt --params",
        "inspect checkpoint.pt --section model --all",
        "inspect checkpoint.pt --top 3 --tree",
        "diff checkpoint.pt old.pt --stat --params",
        "plan show plan.toml --params",
        "plan derive old.pt --function converter:renamed --to hub",
        "verify checkpoint.pt --against old.pt --plan plan.toml --no-numbers",
        "verify checkpoint.pt --against old.pt --plan plan.toml --view plan.toml",
        "convert old.pt out.pt --shard-size 1MB",
        "convert old.pt out.pt --clone-views",
        "convert old.pt out.safetensors --no-checksums",
        "convert old.pt out.dcp --digest sha256",
        "convert old.pt out.pt --verify --no-verify",
    ],
)
def test_an_option_in_vain_is_wrong_usage(line: str, checkpoints: Path) -> None:
    outcome = run(*line.split())
    assert outcome.code == 2, outcome.out
    assert outcome.err.startswith("error: ")
    assert not (checkpoints / "out.pt").exists()


def test_what_is_missing_is_not_told_of_a_part(checkpoints: Path) -> None:
    assert "resume: " in run("inspect", "checkpoint.pt").out
    assert "resume: " not in run("inspect", "checkpoint.pt", "--section", "model").out


def test_quiet_does_not_hide_errors(checkpoints: Path) -> None:
    outcome = run("inspect", "missing.pt", "--quiet")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.startswith("error: ")


def test_every_command_can_be_quiet() -> None:
    commands = [command for command in app.COMMANDS if command not in ("plan", "demo")]
    assert set(LINES) == {*commands, *(f"plan {verb}" for verb in PLAN_VERBS)}


# --- pipes ----------------------------------------------------------------------------------------------------------


def test_a_plan_goes_through_pipes(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suggested = run("plan", "suggest", "old.pt", "new-model.pt", "-o", "-")
    assert (suggested.code, suggested.err) == (0, "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(suggested.out))
    assert run("plan", "check", "-", "old.pt", "--target", "new-model.pt").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(suggested.out))
    printed = run("remap", "old.pt", "out.pt", "--plan", "-", "--plan-out", "-")
    assert printed.code == 0
    assert Plan.from_toml(printed.out) == Plan.from_toml(suggested.out)
    assert set(torch.load("out.pt")["model"]) == set(torch.load("new-model.pt")["model"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(printed.out))
    assert run("verify", "out.pt", "--against", "old.pt", "--plan", "-").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(printed.out))
    back = run("plan", "invert", "-")
    assert str(Plan.from_toml(back.out).rules[0]) == "blocks.{i}.{p} -> encoder.{i}.{p}"


@pytest.mark.parametrize(
    ("text", "mention"), [("[[rule]\n", "line 1"), ('[[rule]]\nfrom = "a"\n', "standard input:2: rule 1")]
)
def test_a_wrong_plan_on_standard_input_is_told_like_a_file(
    text: str, mention: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    outcome = run("plan", "check", "-")
    assert (outcome.code, outcome.out) == (4, "")
    assert "standard input" in outcome.err
    assert mention in outcome.err


def test_bytes_that_are_no_text_are_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8"))
    outcome = run("plan", "show", "-")
    assert outcome.code == 4
    assert "not UTF-8 text" in outcome.err


@pytest.mark.parametrize(
    "words",
    [
        ["remap", "old.pt", "--dry-run", "--drop", "mlp.**", "--plan-out", "-", "--json"],
        ["plan", "suggest", "old.pt", "new-model.pt", "-o", "-", "--json"],
        ["plan", "invert", "plan.toml", "-o", "-", "--json"],
        ["plan", "check", "plan.toml", "--target", "new-model.pt"],
    ],
)
def test_contradictions_are_wrong_usage(words: list[str], checkpoints: Path) -> None:
    outcome = run(*words)
    assert outcome.code == 2
    if "--json" in words:
        assert json.loads(outcome.out)["error"]["kind"] == "UsageError"
    else:
        assert outcome.out == ""
    assert re.fullmatch(r"error: .*\nhint: `optimstate [a-z ]+ --help` .*\n", outcome.err)


def test_plan_files_are_not_written_over(checkpoints: Path) -> None:
    before = Path("plan.toml").read_text()
    for words in (
        ["plan", "suggest", "old.pt", "new-model.pt", "-o", "plan.toml"],
        ["plan", "invert", "plan.toml", "-o", "plan.toml"],
        ["remap", "old.pt", "out.pt", "--drop", "mlp.**", "--plan-out", "plan.toml"],
        ["plan", "suggest", "old.pt", "new-model.pt", "-o", "old.pt", "--force"],
    ):
        outcome = run(*words)
        assert (outcome.code, outcome.out) == (5, ""), outcome
        assert outcome.err.startswith("error: ")
    assert Path("plan.toml").read_text() == before
    assert not Path("out.pt").exists()


def test_one_liners_are_saved_as_the_plan_they_are(checkpoints: Path) -> None:
    options = ["--rename", "encoder.{i}.{p**}=blocks.{i}.{p}", "--fresh", "head.*", "--drop", "mlp.bias"]
    options += ["--set", "**.bias:weight_decay=0.0"]
    assert run("remap", "old.pt", "a.pt", *options, "--plan-out", "saved.toml").code == 0
    assert run("verify", "a.pt", "--against", "old.pt", "--plan", "saved.toml").code == 0
    optimizer = torch.load("a.pt")["optimizer"]
    decays = {name: group["weight_decay"] for group in optimizer["param_groups"] for name in group["param_names"]}
    assert {decay for name, decay in decays.items() if name.endswith("bias")} == {0.0}
    assert {decay for name, decay in decays.items() if not name.endswith("bias")} == {0.01}
    fresh = [
        name
        for group in optimizer["param_groups"]
        for name, key in zip(group["param_names"], group["params"], strict=True)
        if not optimizer["state"].get(key)
    ]
    assert sorted(fresh) == ["head.bias", "head.weight"]


# --- terminals ------------------------------------------------------------------------------------------------------


def test_long_work_shows_rate_and_time_left_on_a_terminal_only(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PROGRESS_FROM", 0)
    source = Path("old.pt")
    for stream, quiet, shown in ((io.StringIO(), False, False), (Terminal(), True, False), (Terminal(), False, True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "120", "TERM": "xterm", "NO_COLOR": "1"}),
            terminal.progress("working", source, quiet=quiet) as advance,
        ):
            assert (advance is not None) == shown
            if advance is not None:
                for _ in range(3):  # a rate takes two looks at the clock
                    advance(source.stat().st_size // 4)
                    time.sleep(0.02)
        text = stream.getvalue()
        assert bool(text) == shown
        if shown:
            assert "working" in text
            assert re.search(r"/s", text)
            assert re.search(r"-:--:--|\d:\d\d:\d\d", text)


READERS = [
    ["diff", "old.pt", "old.pt"],
    ["verify", "checkpoint.pt"],
    LINES["plan suggest"],
    ["name", str(corpus.case("torch/adam_unnamed_wd").entry), "named.pt"],
    ["remap", "--drop", "mlp.*", "old.pt", "out.pt"],
]


@pytest.mark.parametrize("words", READERS, ids=lambda words: words[0])
def test_what_takes_all_bytes_says_how_far_it_is(
    words: list[str], checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager

    seen: list[int] = []

    @contextmanager
    def recorded(verb: str, *sources: Path, quiet: bool = False) -> Iterator[Callable[[int], None]]:
        yield seen.append

    monkeypatch.setattr(terminal, "progress", recorded)
    run(*words)
    tensors = sum(value.nbytes for value in torch.load(words[-1])["model"].values())
    assert sum(seen) >= tensors > 0


def on_terminal(*words: str, columns: int, code: int | None = 0, **environment: str) -> str:
    """What a whole process, which ends with that exit code or None for any, shows on a real pseudo-terminal."""
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "optimstate.cli", *words],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**inherited, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
    )
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            data = os.read(leader, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(leader)
    ended = process.wait(60)
    assert code in (None, ended), shown
    return shown.decode().replace("\r\n", "\n")


def test_a_real_terminal_gets_folded_lines_without_colour(checkpoints: Path) -> None:
    words = ("remap", "checkpoint.pt", "--dry-run", "--duplicate", "layers.{i}.mlp.{p**}=layers.{i}.e.{e=0..3}.{p}")
    for columns in (60, 100):
        text = on_terminal(*words, columns=columns, NO_COLOR="1")
        assert "\x1b" not in text
        assert all(len(line) <= columns or " " not in line.strip() for line in text.splitlines())
        assert text.split() == run(*words).out.split()


def test_no_color_takes_colour_from_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    @app.app.command("colourful", hidden=True)
    def colourful() -> None:
        typer.secho("text", fg=typer.colors.GREEN)

    try:
        for value, expected in (("", "\x1b[32mtext\x1b[0m\n"), ("1", "text\n")):
            monkeypatch.setenv("NO_COLOR", value)
            out = Terminal()
            monkeypatch.setattr(sys, "stdout", out)
            assert app.app(["colourful"], standalone_mode=False, prog_name="optimstate") in (None, 0)
            assert out.getvalue() == expected
    finally:
        app.app.registered_commands.pop()


# --- completion and start -------------------------------------------------------------------------------------------


def started(environment: dict[str, str]) -> str:
    """What the program prints that a shell starts without arguments in such an environment."""
    done = subprocess.run(
        [sys.executable, "-m", "optimstate.cli"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def completed(shell: str, line: str) -> list[str]:
    """What a shell is offered behind a line."""
    environment = {
        "_OPTIMSTATE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    return re.findall(r"[a-z-]{3,}", started(environment))


def test_options_of_fixed_words_are_completed_with_them() -> None:
    line = "optimstate convert a.pt b"
    assert set(completed("bash", f"{line} --to ")) == {
        "torch",
        "safetensors",
        "dcp",
        "deepspeed-universal",
        "torch-checkpointing",
    }
    assert completed("bash", f"{line} --section opt") == ["optimizer"]
    assert "dafactor" in completed("fish", f"{line} --optimizer Adafac")  # found in small letters
    assert "exp" in started(
        {"_OPTIMSTATE_COMPLETE": "complete_bash", "COMP_WORDS": f"{line} --dtype e", "COMP_CWORD": "5"}
    )


@pytest.mark.parametrize(
    "words",
    [["--version"], ["inspect", "checkpoint.pt"], ["inspect", "missing.pt"], ["inspect"], ["diff", "--nothing"]],
    ids=" ".join,
)
def test_python_dash_m_is_the_command(words: list[str], checkpoints: Path) -> None:
    done = [
        subprocess.run([sys.executable, *how, *words], capture_output=True, text=True, timeout=60)
        for how in (["-m", "optimstate"], ["-m", "optimstate.cli"])
    ]
    assert len({(one.returncode, one.stdout, one.stderr) for one in done}) == 1
    assert "__main__" not in done[0].stderr


def test_the_habits_of_command_lines() -> None:
    assert run("-V") == run("--version")
    assert run("help", "inspect") == run("inspect", "--help")
    assert run("help").out == run("-h").out
    wrong = run("help", "inpsect")
    assert (wrong.code, wrong.out) == (2, "")
    assert "inspect" in wrong.err


def test_the_nearest_of_fixed_words_is_suggested(checkpoints: Path) -> None:
    for words, meant in (
        (["inspect", "checkpoint.pt", "--sort", "sze"], "'size'"),
        (["inspect", "checkpoint.pt", "--sort=nmae"], "'name'"),
        (["convert", "checkpoint.pt", "b", "--to", "safetensor"], "'safetensors'"),
        (["convert", "checkpoint.pt", "b.pt", "--optimizer", "Adafactr"], "'Adafactor'"),
    ):
        outcome = run(*words)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"Did you mean {meant}?" in outcome.err


def test_nothing_is_said_about_a_missing_numpy(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['numpy'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for words in (["verify", "checkpoint.pt"], ["inspect", "checkpoint.pt", "--stats"]):
        done = subprocess.run(
            [sys.executable, "-m", "optimstate", *words], capture_output=True, text=True, timeout=120, env=environment
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_verbs_and_options(shell: str) -> None:
    assert set(app.COMMANDS) <= set(completed(shell, "optimstate "))
    assert set(PLAN_VERBS) <= set(completed(shell, "optimstate plan "))
    assert {"--fresh", "--force"} <= set(completed(shell, "optimstate remap --f"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(shell: str) -> None:
    script = started({"_OPTIMSTATE_COMPLETE": f"source_{shell}"})
    assert f"_OPTIMSTATE_COMPLETE=complete_{shell}" in script
    assert "optimstate" in script.split()
    if shell == "bash":  # the shell that is everywhere accepts it
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_can_be_installed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    tool = f"{sys.executable} -m optimstate.cli --install-completion"
    done = subprocess.run(["bash", "-c", f"{tool}; true"], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "complete -o default" in (tmp_path / ".bash_completions" / "optimstate.sh").read_text()


HEAVY = {"torch", "numpy", "rich", "optimstate.surgery", "optimstate.plan", "optimstate.formats", "optimstate.state"}


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], *([command, "--help"] for command in app.COMMANDS), ["plan", "suggest", "--help"]],
    ids=" ".join,
)
def test_help_imports_nothing_that_does_work(words: list[str]) -> None:
    code = "import sys; from optimstate.cli import app; app.run(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "optimstate" in done.stdout
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("command", [command for command in app.COMMANDS if command != "demo"])  # which takes long
def test_commands_do_not_postpone_annotations(command: str) -> None:
    """As texts, Typer would compile each of them twice at every start: 2 ms for the options of `inspect`."""
    assert "annotations" not in vars(import_module(f"optimstate.cli.{command}"))


@pytest.mark.parametrize("kind", [RuntimeError, ZeroDivisionError, AttributeError, MemoryError])
def test_what_nobody_foresaw_is_not_a_finding(
    kind: type[Exception], checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("made up")

    monkeypatch.setattr("json.dumps", fail)
    outcome = run("inspect", "checkpoint.pt", "--json")
    assert outcome.code == app.CRASHED == 70
    assert f"{kind.__name__}: made up" in outcome.err
    assert "report it" in outcome.err
    assert "Traceback" not in outcome.err
    monkeypatch.setenv("OPTIMSTATE_DEBUG", "1")
    assert "Traceback" in run("inspect", "checkpoint.pt", "--json").err
