"""`scan` names every global of every pickle with its place, agrees with the unpickler, and runs nothing."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from optimstate.errors import CheckpointNotFoundError
from optimstate.formats.pickles.mentions import mentions
from optimstate.formats.pickles.unpickle import load
from optimstate.surgery.scanning import scan
from optimstate.tensors.lazy import Storage
from tests.corpus import Case, all_cases, case


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self.marker}",)


def test_an_attack_is_reported_with_its_place_and_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "checkpoint.pt"
    torch.save({"model": {"w": torch.ones(2)}, "callback": Attack(marker)}, path)
    report = scan(path)
    (found,) = [finding for finding in report.findings if finding.verdict == "dangerous"]
    assert found.name in ("posix.system", "nt.system")
    pickled = zipfile.ZipFile(path).read(found.record)
    assert pickled[found.offset :].startswith(b"c" + found.name.replace(".", "\n").encode())
    assert not report.clean
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"a": Attack(tmp_path / "ran"), "b": Attack(tmp_path / "ran")}, protocol))
    assert {f.name for f in scan(path).findings if f.verdict == "dangerous"} == {"posix.system"}


def test_names_taken_from_the_memo_are_found() -> None:
    data = pickle.dumps([Path, Path("x"), io.BytesIO], 4)
    assert {(m.module, m.name) for m in mentions(data)} == set(load(data)[1])


def test_an_archive_inside_an_archive_is_looked_into(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save({"callback": Attack(tmp_path / "ran")}, inner)
    path = tmp_path / "agent.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", "{}")
        archive.writestr("policy.pth", inner.getvalue())
    (found,) = [finding for finding in scan(path).findings if finding.verdict == "dangerous"]
    assert found.record.startswith("policy.pth/")


def test_what_cannot_be_read_is_never_called_clean(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    report = scan(path)
    assert report.unreadable
    assert not report.clean


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        scan(tmp_path / "missing.pt")


def torch_archives() -> list[Case]:
    return [found for found in all_cases() if found.entry.suffix == ".pt" and found.entry.read_bytes()[:2] == b"PK"]


@pytest.mark.parametrize("found", torch_archives(), ids=str)
def test_the_opcodes_name_what_the_unpickler_meets(found: Case) -> None:
    with zipfile.ZipFile(found.entry) as archive:
        (record,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    with found.entry.open("rb") as file:  # not through zipfile, which refuses records without a checksum
        file.seek(record.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        data = file.read(record.file_size)
    met = load(data, lambda kind, key, place, nbytes: Storage((), nbytes, kind, place, key))[1]
    # The unpickler also lists the longer names of nested classes, which older protocols spell as a call of getattr.
    named = {(m.module, m.name) for m in mentions(data)}
    assert {key for key in named if "." not in key[1]} == {key for key in met if "." not in key[1]}


@pytest.mark.parametrize("name", ["hostile_zip", "hostile_legacy", "hostile_pickle"])
def test_hostile_fixtures(name: str) -> None:
    report = scan(case(f"optimstate/{name}").entry)
    assert any(finding.verdict == "dangerous" for finding in report.findings)
