"""Certified runs of DeepSpeed: what each way to lose state says, on as many ranks as run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Files = dict[str, Any]
"""The files of a checkpoint, loaded; changed in place."""


def _states(files: Files) -> list[dict[str, Any]]:
    found = [file.get("optimizer_state_dict") or file.get("optimizer") for file in files.values()]
    return [state for state in found if state]


def _base(state: dict[str, Any]) -> dict[str, Any]:
    return next((s for key in ("base_optimizer_state", "optimizer_state_dict") if (s := state.get(key))), state)


def _slots(files: Files) -> list[dict[str, Any]]:
    return [slots for state in _states(files) for slots in _base(state)["state"].values()]


def _groups(files: Files) -> list[dict[str, Any]]:
    return [group for state in _states(files) for group in _base(state)["param_groups"]]


def _models(files: Files) -> list[dict[str, Any]]:
    return [found for name, found in files.items() if "model_states" in name]


def a_bit_of_a_moment(files: Files) -> None:
    _slots(files)[0]["exp_avg"].view(torch.int32).view(-1)[0] ^= 1


def moments_exchanged(files: Files) -> None:
    slots = _slots(files)[0]
    slots["exp_avg"], slots["exp_avg_sq"] = slots["exp_avg_sq"], slots["exp_avg"]


def moments_of_two_parameters_exchanged(files: Files) -> None:
    flat = _slots(files)[0]["exp_avg"].detach().view(-1)
    flat[:4] = flat[4:8].clone()


def moments_zeroed(files: Files) -> None:
    for slots in _slots(files):
        slots["exp_avg"].zero_()


def moments_rounded(files: Files) -> None:
    for slots in _slots(files):
        slots["exp_avg_sq"].copy_(slots["exp_avg_sq"].bfloat16().float())


def steps_counted_anew(files: Files) -> None:
    for counted in (*_slots(files), *_groups(files)):
        if "step" in counted:
            counted["step"] = torch.zeros_like(torch.as_tensor(counted["step"]))


def another_rate(files: Files) -> None:
    for group in _groups(files):
        group["lr"] = 0.5


def another_decay(files: Files) -> None:
    for group in _groups(files):
        group["weight_decay"] = 0.3


def other_betas(files: Files) -> None:
    for group in _groups(files):
        group["betas"] = (0.5, 0.9)


def weights_of_another_step(files: Files) -> None:
    for state in _states(files):
        for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
            for flat in state.get(key, []):
                flat.detach().view(-1)[0] += 1
    for model in _models(files):
        next(iter(model["module"].values())).view(-1)[:1] += 1


def the_schedule_at_its_start(files: Files) -> None:
    for model in _models(files):
        model["lr_scheduler"]["last_batch_iteration"] = 0


WAYS: dict[str, Callable[[Files], None]] = {
    way.__name__: way
    for way in (
        a_bit_of_a_moment,
        moments_exchanged,
        moments_of_two_parameters_exchanged,
        moments_zeroed,
        moments_rounded,
        steps_counted_anew,
        another_rate,
        another_decay,
        other_betas,
        weights_of_another_step,
        the_schedule_at_its_start,
    )
}


def certified(folder: Path, stage: int) -> dict[str, str]:
    """What loading a certified run says, by what was done to its files; empty where it is the run."""
    import deepspeed

    from optimstate.errors import OptimStateError
    from optimstate.integrations.deepspeed import Resume

    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_max_lr": 0.01}}
    config: dict[str, Any] = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "scheduler": schedule}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    resume = Resume(engine, certificate=True)
    for _ in range(3):
        engine.backward(engine(torch.ones(4 // dist.get_world_size(), 4)).square().mean())
        engine.step()
    engine.save_checkpoint(str(folder / "run"), tag="three")
    resume.remove()
    said: dict[str, str] = {}

    def attempt(name: str, place: Path) -> None:
        taken = Resume(engine, certificate=True)
        try:
            engine.load_checkpoint(str(place), tag="three")
            said[name] = ""
        except OptimStateError as error:
            said[name] = str(error).partition("\n")[0]
        taken.remove()

    attempt("untouched", folder / "run")
    for name, way in WAYS.items():
        place = folder / name
        if dist.get_rank() == 0:
            shutil.copytree(folder / "run", place)
            files = {str(path): torch.load(path, weights_only=False) for path in (place / "three").glob("*.pt")}
            way(files)
            for path, found in files.items():
                torch.save(found, path)
        dist.barrier()
        attempt(name, place)
    attempt("untouched again", folder / "run")
    return said
