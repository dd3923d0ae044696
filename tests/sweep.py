"""Properties of what is seen, over any folder of checkpoints: `python -m tests.sweep FOLDER...`.

For every file below the folders, and for every folder of `torch.distributed.checkpoint`:

- `inspect` counts as many tensors as torch (or safetensors) loads;
- a file that `inspect` warns of is not clean to `scan`;
- a file does not differ from itself, and differs from the file before it exactly where torch loads other trees
  (names of parameters that only one of them has are no difference).

Files that torch refuses to load with `weights_only=True` are loaded by torch too, with a stand-in for every class that
is not torch's, so nothing of a file is run. Prints what fails and the counts; the exit code is 1 where anything fails.
"""

from __future__ import annotations

import argparse
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

import optimstate
from optimstate.errors import OptimStateError
from tests.surgery.equality import equal

__all__ = ["checkpoints", "failures", "loaded", "tensors_in"]

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
        return type(name.rpartition(".")[2], (StandIn,), {})


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


def _has_names(node: Any, seen: frozenset[int] = frozenset()) -> bool:
    if id(node) in seen:
        return False
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    named = isinstance(node, Mapping) and "param_names" in node
    return named or any(_has_names(value, seen | {id(node)}) for value in inner)


def checkpoints(folders: list[Path]) -> Iterator[Path]:
    """The files that torch or safetensors could load, without those that are parts of others."""
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".th"):
                yield path


def failures(path: Path, before: tuple[Path, Any] | None = None) -> tuple[list[str], Any]:
    """What does not hold for a file, and its tree; None where torch does not load it.

    Args:
        path: The file.
        before: Another one and its tree, to compare with.
    """
    found = []
    try:
        live = loaded(path)
    except Exception:  # noqa: BLE001  # whatever torch says of a file that is not its own
        live = None
    try:
        report = optimstate.inspect(path)
    except OptimStateError as error:
        return ([f"torch loads it, and inspect does not: {error}"] if live is not None else []), None
    if live is not None and report.tensors != (expected := tensors_in(live)):
        found.append(f"{report.tensors} tensors, torch loads {expected}")
    if report.dangerous and optimstate.scan(path).clean:
        found.append("inspect warns, and scan is clean")
    if optimstate.diff(path, path).changes:
        found.append("differs from itself")
    if before is not None and live is not None and before[1] is not None:
        if _has_names(live) != _has_names(before[1]):  # names that one side alone has are no difference
            return found, live
        same = not optimstate.diff(path, before[0]).changes
        if same != equal(live, before[1]):
            found.append(f"diff with {before[0].name} says {'no ' if same else ''}differences")
    return found, live


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args(words).folders
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    before = None
    for path in checkpoints(folders):
        found, live = failures(path, before)
        before = (path, live) if live is not None else before
        counts["loaded by torch" if live is not None else "not loaded by torch"] += 1
        counts["failed"] += bool(found)
        for line in found:
            print(f"{path}: {line}")
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
