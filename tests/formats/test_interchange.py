"""From any container to safetensors and back, to a distributed checkpoint and back; what is lost is said."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optimstate.errors import RepresentationError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.state.sections import find_sections
from optimstate.surgery.writing.converting import convert
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import OpaqueFile, bare_value, difference, rebuilt_mapping, tensors
from tests import corpus
from tests.formats.live import raw
from tests.formats.truths import judge

CASES = [case for case in corpus.all_cases() if not case.is_hostile]
PLAIN_DICTS = "an OrderedDict becomes a dict"


def without_files(node: Any) -> Any:
    """A tree of a folder without the files that are no checkpoints: no single file can hold them."""
    if isinstance(node, dict) and any(isinstance(value, OpaqueFile) for value in node.values()):
        return {key: without_files(value) for key, value in node.items() if not isinstance(value, OpaqueFile)}
    if type(node) is dict and all(isinstance(value, dict) for value in node.values()):
        return {key: without_files(value) for key, value in node.items()}
    return node


def with_plain_text(node: Any) -> Any:
    """Objects that are nothing but a text or a number are kept as that."""
    if isinstance(node, dict):
        return rebuilt_mapping(node, {key: with_plain_text(value) for key, value in node.items()})
    if type(node) in (list, tuple):
        return type(node)(with_plain_text(item) for item in node)
    value = bare_value(node)
    return node if value is None else value


def converted(source: Path, destination: Path, to: str, drop_opaque: bool = False, **options: Any) -> Any:
    options_of_writer = WriteOptions(sync=False, **options)
    return convert(source, destination, to=to, drop_opaque=drop_opaque, options=options_of_writer)


# Sections that are objects of the frameworks, and are left out whole when such objects are dropped.
OBJECTS = {
    "torch/wholeobject": "is an object of torch.optim.adamw.AdamW",
    "torch/wholeobject_legacy": "is an object of torch.optim.adamw.AdamW",
}


def refusal(source: Path, destination: Path, **options: Any) -> str:
    """Why a checkpoint is not written as safetensors; empty when it was."""
    try:
        converted(source, destination, "safetensors", **options)
    except RepresentationError as error:
        return error.message
    return ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_through_safetensors_and_back(case: corpus.Case, tmp_path: Path) -> None:
    """The tree that comes back is the tree that went in, or the conversion is refused and names the object."""
    original = open_checkpoint(case.entry)
    file = tmp_path / "a.safetensors"
    reason = refusal(case.entry, file)
    if reason:
        assert (
            "which this container cannot hold" in reason
            or "strided view of memory it shares" in reason
            or "contains itself" in reason
        )
        return
    back = open_checkpoint(file)
    assert difference(with_plain_text(without_files(original.tree)), back.tree, aliases=False) is None
    named = load_file(file)
    assert len(named) <= sum(1 for _ in tensors(back.tree))
    if original.format != "safetensors":
        converted(file, tmp_path / "b.pt", "torch")
        assert difference(back.tree, open_checkpoint(tmp_path / "b.pt").tree) is None


REFUSED = [case for case in CASES if case.truth_path and {"state", "model", "optimizers"} & set(case.truth())]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_safetensors_refuses_it_takes_without_the_objects(case: corpus.Case, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    if not refusal(case.entry, file):
        return
    report = converted(case.entry, file, "safetensors", drop_opaque=True, clone_views=True)
    wrong = judge(open_checkpoint(case.entry).tree, case.truth()).wrong
    if case.name in OBJECTS:
        assert any("left out: " in note and OBJECTS[case.name] in note for note in report.notes)
    elif "Opaque" not in str(wrong):
        assert judge(open_checkpoint(file).tree, case.truth()).wrong == wrong


NOT_AS_NAMES = {
    "optimstate/objects_containers": "contains itself",
    "optimstate/objects_keys": "would both be named '0'",  # the keys 0 and '0' of one dict
}


def as_dcp_holds_it(node: Any, path: tuple[Any, ...] = ()) -> Any:
    """What the names of a distributed checkpoint can say of a tree."""
    if isinstance(node, dict):
        positions = path[-1:] == ("state",)
        made = {key if positions else str(key): as_dcp_holds_it(value, (*path, key)) for key, value in node.items()}
        return made or node
    if isinstance(node, list) and any(isinstance(item, LazyTensor | dict | list) for item in node):
        return [as_dcp_holds_it(item, (*path, index)) for index, item in enumerate(node)]
    if isinstance(node, LazyTensor):
        return LazyTensor(node.clone().storage, node.dtype, node.shape, node.stride, 0, node.requires_grad)
    return node


@pytest.mark.parametrize("case", CASES, ids=str)
def test_through_a_distributed_checkpoint_and_back(case: corpus.Case, tmp_path: Path) -> None:
    """Values, names and positions come back; the notes name every kind of thing that does not."""
    original = open_checkpoint(case.entry)
    source = without_files(original.tree)
    if not isinstance(source, dict) or case.name in NOT_AS_NAMES:
        with pytest.raises(RepresentationError, match=NOT_AS_NAMES.get(case.name, "root")):
            converted(case.entry, tmp_path / "a", "dcp")
        return
    report = converted(case.entry, tmp_path / "a", "dcp")
    back = open_checkpoint(tmp_path / "a").tree
    if not case.truth_path or not {"state", "model", "optimizers"} & set(case.truth()):
        return
    assert judge(back, case.truth()).wrong == judge(original.tree, case.truth()).wrong
    expected = as_dcp_holds_it(source)
    found = difference(expected, back, strides=False, aliases=False)
    lost = [note.split(":")[0] for note in report.notes]
    assert found is None
    has_ordered = any(isinstance(node, OrderedDict) for node in _mappings(source))
    assert (PLAIN_DICTS in lost) == has_ordered


def _mappings(node: Any) -> Any:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _mappings(value)
    elif isinstance(node, list) and any(isinstance(item, LazyTensor | dict | list) for item in node):
        for item in node:
            yield from _mappings(item)


@pytest.mark.parametrize(
    "name",
    [
        "dcp/fsdp2_ws2_adamw_nested",
        "dcp/fsdp2_ws2_adamw_flat",
        "deepspeed/z2_ws2_fp32_adam_sched",
        "deepspeed/z3_ws2_bf16_adamw",
        "stable_baselines3/ppo",
        "torch/legacy_adamw",
        "torch/pickle_dump_statedict",
        "fsdp1/full_useorig",
    ],
)
def test_torch_loads_the_zip_made_of_it(name: str, tmp_path: Path) -> None:
    case = corpus.case(name)
    entry = next(path for path in case.entry.iterdir()) if case.entry.is_dir() and len(case.files) == 1 else case.entry
    converted(entry, tmp_path / "a.pt", "torch")
    if name.startswith("deepspeed/"):  # the loss scaler is an object of DeepSpeed's
        assert judge(open_checkpoint(tmp_path / "a.pt").tree, case.truth()).wrong == []
        return
    live = torch.load(tmp_path / "a.pt", weights_only=True)
    found = dict(tensors(open_checkpoint(tmp_path / "a.pt").tree))
    assert found
    for path, tensor in found.items():
        node = live
        for key in path:
            node = node[key]
        assert raw(node) == tensor.tobytes()


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from optimstate.formats.protocol import WriteOptions
from optimstate.surgery.writing.converting import convert
convert(sys.argv[1], sys.argv[2], to=sys.argv[3], options=WriteOptions(sync=False))
assert not {"torch", "numpy"} & set(sys.modules), "imported"
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def peak(source: Path, destination: Path, to: str) -> int:
    """KiB at most resident while a checkpoint is converted in a fresh process."""
    command = [sys.executable, "-c", MEASURE, str(source), str(destination), to]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def large_checkpoint(path: Path, kind: str, mib: int) -> Path:
    rows = mib * 64
    live = {"model": {"w": torch.zeros(rows, 2048), "x": torch.zeros(rows, 2048).bfloat16()}}
    if kind == "legacy":
        torch.save(live, path, _use_new_zipfile_serialization=False)
    elif kind == "zip":
        torch.save(live, path)
    else:
        _two_column_shards(live["model"]["w"], path)
    return path


def _two_column_shards(whole: torch.Tensor, path: Path) -> None:
    """One tensor cut along dim 1: its rows must be interleaved."""
    import torch.distributed.checkpoint as distributed
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    half = whole.shape[1] // 2
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        distributed.save({"a": whole[:, :half].clone(), "b": whole[:, half:].clone()}, checkpoint_id=str(path))
    import pickle

    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    entry = metadata.state_dict_metadata.pop("a")
    del metadata.state_dict_metadata["b"]
    sizes = torch.Size([whole.shape[0], half])
    offsets = [torch.Size([0, 0]), torch.Size([0, half])]
    entry.size = whole.shape
    entry.chunks = [ChunkStorageMetadata(offsets=offset, sizes=sizes) for offset in offsets]
    metadata.state_dict_metadata["w"] = entry
    metadata.planner_data = {"w": ("w",)}
    places = {index.fqn: info for index, info in metadata.storage_data.items()}
    metadata.storage_data = {
        MetadataIndex("w", offset, number): places[name]
        for number, (offset, name) in enumerate(zip(offsets, "ab", strict=True))
    }
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(("kind", "to"), [("legacy", "safetensors"), ("zip", "dcp"), ("columns", "safetensors")])
def test_memory_does_not_grow_with_the_checkpoint(kind: str, to: str, tmp_path: Path) -> None:
    peaks = []
    for mib in (2, 96):
        source = large_checkpoint(tmp_path / f"{kind}{mib}", kind, mib)
        peaks.append(peak(source, tmp_path / f"out{mib}", to))
    assert peaks[1] - peaks[0] < 16 << 10, peaks


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes: in memory where there is room for them, since a disk would take its time."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 5 << 30 or available_memory() < 8 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def sparse_checkpoint(path: Path, mib: int, kind: str) -> Path:
    """Tensors of this size in a file of nearly no blocks: what was never written reads as zeros."""
    count = (mib << 20) // 12
    if kind == "torch":
        model = {f"w{number}": torch.empty(count) for number in range(3)}
        group = {"lr": 0.1, "params": ["w0", "w1", "w2"]}
        with torch.serialization.skip_data():
            torch.save({"model": model, "optimizer": {"state": {}, "param_groups": [group]}}, path)
        return path
    entries = {
        f"w{n}": {"dtype": "F32", "shape": [count], "data_offsets": [4 * count * n, 4 * count * (n + 1)]}
        for n in range(3)
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 12 * count)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "to"), [("torch", "safetensors"), ("safetensors", "torch"), ("torch", "dcp")])
def test_three_gigabytes_take_the_memory_of_three_megabytes(kind: str, to: str, roomy: Path) -> None:
    peaks = []
    for mib in (3, 3 << 10):
        source = sparse_checkpoint(roomy / f"{mib}", mib, kind)
        peaks.append(peak(source, roomy / f"out{mib}", to))
        assert source.stat().st_blocks * 512 < 1 << 20
        written = roomy / f"out{mib}"
        files = list(written.iterdir()) if written.is_dir() else [written]
        assert sum(file.stat().st_size for file in files) > (mib << 20) - 100
    assert abs(peaks[1] - peaks[0]) < 64 << 10, peaks


def test_sections_of_a_converted_folder_are_found(tmp_path: Path) -> None:
    case = corpus.case("deepspeed/z1_ws2_bf16_adamw")
    converted(case.entry, tmp_path / "a.safetensors", "safetensors", drop_opaque=True)
    kinds = [section.kind for section in find_sections(open_checkpoint(tmp_path / "a.safetensors").tree)]
    assert kinds == ["model", "optimizer"]
