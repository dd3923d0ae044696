"""Outputs appear whole or not at all, leave nothing behind, and clear away what dead writers left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from optimstate.errors import DestinationError, DestinationExistsError
from optimstate.io import directory
from optimstate.io.destination import check_destination
from optimstate.io.directory import AtomicDirectory
from optimstate.io.output import AtomicFile, AtomicGroup
from optimstate.io.temporary import is_leftover


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_file(path: Path) -> None:
    with AtomicFile(path, expected_size=100) as out:
        out.write(b"new")


def write_folder(path: Path) -> None:
    with AtomicDirectory(path) as folder:
        write_file(folder / "a")
        (folder / "inner").mkdir()
        write_file(folder / "inner" / "b")


def write_group(path: Path) -> None:
    with AtomicGroup(path) as group:
        for name in (f"{path.name}.shard", path.name):
            with AtomicFile(path.with_name(name), group=group) as out:
                out.write(b"new")


WRITERS = [write_file, write_folder, write_group]
CALLS = ["open", "posix_fallocate", "write", "ftruncate", "fsync", "chmod", "mkdir", "replace", "rename"]


class Failing:
    """A call that fails at one of its times, before or after it is done."""

    def __init__(
        self, real: Callable[..., object], at: int, kind: type[BaseException] | BaseException, after: bool
    ) -> None:
        self.real, self.at, self.kind, self.after, self.count = real, at, kind, after, 0

    def __call__(self, *arguments: object, **options: object) -> object:
        self.count += 1
        if self.count == self.at:
            if self.after:
                self.real(*arguments, **options)
            raise self.kind
        return self.real(*arguments, **options)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", [False, True])
def test_a_failure_at_any_call_leaves_old_or_new(
    write: Callable[[Path], None],
    call: str,
    kind: type[BaseException] | BaseException,
    after: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(1, 20):
        place = tmp_path / str(number)
        place.mkdir()
        target = place / "out"
        target.write_bytes(b"old")
        failing = Failing(getattr(os, call), number, kind, after)
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt, DestinationError):
            patched.setattr(os, call, failing)
            write(target)
        assert [name for name in names(place) if is_leftover(name)] == []
        if target.is_file():
            assert target.read_bytes() in (b"old", b"new")
        else:
            assert names(target) == ["a", "inner"]
        if failing.count < number:
            return


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_killed_writer_left_goes_with_the_next_write(write: Callable[[Path], None], tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from optimstate.io.directory import AtomicDirectory
from optimstate.io.output import AtomicFile
with {"AtomicDirectory" if write is write_folder else "AtomicFile"}(Path({str(tmp_path / "out")!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    other = tmp_path / ".other.0123456789ab.part"
    other.touch()
    assert len(names(tmp_path)) == 2
    write(tmp_path / "out")
    assert [name for name in names(tmp_path) if is_leftover(name)] == [other.name]


def test_a_living_writers_file_stays(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "out") as first:
        first.write(b"first")
        write_file(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"new"
    assert (tmp_path / "out").read_bytes() == b"first"
    assert names(tmp_path) == ["out"]


def test_a_living_groups_files_stay(tmp_path: Path) -> None:
    index = tmp_path / "index"
    with AtomicGroup(index) as group:
        for name in ("shard", "index"):
            with AtomicFile(tmp_path / name, group=group) as out:
                out.write(b"first")
        script = f"from optimstate.io.output import *\nwith AtomicFile({str(index)!r}) as out: out.write(b'other')"
        subprocess.run([sys.executable, "-c", script], check=True)
        assert index.read_bytes() == b"other"
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == {"shard": b"first", "index": b"first"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_a_folder_or_file(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file", "none"):
        write_folder(tmp_path / name)
        assert names(tmp_path / name) == ["a", "inner"]
    assert names(tmp_path) == ["file", "folder", "none"]


def test_pipes_are_neither_replaced_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for force in (False, True):
        with pytest.raises(DestinationError, match="not a regular file or folder"):
            check_destination(tmp_path / "pipe", [], force=force)
    for write in WRITERS:
        with pytest.raises(DestinationError, match="not a regular file or folder"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_that_leads_nowhere_is_something(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DestinationExistsError):
        check_destination(tmp_path / "link", [], force=False)


def test_names_of_any_length_and_bytes(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127, os.fsdecode(b"\xff\xfe" * 100), "a\nb"):
        write_file(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(DestinationError):
        write_file(tmp_path / ("n" * 256))
