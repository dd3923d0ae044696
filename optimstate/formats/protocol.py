"""What a container format provides: the interface that formats implement, here and in other packages.

A format is a module (or any object) with the attributes and functions of `Format`. Another package adds one by an
entry point of the group `optimstate.formats`, whose name is the format's and whose value is the module:

    [project.entry-points."optimstate.formats"]
    toy = "my_package.toy"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

from optimstate.io.extents import Progress
from optimstate.io.location import Location
from optimstate.io.places import new_file, new_folder
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.io.checksums import Recorded
    from optimstate.io.output import AtomicGroup, Output
    from optimstate.io.shared import SharedFiles
    from optimstate.io.together import Stage

__all__ = ["HEAD_BYTES", "Claim", "Document", "Format", "WriteOptions"]

HEAD_BYTES = 4096
"""How much of a file's beginning is shown to `Format.sniff`."""


class Claim(IntEnum):
    """How surely a file or folder is of a format: of all that claim it, the surest reads it.

    Two that claim it alike are an error, so every format says no more than it has seen.
    """

    NO = 0
    FALLBACK = 1
    """It can be read if no other format knows it better: any zip archive, any folder."""
    LIKELY = 2
    """It begins like one, and so might others."""
    CERTAIN = 3
    """It bears a mark that nothing else has."""


class Document:
    """A checkpoint that was opened.

    Attributes:
        path: The file or folder.
        format: The name of its container format.
        tree: Its contents; tensors are lazy and stay readable while this object lives.
        globals: Every `(module, name)` its pickles mention.
        notes: Oddities met while reading, for people.
        parts: For folders: the documents of the files inside, by name.
        checksums: Each gives checksums that the container recorded, of bytes that may not have been compared yet; those
            of `parts` are theirs. `verify` compares them, and so does whatever copies the bytes.
        lost: What a salvaged checkpoint held and cannot be read any more, by name.
        handle: What the format needs to write a variant of this file cheaply; private to the format.
    """

    # Not a dataclass: to make one takes as long as to read a small file, and every start would.
    def __init__(
        self,
        path: Location,
        format: str,  # noqa: A002 - the name of the attribute
        tree: Any,
        globals: Sequence[tuple[str, str]] = (),  # noqa: A002
        notes: list[str] | None = None,
        parts: dict[str, Document] | None = None,
        checksums: list[Callable[[], Iterable[Recorded]]] | None = None,
        lost: list[str] | None = None,
        handle: Any = None,
    ) -> None:
        self.path, self.format, self.tree, self.globals, self.handle = path, format, tree, globals, handle
        self.notes = [] if notes is None else notes
        self.parts = {} if parts is None else parts
        self.checksums = [] if checksums is None else checksums
        self.lost = [] if lost is None else lost


class WriteOptions(Record):
    """How to write.

    Attributes:
        checksums: Compute checksums the container asks for where none is known; False leaves them out.
        clone_views: Store tensors that share memory each on its own where the container cannot express the sharing.
        shard_size: Largest number of bytes per file where the container can be split, or None.
        sync: Flush what is written to the disk before it takes its name.
        replace: Whether an object of a store may take the place of another; whether a file may is asked before.
        progress: Called with the bytes written since the last call.
        digest: The algorithm of a digest to record for each tensor where the container has no checksums, or None.
        copy: In a folder of `torch.distributed.checkpoint`, copy data files that are unchanged instead of linking them.
        ranks: Cut the tensors of such a folder for so many processes; None leaves them in the pieces that they are in.
        stage: The folder that several processes fill together, of which this is one; None where it is alone.
        shared: Where the files of such a folder come from, for a format that writes them one by one.
        confirm: Called when everything is written and before it takes its name; what it raises undoes the writing.
    """

    checksums: bool = True
    clone_views: bool = False
    shard_size: int | None = None
    sync: bool = True
    progress: Progress | None = None
    digest: str | None = None
    confirm: Callable[[], None] | None = None
    copy: bool = False
    ranks: int | None = None
    replace: bool = True
    stage: Stage | None = None
    shared: SharedFiles | None = None

    def new_file(
        self, path: Location, *, expected_size: int = 0, group: AtomicGroup | None = None
    ) -> AbstractContextManager[Output]:
        """A file of the output, which appears whole or not at all.

        Args:
            path: Its name.
            expected_size: Its number of bytes, where it is known about.
            group: Files that appear together.
        """
        if self.shared is not None:
            return self.shared.file(path, expected_size)
        return new_file(path, expected_size=expected_size, sync=self.sync, replace=self.replace, group=group)

    def new_folder(self, path: Location) -> AbstractContextManager[Location]:
        """The output as a folder, which appears whole or not at all; files go to the place that is the value."""
        if self.shared is not None:
            return self.shared.folder(path)
        return new_folder(path, sync=self.sync)

    @contextmanager
    def together(self, path: Location) -> Iterator[tuple[Location, WriteOptions]]:
        """The output as a folder that one process writes, or those of the stage together.

        Args:
            path: Its name.

        Returns:
            The place for files, and the options to write them with.
        """
        stage = self.stage
        if stage is None:
            with self.new_folder(path) as folder:
                yield folder, self
            return
        shared: SharedFiles
        if stage.in_store:  # what works alone need not know how several work
            from optimstate.io.shared_objects import SharedObjects

            shared = SharedObjects(stage)
        else:
            from optimstate.io.shared import SharedFiles

            shared = SharedFiles(stage, sync=self.sync)
        with stage if stage.team.rank == 0 else nullcontext(stage.folder) as folder:
            with stage.alive() as moved:
                yield folder, self._replace(stage=None, confirm=None, shared=shared)
                shared.share_out(moved, self.progress, self.confirmed)
            if stage.team.rank == 0:
                stage.clear()

    def confirmed(self) -> None:
        """The last thing that a format does before the name is given."""
        if self.confirm is not None:
            self.confirm()


class Format(Protocol):
    """A container format.

    Attributes:
        NAME: What it is called (`--to NAME`).
        SUFFIXES: The endings of file names for which it is written unless another format is named; no other has them.
            Empty where it is not written, or only by name.

    A format may also have `salvage(path) -> Document`: what is whole in a file that `read` refuses as damaged, with
    the names of everything else in `lost`; refused where nothing is whole.
    """

    NAME: str
    SUFFIXES: tuple[str, ...]

    def sniff(self, path: Location, head: bytes) -> Claim:
        """How surely the file (its first `HEAD_BYTES` are `head`) or folder (`head` is empty) is of this format."""

    def read(self, path: Location) -> Document:
        """Open it.

        Raises:
            CheckpointError: It is damaged, hostile or uses what is not supported; the error names the file.
        """

    def write(self, tree: Any, path: Location, *, like: Document | None, options: WriteOptions) -> list[str]:
        """Write `tree` to `path`, all or nothing, and return notes on what was left out or changed.

        Args:
            tree: Nested dicts, lists and tuples of `LazyTensor`s and plain values.
            path: What is there is replaced.
            like: The document the tree was made from, when there is one.
            options: See `WriteOptions`.

        Raises:
            RepresentationError: The container cannot hold something of the tree; the message names it.
            DestinationError: It cannot be written.
        """
