"""Two processes of a sharded run: they save and train on, then a renamed model resumes from a store and trains on.

`python -m tests.remote.sharded_worker FOLDER URL` forks them, so that torch is imported once; URL names FOLDER.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import optimstate
from optimstate.io.remote.store import traffic

WIDTH = 512


class Net(torch.nn.Module):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        for number in range(6):
            self.add_module(f"{prefix}{number}", torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = torch.tanh(module(x))
        return x


def build(prefix: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net(prefix)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in net.children():
        fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2)


def train(net: Net, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        torch.manual_seed(1000 * dist.get_rank() + seed)
        loss = net(torch.randn(4, WIDTH)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(rank: int, folder: Path, url: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
    net, optimizer = build("layer")
    train(net, optimizer, range(3))
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
    expected = train(net, optimizer, range(3, 5))
    net, optimizer = build("block")
    plan = optimstate.Plan.from_options(rename=["layer{i}.{p}=block{i}.{p}"])
    optimstate.resume(url, model=net, optimizer=optimizer, plan=plan)
    read = traffic.read
    said = {"expected": expected, "losses": train(net, optimizer, range(3, 5)), "read": read}
    folder.with_name(f"said{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, Path(sys.argv[1]), sys.argv[2])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
