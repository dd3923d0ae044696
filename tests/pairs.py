"""Every pair of checkpoints below some folders: `python -m tests.pairs FOLDER...`.

For each pair of files that torch or safetensors load, `diff` has to report differences exactly where the trees that
they load are other ones. Each file is read once on each side. What `diff` sees without reading tensors it sees with
them too, so a pair is compared in full only where headers show nothing. Prints the pairs that disagree, and the counts;
the exit code is 1 where any does.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from optimstate.errors import OptimStateError
from optimstate.formats.protocol import Document
from optimstate.formats.registry import open_checkpoint
from optimstate.surgery.comparison.comparing import diff
from tests import sweep
from tests.surgery.equality import equal

__all__ = ["Loaded", "disagreements", "loaded_files"]


class Loaded:
    """A file as torch loads it, and as it is read here."""

    def __init__(self, path: Path, live: Any, document: Document) -> None:
        self.path, self.live, self.document = path, live, document
        self.named = has_names(live)
        self.tensors = frozenset(Counter(map(_form, tensors_of(live))).items())

    def equals(self, other: Loaded) -> bool:
        """Whether torch loads equal trees; names that one side alone has are no difference, as they are concluded."""
        if self.tensors != other.tensors:
            return False
        mine, theirs = self.live, other.live
        if self.named != other.named:
            mine, theirs = without_names(mine), without_names(theirs)
        return equal(mine, theirs)


def _form(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def tensors_of(node: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors in a tree: equal trees have equal ones."""
    seen = set() if seen is None else seen
    if isinstance(node, torch.Tensor):
        if not node.is_nested:
            yield node
    elif id(node) not in seen:
        inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
        for value in inner:
            yield from tensors_of(value, seen | {id(node)})


def has_names(node: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether an optimizer in a tree has the names of its parameters."""
    if id(node) in seen:
        return False
    inner = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    named = isinstance(node, Mapping) and "param_names" in node
    return named or any(has_names(value, seen | {id(node)}) for value in inner)


def without_names(node: Any) -> Any:
    """A tree without the names of parameters in the groups of optimizers."""
    if type(node) is dict:
        return {key: without_names(value) for key, value in node.items() if key != "param_names"}
    return [without_names(item) for item in node] if type(node) is list else node


def loaded_files(folders: Iterable[Path]) -> Iterator[Loaded]:
    """Every file below the folders that torch or safetensors, and this package, load."""
    for path in sweep.checkpoints(list(folders)):
        try:
            live, document = sweep.loaded(path), open_checkpoint(path)
        except (OptimStateError, Exception):  # noqa: BLE001  # `tests.sweep` holds what one of them alone loads
            continue
        yield Loaded(path, live, document)


def disagreements(pairs: Iterable[tuple[Loaded, Loaded]]) -> Iterator[str]:
    """What is wrong with the answers of `diff`, pair by pair; an empty text for a right one."""
    for one, other in pairs:
        expected = one.equals(other)
        report = diff(one.document, other.document, headers=True)
        if not report.changes:
            report = diff(one.document, other.document)
        wrong = expected == bool(report.changes)
        told = f"{len(report.changes)} differences" if report.changes else "no differences"
        yield f"{one.path} and {other.path}: diff says {told}" if wrong else ""


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args(words).folders
    warnings.simplefilter("ignore")
    files = list(loaded_files(folders))
    pairs = wrong = 0
    for line in disagreements(itertools.combinations(files, 2)):
        pairs += 1
        wrong += bool(line)
        if line:
            print(line, flush=True)
    print(f"{len(files)} files, {pairs:,} pairs, {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
