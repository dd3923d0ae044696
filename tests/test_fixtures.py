"""The manifest tells the truth about the fixtures, and the generating scripts write them again."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.generate.__main__ import write_case
from fixtures.generate._truth import TreeTruth, raw_bytes, tensor_truth, value_truth
from fixtures.generate.cases import CASES
from tests import corpus

# No optimizer stood beside what they hold.
WITHOUT_TRUTH = {
    "nanogpt/ckpt",
    "bitsandbytes/linear4bit_module",
    "bitsandbytes/linear8bit_module",
    "torchao/int8_weight_only",
}
GENERATED = {case.name: case for case in CASES}
# Tensor types that warn when torch first meets them in a process.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def manifest() -> dict[str, Any]:
    return json.loads(corpus.MANIFEST.read_text(encoding="utf-8"))


def load(path: Path) -> Any:
    """Load one of our own files in full; the hostile ones must never come here."""
    assert "hostile" not in str(path)
    return torch.load(path, weights_only=False)


def same(one: Any, other: Any) -> bool:
    """Equal trees: types, keys, order, and tensors bit by bit except for the last bits of floats."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        about = [(t.shape, t.dtype, t.layout, t.device) for t in (one, other)]
        if about[0] != about[1]:
            return False
        if one.layout != torch.strided or one.device.type == "meta":
            return one.device.type == "meta" or torch.equal(one.to_dense(), other.to_dense())
        if one.stride() != other.stride():
            return False
        if raw_bytes(one) == raw_bytes(other):
            return True
        return one.dtype in {torch.float32, torch.complex64} and torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    if isinstance(one, dict):
        return list(map(repr, one)) == list(map(repr, other)) and all(
            (a is one and b is other) or same(a, b) for a, b in zip(one.values(), other.values(), strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


DRAWS_SHARDS_OTHERWISE = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def nearly(one: Any, other: Any) -> bool:
    """Equal truths, but for the last bits of floats and so the digests."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(nearly(one[key], other[key]) for key in one.keys() - {"sha256"})
    if isinstance(one, list):
        return len(one) == len(other) and all(map(nearly, one, other))
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6))


def test_the_manifest_lists_every_file_and_no_other() -> None:
    listed = [f["path"] for entry in manifest()["cases"] for f in [*entry["files"], entry["truth"]] if f]
    on_disk = {path.relative_to(corpus.FILES).as_posix() for path in corpus.FILES.rglob("*") if path.is_file()}
    assert sorted(listed) == sorted(on_disk)


@pytest.mark.parametrize("entry", manifest()["cases"], ids=lambda entry: entry["case"])
def test_a_case_is_as_the_manifest_says(entry: dict[str, Any]) -> None:
    for file in [*entry["files"], entry["truth"]]:
        if file:
            content = (corpus.FILES / file["path"]).read_bytes()
            assert len(content) == file["size"]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
    case = corpus.case(entry["case"])
    assert case.entry.exists()
    assert all(case.entry == path or case.entry in path.parents for path in case.files)
    assert case.covers
    assert (case.truth_path is None) == (case.name in WITHOUT_TRUTH)


def test_cases_are_sorted_unique_and_small() -> None:
    names = [entry["case"] for entry in manifest()["cases"]]
    assert names == sorted(set(names))
    assert sum(path.stat().st_size for path in corpus.FILES.rglob("*") if path.is_file()) < 6_000_000


def test_no_file_holds_a_path_of_the_machine_that_wrote_it() -> None:
    private = re.compile(rb"/home/|/Users/|/tmp/|/root/|/mnt/|[A-Z]:\\Users|localhost|site-packages")
    found = [path.name for path in corpus.FILES.rglob("*") if path.is_file() and private.search(path.read_bytes())]
    assert found == []


def test_exactly_the_committed_cases_of_the_table_are_there() -> None:
    committed = sorted(f"optimstate/{case.name}" for case in CASES if case.committed)
    assert [case.name for case in corpus.cases("optimstate/")] == committed
    assert all(case.generated_by for case in corpus.cases("optimstate/"))


@pytest.mark.parametrize("name", [case.name for case in CASES if case.committed])
def test_writing_a_case_again_gives_an_equal_checkpoint(name: str, tmp_path: Path) -> None:
    write_case(GENERATED[name], tmp_path)
    case = corpus.case(f"optimstate/{name}")
    if len(case.files) > 1:  # of several ranks: torch loads such files only where there are as many processes
        truth = json.loads((tmp_path / f"{name}.truth.json").read_text(encoding="utf-8"))
        if name == "ranks_tensor_parallel" and DRAWS_SHARDS_OTHERWISE:
            pytest.skip("this torch initialises sharded parameters with other numbers")
        assert nearly(truth, case.truth())
        assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in case.files}
        return
    (again,) = (path for path in (tmp_path / name).iterdir())
    if case.is_hostile:
        # Never loaded; the legacy container names storages by their address, which differs each time.
        assert again.read_bytes() == case.entry.read_bytes() or name == "hostile_legacy"
    else:
        made, kept = load(again), load(case.entry)
        if case.optimizer == "LBFGS" and "maximize" not in kept["optimizer"]["param_groups"][0]:
            made["optimizer"]["param_groups"][0].pop("maximize", None)  # which LBFGS has from torch 2.14 on
        assert same(made, kept)


HARMLESS = [case for case in corpus.cases("optimstate/") if not case.is_hostile and len(case.files) == 1]


@pytest.mark.parametrize("case", [case for case in HARMLESS if "tensors" in case.truth()], ids=str)
def test_a_tree_truth_is_what_torch_loads(case: corpus.Case) -> None:
    truth = case.truth()
    loaded = load(case.entry)
    found = TreeTruth(loaded)
    assert json.loads(json.dumps(found.tensors)) == truth["tensors"]
    assert json.loads(json.dumps(found.values)) == truth["values"]
    for place, tensor in truth["tensors"].items():
        assert list(corpus.subscript(loaded, place).shape) == tensor["shape"]


def check_optimizer_truth(truth: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Groups, slots by name and model tensors of a truth are those of a loaded checkpoint."""
    optimizer = checkpoint["optimizer"]
    names = [name for group in truth["groups"] for name in group["params"]]
    indices = [index for group in optimizer["param_groups"] for index in group["params"]]
    for group, expected in zip(optimizer["param_groups"], truth["groups"], strict=True):
        assert group.get("param_names", expected["params"]) == expected["params"]
        assert set(group) - {"params", "param_names"} == set(expected) - {"params"}
    state = optimizer["state"]
    by_name = {name: state[index] for index, name in zip(indices, names, strict=True) if index in state}
    assert set(by_name) == set(truth["state"])
    for name, slots in truth["state"].items():
        about = slots.pop("__param__")
        assert about["shape"] == list(checkpoint["model"][name].shape)
        assert json.loads(json.dumps({slot: value_truth(v) for slot, v in by_name[name].items()})) == slots
    assert {name: tensor_truth(value) for name, value in checkpoint["model"].items()} == truth["model"]


@pytest.mark.parametrize("case", [case for case in HARMLESS if "state" in case.truth()], ids=str)
def test_an_optimizer_truth_is_what_torch_loads(case: corpus.Case) -> None:
    check_optimizer_truth(case.truth(), load(case.entry))


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.committed])
def test_a_case_that_is_not_committed_can_be_written(name: str, tmp_path: Path) -> None:
    write_case(GENERATED[name], tmp_path)
    truth = json.loads((tmp_path / f"{name}.truth.json").read_text(encoding="utf-8"))
    checkpoint = load(tmp_path / name / "checkpoint.pt")
    if "state" in truth:
        check_optimizer_truth(truth, checkpoint)
    else:
        assert json.loads(json.dumps(TreeTruth(checkpoint).tensors)) == truth["tensors"]


def test_hostile_cases_name_a_command_and_torch_refuses_them() -> None:
    hostile = corpus.cases("optimstate/hostile_")
    assert len(hostile) == 3
    for case in hostile:
        content = case.entry.read_bytes()
        if zipfile.is_zipfile(case.entry):
            content = zipfile.ZipFile(case.entry).read("checkpoint/data.pkl")
        assert b"system" in content
        assert case.truth()["hostile"]["leaves"].encode() in content
        if corpus.container_of(case.entry) != "pickle":
            with pytest.raises(pickle.UnpicklingError, match="system"):
                torch.load(case.entry, weights_only=True)
    assert not Path(hostile[0].truth()["hostile"]["leaves"]).exists()


def test_containers_are_told_apart_by_their_first_bytes() -> None:
    kinds = {
        kind: len(corpus.files_in(kind)) for kind in ("torch_zip", "torch_legacy", "safetensors", "pickle", "distcp")
    }
    assert all(kinds.values())
    assert corpus.container_of(corpus.case("torch/legacy_adamw").entry) == "torch_legacy"
    assert corpus.container_of(corpus.case("optimstate/hostile_pickle").entry) == "pickle"
    assert corpus.container_of(corpus.case("torch/adam_named_wd").entry) == "torch_zip"


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(LookupError, match="no case"):
        corpus.case("torch/none")
    with pytest.raises(LookupError, match="starts with"):
        corpus.cases("none/")
