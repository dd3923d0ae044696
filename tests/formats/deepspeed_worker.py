"""A run of DeepSpeed on the CPU: `python -m tests.formats.deepspeed_worker STAGE FOLDER PORT [TAG]` prints losses.

Without a tag it trains four steps, saves them as `step4`, and trains on; with one it resumes from that universal
checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch
from torch import nn


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


def main() -> None:
    stage, folder, port, *tag = sys.argv[1:]
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}  # or importing its Muon compiles it
    running = engine(int(stage), universal=bool(tag))
    if tag:
        running.load_checkpoint(folder, tag=tag[0])
    else:
        train(running, range(4))
        running.save_checkpoint(folder, tag="step4")
    print("losses", json.dumps(train(running, range(4, 8))))


if __name__ == "__main__":
    main()
