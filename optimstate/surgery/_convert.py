"""Convert: the same checkpoint in another container."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.files import Progress, check_destination, chunks
from optimstate.formats._protocol import Document, WriteOptions
from optimstate.formats.registry import format_for_destination, get_format, open_document
from optimstate.surgery._common import opening, to_json
from optimstate.tensors import LazyTensor
from optimstate.tree import format_path, nodes, walk

__all__ = ["ConvertReport", "convert", "verify_checksums"]


@dataclass(frozen=True)
class ConvertReport:
    """What was written, and what the container could not hold."""

    source: str
    destination: str
    source_format: str
    format: str
    written: bool
    tensors: int
    nbytes: int
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("convert", asdict(self))


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    force: bool = False,
    options: WriteOptions | None = None,
) -> ConvertReport:
    """Write the same checkpoint in another container.

    Args:
        source: A file or folder.
        destination: Where to write; its suffix chooses the container unless `to` does.
        to: The name of a container format.
        verify: Check every checksum the source has before anything is written.
        dry_run: Only check that it can be done.
        force: Replace an existing destination.
        options: What to do with what the container cannot hold, checksums, shards.

    Raises:
        CheckpointError: The source cannot be read, or `verify` finds damage.
        RepresentationError: The container cannot hold something; the message names it and the option that helps.
        DestinationError: The destination exists, is the source, or cannot be written.
    """
    source, destination = Path(source), Path(destination)
    options = options or WriteOptions()
    target = _target_format(destination, to, options)
    if not dry_run:
        check_destination(destination, [source], force=force)
    with opening(source):
        document = open_document(source)
        if verify:
            verify_checksums(document)
        tree, notes = _without_files(document)
        written = get_format(target)
        if dry_run:
            options = replace(options, progress=None)
        else:
            notes += written.write(tree, destination, like=document, options=options)
        found = [node for node in nodes(tree) if isinstance(node, LazyTensor)]
        nbytes = sum(tensor.nbytes for tensor in found)
        return ConvertReport(
            str(source), str(destination), document.format, target, not dry_run, len(found), nbytes, tuple(notes)
        )


def _target_format(destination: Path, to: str | None, options: WriteOptions) -> str:
    if to is None and options.shard_size is not None and not destination.suffix:
        return "safetensors"
    return format_for_destination(destination, to).NAME


_FOLDERS = ("folder", "zip")


def _without_files(document: Document) -> tuple[Any, list[str]]:
    """A folder's tree without the files that are no checkpoints, which a single container cannot hold."""
    if document.format not in _FOLDERS:
        return document.tree, []
    notes: list[str] = []

    def strip(node: dict[str, Any], like: Document, prefix: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in node.items():
            part = like.parts.get(name)
            if part is None:
                notes.append(f"left out: {prefix}{name} is no checkpoint")
            else:
                made[name] = strip(value, part, f"{prefix}{name}/") if part.format in _FOLDERS else value
        return made

    return strip(document.tree, document, ""), notes


def verify_checksums(document: Document, progress: Progress | None = None) -> int:
    """Read every storage whose container recorded a checksum and compare.

    Returns:
        The number of storages compared.

    Raises:
        CorruptCheckpointError: One differs; the message names the tensor.
    """
    seen: set[int] = set()
    compared = 0
    for path, node in walk(document.tree):
        if not isinstance(node, LazyTensor) or node.storage.crc is None or id(node.storage) in seen:
            continue
        seen.add(id(node.storage))
        value = 0
        for block in chunks(node.storage.pieces):
            value = zlib.crc32(block, value)
            if progress is not None:
                progress(len(block))
        if value != node.storage.crc:
            raise CorruptCheckpointError(
                f"the bytes of {format_path(path)} do not match their checksum",
                path=document.path,
                place=f"record data/{node.storage.key}",
                hint="The file is damaged; copy it again from its source.",
            )
        compared += 1
    return compared
