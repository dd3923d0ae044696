"""What is fuzzed: one input, after which nothing but an error of optimstate's may have been raised."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import OrderedDict
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from optimstate.errors import OptimStateError

__all__ = ["FOUND", "read_anything", "run_verbs"]

FOUND = Path(__file__).parent / "found"
SUFFIXES = ("a.pt", "a.safetensors", "a.npz", "a.npy", "a.zip", "a.pkl", "a.safetensors.index.json", "d/.metadata")


@cache
def _place() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))


def read_anything(data: bytes) -> None:
    """Open, look into and scan a file; the first byte says what it is called."""
    from optimstate.formats.registry import open_checkpoint
    from optimstate.surgery.inspecting import inspect
    from optimstate.surgery.scanning import scan

    folder = _place()
    name = SUFFIXES[data[0] % len(SUFFIXES)] if data else SUFFIXES[0]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data[1:])
    opened = path.parent if path.parent != folder else path
    looks = (lambda: inspect(opened), lambda: scan(opened), lambda: open_checkpoint(opened, salvage=True))
    for look in looks:
        with suppress(OptimStateError):
            str(look())
    path.unlink()


class _Trees:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def key(self) -> Any:
        names = ["model", "state", "param_groups", "a.weight", "b.bias", "\x1b[31m", "\u202e", "lr", "last_epoch", ""]
        return self.random.choice([*names, self.random.randrange(5), (1, "x"), None, 2.5, b"k", 10**400])

    def leaf(self) -> Any:
        import torch

        which = self.random.randrange(10)
        if which < 5:
            shape = [self.random.randrange(4) for _ in range(self.random.randrange(4))]
            dtype = self.random.choice(
                [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
            )
            tensor = torch.zeros(shape, dtype=dtype)
            return tensor.t() if tensor.dim() == 2 and which == 1 else tensor
        return self.random.choice(
            [0, -1, 10**30, 10**500, 1.5, float("nan"), "text", "\ud800", b"\0" * 9, None, True, 2j, [], {}]
        )

    def tree(self, depth: int) -> Any:
        which = self.random.randrange(6) if depth else 9
        count = self.random.randrange(4)
        if which < 3:
            made = {self.key(): self.tree(depth - 1) for _ in range(count)}
            return OrderedDict(made) if which == 2 else made
        if which < 5:
            items = [self.tree(depth - 1) for _ in range(count)]
            return items * 2 if which == 3 else tuple(items)
        return self.leaf()

    def checkpoint(self) -> Any:
        import torch

        if self.random.random() < 0.3:
            return self.tree(5)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        optimizer = torch.optim.Adam(model.named_parameters() if self.random.random() < 0.5 else model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        made: Any = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "extra": self.tree(3)}
        node = made["optimizer"]
        for _ in range(self.random.randrange(4)):  # damage that every pickle can express
            where = self.random.choice([node, node["state"], node["param_groups"]])
            if isinstance(where, dict) and where:
                where[self.random.choice(list(where))] = self.tree(2)
            if not isinstance(node.get("state"), dict) or not isinstance(node.get("param_groups"), list):
                break
        return made


def run_verbs(seed: int) -> None:
    """Build a checkpoint, change some bytes of it perhaps, and run every verb on it.

    Raises:
        Exception: What none of them may raise.
    """
    import torch

    import optimstate
    from optimstate.formats.protocol import WriteOptions

    trees = _Trees(seed)
    chosen = trees.random
    folder = _place() / "verbs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path, other = folder / "a.pt", folder / "b.pt"
    torch.save(trees.checkpoint(), path)
    torch.save(trees.checkpoint(), other)
    if chosen.random() < 0.5:
        data = bytearray(path.read_bytes())
        for _ in range(chosen.randrange(1, 6)):
            at = chosen.randrange(len(data))
            data[at : at + chosen.randrange(1, 4)] = chosen.randbytes(chosen.randrange(4))
        path.write_bytes(data)
    quick = WriteOptions(sync=False)
    rename = optimstate.Plan.from_options(rename=["0.{p}=first.{p}"])
    verbs = [
        lambda: str(optimstate.inspect(path)),
        lambda: optimstate.inspect(path).to_json(),
        lambda: str(optimstate.diff(path, other)),
        lambda: str(optimstate.verify(path)),
        lambda: optimstate.scan(path).to_json(),
        lambda: optimstate.convert(path, folder / "c.safetensors", options=quick, force=True),
        lambda: optimstate.convert(path, folder / "c.pt", drop_opaque=True, options=quick, force=True),
        lambda: optimstate.convert(path, folder / "c.dcp", options=quick, force=True),
        lambda: optimstate.remap(path, folder / "r.pt", rename, force=True, sync=False),
        lambda: optimstate.name(path, folder / "n.pt", force=True),
    ]
    before = path.read_bytes()
    for verb in verbs:
        try:
            verb()
        except OptimStateError as error:
            str(error)
    assert path.read_bytes() == before, "the source changed"
    left = [found.name for found in folder.iterdir() if found.name.endswith(".part")]
    assert not left, f"left {left}"
