"""Write a named training state as DeepSpeed's ZeRO would, on any number of ranks: the rules, in torch."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

Named = dict[str, dict[str, torch.Tensor]]


def named_state(shapes: dict[str, tuple[int, ...]]) -> Named:
    torch.manual_seed(3)
    return {
        name: {
            "fp32_param": torch.randn(shape),
            "exp_avg": torch.randn(shape),
            "exp_avg_sq": torch.rand(shape),
        }
        for name, shape in shapes.items()
    }


def _model_states(state: Named, groups: list[list[str]], dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    return {
        "module": {name: slots["fp32_param"].to(dtype) for name, slots in state.items()} | {"count": torch.ones(1)},
        "buffer_names": ["count"],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, state[name]["exp_avg"].shape) for name in group) for group in groups],
        "shared_params": {},
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "lr_scheduler": None,
        "global_steps": 9,
        **more,
    }


def _group(index: int) -> dict[str, Any]:
    return {"lr": 0.1 * (index + 1), "betas": (0.9, 0.99), "params": [index]}


def write_stage_2(folder: Path, state: Named, groups: list[list[str]], world: int, *, keep_padding: bool) -> None:
    """Each group flat, padded to a multiple of twice the ranks, cut into equal parts; no slice mappings."""
    folder.mkdir()
    torch.save(_model_states(state, groups, torch.float16), folder / "mp_rank_00_model_states.pt")
    for rank in range(world):
        base: dict[int, Any] = {}
        masters = []
        for index, names in enumerate(groups):
            parts = {}
            for slot in ("fp32_param", "exp_avg", "exp_avg_sq"):
                flat = torch.cat([state[name][slot].reshape(-1) for name in names])
                padded = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * world)))
                size = padded.numel() // world
                stop = (rank + 1) * size if keep_padding else min((rank + 1) * size, flat.numel())
                parts[slot] = padded[rank * size : stop].clone()
            masters.append(parts.pop("fp32_param"))
            base[index] = {"step": torch.tensor(9.0), **parts}
        inner = {
            "loss_scaler": None,
            "clip_grad": 1.0,
            "zero_stage": 2,
            "partition_count": [world] * len(groups),
            "base_optimizer_state": {"state": base, "param_groups": [_group(i) for i in range(len(groups))]},
            "single_partition_of_fp32_groups": masters,
        }
        torch.save({"optimizer_state_dict": inner}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def write_stage_3(folder: Path, state: Named, names: list[str], world: int, frozen: torch.Tensor) -> None:
    """Each parameter cut and padded on its own; two sub-groups of one param group; one parameter not trained."""
    folder.mkdir()
    half = len(names) // 2
    subgroups = [names[:half], names[half:]]

    def part(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        size = -(-tensor.numel() // world)
        padded = torch.nn.functional.pad(tensor.reshape(-1), (0, size * world - tensor.numel()))
        return padded[rank * size : (rank + 1) * size].clone()

    for rank in range(world):
        flats = {
            slot: [torch.cat([part(state[name][slot], rank) for name in group]) for group in subgroups]
            for slot in ("fp32_param", "exp_avg", "exp_avg_sq")
        }
        inner = {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": flats["fp32_param"],
            "optimizer_state_dict": {
                "state": {
                    index: {
                        "step": torch.tensor(9.0),
                        **{slot: flats[slot][index] for slot in ("exp_avg", "exp_avg_sq")},
                    }
                    for index in range(2)
                },
                "param_groups": [_group(0)],
            },
        }
        model = _model_states(state, [names], torch.bfloat16)
        model["module"] = {name: torch.zeros(0) for name in state} | {"count": torch.ones(1)}
        model["frozen_param_shapes"] = {"frozen": frozen.shape}
        model["frozen_param_fragments"] = {"frozen": part(frozen, rank)}
        model["shared_params"] = {"tied": names[0]}
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": inner}, folder / f"bf16_{prefix}_optim_states.pt")
        torch.save(model, folder / f"{prefix}_model_states.pt")
