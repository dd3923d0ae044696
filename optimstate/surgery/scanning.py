"""Scan: every class or function that the pickles of a checkpoint name, without running any."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISLNK, S_ISREG

from optimstate.errors import CheckpointError
from optimstate.formats.dcp.folder import items_of
from optimstate.formats.pickles.globals import Verdict, classify
from optimstate.formats.unpickled import Unread, pickles_in
from optimstate.io.folders import kind_of, leftover_notes
from optimstate.io.location import Location, Place
from optimstate.io.places import located, open_source, prefetch
from optimstate.io.temporary import is_leftover
from optimstate.record import Record
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import plural, table

__all__ = ["Finding", "ScanReport", "scan"]

_TOGETHER = 64  # files of a store whose beginnings are fetched at the same time


class Finding(Record):
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


class ScanReport(VerbReport):
    """Everything named.

    Attributes:
        pickles: How many pickles were read.
        findings: In the order of the files.
        unreadable: What was not scanned, or not to its end, and why: to be treated as dangerous.
        notes: What is passed over, and why.
    """

    path: str
    pickles: int
    findings: tuple[Finding, ...]
    unreadable: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether everything was looked at, and all that is named only builds data."""
        return not self.unreadable and all(finding.verdict == "data" for finding in self.findings)

    VERB = "scan"

    def _lines(self) -> Iterator[str]:
        order = {"dangerous": 0, "unknown": 1, "data": 2}
        found = sorted(self.findings, key=lambda finding: order[finding.verdict])
        rows = [
            (f.verdict, f.name, str(f.times), f.file, f.record, str(f.offset)) for f in found if f.verdict != "data"
        ]
        if rows:
            yield table(("verdict", "name", "times", "file", "pickle", "at byte"), rows)
        for line in self.unreadable:
            yield f"  {line}"
        for note in self.notes:
            yield f"note: {note}"
        names = {verdict: len({f.name for f in found if f.verdict == verdict}) for verdict in order}
        counts = ", ".join(f"{count} {verdict}" for verdict, count in names.items())
        yield f"{self.path}: {plural(self.pickles, 'pickle')} scanned, nothing run; names: {counts}"


def scan(path: Place) -> ScanReport:
    """Name every global in the pickles of a file, or of all files of a folder.

    Every container that is known is looked into, one within another, whatever a file is called; what is not known, or
    could be read in two ways, is listed as not scanned.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        CheckpointError: It cannot be read.
    """
    path = located(path)
    pickles = 0
    findings: list[Finding] = []
    unreadable: list[str] = []
    data: dict[str, dict[str, list[tuple[int, int]]]] = {}
    with opening(path):
        for name, file, problem in _files(path):
            if problem:
                unreadable.append(f"{name}: not scanned: {problem}")
                continue
            try:
                source = open_source(file)
            except CheckpointError as error:
                unreadable.append(f"{name}: not scanned: {error.message}")
                continue
            items = _items_of(file.parent, data).get(file.name, ()) if file.suffix == ".distcp" else ()
            for found in pickles_in(source, suffix=file.suffix, items=items):
                if isinstance(found, Unread):
                    unreadable.append(f"{_within(name, found.record)}: not scanned: {found.reason}")
                    continue
                pickles += 1
                if problem := found.mentions.problem:
                    unreadable.append(f"{_within(name, found.record)}: not scanned: the pickle {problem}")
                for module, member, offset, times, called in found.mentions.found:
                    verdict = classify(module, member, called=called)
                    findings.append(Finding(name, found.record, offset, f"{module}.{member}", times, verdict))
    notes = leftover_notes(path) if path.is_dir() else []
    return ScanReport(str(path), pickles, tuple(findings), tuple(unreadable), tuple(notes))


def _items_of(
    folder: Location, known: dict[str, dict[str, list[tuple[int, int]]]]
) -> Mapping[str, Sequence[tuple[int, int]]]:
    """The places of the items in a distributed checkpoint's data files, read once for each folder if they can be."""
    if str(folder) not in known:
        known[str(folder)] = {}
        with suppress(CheckpointError):
            known[str(folder)] = items_of(folder)
    return known[str(folder)]


def _within(file: str, record: str) -> str:
    return f"{file}, {record}" if record else file


def _files(path: Location) -> Iterator[tuple[str, Location, str]]:
    """The name, the path and, for what cannot be scanned, the reason, of each file.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        CheckpointError: It cannot be looked at.
    """
    if kind_of(path) == "file":
        open_source(path)  # one file that cannot be opened is an error, not a finding
        yield path.name, path, ""
        return
    if not isinstance(path, Path):
        objects = sorted(found for found in path.rglob("*") if found.is_file())
        for start in range(0, len(objects), _TOGETHER):
            some = objects[start : start + _TOGETHER]
            with suppress(CheckpointError):  # reported of the file that cannot be read
                prefetch(some)
            for found in some:
                yield str(found.relative_to(path)), found, ""
        return
    failed: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=failed.append):
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        for name in sorted([*files, *(name for name in folders if Path(folder, name).is_symlink())]):
            if is_leftover(name):
                continue
            file = Path(folder, name)
            yield str(file.relative_to(path)), file, _unfit(file)
    for failure in failed:
        if Path(failure.filename) == path:
            raise CheckpointError(f"cannot be read: {failure.strerror}", path=path) from failure
        yield str(Path(failure.filename).relative_to(path)), path, f"cannot be listed: {failure.strerror}"


def _unfit(file: Path) -> str:
    """Why something in a folder cannot be scanned, or an empty text."""
    try:
        mode = file.stat().st_mode
        if S_ISREG(mode):
            return ""
        return "a link to a folder" if S_ISLNK(file.lstat().st_mode) else "not a regular file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
