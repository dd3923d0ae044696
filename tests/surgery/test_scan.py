"""`scan` names every global of every pickle with its place, agrees with the unpickler, and runs nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimstate.errors import CheckpointNotFoundError, OptimStateError
from optimstate.formats.pickles.mentions import mentions
from optimstate.formats.pickles.unpickle import load
from optimstate.surgery.inspection.inspecting import inspect
from optimstate.surgery.scanning import scan
from optimstate.tensors.lazy import Storage
from tests.corpus import Case, all_cases, case
from tests.hostile.attacks import EVIL, nested, prove, tarred, write, zipped
from tests.hostile.peers import JUDGES


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


def named(data: bytes) -> set[tuple[str, str]]:
    """What one pickle names."""
    found = mentions(lambda length: data[:length], len(data))
    assert found is not None
    assert found[0] == len(data)
    return {(mention.module, mention.name) for mention in found[1].found}


def test_names_taken_from_the_memo_are_found() -> None:
    data = pickle.dumps([Path, Path("x"), io.BytesIO], 4)
    assert named(data) == set(load(data)[1])


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


GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}


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
    assert {key for key in named(data) if "." not in key[1]} == {key for key in met if "." not in key[1]} - GETATTR


@pytest.mark.parametrize("name", ["hostile_zip", "hostile_legacy", "hostile_pickle"])
def test_hostile_fixtures(name: str) -> None:
    report = scan(case(f"optimstate/{name}").entry)
    assert any(finding.verdict == "dangerous" for finding in report.findings)


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    """The attack files, and whether loading each of them runs its payload."""
    folder = tmp_path_factory.mktemp("attacks")
    return folder, prove(folder, write(folder))


def test_no_attack_that_runs_comes_out_clean(attacks: tuple[Path, dict[str, bool]]) -> None:
    folder, ran = attacks
    assert sum(ran.values()) >= 30
    assert [name for name, does in ran.items() if does and scan(folder / name).clean] == []
    assert not (folder / "CANARY").exists()


def test_what_inspect_warns_of_is_never_clean(attacks: tuple[Path, dict[str, bool]]) -> None:
    folder, ran = attacks
    for name in ran:
        try:
            warned = bool(inspect(folder / name).dangerous)
        except OptimStateError:
            continue
        assert not (warned and scan(folder / name).clean), name


@pytest.mark.parametrize("wrap", [gzip.compress, bz2.compress, lzma.compress, zlib.compress, tarred, zipped, nested])
def test_attacks_are_found_inside_of_every_container(wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(wrap(wrap(EVIL)))
    assert any(finding.verdict == "dangerous" for finding in scan(tmp_path / "a").findings)


@pytest.mark.parametrize("found", all_cases(), ids=str)
def test_honest_checkpoints_are_clean(found: Case) -> None:
    report = scan(found.entry)
    names = sorted({finding.name for finding in report.findings if finding.verdict != "data"})
    assert report.clean != (found.is_hostile or bool(names)), report.unreadable


@pytest.mark.parametrize(
    "data",
    [b"", b"# A model\n", b'{"hidden": 8}\n', b"print(1)\n", b"global_step4", b"3\n", b"\x89PNG\r\n\x1a\n" + bytes(90)],
)
def test_what_cannot_be_unpickled_is_clean(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    assert scan(tmp_path / "file").clean


def test_bytes_of_no_known_kind_are_not_clean(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(255, 0, -1)))
    (line,) = scan(tmp_path / "noise").unreadable
    assert "not scanned" in line


def test_a_call_of_a_class_that_is_data_by_itself_only(tmp_path: Path) -> None:
    head = b"\x80\x02ctransformers.training_args\nTrainingArguments\n)"
    (tmp_path / "made.bin").write_bytes(head + b"\x81}b.")
    (tmp_path / "called.bin").write_bytes(head + b"R.")
    assert scan(tmp_path / "made.bin").clean
    assert not scan(tmp_path / "called.bin").clean


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(packer.compress(bytes(1 << 24)) for _ in range(20)) + packer.flush()
    (tmp_path / "bomb.gz").write_bytes(data)
    (line,) = scan(tmp_path / "bomb.gz").unreadable
    assert "the limit" in line


def test_peers_miss_more_and_flag_more(attacks: tuple[Path, dict[str, bool]]) -> None:
    pytest.importorskip("picklescan")
    pytest.importorskip("fickling")
    folder, ran = attacks
    harmless = [found.entry for found in torch_archives() if not found.is_hostile][:20]
    proven = [folder / name for name, does in ran.items() if does]
    missed = {who: sum(judge(path) == "clean" for path in proven) for who, judge in JUDGES.items()}
    flagged = {who: sum(judge(path) == "flagged" for path in harmless) for who, judge in JUDGES.items()}
    assert (missed.pop("optimstate scan"), flagged.pop("optimstate scan")) == (0, 0)
    assert all(missed[who] or flagged[who] for who in missed)


@given(st.binary(max_size=300))
def test_any_bytes_have_a_verdict(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for head in (b"", b"PK\x03\x04", b"\x80\x04", b"\x93NUMPY\x01\x00", b"\x1f\x8b"):
            (Path(folder) / "any").write_bytes(head + data)
            scan(Path(folder) / "any")
