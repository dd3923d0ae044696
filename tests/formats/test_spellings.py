"""Every spelling of a tensor that a release of torch wrote is read as torch reads it, or named."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimstate import convert, diff
from optimstate.errors import CheckpointError, CorruptCheckpointError, RepresentationError, UnsupportedTorchError
from optimstate.formats.pickles import tensors as spellings
from optimstate.formats.pickles.foreign import remedy_for
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.safetensors import json_tree
from optimstate.installed_torch import has_dtype
from optimstate.surgery.statistics import statistics
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName, difference, nodes
from tests.corpus import Case, case, cases
from tests.formats.live import differs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates what these files are made of


class Storage:
    """Stands for a storage, or for a view of one, in a stream of torch before 1.6."""

    def __init__(self, key: str, kind: Any, code: str, values: list[Any], view: tuple[str, int, int] | None = None):
        self.key, self.kind, self.code, self.values, self.view = key, kind, code, values, view


class Call:
    """Pickled as a call, and what is done to the result of it."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


class Pickler(pickle.Pickler):
    used: dict[str, Storage]

    def persistent_id(self, item: Any) -> Any:
        if isinstance(item, Storage):
            self.used.setdefault(item.key, item)
            return "storage", item.kind, item.key, "cpu", len(item.values), item.view
        return None


def stream(path: Path, tree: Any) -> Path:
    """The container of torch 0.2 to 1.5."""
    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with path.open("wb") as file:
        for item in (0x1950A86A20F9469CFC6C, 1001, about):
            pickle.dump(item, file, 2)
        pickler = Pickler(file, 2)
        pickler.used = {}
        pickler.dump(tree)
        pickle.dump(list(pickler.used), file, 2)
        for storage in pickler.used.values():
            values = struct.pack(f"<{len(storage.values)}{storage.code}", *storage.values)
            file.write(struct.pack("<q", len(storage.values)) + values)
    return path


FLOATS = Storage("1", torch.FloatStorage, "f", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
LONGS = Storage("2", torch.LongStorage, "q", [7, 8])
PLAIN = Call(torch._utils._rebuild_tensor, FLOATS, 1, (2, 2), (1, 2))
V2 = Call(torch._utils._rebuild_tensor_v2, FLOATS, 1, (2, 2), (1, 2), False, OrderedDict())
HOOKS: Any = OrderedDict()
VARIABLE = torch.autograd.Variable
# What each release wrote for a tensor, a parameter or a variable.
OLD: dict[str, Any] = {
    "0.1.9 tensor": Call(torch.FloatTensor, state=(FLOATS, 1, (2, 2), (1, 2))),
    "0.1.9 empty tensor": Call(torch.FloatTensor),
    "0.1.10 tensor": PLAIN,
    "0.1 variable, all in its state": Call(VARIABLE, PLAIN, state=(PLAIN, None, HOOKS, True, False)),
    "0.2 variable": Call(VARIABLE, PLAIN, state=(True, False, HOOKS)),
    "0.3 buffer": Call(VARIABLE, PLAIN, state=(False, False, HOOKS)),
    "0.3 parameter": Call(torch.nn.Parameter, PLAIN, state=(True, False, HOOKS)),
    "0.3 frozen parameter": Call(torch.nn.Parameter, PLAIN, state=(False, False, HOOKS)),
    "0.4 tensor": V2,
    "0.4 parameter": Call(torch._utils._rebuild_parameter, V2, True, HOOKS),
    "1.9 tensor of a type": Call(
        torch._tensor._rebuild_from_type, torch._utils._rebuild_tensor_v2, torch.Tensor, V2.parts[1], {}
    ),
    "2.0 parameter with attributes": Call(
        torch._utils._rebuild_parameter_with_state, V2, True, HOOKS, {"sequence_parallel": True}
    ),
}


def as_tensor(live: Any) -> Any:
    """Variables are tensors today."""
    return live.data.requires_grad_(live.requires_grad) if type(live) is torch.Tensor else live


@pytest.mark.parametrize("name", OLD)
def test_what_an_old_release_wrote_is_read_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    path = stream(
        tmp_path / "old.pt",
        {"a": OLD[name], "n": Call(torch._utils._rebuild_tensor, LONGS, 0, (2,), (1,))},
    )
    live = torch.load(path, weights_only=False)
    tree = open_checkpoint(path).tree
    assert isinstance(tree["a"], LazyTensor)
    assert tree["a"].is_parameter is isinstance(live["a"], torch.nn.Parameter)
    assert tree["a"].requires_grad is live["a"].requires_grad
    assert differs(tree, live) is None
    for target in ("b.pt", "b.safetensors"):
        convert(path, tmp_path / target)
        assert difference(tree, open_checkpoint(tmp_path / target).tree) is None
    assert differs(tree, torch.load(tmp_path / "b.pt", weights_only=True)) is None


def test_a_view_of_a_storage_is_read(tmp_path: Path) -> None:
    """Torch before 0.4 noted for a storage that is a part of another one where in it that is."""
    part = Storage("1", torch.FloatStorage, "f", FLOATS.values, view=("9", 2, 3))
    tree = [Call(torch._utils._rebuild_tensor, part, 1, (2,), (1,)), PLAIN]
    path = stream(tmp_path / "old.pt", tree)
    live = torch.load(path, weights_only=False)
    assert live[0].tolist() == [4.0, 5.0]
    assert differs(open_checkpoint(path).tree, live) is None


@pytest.mark.parametrize("view", [("9", 6, 3), ("9", -1, 2), ("9", 0, 2.0), ("9", 0), ("9", 0, 1 << 70)])
def test_a_view_outside_of_its_storage_is_refused(view: Any, tmp_path: Path) -> None:
    part = Storage("1", torch.FloatStorage, "f", FLOATS.values, view=view)
    path = stream(tmp_path / "old.pt", Call(torch._utils._rebuild_tensor, part, 0, (1,), (1,)))
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(path)


def test_a_pickle_of_numbers_is_read(tmp_path: Path) -> None:
    """What `pickle.dump` made of a state dict before torch 0.4."""
    tree = {"w": Call(torch._utils._rebuild_tensor, Call(torch.FloatStorage, [1.0, 2.0, 3.0]), 1, (2,), (1,))}
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(tree, 2))
    live = pickle.loads((tmp_path / "old.pkl").read_bytes())
    assert differs(open_checkpoint(tmp_path / "old.pkl").tree, live) is None


@pytest.mark.parametrize(
    "state",
    [(FLOATS, 6, (2, 2), (1, 2)), (LONGS, 0, (2,), (1,)), (FLOATS, 0, (2,)), None, ("x", 0, (2,), (1,)), (True, False)],
)
def test_a_state_that_does_not_fit_is_refused(state: Any, tmp_path: Path) -> None:
    made = Call(torch.FloatTensor, state=state or 7)
    with pytest.raises(CheckpointError):
        open_checkpoint(stream(tmp_path / "old.pt", made))


def test_state_is_given_once(tmp_path: Path) -> None:
    twice = pickle.dumps([Call(torch.FloatTensor, state=("x",)), 0], 2)
    (tmp_path / "a.pkl").write_bytes(twice)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "function", ["_rebuild_xla_tensor", "_rebuild_device_tensor_from_numpy", "_rebuild_hpu_tensor"]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "complex64"])
def test_a_tensor_of_a_device_that_is_stored_as_an_array(
    function: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    monkeypatch.setattr(torch._utils, function, _named(function), raising=False)
    call = Call(getattr(torch._utils, function), array, getattr(torch, dtype), "xla:0", True)
    torch.save({"w": call}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt").tree["w"]
    assert (found.dtype, found.shape, found.requires_grad) == (dtype, (2, 3), True)
    assert found.tobytes() == array.tobytes()


def _named(name: str) -> Callable[..., Any]:
    def function(*_: Any) -> None:
        raise AssertionError

    function.__module__, function.__qualname__, function.__name__ = "torch._utils", name, name
    return function


NOT_SAVED = {f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)}  # by torch.save
NOT_SAVED |= {name for name in DTYPES if not has_dtype(name)}


@pytest.mark.parametrize("dtype", sorted(name for name in DTYPES if not name.startswith("q") and name not in NOT_SAVED))
def test_every_dtype_is_read_and_written(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    live = (
        torch.arange(16, dtype=torch.uint8).view(kind)
        if kind.itemsize == 1
        else torch.arange(16).view(torch.uint8).view(kind)
    )
    torch.save({"w": live}, tmp_path / "a.pt")
    tree = open_checkpoint(tmp_path / "a.pt").tree
    assert (tree["w"].dtype, tree["w"].shape) == (dtype, tuple(live.shape))
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert difference(tree, open_checkpoint(tmp_path / "c.pt").tree) is None
    assert torch.load(tmp_path / "c.pt")["w"].dtype is kind


def test_every_dtype_of_torch_is_known() -> None:
    every = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert every <= set(DTYPES)


def test_complex_numbers_of_two_bfloat16_keep_their_bits_and_their_imaginary_parts(tmp_path: Path) -> None:
    """A dtype of torch 2.14, in a file made of one that every torch has."""
    numbers = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.bfloat16)
    torch.save({"w": torch.view_as_complex(numbers.view(torch.float16).view(2, 2))}, tmp_path / "half.pt")
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(tmp_path / "half.pt") as half, zipfile.ZipFile(path, "w") as made:
        for name in half.namelist():
            made.writestr(name, half.read(name).replace(b"ctorch\ncomplex32\n", b"ctorch\nbcomplex32\n"))
    assert open_checkpoint(path).tree["w"].dtype == "bcomplex32"
    convert(path, tmp_path / "a.safetensors", to="safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt", to="torch")
    assert difference(open_checkpoint(path).tree, open_checkpoint(tmp_path / "b.pt").tree) is None
    if has_dtype("bcomplex32"):
        found = statistics(open_checkpoint(path).tree["w"])
        assert found.norm == pytest.approx(float(numbers.double().norm()))
    else:
        with pytest.raises(UnsupportedTorchError, match="bcomplex32"):
            statistics(open_checkpoint(path).tree["w"])


def foreign() -> dict[str, tuple[Any, str]]:
    """Tensors that stay records, as torch makes them, and what they are called."""
    quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.qint8)
    return {
        "sparse": (torch.eye(3).to_sparse(), "a sparse tensor"),
        "csr": (torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        "quantized": (quantized, "a quantized tensor"),
        "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        "jagged": (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "a nested tensor (NestedTensor)",
        ),
        "meta": (torch.ones(2, device="meta"), "a tensor of the meta device, without elements"),
        "sparse parameter": (torch.nn.Parameter(torch.eye(3).to_sparse()), "a sparse tensor"),
        "subclass": (torch.ones(2).as_subclass(Tagged), f"a tensor of class {__name__}.Tagged"),
        "uninitialized": (torch.nn.parameter.UninitializedParameter(), "a parameter without a shape"),
    }


FOREIGN = (
    "sparse",
    "csr",
    "quantized",
    "nested",
    "jagged",
    "meta",
    "sparse parameter",
    "subclass",
    "uninitialized",
)


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("name", FOREIGN)
def test_other_tensors_are_named_and_copied(name: str, tmp_path: Path) -> None:
    live, words = foreign()[name]
    torch.save({"w": live, "b": torch.ones(1)}, tmp_path / "a.pt")
    document = open_checkpoint(tmp_path / "a.pt")
    assert tensor_kind(document.tree["w"]) == words
    convert(tmp_path / "a.pt", tmp_path / "b.pt")
    back = torch.load(tmp_path / "b.pt", weights_only=False)["w"]
    assert type(back) is type(live)
    if words.startswith("a tensor of the meta"):
        return
    with pytest.raises(RepresentationError, match=re.escape(f"w is {words}, which this container cannot hold")):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")


def test_the_tables_name_every_constructor_of_the_installed_torch() -> None:
    modules = [torch._utils, torch._tensor, torch.nested._internal.nested_tensor]
    found = {f"{module.__name__}.{name}" for module in modules for name in vars(module) if name.startswith("_rebuild_")}
    assert found <= {*spellings.READ, *spellings.RECORDS}
    allowed = set(torch._weights_only_unpickler._get_allowed_globals())
    assert {name for name in allowed if "_rebuild" in name} <= {*spellings.READ, *spellings.RECORDS}
    assert {n for n in allowed if n.endswith("Tensor") and "sparse" not in n and n != "torch.Tensor"} <= set(
        spellings.STORAGE_OF_TENSOR
    )


def test_what_is_no_tensor_is_not_called_one() -> None:
    for node in (3, {}, GlobalName("argparse", "Namespace").record(), GlobalName("my", "_rebuild_tensor")(1)):
        assert tensor_kind(node) is None
    assert tensor_kind(GlobalName("torch._utils", "_rebuild_new")()) == "a tensor rebuilt by torch._utils._rebuild_new"


def _wrapper(path: str) -> Any:
    """The record of a tensor of a class, as torch pickles wrapper subclasses."""
    module, _, name = path.rpartition(".")
    build = GlobalName("torch._utils", "_rebuild_wrapper_subclass")
    kind = GlobalName(module, name)
    arguments = (kind, GlobalName("torch", "float32"), (2,), (1,), 0, None, None, False)
    return GlobalName("torch._tensor", "_rebuild_from_type_v2")(build, kind, arguments, {})


LIBRARIES = {
    "torch.distributed.tensor.DTensor": "a DTensor, one rank's part of a tensor",  # since 2.5
    "torch.distributed._tensor.api.DTensor": "a DTensor, one rank's part of a tensor",  # 2.0 to 2.4
    "torch.distributed._tensor.DTensor": "a DTensor, one rank's part of a tensor",
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor": "a ShardedTensor, one rank's part",  # since 1.11
    "torch.distributed._sharded_tensor.api.ShardedTensor": "a ShardedTensor, one rank's part",  # 1.10
    "torchao.quantization.Int8Tensor": "a quantized tensor of torchao",
    "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor": "a quantized tensor of torchao",
    "torchao.dtypes.nf4tensor.NF4Tensor": "a quantized tensor of torchao",
    "torchao.float8.float8_tensor.Float8Tensor": "a quantized tensor of torchao",
    "torchao.optim.subclass_4bit.OptimState4bit": "a quantized slot of torchao's optimizers",
    "torchao.prototype.low_bit_optim.subclass_8bit.OptimState8bit": "a quantized slot of torchao's optimizers",
    "bitsandbytes.nn.modules.Params4bit": "a quantized weight of bitsandbytes",
    "transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor": "a quantized tensor of Transformer Engine",
    "optimum.quanto.tensor.weights.qbytes.WeightQBytesTensor": "a quantized tensor of quanto",
    "torch.masked.maskedtensor.core.MaskedTensor": "a masked tensor",
    "torch.sparse.semi_structured.SparseSemiStructuredTensorCUTLASS": "a semi-structured sparse tensor",
    "torch._subclasses.fake_tensor.FakeTensor": "a fake tensor, without elements",
}


@pytest.mark.parametrize("path", LIBRARIES)
def test_tensors_of_libraries_are_named_with_what_to_do(path: str) -> None:
    kind = tensor_kind(_wrapper(path))
    assert kind is not None
    assert kind.startswith(LIBRARIES[path])
    assert kind.endswith(f"({path.rpartition('.')[2]})")
    assert remedy_for(kind)
    with pytest.raises(RepresentationError) as caught:
        json_tree.encode({"w": _wrapper(path)}, lambda *_: {}, lambda _: None)
    assert kind in str(caught.value)
    assert remedy_for(kind) in str(caught.value.hint)


def test_every_kind_of_record_has_a_remedy() -> None:
    for path, kind in spellings.RECORDS.items():
        assert remedy_for(kind) or "wrapper" in kind, path


OF_LIBRARIES = {
    "torchao/int8_weight_only": "a quantized tensor of torchao (Int8Tensor)",
    "torchao/adamw8bit": "a quantized slot of torchao's optimizers (OptimState8bit)",
    "bitsandbytes/linear4bit_module": "a quantized weight of bitsandbytes",
    "bitsandbytes/linear8bit_module": "a quantized weight of bitsandbytes",
}


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_what_libraries_save_is_named_and_copied(name: str, tmp_path: Path) -> None:
    (file,) = (file for file in case(name).files if file.suffix == ".pt")
    found = {tensor_kind(node) for node in nodes(open_checkpoint(file).tree)} - {None}
    assert found == {OF_LIBRARIES[name]}
    convert(file, tmp_path / "b.pt")
    assert not diff(file, tmp_path / "b.pt").changes
    with pytest.raises(RepresentationError) as caught:
        convert(file, tmp_path / "b.safetensors")
    assert OF_LIBRARIES[name] in str(caught.value)
    assert "dequantize" in str(caught.value.hint)


@pytest.mark.parametrize("found", [*cases("fsdp1/"), *cases("dcp/")], ids=str)
def test_one_ranks_file_alone_is_named(found: Case, tmp_path: Path) -> None:
    for number, file in enumerate(found.files):
        if file.suffix == ".pt":
            kinds = {tensor_kind(node) for node in nodes(open_checkpoint(file).tree)} - {None}
            if any(str(kind).startswith(("a DTensor", "a ShardedTensor")) for kind in kinds):
                with pytest.raises(RepresentationError, match="one rank's part of a tensor"):
                    convert(file, tmp_path / f"{number}.safetensors")
