"""DeepSpeed: the four changes, and the example with ZeRO, without, and in stage 3 on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.changes import CHANGES, expected_losses
from tests.support import free_port

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

ROOT = Path(__file__).parents[2]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.0}


def started(command: list[str], rank: int, world: int, port: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(run: subprocess.Popen[str]) -> str:
    out, error = run.communicate(timeout=240)
    assert run.returncode == 0, error[-2000:]
    return out


def test_a_changed_run_goes_on_as_one_that_was_changed_by_hand(tmp_path: Path) -> None:
    old, more = 3, 3
    command = ["-m", "tests.integrations.deepspeed_worker", str(tmp_path), str(old), str(more), json.dumps(OPTIONS)]
    out = finished(started(command, 0, 1, free_port()))
    (line,) = (line for line in out.splitlines() if line.startswith("losses"))
    found = json.loads(line.removeprefix("losses"))
    # ZeRO keeps one step for all parameters of a group.
    assert found == {change: expected_losses(change, old, more, new_step=old, **OPTIONS) for change in CHANGES}
    assert out.count("the same losses") == 2


def test_the_example_on_two_ranks(tmp_path: Path) -> None:
    command, port = [str(ROOT / "examples" / "deepspeed_load_checkpoint.py"), str(tmp_path), "3"], free_port()
    for run in [started(command, rank, 2, port) for rank in range(2)]:
        assert "the same losses" in finished(run)
    assert not list(tmp_path.glob(".*")), "the migrated checkpoint is removed"


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2)])
def test_a_certified_run(stage: int, world: int, tmp_path: Path) -> None:
    command, port = ["-m", "tests.integrations.deepspeed_certified", str(tmp_path), str(stage)], free_port()
    printed = [finished(run) for run in [started(command, rank, world, port) for rank in range(world)]]
    said = json.loads(printed[0].rpartition("said ")[2].splitlines()[0])
    assert [way for way, error in said.items() if not error] == ["untouched", "untouched again"], said
    assert len(said) == 13
    assert all("certified" in error for way, error in said.items() if "untouched" not in way), said
