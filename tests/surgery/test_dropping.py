"""Copies without objects of other classes: `torch.load(weights_only=True)` takes them, and every loss is named."""

from __future__ import annotations

import argparse
import collections
import enum
import fractions
import json
import pathlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import optimstate
from optimstate.errors import RepresentationError
from optimstate.formats.registry import open_checkpoint
from optimstate.installed_torch import has_dtype
from optimstate.tree import Opaque, tensors
from tests import corpus

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Mode(enum.Enum):
    FAST = 1


class Bag:
    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


class Text(str):
    __slots__ = ()


def saved(tree: Any, folder: Path) -> Path:
    torch.save(tree, folder / "source.pt")
    return folder / "source.pt"


def copied(tree: Any, folder: Path) -> tuple[Any, optimstate.surgery.writing.converting.ConvertReport]:
    report = optimstate.convert(saved(tree, folder), folder / "copy.pt", drop_opaque=True)
    return torch.load(folder / "copy.pt", weights_only=True), report


FILES = [
    case for case in corpus.cases() if case.entry.is_file() and case.entry.suffix in {".pt", ".pth", ".ckpt", ".bin"}
]


REFUSED = {
    ("optimstate/objects_containers", ".safetensors"): "contains itself",
    **{("torchao/int8_weight_only", suffix): "which would be lost" for suffix in (".pt", ".safetensors")},
}


@pytest.mark.parametrize("case", FILES, ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_copy_is_taken_and_counted(case: corpus.Case, suffix: str, tmp_path: Path) -> None:
    if (case.name, suffix) == ("optimstate/tensors_dtypes", ".pt") and not has_dtype("float8_e8m0fnu"):
        pytest.skip("this torch lacks one of the dtypes")
    options = optimstate.formats.protocol.WriteOptions(sync=False, clone_views=suffix != ".pt")
    convert = partial(optimstate.convert, case.entry, tmp_path / f"copy{suffix}", drop_opaque=True, options=options)
    if (case.name, suffix) in REFUSED:
        with pytest.raises(RepresentationError, match=REFUSED[case.name, suffix]):
            convert()
        assert not list(tmp_path.iterdir())
        return
    planned, report = convert(dry_run=True), convert()
    back = open_checkpoint(tmp_path / f"copy{suffix}").tree
    found = sum(1 for _ in tensors(back))
    assert (report.tensors, report.nbytes) == (planned.tensors, planned.nbytes)
    if suffix == ".pt":
        torch.load(tmp_path / "copy.pt", weights_only=True)
        assert report.tensors == found
    else:
        with safe_open(tmp_path / "copy.safetensors", "pt") as file:
            assert report.tensors >= len(file.keys())
    if report.tensors < sum(1 for _ in tensors(open_checkpoint(case.entry).tree)):
        assert any("left out" in note for note in report.notes)


def test_plain_contents_stay_and_what_goes_is_named(tmp_path: Path) -> None:
    tree = {
        "w": torch.ones(2),
        "args": argparse.Namespace(lr=0.1, where=pathlib.PurePosixPath("a") / "b", mode=Mode.FAST),
        "counts": collections.defaultdict(list, a=[1]),
        "last": collections.deque([1, 2]),
        "best": np.float32(0.5),
        "rng": ("MT19937", np.arange(4, dtype=np.uint32), 3),
        "version": torch.__version__,
        "ratio": [fractions.Fraction(1, 2), 3],
        "bag": Bag(kept=1, moment=torch.zeros(3)),
        "class": Bag,
        "size": torch.Size([2]),
        "order": OrderedDict(a=1),
        "frozen": [frozenset({1}), b"", {frozenset({2}): 1}],
    }
    made, report = copied(tree, tmp_path)
    assert made["args"] == {"lr": 0.1, "where": "a/b"}
    assert made["counts"] == {"a": [1]}
    assert made["last"] == [1, 2]
    assert made["best"] == 0.5
    assert made["rng"][1].tolist() == [0, 1, 2, 3]
    assert made["version"] == str(torch.__version__)
    assert made["ratio"] == [None, 3]
    assert made["size"] == torch.Size([2])
    assert type(made["order"]) is OrderedDict
    assert made["frozen"] == [{1}, b"", {}]
    assert "bag" not in made
    assert "class" not in made
    lost = [note for note in report.notes if note.startswith("left out")]
    assert len(lost) == 4
    assert any("args['mode'] is an object of" in note for note in lost)
    assert any("bag is" in note and "with 1 tensor in it, 12 B: bag['moment']" in note for note in lost)
    assert report.tensors == 2


def test_a_tensor_that_stays_elsewhere_is_not_lost(tmp_path: Path) -> None:
    shared = torch.ones(3)
    _, report = copied({"w": shared, "bag": Bag(w=shared)}, tmp_path)
    assert [note for note in report.notes if "left out" in note] == [f"left out: bag is an object of {__name__}.Bag"]


@pytest.mark.parametrize(
    "tree", [Bag(), [Bag(), Bag()], {"a": Bag()}, (Bag(),), torch.nn.Linear(2, 2), {"a": [{"b": Bag()}]}]
)
@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "b.dcp"])
def test_nothing_but_objects_is_refused(tree: Any, target: str, tmp_path: Path) -> None:
    with pytest.raises(RepresentationError, match="nothing would be left to write"):
        optimstate.convert(saved(tree, tmp_path), tmp_path / target, drop_opaque=True)
    assert not (tmp_path / target).exists()


def test_weights_are_not_dropped(tmp_path: Path) -> None:
    source = saved({"epoch": 3, "net": [torch.nn.Linear(2, 2)]}, tmp_path)
    with pytest.raises(RepresentationError, match="2 tensors of a model, which would be lost") as caught:
        optimstate.convert(source, tmp_path / "b.pt", drop_opaque=True)
    assert "--section net[0]" in caught.value.hint
    optimstate.convert(source, tmp_path / "b.safetensors", section="net[0]")
    assert set(open_checkpoint(tmp_path / "b.safetensors").tree) == {"weight", "bias"}


def test_text_and_numbers_of_other_classes_become_plain_without_an_option(tmp_path: Path) -> None:
    source = saved({"w": torch.ones(1), "v": [Text("abc")]}, tmp_path)
    report = optimstate.convert(source, tmp_path / "b.safetensors")
    assert report.notes == (f"v[0], an object of {__name__}.Text, is kept as 'abc'",)
    assert open_checkpoint(tmp_path / "b.safetensors").tree["v"] == ["abc"]


OBJECTS = st.sampled_from([Bag(), Mode.FAST, fractions.Fraction(1, 3), Bag])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | OBJECTS
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


def without_objects(node: Any) -> Any:
    """By hand: entries of dicts go, positions in lists hold None."""
    if isinstance(node, dict):
        return {key: without_objects(value) for key, value in node.items() if not is_object(value)}
    if isinstance(node, list | tuple):
        return type(node)(None if is_object(item) else without_objects(item) for item in node)
    return node


def is_object(node: Any) -> bool:
    return isinstance(node, Bag | Mode | fractions.Fraction | type)


@settings(max_examples=60)
@given(tree=TREES)
def test_any_tree_loses_its_objects_and_nothing_else(tree: Any, tmp_path: Path) -> None:
    made, report = copied({"keep": 1, "tree": [tree]}, tmp_path)
    assert made == {"keep": 1, "tree": without_objects([tree])}
    assert json.loads(report.to_json())["written"] is True
    records = [node for node in (open_checkpoint(tmp_path / "copy.pt").tree,) if isinstance(node, Opaque)]
    assert not records
    (tmp_path / "copy.pt").unlink()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["sparse", "quantized"])
@pytest.mark.parametrize("name", ["fc.weight", "weight"])
def test_a_weight_in_a_form_of_its_own_is_not_dropped(form: str, name: str, tmp_path: Path) -> None:
    made = (
        torch.eye(3).to_sparse() if form == "sparse" else torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    )
    source = saved({"model": {name: made, "fc.bias": torch.ones(3), "fc.scale": torch.ones(3, 3)}}, tmp_path)
    with pytest.raises(RepresentationError, match=f"is a {form} tensor of the model, which would be lost") as caught:
        optimstate.convert(source, tmp_path / "b.safetensors", drop_opaque=True)
    assert "A torch file keeps them" in caught.value.hint
    assert not (tmp_path / "b.safetensors").exists()
