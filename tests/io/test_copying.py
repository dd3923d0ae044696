"""The copier: every byte at its place whatever the pieces, and no thread left behind."""

from __future__ import annotations

import errno
import os
import random
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimstate.errors import CorruptCheckpointError
from optimstate.io import copying
from optimstate.io.copying import BLOCK, SMALL_PIECE, FileCopier
from optimstate.io.extents import CHUNK, Extent, FileSource
from optimstate.io.output import FileOutput


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many stripes in a small file; and the helper must be gone afterwards, however the test ended."""
    monkeypatch.setattr(copying, "STRIPE", 3 * BLOCK)
    yield
    assert "optimstate-helper" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "source"
    path.write_bytes(random.Random(0).randbytes(20 * BLOCK + 12345))
    return FileSource(path)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@pytest.fixture(params=["through memory", "by the system", "begun by the system"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of copying, whatever file system the tests run on."""
    if request.param == "through memory":
        monkeypatch.setattr(copying, "_goes_through_memory", lambda *_: True)
        return "threads"
    if not hasattr(os, "copy_file_range"):
        pytest.skip("this system has no copy_file_range")
    monkeypatch.setattr(copying, "_goes_through_memory", lambda *_: False)
    if request.param == "begun by the system":
        real = os.copy_file_range

        def unwilling(src: int, dst: int, count: int, at: int, to: int) -> int:
            if at % 2:
                raise OSError(errno.EXDEV, "as between two file systems")
            return real(src, dst, min(count, 100_000), at, to) if at % 3 else 0

        monkeypatch.setattr(os, "copy_file_range", unwilling)
    return "system"


class Letters:
    """A source that is computed: its byte at n is n modulo 251."""

    def __init__(self) -> None:
        self.readers: set[threading.Thread] = set()

    def read(self, offset: int, length: int) -> bytes:
        self.readers.add(threading.current_thread())
        return bytes((offset + i) % 251 for i in range(length))


def some_extents(source: FileSource, seed: int) -> list[Extent]:
    """Pieces of every kind and of sizes around all the limits, most of them at odd offsets."""
    chance = random.Random(seed)
    sizes = [0, 1, 4095, SMALL_PIECE - 1, SMALL_PIECE, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 3, CHUNK + 5]
    made = []
    for _ in range(30):
        size = chance.choice(sizes)
        kind = chance.choice([source, source, source, Letters(), None])
        size = min(size, 5000) if isinstance(kind, Letters) else size
        offset = chance.randrange(source.size - size) if kind is source else chance.randrange(1000)
        made.append(Extent(kind, offset, size))
    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("position", [0, 4097])
def test_extents_arrive_in_order_and_the_position_moves(
    source: FileSource, out: int, way: str, seed: int, position: int
) -> None:
    extents = some_extents(source, seed)
    expected = b"".join(extent.read() for extent in extents)
    os.lseek(out, position, os.SEEK_SET)
    reported: list[int] = []
    assert FileOutput(out).copy(iter(extents), reported.append) == len(expected)
    assert os.pread(out, len(expected) + 1, position) == expected
    assert os.lseek(out, 0, os.SEEK_CUR) == position + len(expected)
    assert sum(reported) == len(expected)


@pytest.mark.parametrize("seed", range(3))
def test_checksums_are_those_of_zlib(source: FileSource, out: int, seed: int) -> None:
    records = [some_extents(source, 10 * seed + n)[:6] for n in range(5)]
    expected = [b"".join(extent.read() for extent in record) for record in records]
    reported: list[int] = []
    with FileCopier(out, reported.append) as copier:
        found, at = [], 7
        for record, data in zip(records, expected, strict=True):
            found.append(copier.put_with_checksum(record, at))
            at += len(data)
    assert os.pread(out, at, 7) == b"".join(expected)
    assert [checksum.value for checksum in found] == [zlib.crc32(data) for data in expected]
    assert sum(reported) == at - 7


def test_more_may_be_put_after_finishing(source: FileSource, out: int) -> None:
    with FileCopier(out) as copier:
        copier.put([source.extent(0, 5 * BLOCK)], 0)
        copier.finish()
        assert os.pread(out, 5 * BLOCK, 0) == source.read(0, 5 * BLOCK)
        copier.put([source.extent(BLOCK, 5 * BLOCK)], 5 * BLOCK)
    assert os.pread(out, 5 * BLOCK, 5 * BLOCK) == source.read(BLOCK, 5 * BLOCK)


def test_computed_bytes_are_asked_for_by_one_thread_only(source: FileSource, out: int) -> None:
    letters = Letters()
    with FileCopier(out) as copier:
        for n in range(4):
            copier.put([source.extent(0, 4 * BLOCK), Extent(letters, 0, 5000)], n * 5 * BLOCK)
            copier.put_with_checksum([source.extent(0, 100), Extent(letters, 3, 50)], (n * 5 + 4) * BLOCK + 5000)
    assert letters.readers == {threading.current_thread()}


def test_a_range_that_the_file_does_not_have_is_refused(source: FileSource, out: int) -> None:
    for put in (FileCopier.put, FileCopier.put_with_checksum):
        with (
            pytest.raises(CorruptCheckpointError, match=f"the file has {source.size} bytes"),
            FileCopier(out) as copier,
        ):
            put(copier, [Extent(source, 1, source.size)], 0)


def test_a_source_that_shrinks_is_reported(source: FileSource, out: int, way: str) -> None:
    os.truncate(source.path, source.size // 2)
    with pytest.raises(CorruptCheckpointError, match="shrank"):
        FileOutput(out).copy([source.extent(0, source.size)])
    with pytest.raises(CorruptCheckpointError, match="shrank"), FileCopier(out) as copier:
        copier.put_with_checksum([source.extent(0, source.size)], 0)


def test_an_output_that_cannot_be_written_is_reported(source: FileSource) -> None:
    read_only = os.open(source.path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"), FileCopier(read_only) as copier:
            copier.put([source.extent(0, source.size)], 0)
    finally:
        os.close(read_only)


def test_an_interruption_while_waiting_ends_the_other_thread(
    source: FileSource, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, may_go_on = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            assert may_go_on.wait(60)

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        monkeypatch.undo()
        may_go_on.set()
        raise KeyboardInterrupt

    def work() -> None:
        with FileCopier(out, slow) as copier:
            copier.put([source.extent(0, BLOCK)], 0)
            assert started.wait(60)
            monkeypatch.setattr(threading.Thread, "join", interrupted)

    monkeypatch.setattr(copying, "_goes_through_memory", lambda *_: True)
    with pytest.raises(KeyboardInterrupt):
        work()


@pytest.mark.parametrize("where", ["between", "at the end"])
def test_an_interruption_ends_both_threads(source: FileSource, out: int, where: str) -> None:
    def interrupt(_: int) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    def work() -> None:
        with FileCopier(out, interrupt if where == "at the end" else None) as copier:
            for n in range(20):
                copier.put([source.extent(0, source.size)], n * source.size)
            if where == "between":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
