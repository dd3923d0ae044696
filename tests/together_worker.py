"""Two processes of which one fails, or has other parameters: `python -m tests.together_worker FOLDER` forks them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import optimstate
from optimstate.distributed import PlanLoadPlanner, fill_state_dict, load
from optimstate.errors import OptimStateError
from optimstate.plan.language.plan import Plan
from tests.distributed_worker import OPTIONS, TRANSPOSED, After, forked, groups, sharded, train


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    """Everything that this process has of a run."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for slots in optimizer.state.values() for v in slots.values() if isinstance(v, torch.Tensor)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [*(tensor.detach().numpy().tobytes() for tensor in local), str(options).encode()]


def outcome(run: Callable[[], object], model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The error that is raised, and whether everything is as it was before."""
    before, said = bits(model, optimizer), "done"
    try:
        run()
    except (OptimStateError, CheckpointException, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return [said, "as before" if bits(model, optimizer) == before else "changed"]


def fail(*_: object) -> None:
    raise RuntimeError("a hook of one process")


def refused(folder: Path, rank: int) -> dict[str, list[str]]:
    """Faults of the second process alone, which both have to learn of."""
    good, other, plan = folder / "before.dcp", folder / "other.dcp", Plan.from_toml(TRANSPOSED)
    only_here = folder / ("plan.toml" if rank == 0 else "nowhere.toml")
    found = {}
    for kind in ("plan", "other plan", "hook", "certificate", "checkpoint"):
        net = sharded("fsdp")
        optimizer = torch.optim.AdamW(groups(net), **OPTIONS)
        if kind == "hook" and rank == 1:
            optimizer.register_load_state_dict_post_hook(fail)
        given: dict[str, Any] = {"plan": only_here if kind == "plan" else plan}
        if kind == "other plan" and rank:
            given["plan"] = plan.with_policy(hyperparameters="live")
        if kind == "certificate":
            given["certificate"] = str(folder / "nowhere.json") if rank else None

        place = other if kind == "checkpoint" and rank == 1 else good

        def run(
            given: dict[str, Any] = given,
            net: nn.Module = net,
            of: torch.optim.Optimizer = optimizer,
            place: Path = place,
        ) -> object:
            return optimstate.resume(place, model=net, optimizer=of, **given)

        found[kind] = outcome(run, net, optimizer)
    net = sharded("fsdp")
    optimizer = torch.optim.AdamW(groups(net), **OPTIONS)
    weights = get_model_state_dict(net)
    planner = PlanLoadPlanner(good, only_here)
    found["planner"] = outcome(
        lambda: dcp.load({"model": weights}, checkpoint_id=str(good), planner=planner), net, optimizer
    )
    own = other if rank else good
    second = PlanLoadPlanner(own, plan)
    found["planner's checkpoint"] = outcome(
        lambda: dcp.load({"model": weights}, checkpoint_id=str(own), planner=second), net, optimizer
    )
    return found


def refused_of_fsdp1(folder: Path, rank: int) -> dict[str, list[str]]:
    """The same in FSDP1, whose state dicts are filled before they are loaded."""
    good, found = folder / "before.dcp", {}
    for kind in ("resume", "hook", "plan", "trained"):
        net = FullyShardedDataParallel(After(), device_id=torch.device("cpu"), use_orig_params=True)
        optimizer = torch.optim.AdamW(groups(net), **OPTIONS)
        if kind == "trained":
            train(net, optimizer, range(1))
        if kind in ("hook", "trained"):
            optimizer.register_load_state_dict_pre_hook(fail)  # in both: torch's own calls are collective
        plan = folder / ("nowhere.toml" if rank and kind == "plan" else "plan.toml")

        def run(
            kind: str = kind, net: nn.Module = net, of: torch.optim.Optimizer = optimizer, plan: Path = plan
        ) -> object:
            if kind == "resume":
                return optimstate.resume(good, model=net, optimizer=of, plan=plan)
            return load(good, net, of, plan=plan)

        found[kind] = outcome(run, net, optimizer)
    return found


def smaller_than_the_processes(folder: Path) -> list[Any]:
    """FSDP1's `ShardedTensor` of one row, of which the second process has no shard."""
    saved, where = {"weight": torch.full((1, 2), 3.0), "bias": torch.full((1,), 4.0)}, folder / "small.pt"
    if dist.get_rank() == 0:
        torch.save({"model": saved}, where)
    dist.barrier()
    net = FullyShardedDataParallel(nn.Linear(2, 1), device_id=torch.device("cpu"), use_orig_params=True)
    load(where, net)
    full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))  # on the first process
    return [full["weight"].tolist(), full["bias"].tolist()] if full else []


class Nested(torch.optim.Optimizer):
    """Slots within dicts and lists, with or without one of another shape than its parameter."""

    def __init__(self, parameters: Any, *, square: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.square = square

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            slots = self.state[parameter]
            if not slots:
                slots |= {"of": {"sum": torch.zeros_like(parameter), "step": torch.zeros(())}, "old": []}
                slots["old"].append(torch.zeros_like(parameter))
                if self.square:
                    slots["of"]["square"] = torch.eye(parameter.shape[0])
            slots["of"]["sum"].add_(parameter)
            slots["of"]["step"] += 1
            slots["old"][0].copy_(parameter)
            parameter.sub_(slots["of"]["sum"] + slots["old"][0], alpha=0.1)


def slots_within_slots(folder: Path) -> list[Any]:
    """For sharded and replicated parameters: the weights after a step, and the bytes that were read, or the error."""
    found: list[Any] = []
    mesh = DeviceMesh("cpu", [0, 1])
    for square in (False, True):
        net = nn.Module()
        net.w = nn.Parameter(torch.arange(15.0).reshape(5, 3))
        whole = Nested(net.named_parameters(), square=square)
        whole.step()
        saved = {"model": {"w": net.w.detach().clone()}, "optimizer": whole.state_dict()}
        where = folder / f"nested-{square}.pt"
        if dist.get_rank() == 0:
            torch.save(saved, where)
        dist.barrier()
        whole.step()
        for placement in (Shard(0), Replicate()):
            live = nn.Module()
            live.w = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [placement]))
            optimizer = Nested(live.named_parameters(), square=square)
            try:
                nbytes = optimstate.resume(where, model=live, optimizer=optimizer).nbytes
            except OptimStateError as error:
                found.append(str(error))
                continue
            optimizer.step()
            found.append([torch.equal(live.w.full_tensor(), net.w), nbytes])
    return found


def of_one_process(folder: Path) -> list[Any]:
    """A parameter that is sharded over the first process alone; the other has no part of it."""
    net = nn.Module()
    mesh = DeviceMesh("cpu", [0])
    net.turned = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))
    weights = {"model": net.state_dict()}
    planner = PlanLoadPlanner(folder / "before.dcp")
    dcp.load(weights, checkpoint_id=str(folder / "before.dcp"), planner=planner)
    filled = net.turned.to_local().tolist()
    with torch.no_grad():
        net.turned.zero_()
    plan = Plan().with_policy(unexpected="drop")
    optimstate.resume(folder / "before.dcp", model=net, plan=plan)
    return [filled, net.turned.to_local().tolist(), planner.nbytes]


class Expert(nn.Module):
    """A part that all processes have, and one that only this process has."""

    def __init__(self, rank: int, value: float) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.full((2,), 1.0))
        self.experts = nn.ParameterDict({str(rank): nn.Parameter(torch.full((2,), value))})


def experts(folder: Path, rank: int, *, flat: bool) -> list[str]:
    """What differs after a round trip of a state dict with parameters of this process alone."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def state(value: float, lr: float) -> dict[str, Any]:
        net = Expert(rank, value + rank)
        optimizer = torch.optim.AdamW(net.named_parameters(), lr=lr)
        for parameter in net.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        return {
            "model": get_model_state_dict(net),
            "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
        }

    saved, live = state(1.0, 0.1), state(5.0, 0.2)
    where = folder / f"experts-{flat}.dcp"
    dcp.save(saved, checkpoint_id=str(where))
    fill_state_dict(live, where)
    return [] if str(live) == str(saved) else [str(saved), str(live)]


def run(rank: int, folder: Path) -> None:
    said: dict[str, Any] = {f"fsdp2 {kind}": found for kind, found in refused(folder, rank).items()}
    said |= {f"fsdp1 {kind}": found for kind, found in refused_of_fsdp1(folder, rank).items()}
    said["of one process"] = of_one_process(folder)
    said["small"] = smaller_than_the_processes(folder)
    said["within"] = slots_within_slots(folder)
    said["experts"] = [experts(folder, rank, flat=flat) for flat in (False, True)]
    (folder / f"together{rank}.json").write_text(json.dumps(said))
    dist.barrier()


if __name__ == "__main__":
    sys.exit(forked(run, Path(sys.argv[1])))
