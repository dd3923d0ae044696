"""Google's store, written by requests of XML to a server that has S3's; see `google.py` for what that shows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import optimstate
from optimstate.errors import CheckpointError, DestinationExistsError
from optimstate.io.remote.store import traffic
from tests.cli.test_together import data_of
from tests.remote.conftest import Bucket
from tests.remote.google import GoogleNames, google
from tests.remote.test_held import attempt, shards
from tests.remote.test_other_stores import ODD, PLAN

pytest.importorskip("obstore")
pytest.importorskip("botocore")

__all__ = ["shards"]  # a fixture

MODEL_PLAN = optimstate.Plan.from_options(rename=["model.{p**}=net.{p}"])


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, GoogleNames]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("moto.server")
    with google() as found:
        yield found


@pytest.fixture
def box(server: tuple[str, GoogleNames], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bucket:
    """An empty bucket of Google's, into which the test looks as into one of S3."""
    from zlib import crc32

    from optimstate.io.remote.objects import _client

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server[0])
    made = Bucket(_client(server[0], "us-east-1"), f"box{crc32(request.node.nodeid.encode()):08x}")
    made.url = f"gs://{made.name}"
    return made


def test_what_is_written_is_what_files_have(
    box: Bucket, server: tuple[str, GoogleNames], checkpoint: Path, tmp_path: Path
) -> None:
    optimstate.convert(checkpoint, f"{box.url}/{ODD}")
    asked = [each for each in server[1].asked if each.startswith(("PUT", "POST")) and box.name in each]
    assert sum("uploads=" in each for each in asked) == 1
    assert sum("partNumber=" in each for each in asked) == 3
    assert sum(each.startswith("POST") and "uploadId=" in each for each in asked) == 1
    with pytest.raises(DestinationExistsError, match="exists already"):
        optimstate.convert(checkpoint, f"{box.url}/{ODD}")
    optimstate.convert(checkpoint, f"{box.url}/{ODD}", force=True)
    assert box.keys() == [ODD]
    assert not optimstate.diff(f"{box.url}/{ODD}", checkpoint).changes
    assert not optimstate.verify(f"{box.url}/{ODD}").findings
    optimstate.remap(f"{box.url}/{ODD}", f"{box.url}/new.pt", PLAN)
    optimstate.remap(checkpoint, tmp_path / "near.pt", PLAN)
    assert box.get("new.pt") == (tmp_path / "near.pt").read_bytes()
    assert box.unfinished() == []


def test_two_writers_of_one_name_do_not_overwrite_one_another(
    box: Bucket, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimstate.io.remote.uploads import ObjectUpload

    complete = ObjectUpload.complete

    def late(self: ObjectUpload, rest: bytes) -> None:
        box.client.put_object(Bucket=box.name, Key="new.pt", Body=b"of another")
        complete(self, rest)

    monkeypatch.setattr(ObjectUpload, "complete", late)
    with pytest.raises(DestinationExistsError):
        optimstate.remap(checkpoint, f"{box.url}/new.pt", PLAN)
    assert box.get("new.pt") == b"of another"
    assert box.keys() == ["new.pt"]
    assert box.unfinished() == []


def test_a_source_that_fails_leaves_nothing(box: Bucket, checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        optimstate.remap(tmp_path / "damaged.pt", f"{box.url}/new.pt", PLAN, verify=True)
    assert box.keys() == []
    assert box.unfinished() == []


def test_folders_are_written_and_read(box: Bucket, checkpoint: Path, tmp_path: Path) -> None:
    optimstate.convert(checkpoint, f"{box.url}/run.dcp")
    optimstate.remap(f"{box.url}/run.dcp", f"{box.url}/new.dcp", PLAN)
    assert "layers.0.weight" in optimstate.open_checkpoint(f"{box.url}/new.dcp").tree["model"]
    optimstate.convert(f"{box.url}/run.dcp", tmp_path / "back.pt")
    assert optimstate.diff(checkpoint, tmp_path / "back.pt", headers=True).equal == 24


def test_processes_write_shards_together_and_the_store_copies_them_to_their_names(
    box: Bucket, shards: Path, tmp_path: Path
) -> None:
    optimstate.remap(shards, tmp_path / "one", MODEL_PLAN)
    whole = data_of(tmp_path / "one")
    before = traffic.written
    assert attempt(box, shards) == [None, None]
    assert box.objects("b") == whole
    assert len(box.keys()) == len(whole)
    assert traffic.written - before < 1.2 * sum(map(len, whole.values()))


def test_what_is_not_there_is_one_line(box: Bucket) -> None:
    for url in (f"{box.url}/none.pt", f"{box.url}/none", "gs://nobox/none.pt"):
        with pytest.raises(CheckpointError, match="no such") as caught:
            optimstate.inspect(url)
        assert "\n" not in caught.value.message


def test_the_token_is_sent_and_never_told(
    box: Bucket, server: tuple[str, GoogleNames], monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimstate.io.remote import objects

    real = objects.ObjectStore.__init__

    def made(self: objects.ObjectStore, *arguments: Any) -> None:
        real(self, *arguments)
        stores = pytest.importorskip("obstore.store")
        options = {"config": {"base_url": server[0]}, "client_options": {"allow_http": True}}
        self.raw = stores.GCSStore(
            self.bucket, credential_provider=lambda: {"token": "ya29.secret", "expires_at": None}, **options
        )

    monkeypatch.setattr(objects.ObjectStore, "__init__", made)
    with pytest.raises(CheckpointError) as caught:
        optimstate.inspect(f"{box.url}/none.pt")
    assert "Bearer ya29.secret" in server[1].tokens
    assert "ya29" not in str(caught.value)
