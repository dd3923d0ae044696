"""Containers around torch's own: TorchScript, unpacked archives, arrays of NumPy, packed dtypes of safetensors."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import optimstate
from optimstate.errors import CheckpointError, RepresentationError, UnsupportedCheckpointError
from optimstate.formats.registry import open_checkpoint
from optimstate.state.sections import find_sections
from optimstate.tensors.lazy import LazyTensor
from tests.formats.live import differs

# --- TorchScript ------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        self.tied = self.layers[0].weight
        self.scales = (1.0, 2.0)
        self.limit = 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * self.scales[0] + torch.ones(4)


pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore:`torch.jit.*is deprecated:FutureWarning"
)


@pytest.fixture(params=["scripted", "traced"])
def script(request: Any, tmp_path: Path) -> Path:
    net = Net().eval()
    made = torch.jit.script(net) if request.param == "scripted" else torch.jit.trace(net, torch.ones(2, 3))
    path = tmp_path / "net.pt"
    torch.jit.save(made, str(path), _extra_files={"notes.txt": "hello"})
    return path


def test_the_tensors_of_a_script_are_those_of_its_state_dict(script: Path) -> None:
    live = torch.jit.load(str(script)).state_dict()
    document = open_checkpoint(script)
    assert document.format == "torchscript"
    model = document.tree["model"]
    for name, tensor in live.items():
        assert differs(model[name], tensor.requires_grad_(model[name].requires_grad)) is None
    assert [section.kind for section in find_sections(document.tree)][:1] == ["model"]
    assert "notes.txt" in str(document.tree["code"])


def test_a_script_is_converted_and_its_code_is_said_to_be_left_out(script: Path, tmp_path: Path) -> None:
    live = torch.jit.load(str(script)).state_dict()
    report = optimstate.convert(script, tmp_path / "net.safetensors", section="model")
    assert report.tensors >= len(live)
    found = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(found[name], live[name]) for name in set(live) & set(found))
    report = optimstate.convert(script, tmp_path / "whole.pt")
    assert "left out: code is not a checkpoint" in report.notes
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in live.items())


def test_a_script_is_not_written(script: Path, tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="TorchScript is read, but not written"):
        optimstate.convert(script, tmp_path / "b.pt", to="torchscript")


def test_a_checkpoint_with_compressed_records_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UnsupportedCheckpointError, match="is compressed"):
        open_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("model.json", "TorchScript archive of torch 1.0"),
        ("archive_format", "an exported program"),
        (".data/extern_modules", "a package"),
    ],
)
def test_other_archives_of_torch_are_named(record: str, words: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr(f"a/{record}", b"x")
        file.writestr("a/version", b"3\n")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "a.pt")


# --- unpacked ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    torch.save({"model": {"w": torch.ones(3), "v": torch.zeros(0)}, "epoch": 3}, tmp_path / "z.pt")
    with zipfile.ZipFile(tmp_path / "z.pt") as archive:
        archive.extractall(tmp_path / "around")
    return tmp_path / "around" / "z"


def test_an_unpacked_archive_is_read(unpacked: Path, tmp_path: Path) -> None:
    document = open_checkpoint(unpacked)
    assert document.format == "torch-unpacked"
    assert differs(document.tree, torch.load(tmp_path / "z.pt")) is None
    around = open_checkpoint(unpacked.parent)
    assert differs(around.tree["z"], torch.load(tmp_path / "z.pt")) is None
    optimstate.convert(unpacked, tmp_path / "again.pt")
    assert differs(document.tree, torch.load(tmp_path / "again.pt")) is None


def test_what_is_missing_in_an_unpacked_archive_is_named(unpacked: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the data\.pkl of an unpacked archive") as caught:
        open_checkpoint(unpacked / "data.pkl")
    assert "Give the folder" in caught.value.hint
    (unpacked / "data" / "0").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="declared with 12 bytes, its file has 5"):
        open_checkpoint(unpacked)
    (unpacked / "data" / "0").unlink()
    with pytest.raises(FileNotFoundError):
        open_checkpoint(unpacked)
    (unpacked / "byteorder").write_bytes(b"big")
    with pytest.raises(UnsupportedCheckpointError, match="big-endian"):
        open_checkpoint(unpacked)
    (unpacked / "constants.pkl").touch()
    with pytest.raises(UnsupportedCheckpointError, match="TorchScript"):
        open_checkpoint(unpacked)


# --- NumPy ------------------------------------------------------------------------------------------------------------

ARRAYS = [
    np.arange(6).astype(code).reshape(2, 3)
    for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16")
]


@pytest.mark.parametrize("array", [*ARRAYS, np.array(3.0), np.zeros((0, 4)), np.asfortranarray(ARRAYS[1])], ids=str)
def test_arrays_are_read_as_numpy_reads_them(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    tree = open_checkpoint(tmp_path / "a.npy").tree
    assert (tree.shape, tree.tobytes()) == (array.shape, np.ascontiguousarray(array).tobytes())
    assert np.dtype(array.dtype).itemsize == tree.itemsize


def test_an_archive_of_arrays_is_a_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"fc.weight": ARRAYS[1], "fc/bias": ARRAYS[1][0], "names": np.array(["a", "b"])})
    report = optimstate.convert(tmp_path / "a.npz", tmp_path / "b.safetensors")
    assert report.tensors == 2
    assert report.notes == ("left out: names is not a checkpoint",)
    assert load_file(tmp_path / "b.safetensors")["fc.weight"].tolist() == ARRAYS[1].tolist()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: np.savez(path, a=np.array([{}], dtype=object)), "array of objects, which is a pickle"),
        (lambda path: np.savez(path, a=ARRAYS[1].astype(">f4")), "dtype '>f4'"),
        (lambda path: np.savez(path, a=np.zeros(2, dtype=[("x", "f4")])), "dtype"),
    ],
)
def test_other_arrays_are_refused_by_name(make: Any, words: str, tmp_path: Path) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(UnsupportedCheckpointError, match=words):
        open_checkpoint(tmp_path / "a.npz")


@pytest.mark.parametrize("length", [0, 3, 7, 9, 40, 128, 140])
def test_an_array_cut_short_is_refused(length: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAYS[1])
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:length])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "a.npy")


# --- packed dtypes of safetensors -------------------------------------------------------------------------------------


def test_torchs_packed_floats_are_those_of_safetensors(tmp_path: Path) -> None:
    live = {"w": torch.arange(24, dtype=torch.uint8).view(2, 12).view(torch.float4_e2m1fn_x2), "b": torch.ones(3)}
    save_file(live, tmp_path / "theirs.safetensors")
    torch.save(live, tmp_path / "ours.pt")
    optimstate.convert(tmp_path / "ours.pt", tmp_path / "ours.safetensors")
    for name in ("theirs", "ours"):
        path = tmp_path / f"{name}.safetensors"
        found = open_checkpoint(path).tree
        assert differs({key: found[key] for key in live}, live) is None
        with safe_open(path, "pt") as file:
            assert (file.get_slice("w").get_dtype(), file.get_slice("w").get_shape()) == ("F4", [2, 24])
            assert torch.equal(file.get_tensor("w").view(torch.uint8), live["w"].view(torch.uint8))


def raw(path: Path, dtype: str, shape: list[int], nbytes: int) -> Path:
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(nbytes)))
    return path


@pytest.mark.parametrize(("dtype", "nbytes"), [("F6_E2M3", 24), ("F6_E3M2", 24), ("F8_E3M4", 32), ("F8_E8M0", 32)])
def test_dtypes_without_a_counterpart_are_moved_as_bytes(dtype: str, nbytes: int, tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", dtype, [4, 8], nbytes)
    optimstate.remap(path, tmp_path / "b.safetensors", optimstate.Plan.from_options(rename=["w=net.w"]))
    with (tmp_path / "b.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        assert (header["net.w"]["dtype"], header["net.w"]["shape"]) == (dtype, [4, 8])
        assert file.read() == bytes(range(nbytes))
    assert optimstate.inspect(path, statistics=True).tensors == 1
    assert len(optimstate.verify(path).blind) == (dtype != "F8_E8M0")
    other = raw(tmp_path / "other.safetensors", dtype, [4, 8], nbytes)
    other.write_bytes(other.read_bytes()[:-1] + b"\0")
    assert [change.kind for change in optimstate.diff(path, other).changes] == ["changed"]
    assert optimstate.diff(path, path).changes == ()
    if dtype != "F8_E8M0":
        with pytest.raises(RepresentationError, match=f"{dtype}.*which torch does not have"):
            optimstate.convert(path, tmp_path / "c.pt")


@pytest.mark.parametrize(("dtype", "shape"), [("X9", [4]), ("F4", [4, 1]), ("F6_E2M3", [4, 6]), ("F4", [])])
def test_what_cannot_be_moved_in_whole_bytes_is_refused_by_name(dtype: str, shape: list[int], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=f"'w'.*{dtype}"):
        open_checkpoint(raw(tmp_path / "a.safetensors", dtype, shape, 4))


def test_an_unpacked_folder_is_copied_in_a_folder(unpacked: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "z.pt", unpacked.parent / "model.pt")
    optimstate.convert(unpacked.parent, tmp_path / "copy", to="folder")
    assert isinstance(open_checkpoint(tmp_path / "copy").tree["z"]["model"]["w"], LazyTensor)


def test_compressed_arrays_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(7)}
    np.savez_compressed(tmp_path / "a.npz", **live)
    tree = open_checkpoint(tmp_path / "a.npz").tree
    for name, array in live.items():
        assert tree[name].tobytes() == array.tobytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        first = archive.infolist()[0]
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[first.header_offset + 30 + len(first.filename) + 20 + 8] ^= 0xFF
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "b.npz")
    monkeypatch.setattr("optimstate.formats.numpy_files.MAX_INFLATED", 200)
    with pytest.raises(CheckpointError, match="the limit"):
        open_checkpoint(tmp_path / "a.npz")


def test_numbers_and_arrays_of_numpy_are_shown_as_what_they_are(tmp_path: Path) -> None:
    live = {
        "epoch": np.int64(3),
        "best": np.float32(0.5),
        "done": np.bool_(True),
        "mean": np.ones(3),
        "w": torch.ones(2),
    }
    torch.save(live, tmp_path / "a.pt")
    report = optimstate.inspect(tmp_path / "a.pt")
    assert report.tensors == 1
    shown = {entry.path: entry.value for entry in report.entries}
    assert (shown["epoch"], shown["best"], shown["done"], shown["mean"]) == (3, 0.5, True, "numpy float64[3]")
