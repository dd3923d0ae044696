"""A changed byte is told, or without effect; a digest makes that true of safetensors too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import optimstate
from optimstate.distributed import fill_state_dict
from optimstate.errors import CorruptCheckpointError, OptimStateError, UsageError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.surgery.verification.verifying import verify
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import difference, nodes
from tests.hostile.flips import CHECKPOINTS, WITHOUT_CHECKSUMS, flips, made


@pytest.mark.parametrize("container", CHECKPOINTS)
def test_no_changed_byte_is_missed_or_copied(container: str) -> None:
    """A sample of `python -m tests.hostile.flips`."""
    for told, where in flips(container, 4, seed=1):
        assert told in ("refused", "found", "same") or where.startswith(WITHOUT_CHECKSUMS), where


@pytest.mark.parametrize("container", CHECKPOINTS)
def test_a_changed_byte_of_a_tensor_is_told_by_name_and_never_copied(container: str, tmp_path: Path) -> None:
    path = made(container, tmp_path)
    document = open_checkpoint(path)
    tensors = [node for node in nodes(document.tree) if isinstance(node, LazyTensor) and node.nbytes >= 16]
    assert tensors
    for tensor in tensors[:: max(1, len(tensors) // 3)]:
        extent = max(tensor.extents(), key=lambda extent: extent.length)
        file = extent.source.path
        whole = file.read_bytes()
        at = extent.offset + extent.length // 2
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        report = verify(path, numbers=False)
        assert [finding.kind for finding in report.findings if finding.level == "fault"] == ["checksum"]
        assert "the bytes of " in str(report)
        with pytest.raises(CorruptCheckpointError, match="do not match their checksum"):
            optimstate.convert(path, tmp_path / "out.pt")
        assert not (tmp_path / "out.pt").exists()
        file.write_bytes(whole)
    assert verify(path, numbers=False).healthy


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3"])
def test_digests_are_those_of_the_library(algorithm: str, tmp_path: Path) -> None:
    if algorithm == "xxh3":
        hashed = pytest.importorskip("xxhash").xxh3_128
    else:
        from hashlib import sha256 as hashed
    from safetensors import safe_open

    path = tmp_path / "out.safetensors"
    optimstate.convert(CHECKPOINTS["torch"], path, options=WriteOptions(digest=algorithm))
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["optimstate.digest"])
        assert about["algorithm"] == algorithm
        names = list(file.keys())
        assert about["tensors"] == {name: hashed(file.get_tensor(name).tobytes()).hexdigest() for name in names}
    assert difference(open_checkpoint(CHECKPOINTS["torch"]).tree, open_checkpoint(path).tree) is None


def test_a_file_with_digests_keeps_them_and_shards_have_their_own(tmp_path: Path) -> None:
    path = made("safetensors", tmp_path)
    optimstate.convert(path, tmp_path / "shards", options=WriteOptions(shard_size=30_000))
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(data)
    assert [finding.place for finding in verify(tmp_path / "shards", numbers=False).findings] == [files[-1].name]


def test_a_digest_where_none_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of torch"):
        optimstate.convert(CHECKPOINTS["torch"], tmp_path / "out.pt", options=WriteOptions(digest="sha256"))
    with pytest.raises(UsageError, match="sha256"):
        optimstate.convert(CHECKPOINTS["torch"], tmp_path / "out.safetensors", options=WriteOptions(digest="sha1"))
    assert list(tmp_path.iterdir()) == []


def test_a_header_of_digests_that_lacks_a_tensor_is_damaged(tmp_path: Path) -> None:
    path = made("safetensors", tmp_path)
    path.write_bytes(path.read_bytes().replace(b'\\"tensors\\"', b'\\"tensor_\\"'))
    with pytest.raises(OptimStateError, match=r"optimstate\.digest is malformed"):
        open_checkpoint(path)


def test_remap_does_not_copy_damage(tmp_path: Path) -> None:
    path = made("torch", tmp_path)
    document = open_checkpoint(path)
    tensor = max((node for node in nodes(document.tree) if isinstance(node, LazyTensor)), key=lambda t: t.nbytes)
    data = bytearray(path.read_bytes())
    data[tensor.storage.pieces[0].offset] ^= 1
    path.write_bytes(data)
    plan = optimstate.Plan.from_options(rename=["transformer.{r**}=t.{r**}"])
    with pytest.raises(CorruptCheckpointError):
        optimstate.remap(path, tmp_path / "out.pt", plan)
    assert not (tmp_path / "out.pt").exists()
    assert optimstate.remap(path, tmp_path / "out.pt", plan, verify=False).written


@pytest.mark.parametrize("by", ["resume", "fill_state_dict"])
def test_what_a_run_reads_is_compared(by: str, tmp_path: Path) -> None:
    """Damage that torch would load: nothing of it is resumed, and what is not read does not matter."""
    import torch

    path = tmp_path / "checkpoint.pt"
    saved = torch.nn.Linear(30, 20)
    torch.save({"model": saved.state_dict(), "ema": torch.nn.Linear(30, 20).state_dict()}, path)
    whole = path.read_bytes()
    model = torch.nn.Linear(30, 20)
    before = model.weight.detach().clone()

    def load(part: str) -> None:
        if by == "resume":
            optimstate.resume(path, model={part: model})
        else:
            fill_state_dict({part: model.state_dict()}, path)

    for part in ("model", "ema"):
        tensor = optimstate.open_checkpoint(path).tree[part]["weight"]
        at = tensor.extents()[0].offset + 1000
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptCheckpointError, match=r"the bytes of .*weight.* do not match"):
            load(part)
        assert torch.equal(model.weight, before)
        if part == "ema":
            load("model")
            assert torch.equal(model.weight, saved.weight)
        path.write_bytes(whole)
