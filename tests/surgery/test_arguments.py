"""Arguments of the public functions that are wrong by themselves: each is refused, whatever the checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import UsageError
from optimstate.surgery.plans.deriving import derive_plan

NAN = float("nan")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arguments") / "a.pt"
    torch.save({"model": {"a": torch.ones(2)}}, path)
    return path


def differing(path: Path, **given: Any) -> object:
    return optimstate.diff(path, path, **given)


def remapping(path: Path, **given: Any) -> object:
    return optimstate.remap(path, path.parent / "out", optimstate.Plan(), **given)


def deriving(path: Path, **given: Any) -> object:
    return derive_plan(path, function="a:b", **given)


def rehearsing(path: Path, **given: Any) -> object:
    return optimstate.rehearse(None, None, None, None, None, **given)


WRONG: list[tuple[Callable[..., object], str, Any]] = [
    *((differing, "tolerance", value) for value in (-1, NAN, float("inf"))),
    *((optimstate.inspect, "top", value) for value in (0, -1, NAN)),
    *((optimstate.inspect, "sort", value) for value in ("", "sizes", 1)),
    *((remapping, "ranks", value) for value in (0, -1, 10**9)),
    *((deriving, "timeout", value) for value in (0, -1, NAN)),
    (rehearsing, "steps", -1),
]


@pytest.mark.parametrize(("function", "argument", "value"), WRONG)
def test_a_number_or_a_word_out_of_range_is_refused(
    function: Callable[..., object], argument: str, value: Any, checkpoint: Path
) -> None:
    with pytest.raises(UsageError, match=argument):
        function(checkpoint, **{argument: value})
