"""What several modules of tests share: the two processes that hold real shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimstate.formats.dcp import folder as dcp
from optimstate.formats.registry import open_checkpoint
from tests.formats import gloo_worker


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved, and what they got from a checkpoint of ours: see `gloo_worker`."""
    folder = tmp_path_factory.mktemp("gloo")
    net = gloo_worker.model()
    state = gloo_worker.trained(net).state_dict()
    names = [name for name, _ in net.named_parameters()]
    (group,) = state["param_groups"]
    named = {
        "state": {names[key]: slots for key, slots in state["state"].items()},
        "param_groups": [{**{k: v for k, v in group.items() if k != "param_names"}, "params": names}],
    }
    torch.save({"model": net.state_dict(), "optimizer": named}, folder / "a.pt")
    dcp.write(open_checkpoint(folder / "a.pt").tree, folder / "written")
    command = [sys.executable, "-m", "tests.formats.gloo_worker"]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, cwd=root) for rank in range(2)
    ]
    for process in ranks:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error.decode()
    return folder
