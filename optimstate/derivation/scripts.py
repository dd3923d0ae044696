"""Derivation from a script that reads one weight file and writes another, such as a team's own `convert.py`.

The script is run on files of the checkpoint's own format with tagged weights, in a folder with links to everything in
the working folder, and its output is read. So it is a function from state dict to state dict like any other; in it
`torch.load`, `torch.save` and safetensors work as usual.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from optimstate.derivation.derive import derive
from optimstate.derivation.derived import Derived
from optimstate.derivation.origins import Source
from optimstate.describe import describe, few
from optimstate.errors import CheckpointError, DerivationError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.io.extents import InMemory
from optimstate.state.names import wrapper_prefix
from optimstate.state.sections import Section, find_sections
from optimstate.tensors.compute import bytes_of, to_torch
from optimstate.tensors.lazy import LazyTensor, with_pieces
from optimstate.tree import tensors
from optimstate.tree.copies import rebuilt_mapping, replaced
from optimstate.user_code import run_script

__all__ = ["derive_script"]

_MOST = 1 << 28
"""The largest number of elements of a checkpoint, all of which are written to files."""


def derive_script(
    script: Path,
    reads: Path,
    writes: Path,
    arguments: Sequence[str],
    sources: Mapping[str, Source],
    *,
    scratch: Path,
    allow_drop: bool = False,
) -> Derived:
    """The plan that is equivalent to a script, for the weights in a file.

    Args:
        script: A Python script, which is run like `python script arguments`.
        reads: The checkpoint that it reads: a file or a folder, relative to the working folder.
        writes: The checkpoint that it writes.
        arguments: Its command-line arguments; paths of these two, or of folders around them, are replaced by copies.
        sources: The weights of the checkpoint.
        scratch: An empty folder for the copies.
        allow_drop: Whether weights may be in no output.

    Raises:
        DerivationError: The script fails, writes something else, or does something that no plan can express.
        CheckpointError: Its output cannot be read.
    """
    elements = sum(prod(source.shape) for source in sources.values())
    if elements > _MOST:
        raise DerivationError(
            f"{reads} has {elements} elements: a script is run on files of the real size, of at most {_MOST}",
            hint="Derive from a smaller checkpoint of the same names, or from a function, for which sizes are shrunk.",
        )
    function = _Script(script, reads, writes, arguments, scratch)
    made = derive(function, dict(sources), allow_drop=allow_drop, scaled=False)
    return made._replace(notes=(*made.notes, *function.notes))


class _Script:
    """The script as a function from state dict to state dict."""

    def __init__(self, script: Path, reads: Path, writes: Path, arguments: Sequence[str], scratch: Path) -> None:
        self._script = Path(os.path.abspath(script))  # noqa: PTH100 - links stay links
        self._document = open_checkpoint(reads)
        places = _Places(Path.cwd(), [reads, writes], scratch)
        self._reads, self._writes = places.of(reads), places.of(writes)
        self._folder, self._arguments = places.folder, [places.argument(word) for word in arguments]
        self._written = writes
        self.notes: tuple[str, ...] = ()

    def __call__(self, state: Mapping[str, Any]) -> dict[str, Any]:
        for place in (self._reads, self._writes):
            _removed(place)
        nodes = {id(section.node): _holding(section, state) for section in _models(self._document.tree, self._reads)}
        form = get_format(self._document.format)
        tree = replaced(self._document.tree, nodes)
        form.write(tree, self._reads, like=self._document, options=WriteOptions(sync=False))
        os.chdir(self._folder)
        run_script(self._script, self._arguments, kind=DerivationError)
        return self._result()

    def _result(self) -> dict[str, Any]:
        """The weights in what the script wrote."""
        if not self._writes.exists():
            raise DerivationError(
                f"{self._script.name} did not write {self._written}",
                hint="Give the file that it writes with --writes, and its arguments after --.",
            )
        tree = open_checkpoint(self._writes).tree
        found: dict[str, Any] = {}
        known: set[int] = set()
        for section in find_sections(tree):
            known |= {id(tensor) for _, tensor in tensors(section.in_tree)}
        for section in _models(tree, self._written):
            for name, tensor in _named(section).items():
                if name in found:
                    raise DerivationError(f"{describe(name)} is in two models of what {self._script.name} wrote")
                found[name] = to_torch(tensor).clone()
        others = [describe(".".join(map(str, path))) for path, tensor in tensors(tree) if id(tensor) not in known]
        if others:
            self.notes = (f"what {self._script.name} writes beside the weights is in no plan: {few(others, 5)}",)
        if not found:
            raise DerivationError(f"there are no weights in what {self._script.name} wrote to {self._written}")
        return found


def _models(tree: Any, place: Path) -> Iterator[Section]:
    for section in find_sections(tree):
        if section.kind == "model":
            if not isinstance(section.node, Mapping):
                raise CheckpointError("a pickled module, not a state dict", path=place)
            yield section


def _named(section: Section) -> dict[str, LazyTensor]:
    """The tensors of a model, by names without wrappers."""
    found = section.tensors()
    prefix = wrapper_prefix(list(found))
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if isinstance(tensor, LazyTensor)}


def _holding(section: Section, state: Mapping[str, Any]) -> Any:
    """A model's mapping with these values."""
    prefix = wrapper_prefix(list(section.tensors()))
    made = {prefix + name: _lazy(tensor, state[name]) for name, tensor in _named(section).items()}
    return rebuilt_mapping(section.node, {**section.node, **made})


def _lazy(like: LazyTensor, value: Any) -> LazyTensor:
    data = bytes_of(value)
    return with_pieces(like, InMemory(data).extents(), like.dtype, like.shape)


def _removed(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


class _Places:
    """A folder with links to everything in the working folder, except some files and folders that are left out.

    Args:
        here: The working folder.
        own: The files and folders to leave out, relative to the working folder or absolute.
        scratch: The folder to make it in; files outside the working folder get separate folders beside it.
    """

    def __init__(self, here: Path, own: Sequence[Path], scratch: Path) -> None:
        self._here, self.folder = here, scratch / "here"
        self._roots = {here: self.folder}
        below: dict[Path, list[tuple[str, ...]]] = {here: []}
        for path in map(self._whole, own):
            root = here if path.is_relative_to(here) else path.parent
            self._roots.setdefault(root, scratch / f"outside{len(self._roots)}")
            below.setdefault(root, []).append(path.relative_to(root).parts)
        for root, places in below.items():
            _link(root, self._roots[root], places)

    def _whole(self, path: Path) -> Path:
        return Path(os.path.normpath(self._here / path))

    def of(self, path: Path) -> Path:
        """The path that replaces a file or folder."""
        whole = self._whole(path)
        root = next(root for root in self._roots if whole.is_relative_to(root))
        return self._roots[root] / whole.relative_to(root)

    def argument(self, word: str) -> str:
        """A command-line argument, in which a path outside the folder is replaced."""
        option, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
        outside = Path(value).is_absolute() or value.startswith("..")
        if not value or not outside or not any(self._whole(Path(value)).is_relative_to(root) for root in self._roots):
            return word
        return f"{option}{sign}{self.of(Path(value))}"


def _link(folder: Path, target: Path, own: Sequence[tuple[str, ...]]) -> None:
    """Make a folder with links to everything in another, except some paths, whose parent folders are made likewise."""
    target.mkdir(parents=True)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if all(entry.name != parts[0] for parts in own):
            (target / entry.name).symlink_to(entry)
    for first in {parts[0] for parts in own if len(parts) > 1}:
        _link(folder / first, target / first, [parts[1:] for parts in own if parts[0] == first and len(parts) > 1])
