"""DeepSpeed: the four changes, the example, and certified runs, with ZeRO and without, on one rank and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.changes import CHANGES, expected_losses
from tests.integrations.deepspeed_certified import WAYS
from tests.integrations.deepspeed_worker import STEPS

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

ROOT = Path(__file__).parents[2]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.0}


def found_on(world: int, folder: Path) -> dict[str, Any]:
    """What so many ranks found, after the example and its own assertions."""
    command = [sys.executable, "-m", "tests.integrations.deepspeed_worker", str(folder), str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # importing DeepSpeed's Muon compiles it, which imports half of torch
    done = subprocess.run(
        [*command, json.dumps(OPTIONS)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in (2, 0) if world == 1 else (3,):
        assert not list((folder / f"example-{stage}").glob(".*")), "the migrated checkpoint is removed"
    assert done.stdout.count("the same losses") == 2
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    said = found["said"]
    assert said.keys() == {"untouched", *WAYS, "untouched again"}
    assert [way for way, error in said.items() if not error] == ["untouched", "untouched again"], said
    assert all("certified" in error for way, error in said.items() if "untouched" not in way), said
    return found


def test_one_rank_goes_on_as_a_run_that_was_changed_by_hand_and_is_certified(tmp_path: Path) -> None:
    # ZeRO keeps one step for all parameters of a group.
    expected = {change: expected_losses(change, STEPS, STEPS, new_step=STEPS, **OPTIONS) for change in CHANGES}
    assert found_on(1, tmp_path)["losses"] == expected


def test_two_ranks_run_the_example_in_stage_3_and_are_certified(tmp_path: Path) -> None:
    found_on(2, tmp_path)
