"""Pickles and files made to hurt: nothing runs, nothing is allocated for a lie, and every refusal is a typed error."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optimstate
from optimstate.errors import CheckpointError, LimitExceededError, OptimStateError
from optimstate.formats.pickles.opcodes import check_opcodes
from optimstate.formats.pickles.pickle import dump
from optimstate.formats.pickles.unpickle import load
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.safetensors import container as safetensors
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import Extent, FileSource
from optimstate.plan.language.plan import Plan
from optimstate.state.sections import find_sections
from optimstate.surgery.writing.dropping import held_by_json, plain_copy
from optimstate.tensors.lazy import Storage
from optimstate.tree import Opaque, difference, tensors, walk
from optimstate.tree.unfolding import check_unfolded
from tests import corpus

QUICK = WriteOptions(sync=False)


def storage(kind: str, key: str, location: str, nbytes: int) -> Storage:
    return Storage((Extent(None, 0, nbytes),), nbytes, kind, location, key)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, qualname: str) -> bytes:
    return f"c{module}\n{qualname}\n".encode()


STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
HOOKS = name("collections", "OrderedDict") + b")R"
TENSOR = name("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89" + HOOKS + b"tR"
ORDERED = name("collections", "OrderedDict") + b")R"
SYSTEM = name("os", "system")
TOUCH = text("touch ran")
NAMED = b"}" + text("x") + b"K\x01s"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


# --- things that would run ------------------------------------------------------------------------------------------

RUNNING = {
    "reduce": SYSTEM + TOUCH + b"\x85R",
    "inst": b"(" + TOUCH + b"ios\nsystem\n",
    "obj": b"(" + SYSTEM + TOUCH + b"o",
    "newobj": SYSTEM + TOUCH + b"\x85\x81",
    "newobj_ex": SYSTEM + TOUCH + b"\x85}\x92",
    "stack_global": text("os") + text("system") + b"\x93" + TOUCH + b"\x85R",
    "eval": name("builtins", "eval") + text("open('ran','w')") + b"\x85R",
    "getattr": name("builtins", "getattr") + name("os", "path") + text("join") + b"\x86R" + TOUCH + b"\x85R",
    "getattr chain": b"".join([name("builtins", "getattr")] * 50)
    + name("os", "x")
    + b"".join([text("y") + b"\x86R"] * 50)
    + TOUCH
    + b"\x85R",
    "build on a class": SYSTEM + NAMED + b"b",
    "build on a builder": name("builtins", "getattr") + NAMED + b"b",
    "build on a real class": name("collections", "OrderedDict") + NAMED + b"b",
    "slots on a real class": name("collections", "OrderedDict") + b"N" + NAMED + b"\x86b",
    "class of an instance": ORDERED + b"N}" + text("__class__") + SYSTEM + b"s\x86b",
    "dict of an instance": ORDERED + b"N}" + text("__dict__") + SYSTEM + b"s\x86b",
    "set items of a class": SYSTEM + b"(" + text("a") + b"K\x01u",
    "append to a class": SYSTEM + b"(K\x01e",
    "append to a record": SYSTEM + TOUCH + b"\x85R(" + TOUCH + b"e",
    "extension": b"\x82\x01",
    "persistent id of text": b"P0\n",
    "persistent id of anything": SYSTEM + b"Q",
    "call of a tensor": TENSOR + b")R",
    "call of a storage": STORAGE + b")R",
    "import by dots": name("optimstate.formats.pickles.unpickle", "pickle.os.system") + TOUCH + b"\x85R",
    "numpy": name("numpy", "load") + TOUCH + b"\x85R",
}


@pytest.mark.parametrize("body", RUNNING.values(), ids=RUNNING)
def test_nothing_runs(body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        tree, _ = load(pickled(body), storage)
    except CheckpointError:
        tree = None
    list(walk(tree))
    assert not list(tmp_path.iterdir())


def test_what_would_run_is_a_record_and_is_named() -> None:
    tree, names = load(pickled(RUNNING["reduce"]))
    assert isinstance(tree, Opaque)
    assert (tree.type.path, tree.called, tree.arguments) == ("os.system", True, ("touch ran",))
    assert names == [("os", "system")]
    assert dump(tree).startswith(b"\x80\x02cos\nsystem\n")


BUILDS = {
    "attributes of a tensor": TENSOR + b"}" + text("offset") + b"M\xff\xffsb",
    "slots of a tensor": TENSOR + b"N}" + text("offset") + b"M\xff\xffs\x86b",
    "slots of a storage": STORAGE + b"N}" + text("nbytes") + b"M\xff\xffs\x86b",
    "methods of an OrderedDict": ORDERED + b"}" + text("items") + b"K\x01sb",
    "slots named like methods": ORDERED + b"N}" + text("keys") + b"K\x01s\x86b",
    "methods within": b"](" + ORDERED + b"}" + text("get") + b"K\x01sb\x85K\x01e",
    "methods within a record": SYSTEM + ORDERED + b"}" + text("values") + b"K\x01sb\x85R",
}


@pytest.mark.parametrize("body", BUILDS.values(), ids=BUILDS)
def test_state_cannot_be_put_into_what_we_built(body: bytes) -> None:
    with pytest.raises(CheckpointError):
        load(pickled(body), storage)


def test_attributes_of_an_ordered_dict_are_kept() -> None:
    tree, _ = load(pickled(ORDERED + b"}" + text("_metadata") + b"}sb"))
    assert vars(tree) == {"_metadata": {}}


# --- lies about sizes -----------------------------------------------------------------------------------------------

LIES = {
    "memo": b"Nr\xff\xff\xff\x7f",
    "memo just above": b"Nr" + struct.pack("<I", 1 << 20),
    "memo as text": b"Np2147483647\n",
    "memo as long text": b"Np" + b"9" * 5000 + b"\n",
    "memo as hexadecimal text": b"Np0x10\n",
    "frame": b"\x95" + struct.pack("<Q", 1 << 62),
    "frame over the end": b"\x95" + struct.pack("<Q", 100) + b"N",
    "text": b"X" + struct.pack("<I", 1 << 31) + b"abc",
    "long text": b"\x8d" + struct.pack("<Q", 1 << 60) + b"abc",
    "bytes": b"B" + struct.pack("<I", 1 << 31),
    "long bytes": b"\x8e" + struct.pack("<Q", 1 << 60),
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 60),
    "string": b"T" + struct.pack("<I", 1 << 30),
    "short text": b"\x8c\xff",
    "long": b"\x8b" + struct.pack("<I", 1 << 30),
    "negative long": b"\x8b\xff\xff\xff\xff",
    "line": b"Vabc",
    "global": b"cos",
    "unknown opcode": b"\xff",
    "next buffer": b"\x97",
    "bytearray made by length": name("builtins", "bytearray") + b"J\xff\xff\xff\x7f\x85R",
    "bytes made by length": name("builtins", "bytes") + b"J\xff\xff\xff\x7f\x85R",
    "set of text": name("builtins", "set") + text("abc") + b"\x85R",
    "complex of text": name("builtins", "complex") + text("1") + text("x") + b"\x86R",
    "codec": name("_codecs", "encode") + text("x") + text("bz2") + b"\x86R",
    "negative numel": b"(" + STORAGE[1:].replace(b"K\x04tQ", b"J\xff\xff\xff\xfftQ"),
    "tensor larger than its storage": TENSOR.replace(b"K\x04\x85K\x01\x85", b"K\x05\x85K\x01\x85"),
    "tensor of negative size": TENSOR.replace(b"K\x04\x85K\x01\x85", b"J\xff\xff\xff\xff\x85K\x01\x85"),
    "tensor of negative stride": TENSOR.replace(b"K\x04\x85K\x01\x85", b"K\x04\x85J\xff\xff\xff\xff\x85"),
    "tensor strided True where the one before was strided 1": b"]"
    + TENSOR
    + b"a"
    + TENSOR.replace(b"K\x01\x85", b"\x88\x85")
    + b"a",
    "tensor of text": TENSOR.replace(b"K\x04\x85K\x01\x85", text("4") + b"K\x01\x85"),
    "huge shape over nothing": TENSOR.replace(b"K\x04\x85K\x01\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85K\x01\x85"),
}


@pytest.mark.parametrize("body", LIES.values(), ids=LIES)
def test_a_declared_size_is_checked_before_anything_is_allocated(body: bytes) -> None:
    data = pickled(body)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            load(data, storage)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def saved_by_torch() -> bytes:
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Linear(300, 2), torch.nn.Linear(300, 300))
    optimizer = torch.optim.Adam(net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    archive = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "padding": "." * 5000}, archive)
    with zipfile.ZipFile(archive) as file:
        return file.read("archive/data.pkl")


@pytest.mark.parametrize("size", range(4))
def test_the_scan_sees_the_same_opcodes_as_pickletools(size: int) -> None:
    """Whatever bytes are changed: what the scan lets pass has no memo index or argument beyond the pickle."""
    data = saved_by_torch()
    assert check_opcodes(data) == len(data)
    random, passed = Random(size), 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(1 + size):
            changed[random.randrange(len(data))] = random.choice(
                [0, 0x28, 0x4B, 0x58, 0x72, 0xFF, random.randrange(256)]
            )
        try:
            end = check_opcodes(bytes(changed))
        except CheckpointError:
            continue
        passed += 1
        with suppress(ValueError):  # text that is no UTF-8, or no number: the unpickler stops there too
            stop = 0
            for opcode, argument, stop in pickletools.genops(bytes(changed[:end])):  # noqa: B007
                assert "PUT" not in opcode.name or argument <= len(data)
            assert stop + 1 == end
    assert passed > 100


def test_the_pieces_of_these_pickles_are_sound() -> None:
    assert isinstance(load(pickled(RUNNING["reduce"]))[0], Opaque)
    tree, _ = load(pickled(TENSOR), storage)
    assert (tree.dtype, tree.shape, tree.stride) == ("float32", (4,), (1,))
    assert isinstance(load(pickled(STORAGE), storage)[0], Storage)


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x80\x02", b"\x80\x02N", b".", b"\x80\x02N.N", b"\x80\xffN.", b"text\n"]
)
def test_what_is_no_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        load(data)


# --- nesting and sharing --------------------------------------------------------------------------------------------


def laughs(levels: int = 40, width: int = 10) -> list[Any]:
    tree: list[Any] = []
    for _ in range(levels):
        tree = [tree] * width
    return tree


def write_zip(tree: Any, path: Path) -> Path:
    torch_zip.write(tree, path, options=QUICK)
    return path


def test_a_billion_laughs_are_read_shown_and_renamed(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"step": 1, "joke": laughs()}}, "param_groups": [{"joke": laughs(), "params": [0]}]}
    weight = load(pickled(TENSOR), storage)[0]
    path = write_zip({"model": {"a.w": weight}, "optimizer": optimizer, "joke": laughs()}, tmp_path / "laughs.pt")
    assert path.stat().st_size < 10_000
    assert len(optimstate.inspect(path, parameters=True).to_json()) < 10 << 20
    optimstate.remap(path, tmp_path / "renamed.pt", Plan.from_options(rename=["a.{p}=b.{p}"]), sync=False)
    assert difference(open_checkpoint(path).tree["joke"], open_checkpoint(tmp_path / "renamed.pt").tree["joke"]) is None
    for never, form in (("never.safetensors", "safetensors"), ("never", "dcp")):
        with pytest.raises(LimitExceededError, match=r"the limit is [\d,]+"):
            optimstate.convert(path, tmp_path / never, to=form)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["laughs.pt", "renamed.pt"]
    live = torch.optim.SGD([("a.w", torch.nn.Parameter(torch.zeros(4)))])
    with pytest.raises(LimitExceededError):
        optimstate.resume(path, optimizer=live)
    assert live.state == {}


def test_what_is_written_often_is_measured_before_it_is_written() -> None:
    text, row, loop = "x" * 1_000_000, list(range(10_000)), []  # type: ignore[var-annotated]
    loop.append(loop)
    for much in ([text] * 10_000, [row] * 1_000, [{text: 1} for _ in range(100)], laughs(), [{"k": laughs(20, 2)}]):
        with pytest.raises(LimitExceededError):
            check_unfolded(much)
    for fine in ([()] * 600_000, [text] * 7, [row] * 8, loop, laughs(16, 2), [{"a": {"b": 1.0}} for _ in range(9)]):
        check_unfolded(fine)


def test_laughing_slots_are_duplicated_without_being_written_out(tmp_path: Path) -> None:
    weights = {"a.w": load(pickled(TENSOR), storage)[0]}
    group = {"params": [0], "param_names": ["a.w"]}
    optimizer = {"state": {0: {"joke": laughs()}}, "param_groups": [group]}
    path = write_zip({"model": weights, "optimizer": optimizer}, tmp_path / "laughs.pt")
    plan = Plan.from_options(duplicate=["a.{p}=b.{p},c.{p}"])
    optimstate.remap(path, tmp_path / "two.pt", plan, sync=False)
    assert (tmp_path / "two.pt").stat().st_size < 20_000


def test_containers_that_hold_each_other_are_no_way_around_the_limit(tmp_path: Path) -> None:
    chain: list[Any] = [[]]
    for _ in range(50_000):
        chain.append([chain[-1]])
    with pytest.raises(LimitExceededError):
        list(walk(chain[::-1]))
    with pytest.raises(LimitExceededError):
        find_sections(chain[::-1])


@pytest.mark.parametrize("opener", [b"]", b"}N", b")", b"N"], ids=["lists", "dicts", "tuples", "one-tuples"])
def test_deep_nesting_is_read_or_refused_and_never_crashes(opener: bytes, tmp_path: Path) -> None:
    closers = {b"]": b"a", b"}N": b"s", b")": b"\x86", b"N": b"\x85"}
    depth = 50_000
    if opener == b"N":
        data = pickled(b"N" + b"\x85" * depth)
    else:
        data = pickled(opener * depth + b"N" + closers[opener] * depth)
    path = tmp_path / "deep.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", b"3\n")
    for action in (
        lambda: optimstate.inspect(path, parameters=True).to_json(),
        lambda: optimstate.convert(path, tmp_path / "x.safetensors"),
        lambda: optimstate.convert(path, tmp_path / "x.pt", options=QUICK),
    ):
        with suppress(OptimStateError):
            action()


DEEP = b")" + b"\x85" * 300_000
DEEP_KEYS = {
    "a key": b"}" + DEEP + b"Ns",
    "a key put by many": b"}(" + DEEP + b"Nu",
    "an element of a frozenset": b"(" + DEEP + b"\x91",
    "an element of a set": b"\x8f(" + DEEP + b"\x90",
    "a key by way of the memo": b"})q\x00" + b"0h\x00\x85q\x00" * 300_000 + b"Ns",
    "a key with other things between": b"})" + b"]Na0\x85" * 300_000 + b"Ns",
    "a key of an OrderedDict": name("collections", "OrderedDict") + b"]" + DEEP + b"N\x86a\x85R",
    "a parameter of an optimizer": b"}" + text("params") + b"]" + DEEP + b"as",
    "an argument of an unknown function": name("a", "b") + DEEP + b"\x85R",
}

READ = """
import sys
from optimstate.errors import LimitExceededError
from optimstate.formats.registry import open_checkpoint
try:
    open_checkpoint(sys.argv[1])
except LimitExceededError as error:
    print(error.message)
"""


@pytest.mark.parametrize("what", DEEP_KEYS)
def test_deep_tuples_do_not_exhaust_the_stack(what: str, tmp_path: Path) -> None:
    """In a process of its own: what is tested for is that it does not die."""
    path = tmp_path / "deep.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x04" + DEEP_KEYS[what] + b".")
        archive.writestr("a/version", b"3\n")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True, cwd=root)
    assert "tuples nested more than 1000 deep" in done.stdout
    assert str(path) in done.stdout


def test_many_shallow_tuples_are_fine() -> None:
    body = b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"K\x01\x85\x85\x86N" for n in range(20_000)) + b"u"
    tree, _ = load(pickled(body))
    assert tree == {(n, ((1,),)): None for n in range(20_000)}


def test_what_fails_on_the_large_stack_fails_as_elsewhere() -> None:
    with pytest.raises(CheckpointError, match="underflow"):
        load(pickled(b"\x85" * 20_000))
    with pytest.raises(CheckpointError):
        load(pickled(b"N" + b"\x85" * 20_000 + b"h\x07"))


# --- trees of the wrong shape ---------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3), st.binary(max_size=3), st.just(())
)
KEYS = st.one_of(
    st.sampled_from(
        [
            "state",
            "param_groups",
            "params",
            "param_names",
            "lr",
            "betas",
            "step",
            "last_epoch",
            "base_lrs",
            "exp_avg",
            "_schedulers",
            "n_averaged",
            "module.w",
            "a.w",
            "num_bad_epochs",
            "best",
            "_last_lr",
            "$tuple",
            "$tensor",
        ]
    ),
    st.integers(0, 2),
    st.none(),
    st.tuples(st.integers(0, 1)),
)
TENSORS = st.builds(lambda: load(pickled(TENSOR), storage)[0])
RECORDS = st.builds(lambda body: load(pickled(body), storage)[0], st.sampled_from([RUNNING["reduce"], SYSTEM, STORAGE]))
TREES = st.recursive(
    st.one_of(LEAVES, TENSORS, RECORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.fixed_dictionaries({"state": inner, "param_groups": st.lists(inner, max_size=2)}),
        st.fixed_dictionaries(
            {
                "state": st.dictionaries(KEYS, inner, max_size=2),
                "param_groups": st.lists(
                    st.fixed_dictionaries(
                        {"params": st.lists(inner | st.integers(0, 2), max_size=3)},
                        optional={"param_names": inner | st.lists(st.text(max_size=2), max_size=3), "lr": inner},
                    ),
                    max_size=2,
                ),
            }
        ),
        st.fixed_dictionaries({"last_epoch": inner, "base_lrs": inner}),
    ),
    max_leaves=12,
)


@contextmanager
def refusal_of(path: Path) -> Iterator[None]:
    """Any typed error is fine; one about a checkpoint names its file."""
    found: list[OptimStateError] = []
    try:
        yield
    except OptimStateError as error:
        found.append(error)
    assert all(str(path) in str(error) for error in found if isinstance(error, CheckpointError))


@settings(max_examples=400)
@given(TREES)
def test_any_tree_is_inspected_and_converted_or_refused_with_a_typed_error(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "tree.pt"
    write_zip(tree, path)
    written = open_checkpoint(path)
    assert difference(tree, written.tree) is None
    for action in (
        lambda: json.loads(optimstate.inspect(path, parameters=True).to_json()),
        lambda: optimstate.remap(path, None, Plan.from_options(rename=["a.{p}=b.{p}"]), dry_run=True),
        lambda: optimstate.remap(path, None, Plan.from_options(drop=["**"]), dry_run=True),
    ):
        with refusal_of(path):
            action()
    target = tmp_path / "tree.safetensors"
    with suppress(OptimStateError):
        safetensors.write(written.tree, target, options=QUICK)
        assert difference(written.tree, open_checkpoint(target).tree) is None


# --- flipped bytes --------------------------------------------------------------------------------------------------

SMALL = [
    corpus.case(case).entry
    for case in (
        "torch/adam_named_wd",
        "optimstate/objects_containers",
        "optimstate/tensors_strides",
        "optimstate/objects_scalars",
        "torch/wholeobject",
    )
]
PICKLES = {path: torch_zip.Archive(FileSource(path)) for path in SMALL}
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "cut", "add"]), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[float, str, int]]) -> bytes:
    made = bytearray(data)
    for where, kind, value in edits:
        at = int(where * len(made))
        if kind == "set":
            made[at : at + 1] = bytes([value])
        elif kind == "cut":
            del made[at : at + 1 + value // 32]
        else:
            made[at:at] = bytes([value])
    return bytes(made)


def use(path: Path, scratch: Path) -> None:
    """Everything one does with a file, all of it allowed to be refused but nothing else."""
    with refusal_of(path):
        optimstate.inspect(path, parameters=True).to_json()
        tree = open_checkpoint(path).tree
        for _, tensor in tensors(tree):
            for block in tensor.chunks():
                assert len(block) <= 1 << 20
        torch_zip.write(tree, scratch, options=QUICK)
        assert difference(tree, open_checkpoint(scratch).tree) is None


@settings(max_examples=250)
@given(source=st.sampled_from(SMALL), edits=EDITS)
def test_flipped_bytes_of_a_zip_are_refused_or_read(source: Path, edits: Any, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(edited(source.read_bytes(), edits))
    use(path, tmp_path / "again.pt")


@settings(max_examples=500)
@given(source=st.sampled_from(SMALL), edits=EDITS)
def test_flipped_bytes_of_a_pickle_are_refused_or_read(source: Path, edits: Any, tmp_path: Path) -> None:
    archive = PICKLES[source]
    data = edited(archive.read(archive.records["data.pkl"], 1 << 20), edits)
    with suppress(OptimStateError):
        tree, _ = load(data, storage)
        again = dump(tree)
        assert difference(tree, load(again, storage)[0], aliases=False) is None


def small_safetensors(folder: Path) -> list[bytes]:
    made = []
    for source in (SMALL[0], SMALL[2], SMALL[3], SMALL[0]):
        path = folder / "made.safetensors"
        options = WriteOptions(sync=False, clone_views=True)
        tree = plain_copy(open_checkpoint(source).tree, held_by_json).tree
        safetensors.write(tree, path, options=options)
        made.append(path.read_bytes())
    return made


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return small_safetensors(tmp_path_factory.mktemp("safetensors"))


@settings(max_examples=300)
@given(which=st.integers(0, 3), edits=EDITS, in_header=st.booleans())
def test_flipped_bytes_of_safetensors_are_refused_or_read(
    which: int, edits: Any, in_header: bool, contents: list[bytes], tmp_path: Path
) -> None:
    data = contents[which]
    length = 8 + struct.unpack_from("<Q", data)[0]
    if in_header:  # keep the declared length right, so that the edit is what is read
        header = edited(data[8:length], edits)
        data = struct.pack("<Q", len(header)) + header + data[length:]
    else:
        data = edited(data, edits)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    use(path, tmp_path / "again.pt")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_under_any_name(tmp_path: Path, data: bytes) -> None:
    for suffix in ("pt", "safetensors", "safetensors.index.json"):
        path = tmp_path / f"random.{suffix}"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            optimstate.inspect(path)


def test_a_hostile_pickle_of_every_protocol_is_only_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            import os

            return os.system, ("touch ran",)

    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        tree, names = load(pickle.dumps({"x": [Runs()]}, protocol=protocol))
        assert isinstance(tree["x"][0], Opaque)
        assert any(found == "system" for _, found in names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [b"K\x01", b"M\x01\x01", b"G12345678", b"K\x01G12345678"])
def test_a_row_of_numbers_is_gone_over_once(number: bytes) -> None:
    """From each number anew, half a million would take hours."""
    data = number * 500_000 + b"."
    loose: list[int] = []
    assert check_opcodes(data, loose=loose) == len(data)
    assert loose == []
