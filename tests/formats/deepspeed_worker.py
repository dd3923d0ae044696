"""Runs of DeepSpeed on the CPU, by stages of ZeRO: `python -m tests.formats.deepspeed_worker FOLDER` forks them.

In FOLDER/STAGE one process trains four steps, saves them as `step4`, and trains on; another resumes from the universal
checkpoint that is made of them. Their losses are in `losses.json` and `lossesuniversal.json`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import optimstate
from optimstate.formats.protocol import WriteOptions
from tests.support import forked, free_port

STAGES = (1, 3)
QUICK = WriteOptions(sync=False)


def engine(stage: int, *, universal: bool) -> Any:
    import deepspeed
    import deepspeed.ops

    # What speeds up several processes on one machine would be compiled now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    options: dict[str, Any] = {
        "train_batch_size": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if universal:
        options["checkpoint"] = {"load_universal": True}
    made, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters(), lr=1e-2), config=options)
    return made


def train(running: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        loss = running(torch.randn(4, 6).bfloat16()).float().square().mean()
        running.backward(loss)
        running.step()
        losses.append(loss.item())
    return losses


def run(stage: int, folder: Path, tag: str) -> None:
    """One process of a run, which imports nothing more; its losses go to a file."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({key: str(value) for key, value in place.items()})
    running = engine(stage, universal=bool(tag))
    if tag:
        running.load_checkpoint(str(folder), tag=tag)
    else:
        train(running, range(4))
        running.save_checkpoint(str(folder), tag="step4")
    (folder / f"losses{tag}.json").write_text(json.dumps(train(running, range(4, 8))))


def tool(folder: Path) -> None:
    """DeepSpeed's own tool on the same partitions."""
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = ["ds_to_universal", "--input_folder", str(folder / "step4"), "--output_folder", str(folder / "theirs")]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # or importing its Muon compiles it
    import deepspeed  # noqa: F401 - once, for all processes

    for stage in STAGES:
        folder = Path(sys.argv[1]) / str(stage)
        folder.mkdir()
        failed = forked(run, [(stage, folder, "")])
        optimstate.convert(folder / "step4", folder / "universal", to="deepspeed-universal", options=QUICK)
        failed |= forked(run, [(stage, folder, "universal")])
        if stage == 3:  # for others the tool asks for what only trainers write
            failed |= forked(tool, [(folder,)])
        if failed:
            sys.exit(f"stage {stage} failed")


if __name__ == "__main__":
    main()
