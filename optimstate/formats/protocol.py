"""What a container format provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from optimstate.io.extents import Progress

__all__ = ["HEAD_BYTES", "Document", "Format", "WriteOptions"]

HEAD_BYTES = 4096
"""How much of a file's beginning is shown to `Format.sniff`."""


@dataclass
class Document:
    """A checkpoint that was opened.

    Attributes:
        path: The file or folder.
        format: The name of its container format.
        tree: Its contents; tensors are lazy and stay readable while this object lives.
        globals: Every `(module, name)` its pickles mention.
        notes: Oddities met while reading, for people.
        parts: For folders: the documents of the files inside, by name.
        handle: What the format needs to write a variant of this file cheaply; private to the format.
    """

    path: Path
    format: str
    tree: Any
    globals: Sequence[tuple[str, str]] = ()
    notes: list[str] = field(default_factory=list)
    parts: dict[str, Document] = field(default_factory=dict)
    handle: Any = None


@dataclass(frozen=True)
class WriteOptions:
    """How to write.

    Attributes:
        checksums: Compute checksums the container asks for where none is known; False leaves them out.
        drop_opaque: Leave out objects the container cannot represent, instead of refusing.
        clone_views: Store tensors that share memory each on its own where the container cannot express the sharing.
        shard_size: Largest number of bytes per file where the container can be split, or None.
        sync: Flush what is written to the disk before it takes its name.
        progress: Called with the bytes written since the last call.
        confirm: Called when everything is written and before it takes its name; what it raises undoes the writing.
    """

    checksums: bool = True
    drop_opaque: bool = False
    clone_views: bool = False
    shard_size: int | None = None
    sync: bool = True
    progress: Progress | None = None
    confirm: Callable[[], None] | None = None

    def confirmed(self) -> None:
        """The last thing that a format does before the name is given."""
        if self.confirm is not None:
            self.confirm()


class Format(Protocol):
    """A container format: one module under `optimstate.formats` whose functions have these signatures."""

    NAME: str
    SUFFIXES: tuple[str, ...]

    def sniff(self, path: Path, head: bytes) -> bool:
        """Whether the file (its first `HEAD_BYTES` are `head`) or folder (`head` is empty) is of this format."""

    def read(self, path: Path) -> Document:
        """Open it."""

    def write(self, tree: Any, path: Path, *, like: Document | None, options: WriteOptions) -> list[str]:
        """Write `tree` to `path`, all or nothing, and return notes on what was left out or changed.

        `like` is the document the tree was made from, when there is one.
        """
