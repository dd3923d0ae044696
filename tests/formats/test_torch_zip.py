"""The archives of torch.save: the same bytes as torch's, read by torch in every way it can read."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from optimstate.errors import CheckpointError, CorruptCheckpointError, DestinationError, UnrecognizedFormatError
from optimstate.errors import UnsupportedCheckpointError as Unsupported
from optimstate.formats.pickles.pickle import dump
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch import zip as torch_zip
from optimstate.formats.torch import zip_writer
from optimstate.io.copying import FileCopier
from optimstate.io.extents import FileSource
from optimstate.tree import difference
from tests import corpus
from tests.support import digest, load_torch, unlike

HAS_CONFIG = find_spec("torch.utils.serialization") is not None
of_2_7 = pytest.mark.skipif(not HAS_CONFIG, reason="archives of this torch are laid out otherwise")

ZIPS = [path for path in corpus.files_in("torch_zip") if path.suffix != ".zip"]  # those are archives of several files
QUICK = WriteOptions(sync=False)


def identify(path: Path) -> str:
    return str(path.relative_to(corpus.FILES))


def record(path: Path, name: str) -> bytes:
    archive = torch_zip.Archive(FileSource(path))
    return archive.extent(archive.records[name]).read()


def without_identity(path: Path) -> bytes:
    """The file's bytes with zeros for its serialization id, and for the checksum of that."""
    identity = record(path, ".data/serialization_id")
    data = path.read_bytes().replace(identity, bytes(40))
    return data.replace(zlib.crc32(identity).to_bytes(4, "little"), bytes(4))


# --- bytes ----------------------------------------------------------------------------------------------------------

# Pickled with protocol 4: written back with protocol 2, which every torch reads.
OTHER_PROTOCOL = {"optimstate/protocol_4/checkpoint.pt"}
# Hold bound methods, which a pickle spells as nested classes are, or nested classes: some are memoized, some are not.
OTHER_MEMO = {
    "mmengine/sgd_paramwise/epoch_2.pth",
    "bitsandbytes/linear4bit_module/checkpoint.pt",
    *(f"optimstate/ranks_fsdp1/{kind}_rank{rank}.pt" for kind in ("model", "optim") for rank in (0, 1)),
}


@pytest.mark.parametrize("path", ZIPS, ids=identify)
def test_reading_and_writing_gives_the_same_pickle(path: Path, tmp_path: Path) -> None:
    tree = open_checkpoint(path).tree
    again = dump(tree)
    if identify(path) in OTHER_PROTOCOL:
        assert again[:2] == b"\x80\x02"
        return
    if identify(path) in OTHER_MEMO:
        copy = tmp_path / "copy.pt"
        torch_zip.write(tree, copy, options=QUICK)
        assert difference(tree, open_checkpoint(copy).tree) is None
        return
    assert again == record(path, "data.pkl")


def live_objects() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    optimizer = torch.optim.AdamW(model.named_parameters(), amsgrad=True)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(12.0)
    shared = [1, "x"]
    return {
        "checkpoint": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": None},
        "empty": {},
        "tensor": torch.ones(2),
        "views": [base, base[2:8].view(2, 3), base.view(3, 4).t(), torch.empty(0), torch.tensor(1.5)],
        "dtypes": [torch.zeros(3).to(t) for t in (torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool)],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "containers": {(1, 2): {3}, "t": (), "n": ((1,), (1, 2, 3, 4)), "twice": [shared, shared], "c": Counter("ab")},
        "numbers": [0, 255, 256, 65536, -1, 2**31, 2**63, -(2**63), 2**2050, 1.5, float("inf"), 1j, True],
        "text": {"ä": "\u2603", "": b"\0\xff", "b": bytearray(b"x"), "long": "x" * 70_000},
        "many": OrderedDict((str(i), i) for i in range(2001)),
        "long list": list(range(1001)),
        "size": torch.Size([2, 3]),
        "dtype": [torch.float32, torch.device("cpu"), torch.strided],
    }


@of_2_7
@pytest.mark.parametrize("name", live_objects())
def test_a_fresh_write_is_what_torch_writes(name: str, tmp_path: Path) -> None:
    live = live_objects()[name]
    theirs, ours = tmp_path / "theirs" / "a.b.pt", tmp_path / "ours" / "a.b.pt"
    theirs.parent.mkdir()
    ours.parent.mkdir()
    torch.save(live, theirs)
    torch_zip.write(open_checkpoint(theirs).tree, ours, options=QUICK)
    assert without_identity(ours) == without_identity(theirs)
    assert record(ours, ".data/serialization_id") != bytes(40)
    assert unlike(load_torch(ours), load_torch(theirs)) is None


def test_a_write_without_checksums_leaves_them_out_where_none_are_known(tmp_path: Path) -> None:
    source = corpus.case("optimstate/tensors_without_checksums").entry
    for checksums in (True, False):
        target = tmp_path / f"{checksums}.pt"
        torch_zip.write(open_checkpoint(source).tree, target, options=WriteOptions(checksums=checksums, sync=False))
        with zipfile.ZipFile(target) as archive:
            storages = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
        assert all(bool(info.CRC) is checksums for info in storages)
        if checksums:
            with zipfile.ZipFile(target) as archive:
                assert archive.testzip() is None


# --- every way torch loads ------------------------------------------------------------------------------------------


def rewritten(source: Path, folder: Path) -> dict[str, Path]:
    """The file as we write it: described anew behind its data, written from scratch, and changed in place."""
    document = open_checkpoint(source)
    tail, fresh, inside = folder / "tail.pt", folder / "fresh.pt", folder / "inside.pt"
    torch_zip.write(document.tree, tail, like=document, options=QUICK)
    torch_zip.write(document.tree, fresh, options=QUICK)
    shutil.copy(source, inside)
    copied = open_checkpoint(inside)
    zip_writer.rewrite_in_place(copied, copied.tree)
    return {"tail": tail, "fresh": fresh, "in place": inside}


LOADABLE = [
    corpus.case(name).entry
    for name in (
        "torch/adamw_named_layerwise_sequentiallr",
        "torch/tied_adam_named",
        "lightning/adamw_onecycle",
        "optimstate/tensors_aliases",
        "optimstate/tensors_dtypes",
        "optimstate/tensors_strides",
        "optimstate/tensors_extremes",
        "optimstate/lbfgs_named",
    )
]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("source", LOADABLE, ids=identify)
def test_torch_loads_what_we_write_mapped_unmapped_and_without_data(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch then compares each storage's place with its prediction, wherever it predicts.
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    expected = torch.load(source)
    meta = torch.load(source, map_location="meta")
    for layout, path in rewritten(source, tmp_path).items():
        for mapped in (False, True):
            assert unlike(torch.load(path, mmap=mapped), expected) is None, layout
        assert unlike(torch.load(path, map_location="meta"), meta) is None, layout
        with predicting():
            assert unlike(torch.load(path, mmap=True), expected) is None, layout
        check_predictions(path)


def predicting() -> AbstractContextManager[None]:
    """torch predicts where storages lie, where it can (from 2.7 on)."""
    if not HAS_CONFIG:
        return nullcontext()
    config = import_module("torch.utils.serialization.config")
    return cast("AbstractContextManager[None]", config.patch("load.calculate_storage_offsets", True))


def check_predictions(path: Path) -> None:
    """Where torch believes a storage to be, loading to the meta device, are its bytes."""
    loaded = torch.load(path)
    meta = torch.load(path, map_location="meta")
    data = path.read_bytes()
    for real, ghost in zip(tensors_of(loaded), tensors_of(meta), strict=True):
        storage = real.untyped_storage()
        at = getattr(ghost.untyped_storage(), "_checkpoint_offset", None)
        if at is None:  # torch before 2.12 does not say
            continue
        assert data[at : at + storage.nbytes()] == bytes(storage.tolist())


def tensors_of(node: Any) -> list[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return [node]
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def test_another_order_of_the_same_storages_is_no_reason_to_mispredict_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save({"a": torch.ones(3), "b": torch.zeros(5), "c": torch.full((7,), 2.0)}, source)
    document = open_checkpoint(source)
    torch_zip.write(dict(reversed(document.tree.items())), target, like=document, options=QUICK)
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with predicting():
        loaded = torch.load(target, mmap=True)
    assert unlike(loaded, dict(reversed(torch.load(source).items()))) is None
    check_predictions(target)


def test_old_names_do_not_stay_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save({"very_secret_name": torch.ones(3)}, source)
    document = open_checkpoint(source)
    torch_zip.write({"x": document.tree["very_secret_name"]}, target, like=document, options=QUICK)
    assert b"very_secret_name" in source.read_bytes()
    assert b"very_secret_name" not in target.read_bytes()


# --- beyond 4 GiB ---------------------------------------------------------------------------------------------------


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A file of torch whose storages stand before, across and behind 4 GiB; almost all of it is a hole."""
    sizes = [5, 2**32 - 3000, 1000, 7, 0, 900, 2**32 + 1, 64, 2**32 - 1, 3]
    path, hole = tmp_path / "huge.pt", tmp_path / "hole"
    hole.touch()
    os.truncate(hole, max(sizes))
    live = [torch.from_file(str(hole), size=n, dtype=torch.uint8) if n else torch.empty(0) for n in sizes]
    with torch.serialization.skip_data():
        torch.save({f"t{i}": tensor for i, tensor in enumerate(live)}, path)
    assert path.stat().st_blocks * 512 < 1 << 20, "this file system has no sparse files"
    with path.open("r+b") as file:  # something to recognise each storage by
        for storage in (tensor.storage for tensor in open_checkpoint(path).tree.values() if tensor.nbytes):
            file.seek(storage.pieces[0].offset)
            file.write(bytes([len(storage.key) * 16 + int(storage.key) + 1]))
    return path


def sparse_put(copier: FileCopier, extents: Any, position: int) -> int:
    """`FileCopier.put` that leaves holes as holes."""
    start = position
    for extent in extents:
        at, stop = extent.offset, extent.offset + extent.length
        while isinstance(extent.source, FileSource) and at < stop:
            try:
                at = os.lseek(extent.source.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = min(os.lseek(extent.source.fileno(), at, os.SEEK_HOLE), stop)
            if at < stop:
                os.pwrite(copier.fd, extent.source.read(at, end - at), position + at - extent.offset)
            at = end
        position += extent.length
    return position - start


def data_segments(path: Path) -> list[tuple[int, bytes]]:
    found = []
    with path.open("rb") as file:
        at, size = 0, path.stat().st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            found.append((at, os.pread(file.fileno(), end - at, at)))
            at = end
    return found


def first_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The first byte of each tensor as torch finds it, with every prediction compared."""
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with predicting():
        loaded = torch.load(path, mmap=True)
    ghosts = torch.load(path, map_location="meta")
    with path.open("rb") as file:
        for name, tensor in loaded.items():
            at = getattr(ghosts[name].untyped_storage(), "_checkpoint_offset", None)
            if tensor.numel() and at is not None:  # torch before 2.12 does not say
                file.seek(at)
                assert file.read(1)[0] == tensor[0].item()
    return {name: int(tensor[0]) for name, tensor in loaded.items() if tensor.numel()}


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="this system cannot tell holes")
def test_files_across_4_gib_are_what_torch_writes_and_reads(
    huge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileCopier, "put", sparse_put)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    expected = first_bytes(huge, monkeypatch)
    assert len(set(expected.values())) == len(expected) == 9
    document = open_checkpoint(huge)

    fresh = tmp_path / "fresh" / "huge.pt"
    fresh.parent.mkdir()
    torch_zip.write(document.tree, fresh, options=WriteOptions(checksums=False, sync=False))
    assert fresh.stat().st_size == huge.stat().st_size
    assert first_bytes(fresh, monkeypatch) == expected
    ours, theirs = data_segments(fresh), data_segments(huge)
    assert [at for at, _ in ours] == [at for at, _ in theirs]
    for (at, one), (_, other) in zip(ours[:-1], theirs[:-1], strict=True):
        assert one == other, f"headers near {at} differ"

    renamed = {f"renamed.{name}": tensor for name, tensor in document.tree.items()}
    tail = tmp_path / "tail.pt"
    torch_zip.write(renamed, tail, like=document, options=QUICK)
    again = {f"renamed.{name}": value for name, value in expected.items()}
    assert first_bytes(tail, monkeypatch) == again

    zip_writer.rewrite_in_place(document, renamed)
    assert first_bytes(huge, monkeypatch) == again
    inside = open_checkpoint(huge)
    zip_writer.rewrite_in_place(inside, {name.removeprefix("renamed."): t for name, t in inside.tree.items()})
    assert first_bytes(huge, monkeypatch) == expected


# --- in place, interrupted ------------------------------------------------------------------------------------------


def test_an_interrupted_edit_in_place_reads_as_before(tmp_path: Path) -> None:
    source = corpus.case("torch/adam_named_wd").entry
    old, new = interrupted(source, tmp_path)
    cut = tmp_path / "cut.pt"
    before = open_checkpoint(source).tree
    points = {*range(len(old), len(old) + 40), *range(len(old), len(new), 97), *range(len(new) - 60, len(new))}
    for length in sorted(points):
        cut.write_bytes(new[:length])
        assert difference(open_checkpoint(cut).tree, before) is None, length
        if length % 7 == 0:
            assert unlike(torch.load(cut), torch.load(source)) is None
    assert difference(open_checkpoint(tmp_path / "inside.pt").tree, before) is not None


@of_2_7
def test_a_long_interrupted_edit_says_how_to_return(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    torch.save({f"tensor.{i}": torch.tensor(i) for i in range(1500)}, source)
    old, new = interrupted(source, tmp_path)
    assert len(new) - len(old) > 1 << 17
    cut = tmp_path / "cut.pt"
    before = open_checkpoint(source).tree
    outcomes = Counter[str]()
    for length in (*range(len(old), len(new), 5003), len(new) - 1, len(new) - 22, len(new) - 23):
        cut.write_bytes(new[:length])
        try:
            tree, hint = open_checkpoint(cut).tree, ""
        except CheckpointError as error:
            tree, hint = None, error.hint
        outcomes["refused" if hint else "old"] += 1
        assert f"truncate -s {len(old)} {cut}" in hint if hint else difference(tree, before) is None, length
    assert min(outcomes["old"], outcomes["refused"]) > 10
    os.truncate(cut, len(old))
    assert cut.read_bytes() == old


def interrupted(source: Path, folder: Path) -> tuple[bytes, bytes]:
    """The bytes before and after every name was changed in place."""
    inside = folder / "inside.pt"
    shutil.copy(source, inside)
    document = open_checkpoint(inside)
    zip_writer.rewrite_in_place(document, {"wrapped": document.tree})
    old, new = source.read_bytes(), inside.read_bytes()
    assert new.startswith(old)
    return old, new


def test_a_file_that_grew_since_it_was_read_is_not_edited_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"w": torch.ones(3)}, path)
    document = open_checkpoint(path)
    with path.open("ab") as file:
        file.write(b"more")
    before = path.read_bytes()
    with pytest.raises(DestinationError, match="changed while it was read"):
        zip_writer.rewrite_in_place(document, {"wrapped": document.tree})
    assert path.read_bytes() == before


# Of one tensor and of many: the directory of the second is longer than what readers look through for an end.
EDITED = {"short": 3, "long": 1200}


@of_2_7
@pytest.mark.parametrize("length", EDITED)
@pytest.mark.parametrize("how", ["before", "torn", "after", "error"])
def test_an_edit_in_place_loads_at_every_point(
    length: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch finds the old checkpoint or the new one, whichever call is the last and however much of it is done."""
    source, path = tmp_path / "source.pt", tmp_path / "inside.pt"
    torch.save({f"tensor.{i}": torch.tensor(i) for i in range(EDITED[length])}, source)
    old, first = open_checkpoint(source).tree, {"tensor.0"}
    seen = set[str]()
    for last in count():
        shutil.copy(source, path)
        document = open_checkpoint(path)
        with monkeypatch.context() as patched:
            calls = stopped_at(patched, last + 1, how)
            with suppress(Stopped, DestinationError):
                zip_writer.rewrite_in_place(document, {"wrapped": document.tree})
        loaded = torch.load(path, weights_only=True)
        assert loaded.keys() >= first or loaded.keys() == {"wrapped"}, last
        seen.add("old" if loaded.keys() >= first else "new")
        ours = open_checkpoint(path).tree
        assert difference(ours, old if "wrapped" not in loaded else {"wrapped": old}) is None
        if how == "error" and "wrapped" not in loaded:
            assert digest(path) == digest(source)
        if calls["made"] <= last:
            break
    assert seen == {"old", "new"}
    assert calls["made"] >= (8 if length == "long" else 6)


class Stopped(BaseException):
    """The process is gone."""


def stopped_at(patched: pytest.MonkeyPatch, last: int, how: str) -> Counter[str]:
    """Let the call of this number that changes a file be the last one; how much of it is done is `how`."""
    calls = Counter[str]()

    def watched(real: Any) -> Any:
        def call(fd: int, *arguments: Any) -> Any:
            calls["made"] += 1
            if calls["made"] > last and how != "error":
                raise Stopped  # nothing is done any more, not even what would clean up
            if calls["made"] == last:
                if how == "error":
                    raise OSError(28, "No space left on device")
                if how == "torn" and real is os_pwrite:
                    real(fd, bytes(arguments[0])[: len(arguments[0]) // 2], *arguments[1:])
                elif how == "after":
                    real(fd, *arguments)
                raise Stopped
            return real(fd, *arguments)

        return call

    os_pwrite = os.pwrite
    for name in ("pwrite", "ftruncate", "fsync", "write"):
        patched.setattr(os, name, watched(getattr(os, name)))
    return calls


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_wrong_pickle_checksum_is_noticed(tmp_path: Path) -> None:
    source = corpus.case("torch/adam_named_wd").entry
    data = bytearray(source.read_bytes())
    at = data.index(b"param_groups")
    data[at] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        open_checkpoint(path)


def zip_of(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


PLAIN = {"a/data.pkl": dump({"x": 1}), "a/version": b"3\n"}


def test_zips_that_are_no_checkpoints_are_told_apart(tmp_path: Path) -> None:
    cases = {
        "no data.pkl": ({"a/other": b"x"}, UnrecognizedFormatError, "data.pkl"),
        "no folder": ({"a/data.pkl": PLAIN["a/data.pkl"], "b.txt": b"x"}, CorruptCheckpointError, "common folder"),
        "script": ({**PLAIN, "a/constants.pkl": b"x"}, CorruptCheckpointError, r"constants\.pkl"),
        "big endian": ({**PLAIN, "a/byteorder": b"big"}, Unsupported, "big-endian"),
        "cut": ({**PLAIN, "a/data.pkl": PLAIN["a/data.pkl"][:-1]}, CorruptCheckpointError, "STOP"),
    }
    for name, (records, kind, message) in cases.items():
        path = zip_of(tmp_path / f"{name}.pt", records)
        with pytest.raises(kind, match=message) as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value)
    with pytest.raises(Unsupported, match="compressed"):
        open_checkpoint(zip_of(tmp_path / "deflated.pt", PLAIN, zipfile.ZIP_DEFLATED))
    with pytest.raises(UnrecognizedFormatError):
        open_checkpoint(zip_of(tmp_path / "empty.zip", {}))
    assert open_checkpoint(zip_of(tmp_path / "good.pt", PLAIN)).tree == {"x": 1}


def test_a_missing_version_is_read_and_noted(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "old.pt", {"a/data.pkl": PLAIN["a/data.pkl"]})
    document = open_checkpoint(path)
    assert document.tree == {"x": 1}
    assert "version" in document.notes[0]


def edited_directory(path: Path, name: str, **fields: int) -> None:
    """Change fields of one entry of the zip directory."""
    data = bytearray(path.read_bytes())
    at = data.rfind(name.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    places = {"method": (10, "<H"), "packed": (20, "<L"), "unpacked": (24, "<L"), "offset": (42, "<L")}
    for field, value in fields.items():
        place, code = places[field]
        struct.pack_into(code, data, at + place, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packed": 3, "unpacked": 3}, "declared with|data.pkl"),
        ({"packed": 3}, "reaches past|bytes"),
        ({"packed": 1 << 30, "unpacked": 1 << 30}, "reaches past"),
        ({"offset": 1 << 30}, "reaches past"),
        ({"offset": 0}, "overlaps|header"),
        ({"packed": 0xFFFFFFFF, "unpacked": 0xFFFFFFFF}, "reaches past"),
    ],
)
def test_a_directory_that_lies_is_refused(fields: dict[str, int], message: str, tmp_path: Path) -> None:
    path = tmp_path / "lying.pt"
    torch.save({"a": torch.ones(100), "b": torch.zeros(100)}, path)
    edited_directory(path, "lying/data/1", **fields)
    with pytest.raises(CorruptCheckpointError, match=message):
        open_checkpoint(path)


def test_a_field_may_look_like_the_signature_of_an_entry(tmp_path: Path) -> None:
    source, path = corpus.case("torch/adam_named_wd").entry, tmp_path / "a.pt"
    with zipfile.ZipFile(source) as archive:
        (entry,) = (found for found in archive.infolist() if found.filename.endswith("/data/0"))
    field = entry.CRC.to_bytes(4, "little")
    data = source.read_bytes()
    assert data.count(field) == 2  # behind the record, and in the directory
    path.write_bytes(data.replace(field, b"PK\x01\x02"))
    assert difference(open_checkpoint(source).tree, open_checkpoint(path).tree) is None
    document = open_checkpoint(path)
    torch_zip.write(document.tree, tmp_path / "b.pt", like=document, options=QUICK)
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        (again,) = (found for found in archive.infolist() if found.filename.endswith("/data/0"))
    assert again.CRC.to_bytes(4, "little") == b"PK\x01\x02"


def test_a_record_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", PLAIN["a/data.pkl"])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", PLAIN["a/data.pkl"])
    with pytest.raises(CorruptCheckpointError, match="twice"):
        open_checkpoint(path)


def test_storages_that_do_not_fit_their_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "storage.pt"
    torch.save({"a": torch.ones(4)}, path)
    pickled = record(path, "data.pkl")
    contents = record(path, "data/0")
    good = {"a/data.pkl": pickled, "a/data/0": contents, "a/version": b"3\n"}
    assert open_checkpoint(zip_of(tmp_path / "good.pt", good)).tree["a"].tobytes() == contents
    for name, records in {
        "missing": {"a/data.pkl": pickled},
        "short": {**good, "a/data/0": contents[:-1]},
        "kind": {**good, "a/data.pkl": pickled.replace(b"FloatStorage", b"BluntStorage")},
        "view": {**good, "a/data.pkl": pickled.replace(b"K\x04\x85", b"K\x05\x85")},
        "stride": {**good, "a/data.pkl": pickled.replace(b"K\x01\x85", b"K\x09\x85")},
    }.items():
        with pytest.raises(CheckpointError):
            open_checkpoint(zip_of(tmp_path / f"{name}.pt", records)).tree["a"].tobytes()


def test_a_hostile_archive_runs_nothing_and_is_written_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = corpus.case("optimstate/hostile_zip").entry
    document = open_checkpoint(source)
    target = tmp_path / "again.pt"
    torch_zip.write(document.tree, target, like=document, options=QUICK)
    assert record(target, "data.pkl") == record(source, "data.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["again.pt"]
