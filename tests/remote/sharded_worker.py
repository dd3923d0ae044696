"""One process of a sharded run: saves and trains on, resumes under a plan and trains on; writes losses and bytes."""

from __future__ import annotations

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


def main(saved: str, place: str, out: str) -> None:
    """Save at `saved`, which the store shows as `place`; one start of torchrun takes longer than all else."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    net, optimizer = build("layer")
    train(net, optimizer, range(3))
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=saved)
    expected = train(net, optimizer, range(3, 5))
    dist.barrier()
    net, optimizer = build("block")
    plan = optimstate.Plan.from_options(rename=["layer{i}.{p}=block{i}.{p}"])
    optimstate.resume(place, model=net, optimizer=optimizer, plan=plan)
    read = traffic.read
    Path(out, str(dist.get_rank())).write_text(f"{expected}|{train(net, optimizer, range(3, 5))}|{read}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
