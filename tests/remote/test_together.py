"""Several processes that write one folder of a store: whole or not loadable, and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import optimstate
from optimstate.errors import CheckpointError, DestinationError, DestinationExistsError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.places import located
from optimstate.io.remote.path import RemotePath
from optimstate.io.remote.stage import StoreStage
from optimstate.io.together import Team
from optimstate.tree import difference
from tests.cli.running import run
from tests.cli.test_together import begin, data_of, ended, shards, together
from tests.remote.conftest import Bucket

__all__ = ["shards"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RENAME = ("--rename", "model.{p**}=net.{p}")
AMPLE = "10"
"""Seconds that a process may take to start on a busy machine; what an attempt waits for the last one grows with it."""


def ends_with(stage: StoreStage, bucket: Bucket, name: str) -> None:
    """An attempt that has written an object and ends."""
    with stage as folder:
        bucket.client.put_object(Bucket=bucket.name, Key=f"{folder.key}/{name}", Body=b"whole")
        raise ValueError("ends here")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    torch.manual_seed(0)
    tree = {"model": {f"model.{i}.weight": torch.randn(60 + i, 40) for i in range(12)}, "epoch": 3}
    dcp.save(tree, checkpoint_id=str(folder))
    return folder


def stage(bucket: Bucket, rank: int = 0, digest: str = "0" * 12, name: str = "b") -> StoreStage:
    place = located(f"{bucket.url}/{name}")
    assert isinstance(place, RemotePath)
    return StoreStage(place, digest, Team(rank, 2, 1.0), last=".metadata")


def test_two_processes_go_on_where_one_was_left_alone(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    arguments = ["convert", source, f"{bucket.url}/b", "--to", "dcp", "--ranks", "2"]
    code, said = ended(begin(0, 2, arguments, OPTIMSTATE_PATIENCE="1"))  # rank 1 never comes
    assert code == 5
    assert "rank 1 has given no sign of life" in said
    left = bucket.keys()
    assert [key for key in left if key.startswith("b/")] == ["b/__0_0.distcp"]
    with pytest.raises(CheckpointError, match=r"without \.metadata"):
        open_checkpoint(f"{bucket.url}/b")
    written = bucket.client.head_object(Bucket=bucket.name, Key="b/__0_0.distcp")["LastModified"]
    done = together(2, arguments, OPTIMSTATE_PATIENCE=AMPLE)
    assert [code for code, _ in done] == [0, 0], done
    assert bucket.keys() == ["b/.metadata", "b/__0_0.distcp", "b/__1_0.distcp"]
    assert bucket.unfinished() == []
    assert bucket.client.head_object(Bucket=bucket.name, Key="b/__0_0.distcp")["LastModified"] == written
    assert difference(open_checkpoint(source).tree, open_checkpoint(f"{bucket.url}/b").tree) is None
    assert ended(begin(0, 2, arguments))[0] == 5  # it is there already


@pytest.mark.parametrize("wrong", [("--drop", "nothing"), ("--plan", "nothing.toml"), (*RENAME, "--set", "lr=1")])
def test_of_a_plan_that_does_not_fit_nothing_stays(wrong: tuple[str, ...], bucket: Bucket, source: Path) -> None:
    done = together(2, ["remap", source, f"{bucket.url}/b", *wrong], OPTIMSTATE_PATIENCE=AMPLE)
    assert [code for code, _ in done] == [4, 4], done
    assert bucket.keys() == []


def test_a_rename_copies_whole_objects(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    optimstate.remap(source, tmp_path / "one", optimstate.Plan.from_options(rename=[RENAME[1]]), copy=True)
    done = together(2, ["remap", source, f"{bucket.url}/b", *RENAME], OPTIMSTATE_PATIENCE=AMPLE)
    assert [code for code, _ in done] == [0, 0], done
    keys = bucket.keys()
    assert {key.removeprefix("b/"): bucket.get(key) for key in keys} == data_of(tmp_path / "one")


def test_what_others_have_written_is_not_replaced(bucket: Bucket) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="b/x.distcp", Body=b"of another")
    with pytest.raises(DestinationExistsError, match="is not replaced"), stage(bucket):
        pass
    assert bucket.keys() == ["b/x.distcp"]


def test_another_plan_begins_anew(bucket: Bucket) -> None:
    with pytest.raises(ValueError, match="ends here"):
        ends_with(stage(bucket), bucket, "old.distcp")
    place = f".b.{'0' * 12}.part"
    said = [f"{place}/{'0' * 12}/alive.0", f"{place}/{'0' * 12}/begun", f"{place}/claim"]
    assert bucket.keys() == [*said, "b/old.distcp"]
    with stage(bucket, digest="1" * 12):
        assert bucket.keys() == [f"{place}/{'1' * 12}/alive.0", f"{place}/{'1' * 12}/begun", said[2]]
    assert bucket.keys() == []


def test_an_attempt_that_lives_is_left_alone(bucket: Bucket) -> None:
    with stage(bucket) as folder, stage(bucket).alive():
        for digest in ("0" * 12, "1" * 12):
            with pytest.raises(DestinationError, match="by other processes"), stage(bucket, digest=digest):
                pass
        bucket.client.put_object(Bucket=bucket.name, Key=f"{folder.key}/x.distcp", Body=b"whole")
    assert bucket.keys() == ["b/x.distcp"]


def test_one_that_was_taken_over_does_not_commit(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = stage(bucket), stage(bucket, digest="1" * 12)
    with one, other:  # the first gives no sign meanwhile
        with pytest.raises(DestinationError, match="by other processes"):
            one.clear()
        other.clear()
        late = stage(bucket, digest="1" * 12)
        begun = late._keys
        monkeypatch.setattr(late, "_keys", lambda folder: [] if folder == late._meeting else begun(folder))
        with pytest.raises(DestinationError, match="by other processes"):  # two that begin at the same moment
            late.__enter__()


def test_a_folder_that_is_complete_is_not_taken_for_one_that_is_not(bucket: Bucket) -> None:
    """Killed after the commit, before what was said was removed."""
    with pytest.raises(ValueError, match="ends here"):
        ends_with(stage(bucket), bucket, ".metadata")
    for digest in ("0" * 12, "1" * 12):
        with pytest.raises(DestinationExistsError), stage(bucket, digest=digest):
            pass
    assert bucket.get("b/.metadata") == b"whole"


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("remap", "--rename", "model.{p**}=net.{p}"),
        ("convert", "--to", "safetensors", "--shard-size", "50000", "--section", "model.safetensors.index.json"),
        ("convert", "--to", "folder", "--dtype", "rank_0.pt=bf16", "--dtype", "model.safetensors.index.json=bf16"),
    ],
    ids=["remap", "convert", "cast"],
)
def test_shards_are_uploaded_together(arguments: tuple[str, ...], bucket: Bucket, shards: Path, tmp_path: Path) -> None:
    verb, *options = arguments
    assert run(verb, str(shards), str(tmp_path / "one"), *options).code == 0
    done = together(2, [verb, shards, f"{bucket.url}/b", *options], OPTIMSTATE_PATIENCE=AMPLE)
    assert [code for code, _ in done] == [0, 0], done
    assert bucket.objects("b") == data_of(tmp_path / "one")
    assert len(bucket.keys()) == len(bucket.objects("b"))
    assert bucket.unfinished() == []


def test_of_shards_nothing_is_there_before_all_have_voted_and_the_next_attempt_goes_on(
    bucket: Bucket, shards: Path, tmp_path: Path
) -> None:
    arguments = ["remap", shards, f"{bucket.url}/b", *RENAME]
    code, said = ended(begin(0, 2, arguments, OPTIMSTATE_PATIENCE="1"))  # rank 1 never comes
    assert code == 5
    assert "rank 1 has given no sign of life" in said
    assert bucket.objects("b") == {}
    assert bucket.unfinished()
    done = together(2, arguments, OPTIMSTATE_PATIENCE=AMPLE)
    assert [code for code, _ in done] == [0, 0], done
    assert run("remap", str(shards), str(tmp_path / "one"), *RENAME).code == 0
    assert bucket.objects("b") == data_of(tmp_path / "one")
    assert len(bucket.keys()) == len(bucket.objects("b"))
    assert bucket.unfinished() == []
    assert ended(begin(0, 2, arguments))[0] == 5  # it is there already


def test_another_command_gives_up_what_is_held_back(bucket: Bucket, shards: Path, tmp_path: Path) -> None:
    assert ended(begin(0, 2, ["remap", shards, f"{bucket.url}/b", *RENAME], OPTIMSTATE_PATIENCE="1"))[0] == 5
    other = ("--rename", "model.{p**}=other.{p}")
    done = together(2, ["remap", shards, f"{bucket.url}/b", *other], OPTIMSTATE_PATIENCE=AMPLE)
    assert [code for code, _ in done] == [0, 0], done
    assert run("remap", str(shards), str(tmp_path / "one"), *other).code == 0
    assert bucket.objects("b") == data_of(tmp_path / "one")
    assert len(bucket.keys()) == len(bucket.objects("b"))
    assert bucket.unfinished() == []
