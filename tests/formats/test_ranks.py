"""Files of several ranks, put together: what torch gathers, or an error that names parameter and region."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

from optimstate.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats import folder as folders
from optimstate.formats.ranks import files as ranks
from optimstate.formats.ranks.shards import _box_at, _shard_order
from optimstate.formats.registry import open_checkpoint
from optimstate.formats.torch import zip as torch_zip
from optimstate.plan.language.plan import Plan
from optimstate.surgery.writing.converting import convert
from optimstate.surgery.writing.remapping import remap
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName, Opaque, replaced, tensors
from tests import corpus
from tests.formats.truths import judge

FSDP1 = corpus.case("optimstate/ranks_fsdp1")
TENSOR_PARALLEL = corpus.case("optimstate/ranks_tensor_parallel")
FSDP2 = corpus.case("dcp/fsdp2_ws2_dtensor_torchsave_per_rank")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[corpus.Case], Path]:
    return lambda case: Path(shutil.copytree(case.entry, tmp_path / "a"))


place_of = getattr(torch.distributed.tensor._utils, "_compute_local_shape_and_global_offset", None)
computed = pytest.mark.skipif(place_of is None, reason="this torch computes places for its own rank only")


class Coordinates(tuple[int, ...]):
    """A place in a mesh: torch asks a function of the dimension for it, before 2.12 a list."""

    def __call__(self, dimension: int) -> int:
        return self[dimension]


# --- what is there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [FSDP1, TENSOR_PARALLEL, FSDP2], ids=str)
def test_the_ranks_are_what_torch_gathers(case: corpus.Case) -> None:
    document = open_checkpoint(case.entry)
    verdict = judge(document.tree, case.truth())
    assert verdict.wrong == []
    assert verdict.slots == sum(len(slots) - ("__param__" in slots) for slots in case.truth()["state"].values())
    assert any("files of ranks are joined" in note for note in document.notes)


def test_files_are_named_by_what_they_are_together() -> None:
    assert set(open_checkpoint(FSDP1.entry).tree) == {"model.pt", "optim.pt"}
    assert set(open_checkpoint(FSDP2.entry).tree) == {"full.pt"}


def test_values_of_each_rank_are_kept() -> None:
    document = open_checkpoint(TENSOR_PARALLEL.entry)
    assert document.tree["full.pt"]["seed"] == {f"rank{rank}": 100 + rank for rank in range(4)}
    assert any("'seed' differs from rank to rank" in note for note in document.notes)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from optimstate import inspect; report = inspect(sys.argv[1]); "
        "assert 'torch' not in sys.modules; print([s.kind for s in report.sections])"
    )
    command = [sys.executable, "-c", code, str(TENSOR_PARALLEL.entry)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["['model',", "'optimizer']"]


@pytest.mark.parametrize(("case", "name"), [(FSDP1, "optim.pt"), (TENSOR_PARALLEL, "full.pt")], ids=str)
def test_torch_loads_the_one_file_made_of_them(case: corpus.Case, name: str, tmp_path: Path) -> None:
    convert(case.entry, tmp_path / "a.pt")
    live = torch.load(tmp_path / "a.pt", weights_only=True)
    found = dict(tensors(open_checkpoint(case.entry).tree))
    assert found
    for path, tensor in found.items():
        node = live
        for key in path:
            node = node[key]
        assert type(node) is torch.Tensor
        assert (tuple(node.shape), node.numpy().tobytes()) == (tensor.shape, tensor.tobytes())
    assert judge(open_checkpoint(tmp_path / "a.pt").tree, case.truth()).wrong == []


def test_a_remapped_folder_has_one_file_where_there_were_ranks(tmp_path: Path) -> None:
    report = remap(FSDP1.entry, tmp_path / "a", plan=Plan.from_options(rename=["up.{p}=wide.{p}"]))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["model.pt", "optim.pt"]
    assert any("one file with full tensors, made of those of 2 ranks" in note for note in report.notes)
    truth = json.loads(json.dumps(FSDP1.truth()).replace('"up.', '"wide.'))
    assert judge(open_checkpoint(tmp_path / "a").tree, truth).wrong == []


def test_a_folder_copied_as_it_is_keeps_the_files_of_its_ranks(tmp_path: Path) -> None:
    document = open_checkpoint(FSDP1.entry)
    folders.write(document.tree, tmp_path / "a", like=document)
    for file in FSDP1.files:
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()


# --- what is missing ------------------------------------------------------------------------------------------------


def test_a_missing_rank_is_named_with_the_region(folder: Callable[[corpus.Case], Path]) -> None:
    path = folder(FSDP1)
    (path / "optim_rank1.pt").unlink()
    with pytest.raises(
        CorruptCheckpointError,
        match=r"optim\.pt: state\['down\.weight'\]\['exp_avg'\] of shape \[3, 10\] lacks \[2:3, 0:10\], the part of "
        r"rank 1: it is in none of optim_rank0\.pt\n.*all ranks",
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("rank", range(4))
def test_any_missing_rank_of_a_mesh_is_noticed(rank: int, folder: Callable[[corpus.Case], Path]) -> None:
    path = folder(TENSOR_PARALLEL)
    (path / f"rank_{rank}.pt").unlink()
    with pytest.raises(
        CorruptCheckpointError, match=rf"lacks \[.*position \({rank // 2}, {rank % 2}\) in the mesh \(2, 2\)"
    ):
        open_checkpoint(path)


def test_a_rank_that_is_there_twice_stands_for_no_other(folder: Callable[[corpus.Case], Path]) -> None:
    path = folder(FSDP2)
    shutil.copy(path / "rank0.pt", path / "rank1.pt")
    with pytest.raises(CorruptCheckpointError, match=r"lacks \[17:33, 0:8\], the part of position \(1,\)"):
        open_checkpoint(path)


def test_ranks_of_different_runs_are_refused(folder: Callable[[corpus.Case], Path]) -> None:
    path = folder(FSDP2)
    document = torch_zip.read(path / "rank1.pt")
    other = dict(document.tree["optimizer"]["state"])
    del other[3]
    tree = replaced(document.tree, {id(document.tree["optimizer"]["state"]): other})
    torch_zip.write(tree, path / "b.pt", like=document)
    (path / "b.pt").replace(path / "rank1.pt")
    with pytest.raises(
        CorruptCheckpointError, match=r"optimizer\['state'\]\['3'\] is in rank0\.pt but not in rank1\.pt"
    ):
        open_checkpoint(path)


def with_step(path: Path, file: str, step: float) -> None:
    """Change the step count of one parameter in one file."""
    document = torch_zip.read(path / file)
    state = document.tree["optimizer"]["state"]
    torch.save({"t": torch.tensor(step)}, path / "step.tmp")
    changed = {**state[0], "step": torch_zip.read(path / "step.tmp").tree["t"]}
    torch_zip.write(replaced(document.tree, {id(state[0]): changed}), path / "b.pt", like=document)
    (path / "b.pt").replace(path / file)
    (path / "step.tmp").unlink()


def test_a_step_that_is_not_that_of_the_others_is_refused(folder: Callable[[corpus.Case], Path]) -> None:
    path = folder(FSDP2)
    with_step(path, "rank1.pt", 9.0)
    with pytest.raises(
        CorruptCheckpointError,
        match=r"optimizer\['state'\]\[0\]\['step'\] is not sharded, but differs between rank0\.pt and rank1",
    ):
        open_checkpoint(path)


def test_a_buffer_that_differs_is_that_of_the_first_rank_and_noted(tmp_path: Path) -> None:
    for rank in range(4):
        document = torch_zip.read(TENSOR_PARALLEL.entry / f"rank_{rank}.pt")
        torch.save({"t": torch.full((2,), float(rank))}, tmp_path / "t.tmp")
        model = {**document.tree["model"], "count": torch_zip.read(tmp_path / "t.tmp").tree["t"]}
        tree = replaced(document.tree, {id(document.tree["model"]): model})
        (tmp_path / "a").mkdir(exist_ok=True)
        torch_zip.write(tree, tmp_path / "a" / f"rank_{rank}.pt", like=document)
    document = open_checkpoint(tmp_path / "a")
    assert document.tree["full.pt"]["model"]["count"].tobytes() == torch.zeros(2).numpy().tobytes()
    assert any("model['count'] differs from rank to rank" in note for note in document.notes)


def test_flat_parameters_are_not_put_together() -> None:
    """Without the wrapping of the model nobody knows what is in them."""
    assert set(open_checkpoint(corpus.case("fsdp1/raw_flatparam_per_rank").entry).tree) == {
        "optim_rank0.pt",
        "optim_rank1.pt",
    }


def dtensor(path: Path) -> Opaque:
    document = torch_zip.read(path)
    return next(iter(document.tree["model"].values()))


def test_a_pending_reduction_is_refused_by_name(folder: Callable[[corpus.Case], Path]) -> None:
    path = folder(FSDP2)
    trees = {}
    for rank in range(2):
        document = torch_zip.read(path / f"rank{rank}.pt")
        record = document.tree["model"]["tok.weight"]
        spec = record.arguments[3][1]["_spec"]
        partial = GlobalName("torch.distributed.tensor.placement_types", "Partial").record()
        partial.state = {"reduce_op": "sum"}
        spec.state["placements"] = (partial,)
        trees[f"rank{rank}.pt"] = document
    with pytest.raises(UnsupportedCheckpointError, match=r"'tok\.weight'.* in rank0\.pt: a DTensor placed as Partial"):
        ranks.join_ranks(path / "full.pt", trees)


@pytest.mark.parametrize("broken", ["mesh", "placements", "_coordinate_on_dim", "_local_tensor"])
def test_a_record_of_another_form_is_an_error_not_a_guess(broken: str) -> None:
    documents = {f"rank{rank}.pt": torch_zip.read(FSDP2.entry / f"rank{rank}.pt") for rank in range(2)}
    fields = documents["rank0.pt"].tree["model"]["tok.weight"].arguments[3][1]
    spec = fields["_spec"].state
    if broken == "_local_tensor":
        fields[broken] = None
    elif broken == "_coordinate_on_dim":
        spec["mesh"].state[broken] = (7,)
    else:
        spec[broken] = ("x",)
    with pytest.raises(CheckpointError, match=r"in rank0\.pt"):
        ranks.join_ranks(FSDP2.entry / "full.pt", documents)


# --- where a part is ------------------------------------------------------------------------------------------------


def placement_record(placement: Any) -> Opaque:
    kind = type(placement).__name__
    record = GlobalName("torch.distributed.tensor.placement_types", kind).record()
    record.state = {} if kind == "Replicate" else {"dim": placement.dim}
    if kind == "_StridedShard":
        record.state["split_factor"] = placement.split_factor
    return record


@computed
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_parts_are_where_torch_has_them(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    mesh = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    kinds = st.one_of(st.just(Replicate()), st.builds(Shard, st.integers(0, len(shape) - 1)))
    placements = [data.draw(kinds) for _ in mesh]
    spec = {"placements": tuple(map(placement_record, placements)), "shard_order": None}
    order = _shard_order(spec, mesh)
    for place in product(*map(range, mesh)):
        sizes, offsets = place_of(shape, mesh, Coordinates(place), placements)
        found = _box_at(shape, place, mesh, order)
        assert found[1] == tuple(sizes)
        if 0 not in sizes:
            assert found[0] == tuple(offsets)


@computed
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_strided_shards_are_where_torch_has_them(data: st.DataObject) -> None:
    """FSDP over tensor parallelism: the later dimension of the mesh has cut first."""
    mesh = tuple(data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=2)))
    rows = data.draw(st.integers(1, 3)) * mesh[0] * mesh[1]
    placements = [_StridedShard(0, split_factor=mesh[1]), Shard(0)]
    spec = {"placements": tuple(map(placement_record, placements)), "shard_order": None}
    order = _shard_order(spec, mesh)
    assert order == {0: [1, 0]}
    for place in product(*map(range, mesh)):
        sizes, offsets = place_of((rows, 5), mesh, Coordinates(place), placements)
        assert _box_at((rows, 5), place, mesh, order) == (tuple(offsets), tuple(sizes))


def test_a_stated_order_holds() -> None:
    entry = GlobalName("torch.distributed.tensor._dtensor_spec", "ShardOrderEntry").record(0, (1, 0))
    spec = {"placements": tuple(map(placement_record, [Shard(0), Shard(0)])), "shard_order": (entry,)}
    assert _shard_order(spec, (2, 2)) == {0: [1, 0]}
    spec_module = pytest.importorskip("torch.distributed.tensor._dtensor_spec")
    ShardOrderEntry = getattr(spec_module, "ShardOrderEntry", None)
    if ShardOrderEntry is None:
        pytest.skip("this torch has no shard order")
    assert ShardOrderEntry(0, (1, 0)) == (0, (1, 0))
    assert DTensorSpec.compute_default_shard_order((Shard(0), Shard(0))) == (ShardOrderEntry(0, (0, 1)),)


def test_meshes_of_older_torch() -> None:
    from optimstate.formats.ranks.shards import _mesh_shape
    from optimstate.tensors.lazy import Storage

    assert _mesh_shape({"mesh": LazyTensor(Storage((), 0), "int32", (2, 3))}) == (2, 3)
    layout = GlobalName("torch.distributed._mesh_layout", "_MeshLayout").record()
    layout.state = {"shape": (2, (3, 2)), "stride": (6, (2, 1))}
    assert _mesh_shape({"_layout": layout}) == (2, 6)
    layout.state = {"shape": 4, "stride": 1}
    assert _mesh_shape({"_layout": layout}) == (4,)
