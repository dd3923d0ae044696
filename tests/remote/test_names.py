"""Names of objects: what may be in them, what is refused, and what only stands for a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointNotFoundError, UsageError
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
