"""One of two processes with real shards: `python -m tests.formats.gloo_worker VERB RANK FOLDER`.

save    writes FOLDER/sharded and others with torch.distributed.checkpoint: tensors cut along dim 0, dim 1, or not
load    loads FOLDER/written into an FSDP2 model and its optimizer, and writes what arrived to FOLDER/arrived.pt
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import Shard as OldShard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from optimstate.installed_torch import accepts
from tests.releases import WRITES_SAFETENSORS_SHARDS

SHAPES = {"rows": (7, 4), "columns": (6, 5), "deep": (3, 4, 6), "whole": (5,), "tiny": (1, 3)}


def values(name: str) -> torch.Tensor:
    """The tensor that every process agrees on."""
    shape = SHAPES[name]
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + len(name)).view(shape)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False))


def trained(net: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-2)
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    return optimizer


def safetensors_writers(folder: Path) -> dict[str, Any]:
    """Those of a torch that has them."""
    if not WRITES_SAFETENSORS_SHARDS:
        return {}
    from torch.distributed.checkpoint.filesystem import SerializationFormat
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    return {
        "hf/sharded": HuggingFaceStorageWriter(str(folder / "hf/sharded"), save_distributed=True),
        "hf_consolidated": HuggingFaceStorageWriter(
            str(folder / "hf_consolidated"), save_distributed=True, enable_consolidation=True
        ),
        "safetensors": dcp.FileSystemWriter(
            folder / "safetensors", serialization_format=SerializationFormat.SAFETENSORS
        ),
    }


WITHOUT_COLLECTIVES = accepts(dcp.save, "use_collectives")


def save(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    placements = {"rows": Shard(0), "columns": Shard(1), "deep": Shard(2), "whole": Replicate(), "tiny": Shard(0)}
    tensors = {name: distribute_tensor(values(name), mesh, [kind]) for name, kind in placements.items()}
    dcp.save({"model": tensors, "epoch": 3, "betas": (0.9, 0.999)}, checkpoint_id=str(folder / "sharded"))
    nested = {"model": tensors, "epoch": 3}
    for name, writer in safetensors_writers(folder).items():
        dcp.save(tensors if name.startswith("hf") else nested, storage_writer=writer)
    if WITHOUT_COLLECTIVES:
        dcp.save(nested, checkpoint_id=str(folder / "without_collectives"), use_collectives=False)
    rank = dist.get_rank()
    local = tensors["columns"].to_local()
    shards = [OldShard.from_tensor_and_offsets(local, [0, 3 * rank], rank)]
    whole = sharded_tensor.init_from_local_shards(shards, *SHAPES["columns"])
    torch.save({"d": tensors["rows"], "s": whole}, folder / f"rank{rank}.pt")


def load(folder: Path) -> None:
    net = model()
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
    weights, state = get_state_dict(net, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "written"))
    set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(net, optimizer, options=full)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, folder / "arrived.pt")


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    save(folder)
    load(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
