"""What is fuzzed: one input, after which nothing but an error of optimstate's may have been raised."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from optimstate.errors import OptimStateError
from tests.fuzz.inputs import SHARD, Input, shard

__all__ = ["FOUND", "VERBS", "read_anything", "run_verbs"]

FOUND = Path(__file__).parent / "found"


@cache
def _place() -> Path:
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    (place / "d").mkdir()
    (place / SHARD).write_bytes(shard())
    (place / "d" / "__0_0.distcp").write_bytes(bytes(10_000))
    return place


def read_anything(read: Input) -> None:
    """Look into a file, scan it or open what can be opened of it.

    Raises:
        Exception: What none of them may raise.
    """
    from optimstate.formats.registry import open_checkpoint
    from optimstate.surgery.inspection.inspecting import inspect
    from optimstate.surgery.scanning import scan

    path = _place() / read.name
    path.write_bytes(read.data)
    opened = path if path.parent == _place() else path.parent
    with suppress(OptimStateError):
        if read.look == "inspect":
            str(inspect(opened))
        elif read.look == "scan":
            str(scan(opened))
        else:
            open_checkpoint(opened, salvage=True)
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


VERBS = (
    "inspect", "json", "diff", "verify", "scan", "to safetensors", "to torch", "to dcp", "to shards", "remap", "name"
)  # fmt: skip


def run_verbs(seed: int, verbs: Sequence[str] = VERBS) -> None:
    """Build a checkpoint, change some bytes of it perhaps, and run commands on it.

    Raises:
        Exception: What none of them may raise.
    """
    import torch

    trees = _Trees(seed)
    chosen = trees.random
    folder = _place() / "verbs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path, other = folder / "a.pt", folder / "b.pt"
    torch.save(trees.checkpoint(), path)
    if "diff" in verbs:
        torch.save(trees.checkpoint(), other)
    data = bytearray(path.read_bytes())
    if chosen.random() < 0.5:
        for _ in range(chosen.randrange(1, 6)):
            at = chosen.randrange(len(data))
            data[at : at + chosen.randrange(1, 4)] = chosen.randbytes(chosen.randrange(4))
        path.write_bytes(data)
    for verb in verbs:
        with suppress(OptimStateError):
            _run(verb, path, other)
    assert path.read_bytes() == data, "the source changed"
    left = [found.name for found in folder.iterdir() if found.name.endswith(".part")]
    assert not left, f"left {left}"


def _run(verb: str, path: Path, other: Path) -> None:
    import optimstate
    from optimstate.formats.protocol import WriteOptions

    quick = WriteOptions(sync=False)
    out = path.parent
    match verb:
        case "inspect":
            str(optimstate.inspect(path))
        case "json":
            optimstate.inspect(path).to_json()
        case "diff":
            str(optimstate.diff(path, other))
        case "verify":
            str(optimstate.verify(path))
        case "scan":
            optimstate.scan(path).to_json()
        case "to safetensors":
            optimstate.convert(path, out / "c.safetensors", options=quick, force=True)
        case "to torch":
            optimstate.convert(path, out / "c.pt", drop_opaque=True, options=quick, force=True)
        case "to dcp":
            optimstate.convert(path, out / "c.dcp", options=quick, force=True)
        case "to shards":
            shards = WriteOptions(sync=False, shard_size=20)
            optimstate.convert(path, out / "c", to="safetensors", options=shards, force=True)
        case "remap":
            rename = optimstate.Plan.from_options(rename=["0.{p}=first.{p}"])
            optimstate.remap(path, out / "r.pt", rename, force=True, sync=False)
        case "name":
            optimstate.name(path, out / "n.pt", force=True)
