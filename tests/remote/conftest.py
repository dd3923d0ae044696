"""Servers on loopback, and checkpoints to put there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.io.remote.objects import object_store
from tests.remote.between import Between
from tests.remote.between import serving as serving_between
from tests.remote.server import RangeServer, serving

SECRET = "wJalrXUtnFEMIK7MDENG"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for module in ("multipart", "uploads"):
        monkeypatch.setattr(f"optimstate.io.remote.{module}.PART", 5 << 20)
    object_store.cache_clear()
    yield
    object_store.cache_clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[RangeServer]:
    """A web server over an empty folder."""
    root = tmp_path / "served"
    root.mkdir()
    with serving(root) as server:
        yield server


@pytest.fixture
def ranges(web: RangeServer, monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    """The same as the endpoint of S3; its folders are buckets."""
    pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.address)
    return web


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of moto's server of S3."""
    pytest.importorskip("obstore")
    pytest.importorskip("botocore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pytest.importorskip("moto.server")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        made = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


class Bucket:
    """A bucket of moto, as a test fills it and looks into it."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name
        self.url = f"s3://{name}"
        client.create_bucket(Bucket=name)

    def put(self, file: Path, key: str) -> None:
        for each in [file] if file.is_file() else sorted(file.rglob("*")):
            if each.is_file():
                name = key if each == file else f"{key}/{each.relative_to(file)}"
                self.client.put_object(Bucket=self.name, Key=name, Body=each.read_bytes())

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def keys(self) -> list[str]:
        return [each["Key"] for each in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def objects(self, folder: str) -> dict[str, bytes]:
        """What is below a folder, by name."""
        found = [key for key in self.keys() if key.startswith(f"{folder}/")]  # not a dict's
        return {key[len(folder) + 1 :]: self.get(key) for key in found}

    def unfinished(self) -> list[str]:
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])]


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """An empty bucket."""
    from zlib import crc32

    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    from optimstate.io.remote.objects import _client

    return Bucket(_client(moto, "us-east-1"), f"bucket-{crc32(request.node.nodeid.encode()):08x}")


@pytest.fixture
def between(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    """A server as the endpoint, which asks moto for the objects of the bucket unless a rule says otherwise."""
    with serving_between() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        yield server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its AdamW by torch.save, of some 14 MB, so that uploads have several parts."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(768, 768), torch.nn.Linear(768, 768), torch.nn.Linear(768, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 768)).sum().backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("local") / "run.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, path)
    return path
