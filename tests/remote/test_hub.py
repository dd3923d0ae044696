"""Repositories of the Hub are read at one commit; the token goes to the Hub and to nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, CheckpointNotFoundError, UsageError
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


def hub(web: RangeServer, folder: Path, monkeypatch: pytest.MonkeyPatch, revision: str = "", **about: Any) -> None:
    """Make the server one of the Hub with the files of a folder in the repository `owner/name`."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", web.address)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = {str(file.relative_to(folder)): file for file in files}
    for name, file in names.items():
        target = web.root / "owner" / "name" / "resolve" / COMMIT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in names.items()]
    about = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, **about}
    web.faults[f"/api/models/owner/name{revision}"] = json.dumps(about).encode()


@pytest.mark.parametrize("name", ["a b.pt", "a#b.pt", "a?b.pt", "a%20b.pt", "é.pt", "sub dir/a+b;c.pt"])
def test_a_name_is_the_path_in_the_repository(
    web: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "files" / name).parent.mkdir(parents=True)
    torch.save({"a.weight": torch.ones(3, 4)}, tmp_path / "files" / name)
    hub(web, tmp_path / "files", monkeypatch)
    for place in (f"hf://owner/name/{name}", "hf://owner/name", "hf://owner/name/"):
        assert optimstate.inspect(place).tensors == 1
        assert optimstate.scan(place).pickles == 1


@pytest.mark.parametrize("size", [None, -5, "12", 1 << 70])
def test_a_file_of_unknown_size_is_asked_for_and_not_empty(
    web: RangeServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: Any
) -> None:
    optimstate.convert(checkpoint, tmp_path / "run.dcp")
    names = [file.name for file in (tmp_path / "run.dcp").iterdir()]
    hub(web, tmp_path / "run.dcp", monkeypatch, siblings=[{"rfilename": name, "size": size} for name in names])
    assert optimstate.scan("hf://owner/name").pickles == optimstate.scan(tmp_path / "run.dcp").pickles > 0
    assert not optimstate.diff("hf://owner/name", tmp_path / "run.dcp").changes


@pytest.mark.parametrize(
    "about",
    [
        {"sha": None},
        {"sha": "../../x"},
        {"siblings": [{"rfilename": "../run.pt", "size": 1}]},
        {"siblings": [{"rfilename": "/etc/passwd", "size": 1}]},
        {"siblings": [{"rfilename": 5, "size": 1}]},
        {"siblings": [5]},
    ],
)
def test_an_answer_of_the_hub_that_cannot_be_meant(
    web: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: dict[str, Any]
) -> None:
    hub(web, tmp_path, monkeypatch, **about)
    for place in ("hf://owner/name", "hf://owner/name/run.pt"):
        with pytest.raises(CheckpointError, match="the Hub's answer about the repository cannot be read"):
            optimstate.inspect(place)


def test_revisions_with_slashes(
    web: RangeServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "run.pt").write_bytes(checkpoint.read_bytes())
    hub(web, tmp_path / "files", monkeypatch, revision="/revision/refs/pr/1")
    assert optimstate.inspect("hf://owner/name@refs/pr/1/run.pt").tensors == 24
    assert optimstate.inspect("hf://owner/name@refs/pr/1").tensors == 24


@pytest.mark.parametrize("place", ["hf://owner/name//run.pt", "hf://owner/name/../run.pt", "hf://owner/a name/run.pt"])
def test_names_that_cannot_be_meant(place: str) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(UsageError):
        optimstate.inspect(place)
