"""Objects are written whole or not at all, and what a store can copy itself is not moved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, DestinationError, DestinationExistsError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.io.remote.store import traffic
from tests.remote.conftest import Bucket

PLAN = optimstate.Plan.from_options(rename=["{i:int}.{p}=layers.{i}.{p}"])


def local(checkpoint: Path, folder: Path) -> Path:
    optimstate.remap(checkpoint, folder / "local.pt", PLAN, sync=False)
    return folder / "local.pt"


def without_botocore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads go by obstore then, as those to other stores than S3 do."""
    from optimstate.io.remote.objects import ObjectStore

    monkeypatch.setattr(ObjectStore, "client", None)


@pytest.mark.parametrize(("library", "source"), [("botocore", "local"), ("botocore", "remote"), ("obstore", "remote")])
def test_a_remap_to_a_store_writes_what_a_local_one_does(
    bucket: Bucket, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, source: str
) -> None:
    if library == "obstore":
        without_botocore(monkeypatch)
    bucket.put(checkpoint, "in/run.pt")
    origin = checkpoint if source == "local" else f"{bucket.url}/in/run.pt"
    report = optimstate.remap(origin, f"{bucket.url}/out/new.pt", PLAN)
    assert report.destination == f"{bucket.url}/out/new.pt"
    assert bucket.get("out/new.pt") == local(checkpoint, tmp_path).read_bytes()
    assert bucket.keys() == ["in/run.pt", "out/new.pt"]
    assert bucket.unfinished() == []
    with pytest.raises(DestinationExistsError, match="exists already"):
        optimstate.remap(origin, f"{bucket.url}/out/new.pt", PLAN)
    optimstate.remap(origin, f"{bucket.url}/out/new.pt", PLAN, force=True)


def test_a_rename_within_a_store_moves_hardly_a_byte(bucket: Bucket, checkpoint: Path, tmp_path: Path) -> None:
    bucket.put(checkpoint, "run.pt")
    read, written = traffic.read, traffic.written
    optimstate.remap(f"{bucket.url}/run.pt", f"{bucket.url}/new.pt", PLAN)
    size = checkpoint.stat().st_size
    assert size > 14_000_000
    assert traffic.read - read < 6 << 20
    assert traffic.written - written < 6 << 20
    assert bucket.get("new.pt") == local(checkpoint, tmp_path).read_bytes()
    (tmp_path / "new.pt").write_bytes(bucket.get("new.pt"))
    assert set(torch.load(tmp_path / "new.pt")["model"]) == {
        f"layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")
    }


def test_a_rename_of_safetensors_within_a_store_is_copied_there(
    bucket: Bucket, checkpoint: Path, tmp_path: Path
) -> None:
    optimstate.convert(checkpoint, tmp_path / "run.safetensors")
    bucket.put(tmp_path / "run.safetensors", "run.safetensors")
    written = traffic.written
    optimstate.remap(f"{bucket.url}/run.safetensors", f"{bucket.url}/new.safetensors", PLAN)
    assert traffic.written - written < 8 << 20
    optimstate.remap(tmp_path / "run.safetensors", tmp_path / "local.safetensors", PLAN)
    assert bucket.get("new.safetensors") == (tmp_path / "local.safetensors").read_bytes()


def test_a_rename_of_a_distributed_checkpoint_is_copied_in_the_store(
    bucket: Bucket, checkpoint: Path, tmp_path: Path
) -> None:
    optimstate.convert(checkpoint, tmp_path / "run.dcp")
    bucket.put(tmp_path / "run.dcp", "run.dcp")
    written = traffic.written
    optimstate.remap(f"{bucket.url}/run.dcp", f"{bucket.url}/new.dcp", PLAN)
    assert traffic.written - written < 1 << 20
    assert bucket.get("new.dcp/__0_0.distcp") == (tmp_path / "run.dcp" / "__0_0.distcp").read_bytes()
    assert "layers.0.weight" in optimstate.open_checkpoint(f"{bucket.url}/new.dcp").tree["model"]


@pytest.mark.parametrize("target", ["new.safetensors", "new.dcp", "sharded"])
def test_every_container_is_written_to_a_store(bucket: Bucket, checkpoint: Path, tmp_path: Path, target: str) -> None:
    options = WriteOptions(shard_size=5 << 20) if target == "sharded" else WriteOptions()
    to = "safetensors" if target == "sharded" else None
    optimstate.convert(checkpoint, f"{bucket.url}/out/{target}", to=to, options=options)
    assert optimstate.diff(checkpoint, f"{bucket.url}/out/{target}").equal == 24
    optimstate.convert(f"{bucket.url}/out/{target}", tmp_path / "back.pt", section="model")
    assert optimstate.diff(checkpoint, tmp_path / "back.pt", headers=True).equal == 6
    assert bucket.unfinished() == []
    if target != "new.safetensors":
        with pytest.raises(DestinationError, match=r"exists already|is not replaced"):
            optimstate.convert(
                checkpoint, f"{bucket.url}/out/{target}", to=to, options=options, force=target == "new.dcp"
            )


@pytest.mark.parametrize("library", ["botocore", "obstore"])
def test_an_upload_that_fails_leaves_nothing(
    bucket: Bucket, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "obstore":
        without_botocore(monkeypatch)

    def fail() -> None:
        raise CheckpointError("confirmed to be wrong")

    document = open_checkpoint(checkpoint)
    from optimstate.formats.safetensors import container
    from optimstate.formats.torch import zip as torch_zip
    from optimstate.io.places import located

    for write, name, options in (
        (torch_zip.write, "new.pt", WriteOptions(confirm=fail)),
        (container.write, "new.safetensors", WriteOptions(confirm=fail)),
        (container.write, "sharded", WriteOptions(confirm=fail, shard_size=5 << 20)),
    ):
        with pytest.raises(CheckpointError, match="confirmed to be wrong"):
            write(document.tree, located(f"{bucket.url}/{name}"), like=None, options=options)
        assert bucket.keys() == []
        assert bucket.unfinished() == []


@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_upload_leaves_nothing_visible(
    bucket: Bucket, checkpoint: Path, tmp_path: Path, killed_by: signal.Signals
) -> None:
    script = (
        "import sys, time\n"
        "from optimstate.io.remote.multipart import S3Upload\n"
        "part = S3Upload.part\n"
        "def slow(self, data):\n"
        "    part(self, data)\n"
        "    self._parts[-1].result()\n"
        "    print('part', flush=True)\n"
        "    time.sleep(30)\n"
        "S3Upload.part = slow\n"
        "from optimstate.cli.__main__ import main\n"
        f"sys.argv = ['optimstate', 'convert', {str(checkpoint)!r}, '{bucket.url}/new.pt', '-q']\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ.copy()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    assert first == b"part\n", process.stderr.read()
    process.send_signal(killed_by)
    _, errors = process.communicate(timeout=90)
    assert bucket.keys() == []
    assert (bucket.unfinished() == []) == (killed_by == signal.SIGINT)  # after SIGKILL the parts stay, unseen
    if killed_by == signal.SIGINT:
        assert process.returncode == 130
        assert b"Traceback" not in errors


def test_two_writers_of_one_name_do_not_overwrite_one_another(
    bucket: Bucket, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object appears after the first look: completing the upload finds out."""
    from optimstate.io.remote.multipart import S3Upload

    complete = S3Upload.complete

    def late(self: Any, rest: bytes) -> None:
        bucket.client.put_object(Bucket=bucket.name, Key="new.pt", Body=b"of another")
        complete(self, rest)

    monkeypatch.setattr(S3Upload, "complete", late)
    with pytest.raises(DestinationExistsError):
        optimstate.remap(checkpoint, f"{bucket.url}/new.pt", PLAN)
    assert bucket.get("new.pt") == b"of another"
    assert bucket.unfinished() == []


def test_the_source_of_a_copy_within_a_store_is_of_one_version(bucket: Bucket, checkpoint: Path) -> None:
    """moto does not look at the condition, so what is sent is looked at."""
    bucket.put(checkpoint, "run.pt")
    from optimstate.io.places import located

    store = located(f"{bucket.url}/run.pt").store  # type: ignore[attr-defined]
    sent: list[dict[str, Any]] = []
    store.client.meta.events.register(
        "before-parameter-build.s3.UploadPartCopy", lambda params, **_: sent.append(dict(params))
    )
    optimstate.remap(f"{bucket.url}/run.pt", f"{bucket.url}/new.pt", PLAN)
    etag = bucket.client.head_object(Bucket=bucket.name, Key="run.pt")["ETag"]
    assert sent
    assert all(each["CopySourceIfMatch"] == etag for each in sent)
    ranges = [tuple(map(int, each["CopySourceRange"].removeprefix("bytes=").split("-"))) for each in sent]
    assert all(last - first + 1 >= 5 << 20 for first, last in ranges)


def test_in_place_and_web_servers_are_refused(bucket: Bucket, checkpoint: Path) -> None:
    bucket.put(checkpoint, "run.pt")
    with pytest.raises(DestinationError, match="in place"):
        optimstate.remap(f"{bucket.url}/run.pt", None, PLAN, in_place=True)
    with pytest.raises(DestinationError, match="read, but not written"):
        optimstate.remap(checkpoint, "http://127.0.0.1:9/new.pt", PLAN, force=True)
    with pytest.raises(DestinationError, match="no such bucket"):
        optimstate.remap(checkpoint, "s3://no-such-bucket-here/new.pt", PLAN, force=True)
    with pytest.raises(DestinationError, match="are the same"):
        optimstate.remap(f"{bucket.url}/run.pt", f"{bucket.url}/run.pt", PLAN, force=True)
