"""Shards that processes upload together: wherever one ends, nothing loads, and the next attempt goes on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, DestinationError, DestinationExistsError
from optimstate.formats.dcp.sharing import help_out
from optimstate.formats.protocol import WriteOptions
from optimstate.io.places import located
from optimstate.io.remote.multipart import S3Upload
from optimstate.io.remote.objects import ObjectStore, object_store
from optimstate.io.remote.path import RemotePath
from optimstate.io.remote.stage import StoreStage
from optimstate.io.remote.uploads import ObjectUpload
from optimstate.io.together import Team
from tests.cli.test_together import data_of
from tests.remote.conftest import Bucket
from tests.remote.test_writing import without_botocore

PLAN = optimstate.Plan.from_options(rename=["model.{p**}=net.{p}"])
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 2 and 13 MB with an index, an archive, and a text."""
    folder = tmp_path_factory.mktemp("held")
    torch.manual_seed(0)
    small = {f"model.{i}.weight": torch.randn(100, 400) for i in range(6)}
    torch.save({**small, "model.large": torch.randn(3_200_000)}, folder / "whole.pt")
    options = WriteOptions(shard_size=1_000_000)
    optimstate.convert(folder / "whole.pt", folder / "a", to="safetensors", options=options)
    torch.save({"model": small}, folder / "a" / "run.pt")
    (folder / "a" / "config.json").write_text("{}")
    return folder / "a"


class EndedError(BaseException):
    """What stands for a process that is killed: from then on it asks nothing more of the store."""


class Doomed:
    """Counts what a process asks of its store, and lets it end at one of those."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: dict[int, int] = {}
        self.asked: dict[int, int] = {}
        for owner, name, store_of in (
            (ObjectStore, "asked", lambda store: store),
            (S3Upload, "_asked", lambda upload: upload._store),
            (ObjectUpload, "_asked", lambda upload: upload._store),
            (ObjectUpload, "abort", lambda upload: upload._store),
        ):
            self._patch(monkeypatch, owner, name, store_of)

    def _patch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, store_of: Any) -> None:
        real = getattr(owner, name)

        def asked(this: Any, *arguments: Any) -> Any:
            store = store_of(this)
            key = id(getattr(store, "raw", store))
            self.asked[key] = self.asked.get(key, 0) + 1
            if key in self.left:
                self.left[key] -= 1
                if self.left[key] < 0:
                    raise OSError if current_thread().name == "optimstate-alive" else EndedError
            return real(this, *arguments)

        monkeypatch.setattr(owner, name, asked)


def stage_of(bucket: Bucket, rank: int, digest: str = "0" * 12) -> StoreStage:
    object_store.cache_clear()  # a process has a store of its own
    place = located(f"{bucket.url}/b")
    assert isinstance(place, RemotePath)
    return StoreStage(place, digest, Team(rank, 2, 1.0), last=".metadata")


@pytest.fixture(params=["botocore", "obstore"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that uploads."""
    if request.param == "obstore":
        without_botocore(monkeypatch)


def attempt(bucket: Bucket, source: Any, doomed: Doomed | None = None, after: int = 0) -> list[BaseException | None]:
    """The errors of both processes, the first of which ends after so many requests."""
    stages = [stage_of(bucket, rank) for rank in (0, 1)]
    if doomed is not None and after:
        doomed.left = {id(stages[0].destination.store.raw): after}  # type: ignore[attr-defined]

    def run(rank: int) -> BaseException | None:
        try:
            if rank and help_out(stages[1], WriteOptions()):
                return None
            optimstate.remap(source, f"{bucket.url}/b", PLAN, stage=stages[rank])
        except (CheckpointError, DestinationError, EndedError) as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (0, 1)))


@pytest.mark.usefixtures("library")
def test_the_objects_are_those_of_one_process(bucket: Bucket, shards: Path, tmp_path: Path) -> None:
    optimstate.remap(shards, tmp_path / "one", PLAN)
    assert attempt(bucket, shards) == [None, None]
    assert bucket.objects("b") == data_of(tmp_path / "one")
    assert len(bucket.keys()) == len(bucket.objects("b"))
    assert bucket.unfinished() == []


def test_what_lies_in_the_same_store_is_copied_there(bucket: Bucket, shards: Path, tmp_path: Path) -> None:
    from optimstate.io.remote.store import traffic

    bucket.put(shards, "a")
    optimstate.remap(shards, tmp_path / "one", PLAN)
    before = traffic.written
    assert attempt(bucket, f"{bucket.url}/a") == [None, None]
    assert bucket.objects("b") == data_of(tmp_path / "one")
    assert traffic.written - before < sum(map(len, data_of(shards).values())) - 7_000_000


@pytest.mark.usefixtures("library")
def test_wherever_it_ends_nothing_loads_and_the_next_attempt_goes_on(
    bucket: Bucket, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimstate.remap(shards, tmp_path / "one", PLAN)
    whole = data_of(tmp_path / "one")
    doomed = Doomed(monkeypatch)
    assert attempt(bucket, shards) == [None, None]
    total = max(doomed.asked.values())
    assert total > 15
    for after in range(1, total, max(total // 3, 1)):
        for key in list(bucket.keys()):
            bucket.client.delete_object(Bucket=bucket.name, Key=key)
        errors = attempt(bucket, shards, doomed, after)
        found = bucket.objects("b")
        assert found.items() <= whole.items()
        if len(found) < len(whole):
            assert errors[0] is not None
            assert INDEX not in found
        for _ in range(2):
            doomed.left = {}
            errors = attempt(bucket, shards)
            if errors == [None, None] or isinstance(errors[0], DestinationExistsError):
                break
        assert bucket.objects("b") == whole, (after, errors)
        assert "held" not in "".join(bucket.keys()), after


def test_objects_some_of_which_are_made_are_not_given_to_another_command(bucket: Bucket) -> None:
    stage = stage_of(bucket, 0)

    def write() -> None:
        held: dict[str, Any] = {}
        with stage as folder:
            assert isinstance(folder, RemotePath)
            with stage.new_object(folder / "x.pt", held) as out:
                out.write(b"whole")
            assert bucket.objects("b") == {}
            stage.release(held, {"b/x.pt": 9})

    with pytest.raises(CheckpointError, match="does not have the 9 bytes"):
        write()
    assert bucket.objects("b") == {"x.pt": b"whole"}
    with pytest.raises(DestinationExistsError), stage_of(bucket, 0, "1" * 12):
        pass
    again = stage_of(bucket, 0)
    with pytest.raises(DestinationError, match="no process has written it"), again:
        again.release({}, {"b/y.pt": 1})


def test_parts_that_a_rule_of_the_bucket_has_removed_are_uploaded_anew(
    bucket: Bucket, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimstate.remap(shards, tmp_path / "one", PLAN)
    real = bucket.client.complete_multipart_upload

    def removed(**_: Any) -> None:  # what S3 answers; moto answers 500
        raise client_error({"Error": {"Code": "NoSuchUpload"}}, "CompleteMultipartUpload")

    client_error = pytest.importorskip("botocore.exceptions").ClientError
    monkeypatch.setattr(bucket.client, "complete_multipart_upload", removed)
    error, _ = attempt(bucket, shards)
    assert isinstance(error, DestinationError)
    assert "no longer has what was uploaded" in str(error)
    assert bucket.objects("b") == {}
    monkeypatch.setattr(bucket.client, "complete_multipart_upload", real)
    assert attempt(bucket, shards) == [None, None]
    assert bucket.objects("b") == data_of(tmp_path / "one")


def test_one_process_makes_the_objects_of_a_folder_when_all_are_uploaded(
    bucket: Bucket, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen, most = S3Upload.release, list[str](), [0]

    def release(self: S3Upload, held: Any) -> None:
        seen.extend(bucket.objects("b"))
        if len(seen) >= most[0]:
            raise DestinationError("no")
        real(self, held)

    monkeypatch.setattr(S3Upload, "release", release)
    for most[0] in (0, 3):
        with pytest.raises(DestinationError, match="no"):
            optimstate.remap(shards, f"{bucket.url}/b", PLAN)
        assert INDEX not in seen
        assert bucket.keys() == []
        assert bucket.unfinished() == []
    most[0] = 1 << 30
    seen.clear()
    optimstate.remap(shards, f"{bucket.url}/b", PLAN)
    optimstate.remap(shards, tmp_path / "one", PLAN)
    assert bucket.objects("b") == data_of(tmp_path / "one")
    assert INDEX not in seen
