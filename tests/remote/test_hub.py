"""Repositories of the Hub are read at one commit; the token goes to the Hub and to nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import optimstate
from optimstate.errors import CheckpointNotFoundError
from tests.remote.conftest import SECRET
from tests.remote.server import RangeServer, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_repository_is_read_at_its_commit_by_way_of_a_redirect(
    web: RangeServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("urllib3")
    monkeypatch.setenv("HF_ENDPOINT", web.address)
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    size = checkpoint.stat().st_size
    for path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
        about = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": "run.pt", "size": size}]}
        web.faults[path] = json.dumps(about).encode()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "blob").write_bytes(checkpoint.read_bytes())
    with serving(other) as elsewhere:
        web.faults[f"/owner/name/resolve/{COMMIT}/run.pt"] = f"{elsewhere.address}/blob?signature={SECRET}"
        for name in ("hf://owner/name/run.pt", "hf://owner/name@main/run.pt", "hf://owner/name"):
            found = optimstate.inspect(name)
            assert found.tensors == 24
            assert found.path.startswith(f"hf://owner/name@{COMMIT[:12]}")
            assert SECRET not in found.to_json()
        assert elsewhere.requests
        assert not any(authorization for *_, authorization in elsewhere.requests)
        asked = [request for request in web.requests if "/resolve/" in request[1]]
        assert all(authorization == f"Bearer hf_{SECRET}" for *_, authorization in asked)
        with pytest.raises(CheckpointNotFoundError, match="no such repository"):
            optimstate.inspect("hf://owner/other/run.pt")
