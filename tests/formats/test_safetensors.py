"""Safetensors: both ways against the safetensors library, shards, and whole checkpoints without loss."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import optimstate
from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LimitExceededError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.formats.pickles.globals import PLAIN_CLASSES
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.safetensors import container as safetensors
from optimstate.formats.safetensors import file as safetensors_file
from optimstate.formats.torch import zip as torch_zip
from optimstate.tensors.compute import concatenated, resolved, to_torch
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, difference, tensors, walk
from tests import corpus
from tests.corpus import Case
from tests.support import load_torch, readable, unlike

QUICK = WriteOptions(sync=False)
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def live_tensors() -> dict[str, torch.Tensor]:
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    integers = [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    made = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in floats + integers}
    made["bool"] = torch.tensor([True, False, True])
    made["complex"] = torch.tensor([1 + 2j, float("nan")])
    made["scalar"] = torch.tensor(float("-inf"))
    made["nothing"] = torch.empty(0, 3)
    made["ünïcode \u2603"] = torch.ones(1)
    return made


# --- the library ----------------------------------------------------------------------------------------------------


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(live_tensors(), path, metadata={"format": "pt", "note": "x"})
    document = open_checkpoint(path)
    again = tmp_path / "again.pt"
    torch_zip.write(dict(document.tree), again, options=QUICK)
    assert unlike(torch.load(again), load_file(path)) is None
    assert document.handle == {"format": "pt", "note": "x"}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    source, path = tmp_path / "live.pt", tmp_path / "ours.safetensors"
    live = live_tensors()
    torch.save(live, source)
    safetensors.write(open_checkpoint(source).tree, path, options=QUICK)
    loaded = load_file(path)
    assert loaded.keys() == live.keys()
    assert unlike({name: loaded[name] for name in live}, live) is None
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        for name, tensor in live.items():
            assert list(file.get_slice(name).get_shape()) == list(tensor.shape)


def test_a_plain_file_is_rewritten_byte_for_byte(tmp_path: Path) -> None:
    source, path = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    ordered = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16), "c": torch.ones(1, dtype=torch.float64)}
    save_file(ordered, source, metadata={"format": "pt", "note": "kept"})
    document = open_checkpoint(source)
    safetensors.write(document.tree, path, like=document, options=QUICK)
    assert load_file(path).keys() == load_file(source).keys()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    assert difference(open_checkpoint(source).tree, open_checkpoint(path).tree) is None


def test_data_is_aligned_to_its_items(tmp_path: Path) -> None:
    path, source = tmp_path / "ours.safetensors", tmp_path / "live.pt"
    torch.save({"x": torch.ones(3, dtype=torch.uint8), "y": torch.ones(5, dtype=torch.float64)}, source)
    safetensors.write(open_checkpoint(source).tree, path, options=QUICK)
    for _, tensor in tensors(open_checkpoint(path).tree):
        assert tensor.storage.pieces[0].offset % tensor.itemsize == 0


def test_the_library_reads_whole_checkpoints_as_named_tensors(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    optimstate.convert(corpus.case("torch/adam_named_wd").entry, path, options=QUICK)
    named = load_file(path)
    assert {"model.fc1.weight", "optimizer.state.fc1.weight.exp_avg"} <= named.keys()
    live = torch.load(corpus.case("torch/adam_named_wd").entry)
    assert torch.equal(named["model.fc1.weight"], live["model"]["fc1.weight"])
    names = [n for g in live["optimizer"]["param_groups"] for n in g["param_names"]]
    keys = [k for g in live["optimizer"]["param_groups"] for k in g["params"]]
    for name, key in zip(names, keys, strict=True):
        assert torch.equal(named[f"optimizer.state.{name}.exp_avg"], live["optimizer"]["state"][key]["exp_avg"])


# --- whole checkpoints ----------------------------------------------------------------------------------------------

WHOLE = [case for case in readable() if case.entry.is_file()]


def held(case: Case, tmp_path: Path) -> tuple[Path, RepresentationError | None]:
    path = tmp_path / "whole.safetensors"
    try:
        optimstate.convert(case.entry, path, options=QUICK)
    except RepresentationError as error:
        return path, error
    return path, None


# What safetensors cannot hold, with the words of the error and the option it offers.
REFUSED = {
    "torch/wholeobject": ("defaultdict|AdamW|object of", "--drop-opaque"),
    "optimstate/objects_containers": ("contains itself|object of", ""),
    "optimstate/tensors_strides": ("column.* shares with rows", "--clone-views"),
    "fastai/adam_discriminative": ("opt.*object of fastcore", "--drop-opaque"),
    "bitsandbytes/linear4bit_module": ("quantized weight of bitsandbytes", ""),
    "bitsandbytes/linear8bit_module": ("quantized weight of bitsandbytes", ""),
    "optimstate/tensors_other_layouts": ("coo is a sparse tensor", "--drop-opaque"),
}


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_torch_to_safetensors_to_torch_is_the_identity(case: Case, tmp_path: Path) -> None:
    path, error = held(case, tmp_path)
    if case.name in REFUSED:
        words, option = REFUSED[case.name]
        assert error is not None
        assert re.search(words, error.message), error.message
        assert option in error.hint
        assert not list(tmp_path.iterdir())
        return
    assert error is None
    source = open_checkpoint(case.entry).tree
    assert difference(source, open_checkpoint(path).tree, aliases=True) is None
    back = tmp_path / "back.pt"
    optimstate.convert(path, back, options=QUICK)
    assert difference(source, open_checkpoint(back).tree) is None
    assert unlike(load_torch(back), load_torch(case.entry)) is None


@pytest.mark.parametrize("name", REFUSED)
def test_the_offered_options_help(name: str, tmp_path: Path) -> None:
    options = WriteOptions(sync=False, clone_views=True)
    source = corpus.case(name).entry
    path = tmp_path / "held.safetensors"
    if name == "optimstate/objects_containers":  # a container within itself is not an object that can be left out
        with pytest.raises(RepresentationError, match="contains itself"):
            optimstate.convert(source, path, drop_opaque=True, options=options)
        return
    report = optimstate.convert(source, path, drop_opaque=True, options=options)
    before, after = open_checkpoint(source).tree, open_checkpoint(path).tree
    unknown = [n for _, n in walk(before) if isinstance(n, Opaque) and n.type.path not in PLAIN_CLASSES]
    assert bool(unknown) == bool(report.notes)
    assert all(note.startswith(("left out: ", "kept as plain data: ")) for note in report.notes)
    assert all(node.type.path in PLAIN_CLASSES for _, node in walk(after) if isinstance(node, Opaque))
    kept = {tensor.tobytes() for _, tensor in tensors(after)}
    assert kept <= {(resolved(t) if t.flags else t).tobytes() for _, t in tensors(before)}


def test_other_readers_see_conjugated_and_negated_tensors_as_they_are_meant(tmp_path: Path) -> None:
    imaginary = torch.tensor([1 + 1j, 2 - 3j])
    live = {"conjugated": imaginary.conj(), "negated": (imaginary * 1).conj().imag, "plain": imaginary}
    torch.save(live, tmp_path / "a.pt")
    optimstate.convert(tmp_path / "a.pt", tmp_path / "b.safetensors", options=WriteOptions(clone_views=True))
    for name, value in load_file(tmp_path / "b.safetensors").items():
        assert value.tolist() == live[name].tolist()
    found = open_checkpoint(tmp_path / "a.pt").tree["negated"].narrow(0, 0, 1)
    assert found.item() == -1.0
    tree = open_checkpoint(tmp_path / "a.pt").tree
    with pytest.raises(CheckpointError, match="some were not"):
        concatenated([tree["plain"], tree["conjugated"]], 0)
    for name in ("conjugated", "negated"):
        assert unlike(to_torch(tree[name]).resolve_conj(), live[name].resolve_conj().resolve_neg()) is None


def test_clone_views_gives_each_tensor_its_own_memory(tmp_path: Path) -> None:
    source, path = tmp_path / "views.pt", tmp_path / "views.safetensors"
    base = torch.arange(12.0)
    torch.save({"all": base, "column": base.view(3, 4)[:, 1], "head": base[:4]}, source)
    with pytest.raises(RepresentationError, match=r"column.*all") as caught:
        optimstate.convert(source, path)
    assert "--clone-views" in caught.value.hint
    optimstate.convert(source, path, options=WriteOptions(sync=False, clone_views=True))
    tree = open_checkpoint(path).tree
    assert len({id(tensor.storage) for _, tensor in tensors(tree)}) == 3
    assert unlike(load_file(path)["column"], base.view(3, 4)[:, 1].contiguous()) is None


def test_shared_contiguous_memory_stays_shared(tmp_path: Path) -> None:
    source, path, back = tmp_path / "tied.pt", tmp_path / "tied.safetensors", tmp_path / "back.pt"
    base = torch.arange(12.0)
    torch.save({"all": base, "again": base, "middle": base[3:9].view(2, 3), "end": base[9:]}, source)
    optimstate.convert(source, path, options=QUICK)
    optimstate.convert(path, back, options=QUICK)
    loaded = torch.load(back)
    assert unlike(loaded, torch.load(source)) is None
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1
    loaded["all"][4] = -1
    assert loaded["middle"][0, 1] == -1


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards_hold_everything_once_under_their_size(tmp_path: Path, name: str) -> None:
    source, folder = corpus.case("torch/adam_named_wd").entry, tmp_path / "shards"
    if name:
        folder.mkdir()
    optimstate.convert(source, folder / name, to="safetensors", options=WriteOptions(sync=False, shard_size=1000))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 1000 or len(load_file(file)) == 1 for size, file in zip(sizes, files, strict=True))
    tree = open_checkpoint(folder / "model.safetensors.index.json").tree
    assert difference(open_checkpoint(source).tree, tree) is None


def test_one_shard_is_a_plain_file(tmp_path: Path) -> None:
    source, folder = corpus.case("torch/adam_named_wd").entry, tmp_path / "one"
    optimstate.convert(source, folder, options=WriteOptions(sync=False, shard_size=1 << 30))
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": "one.safetensors"}, "'b'"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "'c'"),
        ({"a": "../one.safetensors", "b": "one.safetensors"}, "outside"),
        ({"a": "/etc/passwd"}, "outside"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "two.safetensors"),
        ([], "index"),
        (None, "index"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=re.escape(message)):
            open_checkpoint(index)
    index.write_text("{")
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(index)


# --- damage ---------------------------------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def made(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


DAMAGED: dict[str, tuple[Any, bytes]] = {
    "hole": ({"a": A, "b": {**A, "data_offsets": [12, 20]}}, bytes(20)),
    "overlap": ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, bytes(12)),
    "same place": ({"a": A, "b": A}, bytes(8)),
    "trailing bytes": ({"a": A}, bytes(9)),
    "too short": ({"a": A}, bytes(7)),
    "does not begin at 0": ({"a": {**A, "data_offsets": [4, 12]}}, bytes(12)),
    "backwards": ({"a": {**A, "data_offsets": [8, 0]}}, bytes(8)),
    "negative": ({"a": {**A, "data_offsets": [-8, 0]}}, bytes(8)),
    "wrong size": ({"a": {**A, "shape": [3]}}, bytes(8)),
    "negative shape": ({"a": {**A, "shape": [-2]}}, bytes(8)),
    "fractional shape": ({"a": {**A, "shape": [2.0]}}, bytes(8)),
    "boolean shape": ({"a": {**A, "shape": [True, 2]}}, bytes(8)),
    "unknown dtype": ({"a": {**A, "dtype": "F99"}}, bytes(8)),
    "dtype no text": ({"a": {**A, "dtype": ["F32"]}}, bytes(8)),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no object": ({"a": 3}, b""),
    "list": ([], b""),
    "no JSON": (b"{nonsense", b""),
    "no text": (b'{"\xff": 1}', b""),
    "deep": (b'{"a":' + b"[" * 100_000, b""),
    "duplicate keys": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": A}, bytes(8)),
    "metadata a list": ({"__metadata__": [], "a": A}, bytes(8)),
    "huge shape": ({"a": {**A, "shape": [1 << 62, 1 << 62]}}, bytes(8)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_with_the_file_and_place(name: str, tmp_path: Path) -> None:
    path = made(tmp_path / "damaged.safetensors", *DAMAGED[name])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    if name != "duplicate keys":  # which the library overlooks
        with pytest.raises((SafetensorError, OSError)):
            load_file(path)


def test_headers_beyond_the_limit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    for length in (safetensors_file.MAX_HEADER + 1, 1 << 40, (1 << 64) - 1):
        made(path, b"{}", b"", length)
        with pytest.raises(LimitExceededError, match="header"):
            open_checkpoint(path)
    made(path, b"{}", b"", 1000)
    with pytest.raises(CorruptCheckpointError, match="1000"):
        open_checkpoint(path)


def test_elements_smaller_than_a_byte_come_in_whole_bytes(tmp_path: Path) -> None:
    path = made(tmp_path / "f4.safetensors", {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(UnsupportedCheckpointError, match="F4"):
        open_checkpoint(path)


def test_padded_and_unaligned_headers_are_read(tmp_path: Path) -> None:
    for padding in (0, 1, 3, 500):
        path = made(tmp_path / "padded.safetensors", json.dumps({"a": A}).encode() + b" " * padding, bytes(8))
        assert open_checkpoint(path).tree["a"].tobytes() == bytes(8)
        assert load_file(path)["a"].tolist() == [0, 0]


def whole(tmp_path: Path, document: Any) -> Path:
    header = {"__metadata__": {"optimstate": json.dumps(document)}, "a": A}
    return made(tmp_path / "whole.safetensors", header, bytes(8))


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"version": 2, "tree": {}},
        {"version": 1},
        {"version": 1, "tree": {"$tensor": "missing"}},
        {"version": 1, "tree": {"$unknown": 1}},
        {"version": 1, "tree": {"$tuple": 3}},
        {"version": 1, "tree": {"$set": [[]]}},
        {"version": 1, "tree": {"$dict": [[[], 1]]}},
        {"version": 1, "tree": {"$dict": [1]}},
        {"version": 1, "tree": {"$bytes": "!"}},
        {"version": 1, "tree": {"$complex": ["x", 1]}},
        {"version": 1, "tree": {"$float": "1e3"}},
        {"version": 1, "tree": {"$global": 3}},
        {"version": 1, "tree": {"$object": {"class": "os.system", "called": True, "arguments": ["touch ran"]}}},
        {"version": 1, "tree": {"$object": {"class": "builtins.eval", "called": True, "arguments": []}}},
        {"version": 1, "tree": {"$ordered": [], "attributes": {"items": 1}}},
        {"version": 1, "tree": {"$ordered": [], "attributes": 3}},
        {"version": 1, "tree": {"$tensor": "a", "dtype": "float99"}},
        {"version": 1, "tree": {"$tensor": "a", "stride": [1, 1]}},
        {"version": 1, "tree": {"$tensor": "a", "stride": [1 << 60]}},
        {"version": 1, "tree": {"$tensor": "a", "offset": -1}},
        {"version": 1, "tree": {"$tensor": "a", "offset": "x"}},
        {"version": 1, "tree": {"$tensor": "a", "offset": 1 << 60}},
        {"version": 1, "tree": {"$tensor": "a", "shape": [-2, -1]}},
        {"version": 1, "tree": {"$tensor": "a", "dtype": "float64", "shape": [2]}},
        {"version": 1, "tree": {"$tensor": "a", "storage": "0"}},
        {"version": 1, "tree": {"$tensor": "a", "storage": "0"}, "storages": {"0": {"nbytes": 4, "kind": "x"}}},
        {
            "version": 1,
            "tree": {"$tensor": "a", "storage": "0"},
            "storages": {"0": {"nbytes": 4, "kind": "FloatStorage", "location": "cpu"}},
        },
        {
            "version": 1,
            "tree": {"$tensor": "a", "storage": "0"},
            "storages": {"0": {"nbytes": 1 << 60, "kind": "FloatStorage", "location": "cpu"}},
        },
        {
            "version": 1,
            "tree": {"$tensor": "a", "storage": "0"},
            "storages": {"0": {"nbytes": 8, "kind": "os.system", "location": "cpu"}},
        },
    ],
    ids=lambda document: json.dumps(document)[:60],
)
def test_a_checkpoint_description_that_lies_is_refused(document: Any, tmp_path: Path) -> None:
    path = whole(tmp_path, document)

    def use() -> None:
        for _, node in walk(open_checkpoint(path).tree):
            if isinstance(node, LazyTensor):
                # Nothing is read or made for a storage that the file cannot have.
                torch_zip.write({"x": node}, tmp_path / "never.pt", options=QUICK)

    with pytest.raises(CheckpointError):
        use()
    assert not (tmp_path / "never.pt").exists()


def test_views_that_overlap_themselves_return_as_they_were(tmp_path: Path) -> None:
    source, path, back = tmp_path / "live.pt", tmp_path / "held.safetensors", tmp_path / "back.pt"
    live = {
        "expanded": torch.arange(3.0).expand(4, 3),
        "both": torch.ones(1, dtype=torch.int8).expand(2, 5),
        "windows": torch.arange(8.0).unfold(0, 4, 2),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "offset": torch.arange(9.0)[3:8],
        "spread": torch.arange(12.0).view(3, 4)[:, ::2],
    }
    torch.save(live, source)
    optimstate.convert(source, path, options=QUICK)
    optimstate.convert(path, back, options=QUICK)
    assert unlike(torch.load(back), live) is None


@pytest.mark.parametrize("metadata", ["", '"__metadata__": {"a": "b"},'])
@pytest.mark.parametrize(
    "entries",
    [
        '"a": {E}, "a": {E}',
        '"a": {}, "a": {E}',
        '"a": 1, "a": {E}',
        '"a": {E}, "a": {E}, "b": {"shape": [], "data_offsets": [0, 0]}',
        '"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}',
        '"a": {E}, "a": {"x": {"dtype": 1}, "shape": [1], "data_offsets": [0, 4]}, "b": {E}',
    ],
)
def test_a_key_that_is_there_twice_is_refused_whatever_stands_beside_it(
    entries: str, metadata: str, tmp_path: Path
) -> None:
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{metadata}{entries.replace('{E}', entry)}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "a.safetensors")
