"""Scan: every class or function that the pickles of a checkpoint name, without running any."""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from optimstate.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, LimitExceededError
from optimstate.formats.pickles.globals import Verdict, classify
from optimstate.formats.pickles.mentions import mentions
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.surgery.reports import opening, to_json
from optimstate.surgery.text import plural, table

__all__ = ["Finding", "ScanReport", "scan"]


@dataclass(frozen=True)
class Finding:
    """One global in one pickle.

    Attributes:
        file: The file, relative to what was scanned.
        record: The pickle inside of it: a record of an archive, or the byte the pickle begins at.
        offset: The byte of the pickle where it is first named.
        name: `module.name`.
        times: How often it is fetched.
        verdict: `data` builds plain data, `dangerous` runs what the file's author chose, `unknown` is neither.
    """

    file: str
    record: str
    offset: int
    name: str
    times: int
    verdict: Verdict


@dataclass(frozen=True)
class ScanReport:
    """Everything named.

    Attributes:
        pickles: How many pickles were read.
        findings: In the order of the files.
        unreadable: Pickles that could not be read to the end, and why: to be treated as dangerous.
    """

    path: str
    pickles: int
    findings: tuple[Finding, ...]
    unreadable: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether everything named only builds data."""
        return not self.unreadable and all(finding.verdict == "data" for finding in self.findings)

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("scan", asdict(self))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        order = {"dangerous": 0, "unknown": 1, "data": 2}
        found = sorted(self.findings, key=lambda finding: order[finding.verdict])
        rows = [
            (f.verdict, f.name, str(f.times), f.file, f.record, str(f.offset)) for f in found if f.verdict != "data"
        ]
        if rows:
            yield table(("verdict", "name", "times", "file", "pickle", "at byte"), rows)
        for line in self.unreadable:
            yield f"  unreadable: {line}"
        names = {verdict: len({f.name for f in found if f.verdict == verdict}) for verdict in order}
        counts = ", ".join(f"{count} {verdict}" for verdict, count in names.items())
        yield f"{self.path}: {plural(self.pickles, 'pickle')} scanned, nothing run; names: {counts}"


def scan(path: str | Path) -> ScanReport:
    """Name every global in the pickles of a file, or of all files of a folder.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        CheckpointError: It cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointNotFoundError("no such file or folder", path=path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    pickles = 0
    findings: list[Finding] = []
    unreadable: list[str] = []
    with opening(path):
        for file in files:
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            try:
                for record, data in _pickles(file):
                    pickles += 1
                    findings.extend(_findings(name, record, data))
            except CheckpointError as error:
                unreadable.append(f"{name}: {error.message}")
    return ScanReport(str(path), pickles, tuple(findings), tuple(unreadable))


def _findings(file: str, record: str, data: bytes) -> list[Finding]:
    found: dict[str, Finding] = {}
    for module, name, offset in mentions(data):
        full = f"{module}.{name}"
        known = found.get(full)
        first, times = (known.offset, known.times + 1) if known else (offset, 1)
        found[full] = Finding(file, record, first, full, times, classify(module, name))
    return list(found.values())


def _pickles(file: Path) -> Iterator[tuple[str, bytes]]:
    """Each pickle of a file: in an archive, in an archive inside of it, or one after another."""
    with file.open("rb") as handle:
        head = handle.read(4)
        if head == b"PK\x03\x04" and file.suffix == ".distcp":
            yield from _pickles_of_items(handle)
        elif head[:2] == b"PK":
            yield from _archive_pickles(handle, "")
        elif _is_pickle(head):
            yield from _consecutive_pickles(handle)


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] <= b"\x05"


# What torch never unpickles: the raw storages of its own archives.
_RAW_STORAGE = re.compile(r"[^/]+/data/\d+")


def _archive_pickles(archive: IO[bytes], prefix: str) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if entry.is_dir() or _RAW_STORAGE.fullmatch(entry.filename):
                    continue
                head = _contents(opened, archive, entry, 4)
                if not (entry.filename.endswith((".pkl", ".pickle")) or _is_pickle(head) or head == b"PK\x03\x04"):
                    continue
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise LimitExceededError(f"{prefix}{entry.filename} has {entry.file_size} bytes")
                data = _contents(opened, archive, entry, entry.file_size)
                if head == b"PK\x03\x04":
                    yield from _archive_pickles(io.BytesIO(data), f"{prefix}{entry.filename}/")
                else:
                    yield prefix + entry.filename, data
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, struct.error, zlib.error) as error:
        raise CorruptCheckpointError(f"the archive cannot be read: {error}") from error


def _contents(opened: zipfile.ZipFile, archive: IO[bytes], entry: zipfile.ZipInfo, length: int) -> bytes:
    """The first bytes of an entry. Checksums are not looked at: torch does not either, and some files have none."""
    if entry.compress_type != zipfile.ZIP_STORED:
        with opened.open(entry) as record:
            return record.read(length)
    archive.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.read(4))
    archive.seek(entry.header_offset + 30 + name + extra)
    return archive.read(min(length, entry.file_size))


def _pickles_of_items(handle: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """The `data.pkl` of each archive of a `.distcp` file, which is many archives one after another."""
    with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(b"data.pkl")
        while at >= 0:
            header = data.rfind(b"PK\x03\x04", max(at - 300, 0), at)
            if header >= 0:
                name, extra = struct.unpack_from("<HH", data, header + 26)
                start = header + 30 + name + extra
                if header + 30 + name == at + len(b"data.pkl") and _is_pickle(data[start : start + 2]):
                    yield f"byte {header}", _until_stop(data, start)
            at = data.find(b"data.pkl", at + 1)


def _until_stop(data: mmap.mmap, start: int) -> bytes:
    data.seek(start)
    _skip_pickle(data)
    return data[start : data.tell()]


def _consecutive_pickles(handle: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    at = 0
    while True:
        handle.seek(at)
        if not _is_pickle(handle.read(2)):
            return  # what follows the pickles of an old torch file are raw tensors
        handle.seek(at)
        _skip_pickle(handle)
        stop = handle.tell()
        handle.seek(at)
        yield f"byte {at}", handle.read(stop - at)
        at = stop


def _skip_pickle(handle: IO[bytes] | mmap.mmap) -> None:
    try:
        for _ in pickletools.genops(handle):  # type: ignore[arg-type]
            pass
    except (ValueError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise CorruptCheckpointError(f"the pickle cannot be scanned: {error}"[:300]) from error
