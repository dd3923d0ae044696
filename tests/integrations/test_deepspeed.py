"""The example of DeepSpeed without ZeRO, and in stage 3 on two ranks, which share the migrated checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.test_examples import EXAMPLES
from tests.support import free_port

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (3, 2)])
def test_a_stage_on_ranks(stage: int, world: int, tmp_path: Path) -> None:
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "DS_ACCELERATOR": "cpu"}
    common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(EXAMPLES / "deepspeed_load_checkpoint.py"), str(tmp_path), str(stage)]
    ranks = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for rank in ranks:
        out, error = rank.communicate(timeout=240)
        assert rank.returncode == 0, error[-2000:]
        assert "the same losses" in out
    assert not list(tmp_path.glob(".*")), "the migrated checkpoint is removed"
