"""What is said of an object is what became of it, however the last requests end; what others wrote is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, DestinationError
from optimstate.formats.protocol import WriteOptions
from tests.remote.between import Answer, Between, error
from tests.remote.conftest import Bucket
from tests.remote.test_writing import without_botocore

INDEX = "model.safetensors.index.json"
PLAN = optimstate.Plan.from_options(rename=["model.{p**}=net.{p}"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    torch.save({f"model.{i}.weight": torch.randn(100, 400) for i in range(6)}, folder / "whole.pt")
    options = WriteOptions(shard_size=400_000)
    optimstate.convert(folder / "whole.pt", folder / "a", to="safetensors", options=options)
    return folder / "a"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.save({"a.weight": torch.ones(3, 4)}, path)
    return path


MEANWHILE = [
    (library, request_number, name)
    for library, request_number in (("botocore", 2), ("botocore", 9), ("obstore", 2), ("obstore", 4))
    for name in (INDEX, "model-00002-of-00003.safetensors", "notes.txt", "deeper/notes.txt")
    # Whether the shard is there at the ninth request depends on threads, and moto looks before it writes, not at once.
    if request_number != 9 or not name.startswith("model-")
]


@pytest.mark.parametrize(("library", "request_number", "name"), MEANWHILE)
def test_what_others_write_into_a_new_folder_stays(
    between: Between,
    bucket: Bucket,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    request_number: int,
    name: str,
) -> None:
    """botocore's first eight requests that write hold uploads, the next create objects; obstore has one for each."""
    if library == "obstore":
        without_botocore(monkeypatch)
    written: list[str] = []

    def rule(asked: str) -> None:
        if asked.startswith(("PUT", "POST")):
            written.append(asked)
            if len(written) == request_number:
                bucket.client.put_object(Bucket=bucket.name, Key=f"b/{name}", Body=b"of another")

    between.rule = rule
    try:
        optimstate.remap(shards, f"{bucket.url}/b", PLAN)
    except DestinationError:
        assert bucket.objects("b") == {name: b"of another"}
    else:
        late = name.startswith("model")  # this one had been created, and was replaced
        assert (late and (library == "obstore" or name != INDEX)) or (request_number == 9 and "notes" in name)
        assert len(bucket.objects("b")) == (4 if late else 5)
    assert bucket.get(f"b/{name}") == b"of another"
    assert bucket.unfinished() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("source", ["small", "large", "folder"])
def test_an_interrupt_while_an_object_is_made_says_whether_it_is_there(
    between: Between, bucket: Bucket, small: Path, checkpoint: Path, shards: Path, source: str, number: signal.Signals
) -> None:
    reached, interrupted = Event(), Event()

    def rule(asked: str) -> None:
        if asked.startswith("PUT" if source == "small" else "POST") and "?uploads" not in asked:
            reached.set()
            assert interrupted.wait(30)

    between.rule = rule
    path, name = {"small": (small, "new.pt"), "large": (checkpoint, "new.pt"), "folder": (shards, "b")}[source]
    verb = ["remap", "--rename", "model.{p**}=net.{p}"] if source == "folder" else ["convert"]
    arguments = [*verb, "-q", str(path), f"{bucket.url}/{name}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "optimstate", *arguments], stderr=subprocess.PIPE, env=os.environ.copy(), text=True
    )
    assert reached.wait(60)
    process.send_signal(number)
    interrupted.set()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    if source == "folder":  # some objects are not a folder
        assert bucket.keys() == []
        assert "is whole" not in said
    else:
        assert bucket.keys() == ["new.pt"]
        assert f"{bucket.url}/new.pt is whole" in said
    assert bucket.unfinished() == []


@pytest.mark.parametrize("place", ["a shard", "the index"])
def test_an_interrupt_leaves_the_shards_of_the_old_index_or_of_the_new(
    between: Between, bucket: Bucket, shards: Path, place: str
) -> None:
    bucket.put(shards, "m")
    old = bucket.objects("m")
    reached, interrupted = Event(), Event()

    def rule(asked: str) -> None:
        if asked.startswith("PUT") and (INDEX in asked) == (place == "the index") and not reached.is_set():
            reached.set()
            assert interrupted.wait(30)

    between.rule = rule
    arguments = ["convert", "--force", "-q", "--to", "safetensors", str(shards / INDEX), f"{bucket.url}/m/{INDEX}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "optimstate", *arguments, "--shard-size", "200000"],
        stderr=subprocess.PIPE,
        env=os.environ.copy(),
        text=True,
    )
    assert reached.wait(60)
    process.send_signal(signal.SIGINT)
    interrupted.set()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    found = bucket.objects("m")
    if place == "a shard":
        assert found == old
        assert "whole" not in said
    else:
        assert found[INDEX] != old[INDEX]
        assert f"{bucket.url}/m/{INDEX} is whole" in said
    assert not optimstate.diff(shards / INDEX, f"{bucket.url}/m/{INDEX}").changes
    assert bucket.unfinished() == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("size", ["small", "large"])
def test_an_answer_that_is_lost_does_not_make_an_error_of_what_was_made(
    between: Between, bucket: Bucket, small: Path, checkpoint: Path, size: str, force: bool
) -> None:
    lost = []

    def rule(asked: str) -> Answer | None:
        if asked.startswith("PUT" if size == "small" else "POST") and "?uploads" not in asked and not lost:
            lost.append(asked)
            return Between.LOSE
        return None

    between.rule = rule
    source = small if size == "small" else checkpoint
    optimstate.convert(source, f"{bucket.url}/new.pt", force=force)
    assert lost
    assert not optimstate.diff(source, f"{bucket.url}/new.pt").changes


@pytest.mark.parametrize("status", ["501 Not Implemented", "405 Method Not Allowed"])
@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
def test_a_store_that_does_not_copy_ranges_gets_them(
    between: Between, bucket: Bucket, checkpoint: Path, tmp_path: Path, status: str, name: str
) -> None:
    """Google's store answers so by its interface for programs of S3."""
    code = status[4:].replace(" ", "")
    optimstate.convert(checkpoint, tmp_path / name)
    bucket.put(tmp_path / name, name)
    copies = []

    def rule(asked: str, environ: dict[str, object]) -> Answer | None:
        if "HTTP_X_AMZ_COPY_SOURCE" not in environ:
            return None
        copies.append(asked)
        return error(status, code)

    between.rule_of_all = rule
    plan = optimstate.Plan.from_options(rename=["{i:int}.{p}=layers.{i}.{p}"])
    optimstate.remap(tmp_path / name, tmp_path / f"near-{name}", plan)
    for target in ("one", "two"):
        optimstate.remap(f"{bucket.url}/{name}", f"{bucket.url}/{target}", plan)
        assert bucket.get(target) == (tmp_path / f"near-{name}").read_bytes()
    assert len(copies) == 1  # it is asked once
    assert bucket.unfinished() == []


@pytest.mark.parametrize("tried", [False, True])
def test_a_source_that_changes_while_the_store_copies_it_is_noticed(
    between: Between, bucket: Bucket, checkpoint: Path, tried: bool
) -> None:
    """moto does not look at the condition of a copy; S3 answers so if the source has another ETag."""
    bucket.put(checkpoint, "run.pt")
    plan = optimstate.Plan.from_options(rename=["{i:int}.{p}=layers.{i}.{p}"])
    if tried:  # whether the store copies ranges
        optimstate.remap(f"{bucket.url}/run.pt", f"{bucket.url}/new.pt", plan)
        bucket.client.delete_object(Bucket=bucket.name, Key="new.pt")

    def rule(asked: str, environ: dict[str, object]) -> Answer | None:
        if "HTTP_X_AMZ_COPY_SOURCE" not in environ:
            return None
        assert environ["HTTP_X_AMZ_COPY_SOURCE_IF_MATCH"]
        return error("412 Precondition Failed", "PreconditionFailed")

    between.rule_of_all = rule
    with pytest.raises(CheckpointError, match=r"run\.pt: changed while it was read"):
        optimstate.remap(f"{bucket.url}/run.pt", f"{bucket.url}/new.pt", plan)
    assert bucket.keys() == ["run.pt"]
    assert bucket.unfinished() == []


def test_an_answer_that_is_lost_does_not_make_another_object_ours(
    between: Between, bucket: Bucket, small: Path
) -> None:
    def rule(asked: str) -> Answer | None:
        if asked.startswith("PUT") and bucket.keys() == []:
            bucket.client.put_object(Bucket=bucket.name, Key="new.pt", Body=b"of another")
            return error("503 Slow Down", "SlowDown")
        return None

    between.rule = rule
    with pytest.raises(DestinationError, match="exists already"):
        optimstate.convert(small, f"{bucket.url}/new.pt")
    assert bucket.get("new.pt") == b"of another"
