"""Two processes that resume a changed model, sharded: `python -m tests.distributed_worker FOLDER` forks them."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from optimstate.distributed import NamedSavePlanner, PlanLoadPlanner, fill_state_dict, load, optimizer_names
from optimstate.errors import MigrationError, StateMismatchError
from optimstate.plan.language.plan import Plan

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}
PLAN = """
[[rule]]
from = "qkv.{p}"
to = "{x=q|k|v}.{p}"
split = 0

[[rule]]
from = "mlp.{p}"
to = "feed.{p}"
"""
TRANSPOSED = (
    PLAN
    + """
[[rule]]
from = "turned"
to = "turned"
transpose = [0, 1]
"""
)


class Before(nn.Module):
    """Fused attention-like weights, one layer whose name changes, one parameter stored the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 21)
        self.mlp = nn.Linear(7, 5)
        self.turned = nn.Parameter(torch.empty(5, 3))
        self.register_buffer("seen", torch.zeros(2))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).chunk(3, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        return (self.mlp if hasattr(self, "mlp") else self.feed)(torch.tanh(q) * torch.sigmoid(k) + v) @ self.out()

    def out(self) -> torch.Tensor:
        return self.turned


class After(Before):
    """The same function."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv, self.mlp
        self.q, self.k, self.v = (nn.Linear(6, 7) for _ in range(3))
        self.feed = nn.Linear(7, 5)
        self.turned = nn.Parameter(torch.empty(3, 5))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def out(self) -> torch.Tensor:
        return self.turned.t()


def filled(net: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Every process has the same batches, so that what is sharded computes what one process does."""
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss = net(torch.randn(8, 6)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Biases are not decayed, so that there are two param groups."""
    decayed = [(n, p) for n, p in net.named_parameters() if not n.endswith("bias")]
    others = [(n, p) for n, p in net.named_parameters() if n.endswith("bias")]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def sharded(kind: str) -> nn.Module:
    net = After()
    if kind == "tp":
        mesh = init_device_mesh("cpu", (2,))
        return parallelize_module(net, mesh, {"q": ColwiseParallel(), "feed": RowwiseParallel()})
    for layer in (net.q, net.k, net.v, net.feed):
        fully_shard(layer)
    fully_shard(net)
    return net


def whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()


def resumed(folder: Path, kind: str) -> dict[str, Any]:
    net = sharded(kind)
    optimizer = torch.optim.AdamW(groups(net), **{**OPTIONS, "lr": 9.0})
    found = load(folder / "before.dcp", net, optimizer, plan=Plan.from_toml(TRANSPOSED))
    state = dict(zip(optimizer_names(optimizer, net), optimizer.state.values(), strict=True))
    arrived = {
        "model": {name: whole(value) for name, value in net.state_dict().items()},
        "state": {name: {slot: whole(value) for slot, value in slots.items()} for name, slots in state.items()},
        "options": [{k: v for k, v in g.items() if "param" not in k} for g in optimizer.param_groups],
        "nbytes": found.nbytes,
    }
    if kind == "fsdp":
        arrived["losses"] = train(net, optimizer, range(5, 10))
        raw = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
        dcp.save(raw, checkpoint_id=str(folder / "named.dcp"), planner=NamedSavePlanner())
        saved = get_optimizer_state_dict(net, optimizer)["state"]
        arrived["saved"] = {name: {slot: whole(value) for slot, value in s.items()} for name, s in saved.items()}
    return arrived


def planned(folder: Path, kind: str) -> dict[str, Any]:
    """The same through `dcp.load`, which fills the state dicts of FSDP2 or FSDP1."""
    net: nn.Module = (
        FullyShardedDataParallel(After(), device_id=torch.device("cpu"), use_orig_params=True)
        if kind == "fsdp1"
        else sharded("fsdp")
    )
    optimizer = torch.optim.AdamW(groups(net), **{**OPTIONS, "lr": 9.0})
    if kind == "fsdp1":
        nbytes = load(folder / "before.dcp", net, optimizer, plan=Plan.from_toml(TRANSPOSED)).nbytes
    else:
        weights, state = get_state_dict(net, optimizer)
        planner = PlanLoadPlanner(folder / "before.dcp", Plan.from_toml(TRANSPOSED))
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "before.dcp"), planner=planner)
        set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
        nbytes = planner.nbytes
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(net, optimizer, options=options)
    weights, state = copy.deepcopy((weights, state))  # training changes some of them in place
    arrived = {"model": weights, "state": state["state"], "groups": state["param_groups"], "nbytes": nbytes}
    arrived["losses"] = train(net, optimizer, range(5, 10))
    return arrived


def saved_in_the_background(folder: Path) -> str:
    """A folder of `async_save`, filled into another sharding by name."""
    net = sharded("fsdp")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(dist.get_rank() + 1.0)
    done = dcp.async_save({"model": net.state_dict()}, checkpoint_id=str(folder / "async.dcp"))
    done.result()
    dist.barrier()
    plain = {"model": After().state_dict()}
    fill_state_dict(plain, folder / "async.dcp")
    return str(sorted(plain["model"]["q.weight"].unique().tolist()))


def refusals(folder: Path) -> list[str]:
    """What goes wrong in one process alone goes wrong in all, and leaves everything as it was."""
    net = sharded("fsdp")
    optimizer = torch.optim.AdamW(groups(net), **OPTIONS)
    before = {name: whole(value).clone() for name, value in net.state_dict().items()}
    said = []
    missing = folder / "before.dcp" if dist.get_rank() == 0 else folder / "nowhere"
    for path, plan in ((missing, TRANSPOSED), (folder / "before.dcp", PLAN)):
        try:
            load(path, net, optimizer, plan=Plan.from_toml(plan))
        except (MigrationError, StateMismatchError, FileNotFoundError) as error:
            said.append(f"{type(error).__name__}: {error}")
    assert not optimizer.state
    assert all(torch.equal(whole(value), before[name]) for name, value in net.state_dict().items())
    return said


def run(rank: int, folder: Path) -> None:
    results = {kind: resumed(folder, kind) for kind in ("fsdp", "tp")}
    results |= {f"planned {kind}": planned(folder, kind) for kind in ("fsdp2", "fsdp1")}
    results["async"] = saved_in_the_background(folder)  # type: ignore[assignment]
    torch.save(results, folder / f"arrived{rank}.pt")
    (folder / f"said{rank}.json").write_text(json.dumps(refusals(folder)))
    dist.barrier()


def joined(work: Callable[[int, Path], None], rank: int, folder: Path) -> None:
    """Work as one of two processes of a group, which meet in a file that no other group has used."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = f"file://{folder}/rendezvous-{os.getppid()}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    work(rank, folder)
    dist.destroy_process_group()


def forked(work: Callable[[int, Path], None], folder: Path) -> int:
    """Work in two processes; returns the exit code of the one that fails."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=joined, args=(work, rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(forked(run, Path(sys.argv[1])))
