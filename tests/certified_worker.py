"""Two processes that certify a sharded run and resume it: `python -m tests.certified_worker FOLDER` forks them."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import optimstate
from optimstate import hooks
from optimstate.errors import OptimStateError
from tests.support import forked

Part = dict[str, Any]


def built(seed: int, sharded: bool = True) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))  # 5 is not divided evenly
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def _first(optimizer: torch.optim.Optimizer, number: int = 0) -> Part:
    return list(optimizer.state.values())[number]  # type: ignore[arg-type]


def _local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local()
    return found


def a_bit_in_one_process(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    if dist.get_rank() == 1:
        _local(_first(optimizer)["exp_avg"]).view(torch.int32).view(-1)[0] ^= 1


def moments_exchanged(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    one, other = _first(optimizer, 0), _first(optimizer, 2)
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]


def a_lost_step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    _first(optimizer)["step"].zero_()


def another_rate(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.3


def another_schedule(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    scheduler.last_epoch = 0


def weights_of_one_process(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    if dist.get_rank() == 1:
        _local(next(iter(model.parameters()))).detach().zero_()


def a_step_more(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    train(model, optimizer, scheduler, 1)


WAYS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, Any], None]] = {
    way.__name__: way
    for way in (
        a_bit_in_one_process,
        moments_exchanged,
        a_lost_step,
        another_rate,
        another_schedule,
        weights_of_one_process,
        a_step_more,
    )
}


def resumed(place: Path, certificate: Any, *parts: Any) -> str:
    """What resuming a certified run says; empty where it is the run."""
    model, optimizer, scheduler = parts
    try:
        optimstate.resume(place, model=model, optimizer=optimizer, scheduler=scheduler, certificate=certificate)
    except OptimStateError as error:
        return str(error)
    return ""


def work(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder / 'meeting'}")
    said: dict[str, str] = {}
    for name in ("untouched", *WAYS):
        model, optimizer, scheduler = built(1)
        train(model, optimizer, scheduler, 3)
        certify = hooks.certify(model, scheduler=scheduler, path=folder / f"{name}.json")
        hook = optimizer.register_state_dict_post_hook(certify)
        if name in WAYS:
            optimizer.state_dict()
            hook.remove()
            WAYS[name](model, optimizer, scheduler)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        dcp.save({key: part.state_dict() for key, part in parts.items()}, checkpoint_id=folder / name)
        said[name] = resumed(folder / name, folder / f"{name}.json", *built(2))
    said["untouched, its own"] = resumed(folder / "untouched", True, *built(2))
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    sys.exit(forked(work, [(rank, folder) for rank in range(2)]))


if __name__ == "__main__":
    main()
