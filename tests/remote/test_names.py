"""Names of objects: what may be in them, what is refused, and what only stands for a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, CheckpointNotFoundError, DestinationError, UsageError
from tests.cli.running import run
from tests.remote.conftest import Bucket

GOOD = [
    "a b.pt",
    "é/日本.pt",
    "a%20b.pt",
    "%",
    "a+b&c=d.pt",
    "a#b.pt",
    "a*[b]{c}|d.pt",
    "~.pt",
    "a\\b\"'.pt",
    "...pt",
    "x" * 900,
]
BAD = ["a//b.pt", "/a.pt", "x/../y.pt", "./z.pt", "..", "a/./b.pt", "a?b.pt", "a.pt?versionId=3"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.save({"a.weight": torch.ones(3, 4)}, tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.mark.parametrize("name", GOOD)
def test_a_name_is_the_key(bucket: Bucket, small: Path, name: str) -> None:
    optimstate.convert(small, f"{bucket.url}/{name}", to="torch")
    assert bucket.keys() == [name]
    assert not optimstate.diff(f"{bucket.url}/{name}", small).changes
    assert optimstate.scan(bucket.url).pickles == 1


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_would_be_another_objects_is_refused(bucket: Bucket, small: Path, name: str) -> None:
    bucket.put(small, "a.pt")
    for command in (
        ["inspect", f"{bucket.url}/{name}"],
        ["convert", str(small), f"{bucket.url}/{name}", "--to", "torch"],
    ):
        done = run(*command)
        assert done.code == 2
        assert "versionId" not in done.err
    assert bucket.keys() == ["a.pt"]
    with pytest.raises(UsageError):
        optimstate.scan(f"{bucket.url}/{name}")


@pytest.mark.parametrize("name", ["run", "run.pt", "deep/run"])
def test_an_object_that_is_also_a_folder_is_not_guessed(bucket: Bucket, small: Path, name: str) -> None:
    bucket.put(small, name)
    bucket.put(small, f"{name}/model.pt")
    bucket.put(small, f"{name}2/other.pt")
    around = f"{bucket.url}/{name}".rpartition("/")[0]
    asked = [around, f"{around}/"] + [f"{bucket.url}/{name}"] * (not name.endswith(".pt"))
    for place in asked:
        for verb in (optimstate.inspect, optimstate.scan, optimstate.open_checkpoint):
            with pytest.raises(CheckpointError, match="an object with this name, and there are objects below it"):
                verb(place)
    assert optimstate.inspect(f"{bucket.url}/{name}/").format == "folder"
    assert optimstate.inspect(f"{bucket.url}/{name}2").format == "folder"
    if name.endswith(".pt"):
        assert optimstate.inspect(f"{bucket.url}/{name}").format == "torch"


@pytest.mark.parametrize("key", ["d//x.pt", "d/./x.pt", "d/../x.pt", "d/a\tb.pt", "d/e//"])
def test_an_object_whose_name_cannot_be_used_is_named(bucket: Bucket, small: Path, key: str) -> None:
    bucket.put(small, "d/a.pt")
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    for place in (f"{bucket.url}/d", bucket.url):
        with pytest.raises(CheckpointError, match="the name of an object below it cannot be used") as caught:
            optimstate.inspect(place)
        assert repr(key)[1:-1].replace("\\", "") in str(caught.value).replace("\\", "")
        assert "Rename" in caught.value.hint
    assert optimstate.inspect(f"{bucket.url}/d/a.pt").tensors == 1


def test_two_objects_of_one_name_are_not_confused(bucket: Bucket, small: Path) -> None:
    """Listings leave out the slash at the end of a name."""
    bucket.put(small, "d/a.pt")
    bucket.client.put_object(Bucket=bucket.name, Key="d/a.pt/", Body=b"not empty")
    with pytest.raises(CheckpointError, match="differ only in slashes"):
        optimstate.inspect(f"{bucket.url}/d")


@pytest.mark.parametrize("name", ["", "new/", "new.pt/"])
def test_one_file_is_not_written_to_the_name_of_a_folder(bucket: Bucket, small: Path, name: str) -> None:
    with pytest.raises(DestinationError, match="the name of a folder"):
        optimstate.convert(small, f"{bucket.url}/{name}", to="torch")
    assert bucket.keys() == []


def test_a_folder_is_not_said_to_be_replaced_by_force(bucket: Bucket, small: Path) -> None:
    optimstate.convert(small, f"{bucket.url}/run", to="dcp")
    for force in (False, True):
        with pytest.raises(DestinationError, match="a folder of a store is not replaced") as caught:
            optimstate.convert(small, f"{bucket.url}/run", to="dcp", force=force)
        assert "--force" not in caught.value.hint


def test_objects_that_stand_for_folders_are_not_files(bucket: Bucket, small: Path, tmp_path: Path) -> None:
    """Consoles and tools make an object without bytes, with a slash at its end, for a folder."""
    for key in ("run/", "run/empty/", "run/deep/"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"")
    bucket.client.put_object(Bucket=bucket.name, Key="run/none.txt", Body=b"")
    bucket.put(small, "run/deep/a.pt")
    for place in (f"{bucket.url}/run", f"{bucket.url}/run/", bucket.url):
        assert optimstate.inspect(place).tensors == 1
        assert not optimstate.scan(place).unreadable
    with pytest.raises(CheckpointNotFoundError):
        optimstate.inspect(f"{bucket.url}/run/empty")
    optimstate.convert(small, f"{bucket.url}/run/empty", to="dcp")
    assert optimstate.inspect(f"{bucket.url}/run/empty").format == "dcp"
    plan = optimstate.Plan.from_options(rename=["a.{p}=b.{p}"])
    optimstate.remap(f"{bucket.url}/run/deep", tmp_path / "near", plan)
    assert sorted(file.name for file in (tmp_path / "near").iterdir()) == ["a.pt"]
    optimstate.remap(f"{bucket.url}/run", tmp_path / "whole", plan)
    assert (tmp_path / "whole" / "none.txt").read_bytes() == b""
