"""TorchScript archives (`torch.jit.save`): their parameters, buffers and attributes are read, their code is not.

The archive has the module in `data.pkl`, as `torch.save` would, with classes defined by its own code; constants of
the code in `constants.pkl`; and the code, compressed. The tree is

    {"model": {NAME: TENSOR}, "attributes": {NAME: VALUE}, "constants": (...), "code": {FILE: ...}}

where names are joined by dots, as in `state_dict()`. Attributes that are tensors look like buffers and are in `model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.errors import LimitExceededError
from optimstate.formats.protocol import Claim, Document, read_only
from optimstate.formats.torch.zip_directory import Archive
from optimstate.formats.torch.zip_reader import read_pickle
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import MAX_DEPTH, Opaque, OpaqueFile

__all__ = ["NAME", "SUFFIXES", "is_script", "other_archive", "read", "read_script", "sniff", "write"]

NAME = "torchscript"
SUFFIXES: tuple[str, ...] = ()

_OWN_CLASSES = "__torch__"  # the module of classes defined by the archive's code
_NOT_CODE = ("data.pkl", "constants.pkl", "version", "byteorder", ".data/serialization_id")


def sniff(path: Location, head: bytes) -> Claim:  # noqa: ARG001
    """Never: `torch.zip` recognises a TorchScript archive by its directory."""
    return Claim.NO


def read(path: Location) -> Document:
    """Open an archive.

    Raises:
        CheckpointError: It is damaged or hostile.
    """
    return read_script(path, Archive(open_source(path)))


def is_script(archive: Archive) -> bool:
    """Whether a zip archive of torch is a TorchScript archive."""
    return "constants.pkl" in archive.records and "data.pkl" in archive.records


def other_archive(archive: Archive) -> str:
    """What a known archive without `data.pkl` is and what to do; empty for an unknown one."""
    records = archive.records
    if "model.json" in records:
        return "a TorchScript archive of torch 1.0; load it with torch.jit.load and save it with torch.jit.save"
    if "archive_format" in records:
        return "an exported program (torch.export.save); load it with torch.export.load and save its state_dict()"
    if ".data/extern_modules" in records:
        return "a package (torch.package); import what is in it and save the module's state_dict()"
    return ""


def read_script(path: Location, archive: Archive) -> Document:
    """The document of an archive that `is_script`.

    Raises:
        CheckpointError: It is damaged or hostile.
    """
    module, names = read_pickle(archive, "data.pkl", "data/")
    constants, more = read_pickle(archive, "constants.pkl", "constants/")
    model: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for name, value in _named(module):
        (model if isinstance(value, LazyTensor) else attributes)[name] = value
    records = archive.records
    code = {
        name: OpaqueFile(f"{path}:{archive.root}{name}", records[name].size)
        for name in records
        if name not in _NOT_CODE and not name.startswith(("data/", "constants/"))
    }
    tree = {"model": model, "attributes": attributes, "constants": constants, "code": code}
    note = "TorchScript: its tensors and attributes are read, its code is not"
    return Document(path, NAME, tree, list(dict.fromkeys([*names, *more])), [note], checksums=[archive.recorded])


def _named(module: Any) -> Iterator[tuple[str, Any]]:
    """Everything that is not a submodule, by its dotted name; a module that contains itself is a value."""
    entered: set[int] = set()
    stack: list[tuple[str, Any]] = [("", module)]
    while stack:
        prefix, node = stack.pop()
        if not _is_module(node) or id(node) in entered:
            yield prefix.removesuffix("."), node
            continue
        if prefix.count(".") > MAX_DEPTH:
            raise LimitExceededError(f"modules nested more than {MAX_DEPTH} deep")
        inner = [(f"{prefix}{key}.", value) for key, value in node.state.items()]
        stack.extend(reversed(inner))


def _is_module(node: Any) -> bool:
    named = isinstance(node, Opaque) and node.type.module.split(".")[0] == _OWN_CLASSES
    return named and isinstance(node.state, Mapping) and all(isinstance(key, str) for key in node.state)


# The code of a module depends on its names and shapes.
write = read_only(
    "TorchScript is read, but not written",
    hint="`optimstate convert --section model` writes its weights to a .pt or .safetensors file.",
)
