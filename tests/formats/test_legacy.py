"""The containers from before zip, and plain pickles: what torch loads from them, without executing them."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.errors import CheckpointError, CorruptCheckpointError, RepresentationError, UnsupportedCheckpointError
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch import legacy, pickle_file
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName, Opaque, tensors, walk
from tests import corpus
from tests.formats.live import differs

LEGACY = [path for path in corpus.files_in("torch_legacy") if "hostile" not in str(path)]


def sample() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {
        "rows": base[1:3],
        "columns": base.t(),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "complex": torch.tensor([1 + 2j]),
        "nested": OrderedDict(lr=1e-3, betas=(0.9, 0.999), names=["a", None]),
    }


def legacy_file(tree: Any, path: Path) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("path", LEGACY, ids=lambda path: path.parent.name)
def test_a_stream_is_read_as_torch_reads_it(path: Path) -> None:
    document = open_checkpoint(path)
    assert document.format == "torch-legacy"
    live = torch.load(path, weights_only=False)
    if path.parent.name.startswith("wholeobject"):
        assert any(isinstance(node, Opaque) and node.type.qualname == "AdamW" for _, node in walk(document.tree))
        assert differs(document.tree["model"], live["model"]) is None
    else:
        assert differs(document.tree, live) is None


def test_views_share_their_storage(tmp_path: Path) -> None:
    live = sample()
    tree = open_checkpoint(legacy_file(live, tmp_path / "a.pt")).tree
    assert differs(tree, live) is None
    assert tree["rows"].storage is tree["columns"].storage
    assert tree["columns"].stride == (1, 6)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    live = sample()
    path = tmp_path / "a.pt"
    torch.save(live, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert differs(open_checkpoint(path).tree, live) is None


def test_a_pickle_longer_than_the_first_window(tmp_path: Path) -> None:
    live = {f"layer.{index}.weight": torch.full((3,), float(index)) for index in range(4000)}
    path = legacy_file(live, tmp_path / "a.pt")
    assert path.stat().st_size > 6 * legacy._FIRST_WINDOW
    assert differs(open_checkpoint(path).tree, live) is None


def test_it_is_written_as_a_zip_that_torch_loads(tmp_path: Path) -> None:
    live = sample()
    document = open_checkpoint(legacy_file(live, tmp_path / "a.pt"))
    notes = legacy.write(document.tree, tmp_path / "b.pt", like=document)
    assert notes == ["written as torch's zip container"]
    assert differs(document.tree, torch.load(tmp_path / "b.pt", weights_only=True)) is None


def test_every_truncation_is_a_named_error(tmp_path: Path) -> None:
    data = legacy_file(sample(), tmp_path / "a.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(32, len(data), 7):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            open_checkpoint(cut)


def test_a_storage_of_another_size_than_the_pickle_says(tmp_path: Path) -> None:
    path = legacy_file({"w": torch.zeros(5)}, tmp_path / "a.pt")
    data = path.read_bytes()
    path.write_bytes(data[: -20 - 8] + struct.pack("<q", 4) + data[-20:])
    with pytest.raises(CorruptCheckpointError, match=r"has 16 bytes, the pickle says 20"):
        open_checkpoint(path)


def test_big_endian_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    parts = [legacy._MAGIC, 1001, {"protocol_version": 1001, "little_endian": False, "type_sizes": {}}, {}, []]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(UnsupportedCheckpointError, match="big-endian"):
        open_checkpoint(path)


def test_a_hostile_stream_runs_nothing() -> None:
    case = corpus.case("optimstate/hostile_legacy")
    document = open_checkpoint(case.entry)
    assert ("posix", "system") in document.globals
    assert not Path(case.truth()["hostile"]["leaves"]).exists()


# --- tar ------------------------------------------------------------------------------------------------------------


def tar_checkpoint(path: Path) -> None:
    """What torch 0.1 wrote: numbered storages, a view of one, numbered tensors, a tree that refers to them."""
    storages = b"".join(
        [
            pickle.dumps(1, 2),
            pickle.dumps((11, "cpu", torch.FloatStorage), 2),
            struct.pack("<q", 6) + struct.pack("<6f", *range(6)),
            pickle.dumps([(12, 11, 2, 4)], 2),
        ]
    )

    def tensor(key: int, storage: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> bytes:
        n = len(shape)
        head = pickle.dumps((key, storage, torch.FloatTensor), 2) + struct.pack("<i4x", n)
        return head + struct.pack(f"<{n}q{n}qq", *shape, *stride, offset)

    members = {
        "storages": storages,
        "tensors": pickle.dumps(2, 2) + tensor(1, 11, (2, 3), (3, 1), 0) + tensor(2, 12, (3,), (1,), 1),
    }
    stream = io.BytesIO()
    numbered = {"whole": 1, "view": 2}

    class Placeholder:
        def __init__(self, key: int) -> None:
            self.key = key

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            return str(obj.key) if isinstance(obj, Placeholder) else None

    Pickler(stream, 2).dump({name: Placeholder(key) for name, key in numbered.items()} | {"epoch": 3})
    members["pickle"] = stream.getvalue()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # torch's reader, on Python 3.12 and 3.13
def test_a_tar_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    tar_checkpoint(path)
    document = open_checkpoint(path)
    assert document.format == "torch-legacy"
    live = torch.load(path, weights_only=False)
    assert live["view"].tolist() == [3.0, 4.0, 5.0]
    assert differs(document.tree, live) is None
    assert "weights_only=False" in document.notes[0]


def test_a_tar_whose_tensor_reaches_past_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "old.tar"
    tar_checkpoint(path)
    data = path.read_bytes()
    shape = struct.pack("<4q", 2, 3, 3, 1)
    assert data.count(shape) == 1
    path.write_bytes(data.replace(shape, struct.pack("<4q", 2, 9, 3, 1)))
    with pytest.raises(CorruptCheckpointError, match="reaches past its storage"):
        open_checkpoint(path)


# --- plain pickles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_state_dict(protocol: int, tmp_path: Path) -> None:
    live = sample()
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(live, protocol))
    document = open_checkpoint(path)
    assert document.format == "pickle"
    assert differs(document.tree, live) is None


def test_the_fixture_that_pickle_dump_wrote() -> None:
    path = corpus.case("torch/pickle_dump_statedict").entry
    file = next(path.glob("*.pkl")) if path.is_dir() else path
    with file.open("rb") as stream:
        live = pickle.load(stream)
    assert differs(open_checkpoint(file).tree, live) is None


def test_a_hostile_pickle_inside_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.system, (f"touch {tmp_path}/ran",)

    inner = io.BytesIO()
    torch.save(Hostile(), inner, _use_new_zipfile_serialization=False)

    class Outer:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"w": Outer()}, 4))
    with pytest.raises(UnsupportedCheckpointError, match="where a storage belongs"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_unknown_objects_are_records(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"path": Path("x"), "w": torch.ones(2)}, 4))
    tree = open_checkpoint(path).tree
    assert isinstance(tree["path"], Opaque)
    assert isinstance(tree["path"].type, GlobalName)
    assert [tensor.tobytes() for _, tensor in tensors(tree)] == [struct.pack("<2f", 1, 1)]


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="optimstate convert"):
        pickle_file.write({}, tmp_path / "a.pkl")


def test_elements_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path = legacy_file({"w": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    document = open_checkpoint(path)
    tensor = document.tree["w"]
    assert isinstance(tensor, LazyTensor)
    (piece,) = tensor.extents()
    assert piece.length == 4 << 20
    assert piece.offset + piece.length == path.stat().st_size
