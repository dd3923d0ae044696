"""The properties of `tests.sweep` hold for every fixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import optimstate
from tests import corpus, sweep

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of old and of odd tensors


def test_what_is_seen_of_every_file_is_what_torch_loads() -> None:
    before = None
    compared = 0
    for path in sweep.checkpoints([corpus.FILES]):
        found, live = sweep.failures(path, before)
        assert found == [], path
        before = (path, live) if live is not None else before
        compared += live is not None
    assert compared > 160


@pytest.mark.parametrize("case", corpus.cases("dcp/"), ids=str)
def test_every_tensor_of_a_distributed_checkpoint_is_counted(case: corpus.Case) -> None:
    if not (case.entry / ".metadata").is_file():
        pytest.skip("without metadata")
    metadata = FileSystemReader(case.entry).read_metadata()
    tensors = sum(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values())
    assert optimstate.inspect(case.entry).tensors == tensors


def test_a_fault_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.pt")
    assert sweep.main([str(tmp_path)]) == 0
    monkeypatch.setattr(sweep, "tensors_in", lambda _: 3)
    assert sweep.main([str(tmp_path)]) == 1
