"""Arguments of the public functions that are wrong by themselves: each is refused, whatever the checkpoint holds."""

from __future__ import annotations

import io
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


VERBS: list[Callable[[Any], object]] = [
    optimstate.open_checkpoint,
    optimstate.inspect,
    optimstate.verify,
    optimstate.scan,
    differing,
    lambda place: optimstate.diff("a.pt", place),
    lambda place: optimstate.remap(place, "out.pt", optimstate.Plan()),
    lambda place: optimstate.convert(place, "out.pt"),
    lambda place: optimstate.name(place, "out.pt"),
    lambda place: optimstate.suggest(place, "a.pt"),
]
NO_PLACES = [b"a.pt", 5, None, ["a.pt"], {"model": {}}, io.BytesIO()]


@pytest.mark.parametrize("place", NO_PLACES, ids=lambda place: type(place).__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_the_name_of_a_checkpoint_is_refused(verb: Callable[[Any], object], place: Any) -> None:
    with pytest.raises(UsageError, match=f"by its path or address, not as .*{type(place).__name__}"):
        verb(place)
