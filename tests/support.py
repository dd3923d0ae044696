"""What several tests need: the fixtures that can be read, and lazy trees compared with truths and with torch."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimstate.state.optimizer import as_mapping
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque
from tests import corpus
from tests.corpus import Case

CONTAINERS = {"torch_zip", "safetensors", "other"}
# Zips and safetensors too, but of a layout, or with a truth, of their own: tests/formats/test_layouts.py judges them.
OTHER_LAYOUTS = (
    "composer/",
    "dcp/",
    "deepspeed/",
    "fsdp1/",
    "heavyball/",
    "mmengine/",
    "stable_baselines3/",
    "torch_checkpointing/",
    "torchao/",
)


def readable(*prefixes: str, truth: str | None = None) -> list[Case]:
    """The cases whose every file is a torch zip, a safetensors file, or no checkpoint at all; hostile ones are not."""
    found = corpus.cases(*prefixes, truth=truth)
    plain = [case for case in found if not case.is_hostile and not case.name.startswith(OTHER_LAYOUTS)]
    return [case for case in plain if {corpus.container_of(file) for file in case.files} <= CONTAINERS]


def optimizer_of(case: Case) -> str:
    """The class in a case's free text: `Muon(lr=0.001)`, `torch.optim.adamw.AdamW`, `AdamW (whole object pickled)`."""
    assert case.optimizer is not None
    match = re.match(r"[\w.]+", case.optimizer)
    assert match is not None
    return match[0].rpartition(".")[2]


def digest(path: Path) -> str:
    """The sha256 of a file, or of every file of a folder with its name."""
    if path.is_dir():
        return repr([(str(f.relative_to(path)), digest(f)) for f in sorted(path.rglob("*")) if f.is_file()])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_digest(tensor: LazyTensor) -> str:
    """The digest that truths have."""
    return hashlib.sha256(tensor.tobytes()).hexdigest()[:16]


def as_truth(value: Any) -> dict[str, Any]:
    """A slot of a lazy tree in the form of a truth, as far as both have it."""
    if isinstance(value, LazyTensor):
        about = {"kind": "tensor", "shape": list(value.shape), "dtype": value.dtype}
        return about | {"sha256": tensor_digest(value)}
    if isinstance(value, list | tuple):
        return {"kind": type(value).__name__, "items": [as_truth(item) for item in value]}
    if isinstance(value, Mapping):
        return {"kind": type(value).__name__, "items": {str(k): as_truth(v) for k, v in value.items()}}
    return {"kind": type(value).__name__, "value": value}


def told(truth: Mapping[str, Any]) -> dict[str, Any]:
    """A truth without the sums and samples that `as_truth` does not compute."""
    extra = {"sum", "l2", "first", "numel", "min", "max", "mean"}
    made = {key: value for key, value in truth.items() if key not in extra}
    items = made.get("items")
    if isinstance(items, list):
        made["items"] = [told(item) for item in items]
    elif isinstance(items, dict):
        made["items"] = {key: told(item) for key, item in items.items()}
    return made


class Walker:
    """A lazy tree that can be subscripted through records too, as a truth's places are written."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __getitem__(self, key: Any) -> Walker:
        node = self.node
        if isinstance(node, Opaque):
            mapping = as_mapping(node) or dict(node.entries)
            node = mapping or node.items or (node.arguments[0] if node.arguments else node.state)
        return Walker(node[key])


def torch_bytes(tensor: Any) -> bytes:
    """The elements of a torch tensor in row-major order."""
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def unlike(a: Any, b: Any, where: str = "tree") -> str | None:
    """The first place where two objects that torch loaded differ, bit for bit, or None.

    Types, keys and their order, attributes, dtypes, shapes, strides, requires_grad and the bytes of tensors count.
    """
    import torch

    if type(a) is not type(b):
        return f"{where}: {type(a)} != {type(b)}"
    if isinstance(a, torch.Tensor):
        about = [(t.dtype, t.shape, t.layout, t.requires_grad, t.device, t.is_conj(), t.is_neg()) for t in (a, b)]
        if about[0] != about[1]:
            return f"{where}: {about[0]} != {about[1]}"
        if a.layout != torch.strided:
            return unlike(a.detach().coalesce().values(), b.detach().coalesce().values(), where + ".values()")
        if a.stride() != b.stride():
            return f"{where}: strides {a.stride()} != {b.stride()}"
        if a.device.type == "meta":
            return None
        if a.is_quantized:
            return None if torch.equal(a, b) else f"{where}: elements differ"
        return None if torch_bytes(a) == torch_bytes(b) else f"{where}: elements differ"
    if isinstance(a, Mapping):
        if list(map(repr, a)) != list(map(repr, b)):
            return f"{where}: keys {list(a)[:5]} != {list(b)[:5]}"
        if isinstance(a, OrderedDict) and (vars(a) or vars(b)):
            found = unlike(dict(vars(a)), dict(vars(b)), where + ".__dict__")
            if found:
                return found
        pairs = zip(a.items(), b.values(), strict=True)
        return next((d for (k, x), y in pairs if (d := unlike(x, y, f"{where}[{k!r}]"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} != {len(b)} items"
        pairs = zip(a, b, strict=True)
        return next((d for i, (x, y) in enumerate(pairs) if (d := unlike(x, y, f"{where}[{i}]"))), None)
    if " object at 0x" in repr(a):
        return unlike(vars(a), vars(b), f"vars({where})")
    return None if repr(a) == repr(b) else f"{where}: {a!r} != {b!r}"


def load_torch(path: Path) -> Any:
    """What torch makes of one of our own files; only where it must, and never of a hostile one, beyond plain data."""
    import pickle
    import warnings

    import torch

    assert not any(part.startswith("hostile_") for part in path.parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            return torch.load(path, weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, weights_only=False)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """A model whose initial weights depend on the seed alone."""
    import torch

    torch.manual_seed(seed)
    return make()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forked(work: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> bool:
    """Call a function in one forked process for each of the arguments, all at once; whether one of them failed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    return any(process.exitcode for process in processes)
