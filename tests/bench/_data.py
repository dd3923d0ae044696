"""Large checkpoints for the benchmarks, written once into `bench-data/` at the repository's root.

Run as a program (`python -m tests.bench._data RECIPE PATH`) so that the measuring process never imports torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent.parent
CACHE = ROOT / "bench-data"


@dataclass(frozen=True)
class Recipe:
    """A GPT-like model's checkpoint: weights, AdamW state in two groups by name, a cosine scheduler.

    `scalars` > 0 asks instead for so many tiny parameters of 8 elements.
    """

    layers: int = 0
    width: int = 0
    vocabulary: int = 0
    context: int = 1024
    scalars: int = 0

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Parameters in the model's order."""
        if self.scalars:
            for index in range(self.scalars):
                yield f"transformer.h.{index // 100}.experts.{index % 100}.scale", (8,)
            return
        w = self.width
        yield "transformer.wte.weight", (self.vocabulary, w)
        yield "transformer.wpe.weight", (self.context, w)
        for layer in range(self.layers):
            stem = f"transformer.h.{layer}"
            for norm in ("ln_1", "ln_2"):
                yield f"{stem}.{norm}.weight", (w,)
                yield f"{stem}.{norm}.bias", (w,)
            for linear, (outputs, inputs) in {
                "attn.c_attn": (3 * w, w),
                "attn.c_proj": (w, w),
                "mlp.c_fc": (4 * w, w),
                "mlp.c_proj": (w, 4 * w),
            }.items():
                yield f"{stem}.{linear}.weight", (outputs, inputs)
                yield f"{stem}.{linear}.bias", (outputs,)
        yield "transformer.ln_f.weight", (w,)
        yield "transformer.ln_f.bias", (w,)


RECIPES = {
    "3MB": Recipe(layers=2, width=96, vocabulary=256, context=64),
    "1GB": Recipe(layers=11, width=768, vocabulary=8192),
    # Crosses 4 GiB, where zip directories change their form.
    "4.4GB": Recipe(layers=25, width=1024, vocabulary=50304),
    # 80,000 tensors with the slots.
    "20000-tensors": Recipe(scalars=20_000),
}


def checkpoint_path(recipe: str, suffix: str) -> Path:
    """The path of a recipe's file in a container (`.pt` or `.safetensors`), written first if it is not there."""
    path = CACHE / f"{recipe}{suffix}"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        print(f"writing {path.name} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "tests.bench._data", recipe, str(path)], cwd=ROOT, check=True)
    return path


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe's checkpoint whole or not at all; the suffix picks the container.

    Tensors are mappings of one file of noise, so memory stays small whatever the size (`.pt`; safetensors' own writer
    gathers everything first).
    """
    import numpy as np

    largest = max(_numel(shape) for _, shape in recipe.shapes())
    noise = path.with_name(f".{path.name}.noise")
    part = path.with_name(f".{path.name}.part")
    try:
        with noise.open("wb") as file:
            generator = np.random.default_rng(0)
            for start in range(0, largest, 1 << 20):
                generator.standard_normal(min(1 << 20, largest - start), dtype=np.float32).tofile(file)
        if path.suffix == ".safetensors":
            _write_safetensors(recipe, noise, part)
        else:
            _write_torch(recipe, noise, part)
        part.replace(path)
    finally:
        for leftover in (noise, part):
            leftover.unlink(missing_ok=True)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _tensor(noise: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with a storage of its own: a private mapping for large ones, a copy for small."""
    import torch

    mapped = torch.from_file(str(noise), shared=False, size=_numel(shape), dtype=torch.float32).reshape(shape)
    # A mapping takes a page at least, and a process may not have tens of thousands of them.
    return mapped if mapped.numel() > 65_536 else mapped.clone()


def _write_torch(recipe: Recipe, noise: Path, path: Path) -> None:
    import torch

    weights = {name: torch.nn.Parameter(_tensor(noise, shape)) for name, shape in recipe.shapes()}
    groups = [
        {"params": [(n, p) for n, p in weights.items() if (p.ndim >= 2) is matrices], "weight_decay": decay}
        for matrices, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    for parameter in weights.values():
        optimizer.state[parameter] = {
            "step": torch.tensor(100.0),
            "exp_avg": _tensor(noise, tuple(parameter.shape)),
            "exp_avg_sq": _tensor(noise, tuple(parameter.shape)),
        }
    checkpoint = {
        "model": {name: parameter.detach() for name, parameter in weights.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": 100,
    }
    torch.save(checkpoint, path)


def _write_safetensors(recipe: Recipe, noise: Path, path: Path) -> None:
    """The same tensors under flat names: weights as they are, slots as `optimizer.NAME.SLOT`."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, shape in recipe.shapes():
        tensors[name] = _tensor(noise, shape)
        for slot in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{name}.{slot}"] = _tensor(noise, shape)
        tensors[f"optimizer.{name}.step"] = torch.tensor(100.0)
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    write(RECIPES[sys.argv[1]], Path(sys.argv[2]))
