"""Processes that work together and end early: what they say, what stays, and what the next attempt does again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimstate.cli.together import stage_of
from optimstate.errors import DestinationError
from optimstate.formats.registry import open_checkpoint
from optimstate.io import shared
from optimstate.io.extents import Extent, FileSource
from optimstate.io.shared import Notes, Range, move, shape_of
from optimstate.io.staging import FolderStage
from optimstate.io.together import Team, team_of_environment
from tests.cli.running import run
from tests.cli.test_together import (
    RENAME,
    ROOT,
    begin,
    data_of,
    ended,
    parts_of,
    shards,
    source,
    together,
    torchrun,
)

__all__ = ["shards", "source"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def begin_with(
    code: str, rank: int, size: int, arguments: Sequence[object], **environment: str
) -> subprocess.Popen[str]:
    """As `begin`, after running a line of code in the process."""
    env = os.environ | {"OPTIMSTATE_TOGETHER": "1", "RANK": str(rank), "WORLD_SIZE": str(size), **environment}
    script = f"import errno, os, resource, runpy, signal\n{code}\nrunpy.run_module('optimstate', run_name='__main__')"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def within(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Wait until there is a file that a process writes."""
    deadline = time.monotonic() + 30
    while not list(folder.glob(pattern)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[int, list[str]]] = {
    "an option that does not exist": (2, ["remap", "SOURCE", "TO", "--nothing"]),
    "a template": (4, ["remap", "SOURCE", "TO", "--rename", "x"]),
    "a plan file": (4, ["remap", "SOURCE", "TO", "--plan", "TO.toml"]),
    "a plan that does not fit": (4, ["remap", "SOURCE", "TO", "--drop", "nothing"]),
    "a param group that does not exist": (4, ["remap", "SOURCE", "TO", *RENAME, "--set", "lr=1"]),
    "a source": (3, ["convert", "TO-source", "TO", "--to", "dcp"]),
    "one file": (2, ["convert", "SOURCE", "TO.pt"]),
    "a section": (2, ["convert", "SOURCE", "TO", "--to", "dcp", "--section", "nothing"]),
    "the source as destination": (5, ["remap", "SOURCE", "SOURCE", *RENAME, "--force"]),
    "a destination in the source": (5, ["remap", "SOURCE", "SOURCE/in", *RENAME]),
    "a folder that does not exist": (5, ["remap", "SOURCE", "TO/in", *RENAME]),
    "a destination that exists": (5, ["remap", "SOURCE", "THERE", *RENAME]),
    "another command": (2, ["inspect", "SOURCE"]),
    "ranks": (2, ["convert", "SOURCE", "TO", "--to", "dcp", "--ranks", "0"]),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_all_end_with_the_same_code_and_one_says_why(kind: str, source: Path, tmp_path: Path) -> None:
    code, arguments = ERRORS[kind]
    (tmp_path / "there").mkdir()
    before = data_of(source)
    places = {"SOURCE": str(source), "THERE": str(tmp_path / "there"), "TO": str(tmp_path / "b")}
    command = [re.sub("SOURCE|THERE|TO", lambda found: places[found[0]], word) for word in arguments] + ["--json"]
    at_once = "import optimstate.cli.together as t; t._MOMENTS = 0"
    started = [begin_with("", 0, 2, command), begin_with(at_once, 1, 2, command, LOCAL_RANK="1")]
    (results, errors), (nothing, more) = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [code, code], (errors, more)
    assert json.loads(results)["command"] == "error"
    assert nothing == ""
    said = errors.splitlines()[0].removeprefix("error: ")
    assert more.splitlines()[0].endswith(said)  # torchrun has not ended it, so it says the same
    if kind not in ("one file", "another command"):
        assert run(*command).err.splitlines()[0] == f"error: {said}"
    assert data_of(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_torchrun_shows_one_message(source: Path, tmp_path: Path) -> None:
    """The other processes end without a word, and torchrun ends none before the first one has said it."""
    done = torchrun(3, ["remap", source, tmp_path / "b", "--drop", "nothing"])
    assert done.returncode == 1
    assert done.stderr.count("matches none of") == 1
    assert "interrupted" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_cannot_write_says_so_and_ends_the_others(source: Path, tmp_path: Path) -> None:
    arguments = ["remap", source, tmp_path / "b", *RENAME, "--copy"]
    first = begin(0, 2, arguments, OPTIMSTATE_PATIENCE="30")
    code = "import resource, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); runpy.run_module('optimstate', run_name='__main__')"
    )
    env = os.environ | {"OPTIMSTATE_TOGETHER": "1", "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    second = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = ended(second)
    assert said[0] == 5
    assert "rank 1: " in said[1]
    assert "cannot be written" in said[1]
    told = ended(first)
    assert told[0] == 5
    assert "rank 1 has ended: " in told[1]
    assert not (tmp_path / "b").exists()
    assert [code for code, _ in together(2, arguments)] == [0, 0]


def test_processes_that_are_to_work_together_must_be_counted() -> None:
    for environment in ({}, {"RANK": "0"}, {"WORLD_SIZE": "2"}):
        with pytest.raises(DestinationError, match="must be set"):
            team_of_environment({"OPTIMSTATE_TOGETHER": "1", **environment})
    assert team_of_environment({"OPTIMSTATE_TOGETHER": "0", "RANK": "0", "WORLD_SIZE": "2"}) is None


def test_processes_that_are_not_counted_do_not_each_do_everything(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIMSTATE_TOGETHER", "1")
    outcome = run("remap", str(source), str(tmp_path / "b"), *RENAME)
    assert outcome.code == 5
    assert "RANK and WORLD_SIZE must be set" in outcome.err
    assert list(tmp_path.iterdir()) == []


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_first_process_says_what_stays(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    arguments = ["convert", source, tmp_path / "b", "--to", "dcp", "--ranks", "2"]
    first = begin(0, 2, arguments)
    within(first, tmp_path, ".b.*.part/.together.vote.0")
    first.send_signal(number)
    code, said = ended(first)
    assert code == 128 + number
    (stage,) = parts_of(tmp_path / "b")
    assert f"kept {tmp_path / stage}" in said
    assert "nothing was left behind" not in said
    written = (tmp_path / stage / "__0_0.distcp").stat().st_mtime_ns
    assert [code for code, _ in together(2, arguments)] == [0, 0]
    assert (tmp_path / "b" / "__0_0.distcp").stat().st_mtime_ns == written
    assert not list((tmp_path / "b").glob(".together*"))


@pytest.mark.parametrize("options", [[], ["--copy"], ["--ranks", "3"]], ids=["links", "copies", "ranks"])
def test_a_second_attempt_goes_on_after_an_error_just_before_the_commit(
    options: list[str], source: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (large,) = damaged.glob("*.distcp")
    data = bytearray(large.read_bytes())
    data[len(data) // 2] ^= 1
    large.write_bytes(data)
    arguments = ["remap", damaged, tmp_path / "b", *RENAME, *options]
    done = together(2, [*arguments, "--verify"])
    assert [code for code, _ in done] == [3, 3], done
    assert "checksum" in done[0][1]
    assert not (tmp_path / "b").exists()
    (stage,) = parts_of(tmp_path / "b")
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / stage).glob("*.distcp")}
    assert written
    assert [code for code, _ in together(2, arguments)] == [0, 0]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "b").glob("*.distcp")} == written


def test_what_another_program_made_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    arguments = ["remap", source, tmp_path / "b", *RENAME]
    first = begin(0, 2, arguments)
    within(first, tmp_path, ".b.*.part/.together.work.1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "of another").write_text("program")
    for name in parts_of(tmp_path / "b"):  # the vote of the other process
        (tmp_path / name / ".together.vote.1").write_text("[]")
    code, said = ended(first)
    assert code == 5
    assert "was made by another program meanwhile" in said
    assert data_of(tmp_path / "b") == {"of another": b"program"}
    shutil.rmtree(tmp_path / "b")
    assert [code for code, _ in together(2, arguments)] == [0, 0]


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    one, other = (FolderStage(tmp_path / "a", digest * 12, Team(0, 2)) for digest in "01")
    with one:
        with pytest.raises(DestinationError, match="is being written by another command"):
            other.begin()
        other.end(5, "is refused")
        assert other.withdraw() == ""
        assert one.folder.is_dir()
        assert not other.folder.exists()


def test_a_refused_attempt_does_not_end_the_one_that_lives(tmp_path: Path) -> None:
    one, other = (FolderStage(tmp_path / "a", "0" * 12, Team(0, 2)) for _ in range(2))
    with one:
        with pytest.raises(DestinationError, match="is being written by other processes"):
            other.begin()
        other.end(5, "is refused")
        assert other.withdraw() == ""
        assert not list(one.folder.glob(".together.ended*"))


def test_where_nothing_can_be_linked_all_copy(source: Path, tmp_path: Path) -> None:
    """As on another file system."""
    other = "def link(*_): raise OSError(errno.EXDEV, 'no')\nos.link = link"
    arguments = ["remap", source, tmp_path / "b", *RENAME]
    assert ended(begin_with(other, 0, 2, arguments, OPTIMSTATE_PATIENCE="1"))[0] == 5  # rank 1 never comes
    (stage,) = parts_of(tmp_path / "b")
    noted = json.loads((tmp_path / stage / ".together.note.0").read_text())
    whole = sum(file.stat().st_size for file in source.glob("*.distcp"))
    assert noted[-1] == whole // 2
    started = [begin_with(other, rank, 2, arguments) for rank in range(2)]
    assert [ended(process)[0] for process in started] == [0, 0]
    assert run("remap", str(source), str(tmp_path / "one"), *RENAME).code == 0
    assert data_of(tmp_path / "one") == data_of(tmp_path / "b")


def test_the_first_process_gives_signs_of_life_while_it_plans(source: Path, tmp_path: Path) -> None:
    """Otherwise, in a second attempt, the others would take it for dead if planning takes long."""
    code = f"""
import pathlib, time, optimstate
def remap(*_, **__):
    ends = time.monotonic() + 20
    while not list(pathlib.Path({str(tmp_path)!r}).glob('.b.*.part/.together.alive.0')) and time.monotonic() < ends:
        time.sleep(0.01)
    raise optimstate.UsageError('no sign' if time.monotonic() > ends else 'a sign')
optimstate.remap = remap
"""
    exit_code, said = ended(begin_with(code, 0, 2, ["remap", source, tmp_path / "b", *RENAME]))
    assert exit_code == 2
    assert "error: a sign" in said
    assert list(tmp_path.iterdir()) == []


# --- what an attempt leaves out ---------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    portion=st.integers(1, 60),
    stops=st.lists(st.integers(0, 200), max_size=3),
)
def test_an_attempt_moves_only_what_the_earlier_ones_have_not(
    sizes: list[int], portion: int, stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "PORTION", portion)
    folder = tmp_path / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    whole = os.urandom(sum(sizes))
    (folder / "a").write_bytes(whole)
    stage = FolderStage(folder / "b", "0" * 12, Team(1, 2), sync=False)
    stage.folder.mkdir()
    file = FileSource(folder / "a")
    ranges, at = [], 0
    for number, size in enumerate(sizes):
        target = stage.folder / str(number // 2)
        target.touch()
        ranges.append(Range(Extent(file, at, size), target, sum(sizes[number - number % 2 : number])))
        at += size
    for stop in [*stops, len(whole) + 1]:
        already, left = Notes(stage).moved(shape_of(ranges)), [stop]

        def progress(nbytes: int, left: list[int] = left) -> None:
            left[0] -= nbytes
            if left[0] < 0:
                raise KeyboardInterrupt

        try:
            move(ranges, progress, Notes(stage), sync=False)
        except KeyboardInterrupt:
            assert stop - left[0] <= len(whole) - already  # nothing of what was noted is moved again
            continue
        assert stop - left[0] == len(whole) - already
    assert Notes(stage).moved(shape_of(ranges)) == len(whole)
    assert Notes(stage).moved(shape_of([*ranges, ranges[0]])) == 0  # of other ranges nothing is known
    assert b"".join((stage.folder / str(number)).read_bytes() for number in range(-(-len(sizes) // 2))) == whole


def test_files_that_are_complete_are_not_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with several files, killed after the first of them."""
    arguments = ["convert", source, tmp_path / "b", "--to", "dcp", "--ranks", "4"]
    first = begin(0, 2, arguments, OPTIMSTATE_PATIENCE="1")
    assert ended(first)[0] == 5
    (stage,) = (tmp_path / name for name in parts_of(tmp_path / "b"))
    (stage / ".together.vote.0").unlink()
    (stage / "__1_0.distcp").unlink()
    written = (stage / "__0_0.distcp").stat().st_mtime_ns
    assert [code for code, _ in together(2, arguments)] == [0, 0]
    assert (tmp_path / "b" / "__0_0.distcp").stat().st_mtime_ns == written
    assert open_checkpoint(tmp_path / "b").tree["epoch"] == 3
    for name, value in {"OPTIMSTATE_TOGETHER": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    stages = [stage_of(source, tmp_path / "c", ["remap"], sync=sync) for sync in (False, True)]
    assert len({each.folder for each in stages if each is not None}) == 2  # what is not flushed is not gone on with


def test_a_share_is_several_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from optimstate.formats.dcp import layout

    monkeypatch.setattr(layout, "_FILE_BYTES", 20_000)
    dcp.save(
        {"m": {f"{i}.w": torch.randn(20, 40) for i in range(40)} | {"wide": torch.randn(1, 9000)}},
        checkpoint_id=tmp_path,
    )
    document = open_checkpoint(tmp_path)
    leaves = {f"m.{name}": (("m", name), value.narrow(0, 0, 1)) for name, value in document.tree["m"].items()}
    made = layout.layout(leaves, None, team=3)
    assert [name for names in made.owned for name in names] == list(made.files)
    assert all(name.startswith(f"__{rank}_") for rank, names in enumerate(made.owned) for name in names)
    boxes = [part.box for parts in made.files.values() for part in parts if part.name == "m.wide"]
    assert len(boxes) > 2
    assert sum(box[1][1] for box in boxes if box is not None) == 9000
