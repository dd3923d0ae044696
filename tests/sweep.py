"""Properties of what is seen, over any folder of checkpoints: `python -m tests.sweep FOLDER...`.

For every file and every folder below the folders:

- `inspect` counts as many tensors as torch (or safetensors) loads, or lists in a distributed checkpoint;
- what `inspect` warns of is not clean to `scan`;
- nothing differs from itself (`tests.pairs` compares files with each other).

Files that torch refuses to load with `weights_only=True` are loaded by torch too, with a stand-in for every class that
is not torch's, so nothing of a file is run. Prints what fails and the counts; the exit code is 1 where anything fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pickle
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import optimstate
from optimstate.errors import OptimStateError

__all__ = ["checkpoints", "failures", "failures_of_folder", "loaded", "tensors_in"]

_TENSORS = ("torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter", "torch", "torch.serialization")
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: defaultdict(),
    ("collections", "deque"): deque,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


class StandIn:
    """An object of a class that is not imported: what its pickle gave it."""

    parts: list[Any]

    def __new__(cls, *arguments: Any, **keywords: Any) -> StandIn:
        made = object.__new__(cls)
        made.parts = [*arguments, *keywords.values()]
        return made

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts += [key, value]

    def append(self, item: Any) -> None:
        """An item of a list."""
        self.parts.append(item)

    def extend(self, items: Any) -> None:
        """Items of a list."""
        self.parts += items

    add = append


@functools.cache
def _stand_in(module: str, name: str) -> type[StandIn]:
    return type(name.rpartition(".")[2], (StandIn,), {"__module__": module})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        """What makes tensors is torch's; of everything else there is a class that takes whatever it is given."""
        known = _PLAIN.get((module, name))
        if known is not None:
            return known
        harmless = name.startswith("_rebuild") or name.endswith("Storage") or name in ("Size", "Parameter", "device")
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset", "complex", "bytearray", "bytes"):
            return getattr(__import__("builtins"), name)
        if module in _TENSORS and (harmless or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(importlib.import_module(module), name)
        return _stand_in(module, name)


_STAND_INS = SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load(), __name__="stand-ins", HIGHEST_PROTOCOL=5
)


def loaded(path: Path) -> Any:
    """What torch or safetensors load of a file.

    Raises:
        Exception: Whatever they raise for what is not theirs.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    try:
        return torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, AttributeError):
        return torch.load(path, weights_only=False, pickle_module=_STAND_INS)


def tensors_in(node: Any, seen: set[int] | None = None) -> int:
    """The tensors in a tree, each as often as it stands there; a container that stands in several places once."""
    if isinstance(node, torch.Tensor):
        return 1
    seen = set() if seen is None else seen
    if id(node) in seen:
        return 0
    if isinstance(node, Mapping | list | tuple | set | frozenset | deque | StandIn):
        seen.add(id(node))
    if isinstance(node, Mapping):
        more = vars(node).values() if hasattr(node, "__dict__") else ()  # the `_metadata` of a state dict
        return sum(tensors_in(value, seen) for value in (*node.values(), *more))
    if isinstance(node, StandIn):
        return sum(tensors_in(part, seen) for part in node.parts)
    return sum(tensors_in(item, seen) for item in node) if isinstance(node, list | tuple | set | deque) else 0


def checkpoints(folders: list[Path]) -> Iterator[Path]:
    """The files that torch or safetensors could load, without those that are parts of others."""
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".th"):
                yield path


def failures(path: Path) -> tuple[list[str], bool]:
    """What does not hold for a file, and whether torch loads it."""
    found = []
    try:
        live = loaded(path)
    except Exception:  # noqa: BLE001  # whatever torch says of a file that is not its own
        live = None
    try:
        report = optimstate.inspect(path)
    except OptimStateError as error:
        return ([f"torch loads it, and inspect does not: {error}"] if live is not None else []), live is not None
    if live is not None and report.tensors != (expected := tensors_in(live)):
        found.append(f"{report.tensors} tensors, torch loads {expected}")
    return [*found, *_unlike(path, report)], live is not None


def failures_of_folder(path: Path) -> list[str]:
    """What does not hold for a folder: those of `torch.distributed.checkpoint` are counted by torch."""
    try:
        report = optimstate.inspect(path)
    except OptimStateError:
        return []
    found = []
    if (path / ".metadata").is_file() and report.format == "dcp":
        entries = FileSystemReader(path).read_metadata().state_dict_metadata.values()
        expected = sum(isinstance(entry, TensorStorageMetadata) for entry in entries)
        beside = sum(tensors_in(loaded(file)) for file in checkpoints([path]))
        if report.tensors != expected + beside:
            found.append(f"{report.tensors} tensors, torch has {expected}, and {beside} in files beside")
    return [*found, *_unlike(path, report)]


def _unlike(path: Path, report: optimstate.surgery.Inspection) -> Iterator[str]:
    if report.dangerous and optimstate.scan(path).clean:
        yield "inspect warns, and scan is clean"
    if optimstate.diff(path, path).changes:
        yield "differs from itself"


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args(words).folders
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for path in checkpoints(folders):
        found, is_loaded = failures(path)
        counts["files loaded by torch" if is_loaded else "files not loaded by torch"] += 1
        counts["failed"] += bool(found)
        for line in found:
            print(f"{path}: {line}")
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_dir()):
        found = failures_of_folder(path)
        counts["folders"] += 1
        counts["failed"] += bool(found)
        for line in found:
            print(f"{path}: {line}")
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
