"""What `docs/remote.md` shows works against a server of S3; `resume` reads its own bytes from there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from tests.documents import ROOT, follow
from tests.remote.server import RangeServer


def test_what_the_page_shows_works(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimstate.io.remote.objects import _client
    from tests.remote.conftest import Bucket

    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.chdir(tmp_path)
    bucket = Bucket(_client(moto, "us-east-1"), "checkpoints")
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
    optimizer = torch.optim.AdamW(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    bucket.put(tmp_path / "run.pt", "run.pt")
    fresh = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})
    scope: dict[str, Any] = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.named_parameters())}
    follow((ROOT / "docs" / "remote.md").read_text(encoding="utf-8"), tmp_path, scope)
    assert scope["weight"] == model["head"].weight.detach().numpy().tobytes()
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    assert not optimstate.diff("s3://checkpoints/copy.pt", tmp_path / "run.pt").changes
    assert "trunk.weight" in optimstate.open_checkpoint("s3://checkpoints/new.pt").tree["model"]


@pytest.mark.slow
def test_a_sharded_resume_under_a_plan_reads_its_share(ranges: RangeServer) -> None:
    """Two processes of FSDP2 save, train on, and resume the renamed model from the store: the same losses."""
    folder = ranges.root / "bucket" / "checkpoint"
    folder.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.remote.sharded_worker", str(folder), "s3://bucket/checkpoint"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    size = sum(file.stat().st_size for file in folder.iterdir())
    for rank in range(2):
        said = json.loads(folder.with_name(f"said{rank}.json").read_text())
        assert said["losses"] == said["expected"]
        assert said["read"] < 0.65 * size, (said["read"], size)
