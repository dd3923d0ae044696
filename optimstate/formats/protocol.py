"""The interface of container formats, which formats in this package and in others implement.

A format is a module (or any object) with the attributes and functions of `Format`. Another package adds one with an
entry point in the group `optimstate.formats`; its name is the name of the format, its value the module:

    [project.entry-points."optimstate.formats"]
    toy = "my_package.toy"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError, RepresentationError
from optimstate.io.extents import Progress
from optimstate.io.location import Location
from optimstate.io.places import new_file, new_folder
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.io.checksums import Recorded
    from optimstate.io.output import AtomicGroup, Output
    from optimstate.io.shared import SharedFiles
    from optimstate.io.together import Stage

__all__ = ["HEAD_BYTES", "Claim", "Document", "Format", "WriteOptions", "malformed", "read_only"]

HEAD_BYTES = 4096
"""How many bytes from the beginning of a file `Format.sniff` receives."""


class Claim(IntEnum):
    """How certain a format is that a file or folder is its own; the format with the highest claim reads it.

    Two formats with the same highest claim are an error, so a format must not claim more than it has checked.
    """

    NO = 0
    FALLBACK = 1
    """The format can read it if no other format claims more: any zip archive, any folder."""
    LIKELY = 2
    """It begins like a file of this format, but files of other formats may begin so too."""
    CERTAIN = 3
    """It has a signature that no other format has."""


class Document:
    """An open checkpoint.

    Attributes:
        path: The file or folder.
        format: The name of its container format.
        tree: Its contents; tensors are lazy and stay readable while this object lives.
        globals: Every `(module, name)` its pickles mention.
        notes: Remarks about what was read, for people.
        parts: For folders: the documents of the files inside, by name.
        checksums: Functions that return the checksums recorded in the container, without those of `parts`. Reading
            need not have compared them; `verify` does, and so does everything that copies the bytes.
        lost: The names of tensors and files of a salvaged checkpoint that cannot be read.
        handle: What the format needs to write a variant of this file cheaply; private to the format.
    """

    # Not a dataclass: defining one takes as long as reading a small file, at every start.
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

    def mention(self, names: Iterable[tuple[str, str]]) -> None:
        """Add `(module, name)` pairs to `globals`, each once."""
        self.globals = list(dict.fromkeys([*self.globals, *names]))

    def mention_parts(self) -> None:
        """Add the globals of all parts, and their notes with their names."""
        for name, part in self.parts.items():
            self.mention(part.globals)
            self.notes.extend(f"{name}: {note}" for note in part.notes)


class WriteOptions(Record):
    """How to write a checkpoint.

    Attributes:
        checksums: Compute the checksums that the container requires where none is known; False leaves them out.
        clone_views: Store tensors that share memory separately where the container cannot express the sharing.
        shard_size: Largest number of bytes per file where the container can be split, or None.
        sync: Flush written data to the disk before the output gets its name.
        replace: Whether an existing object in a store may be replaced; for files the caller has checked this already.
        progress: Called with the number of bytes written since the last call.
        digest: The algorithm of a digest to record for each tensor where the container has no checksums, or None.
        copy: In a `torch.distributed.checkpoint` folder, copy unchanged data files instead of linking them.
        ranks: Split the tensors of such a folder for this many processes; None keeps their present pieces.
        stage: The folder that this process and others fill together; None if this process writes alone.
        shared: Creates the files of such a folder, for a format that writes them one by one.
        confirm: Called after everything is written and before it gets its name; if it raises, the output is removed.
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
            path: The file.
            expected_size: Its approximate number of bytes; 0 if unknown.
            group: The files that appear together with it.
        """
        if self.shared is not None:
            return self.shared.file(path, expected_size)
        return new_file(path, expected_size=expected_size, sync=self.sync, replace=self.replace, group=group)

    def new_folder(self, path: Location) -> AbstractContextManager[Location]:
        """The output as a folder, which appears whole or not at all; the value is the folder to write files to."""
        if self.shared is not None:
            return self.shared.folder(path)
        return new_folder(path, sync=self.sync)

    @contextmanager
    def together(self, path: Location) -> Iterator[tuple[Location, WriteOptions]]:
        """The output as a folder, written by one process or by all processes of the stage together.

        Args:
            path: The folder.

        Returns:
            The folder to write files to, and the options to write them with.
        """
        stage = self.stage
        if stage is None:
            with self.new_folder(path) as folder:
                yield folder, self
            return
        shared: SharedFiles
        if stage.in_store:  # imported here: a single process needs neither
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
        """Call `confirm`; a format does this last, before the output gets its name."""
        if self.confirm is not None:
            self.confirm()


@contextmanager
def malformed(what: str, *, path: object = "", place: str = "") -> Iterator[None]:
    """Raises a `CorruptCheckpointError` for Python's errors in a block that takes the contents of a file apart.

    Args:
        what: The message, to which that of the error is added: `the index cannot be read`.
        path: The file.
        place: The place in the file.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{what}: {describe(error)}"[:300], path=path, place=place) from error


def read_only(message: str, *, hint: str) -> Callable[..., list[str]]:
    """A `Format.write` that always raises a `RepresentationError`, for formats that are only read.

    Args:
        message: Why; the name of the destination is put in front of it.
        hint: What to do instead.
    """

    def write(tree: Any, path: Location, **_: Any) -> list[str]:  # noqa: ARG001
        raise RepresentationError(f"{path.name}: {message}", hint=hint)

    return write


class Format(Protocol):
    """A container format.

    Attributes:
        NAME: Its name (`--to NAME`).
        SUFFIXES: The file name suffixes that select this format for writing; no other format has them. Empty if the
            format is read-only or must be selected by name.

    A format may also have `OPTIONS`, a set of those of `checksums`, `clone_views`, `copy`, `digest`, `ranks` and
    `shard_size` among the `WriteOptions` that its `write` follows; `convert` refuses what it does not follow. It may
    have `salvage(path) -> Document`, which reads the intact parts of a file that `read` refuses as damaged and puts the
    names of everything else in `lost`. It raises `CheckpointError` if nothing is intact.
    """

    NAME: str
    SUFFIXES: tuple[str, ...]

    def sniff(self, path: Location, head: bytes) -> Claim:
        """The claim on a file, whose first `HEAD_BYTES` bytes are `head`, or on a folder, for which `head` is empty."""

    def read(self, path: Location) -> Document:
        """Open it.

        Raises:
            CheckpointError: It is damaged, hostile or uses something unsupported; the error names the file.
        """

    def write(self, tree: Any, path: Location, *, like: Document | None, options: WriteOptions) -> list[str]:
        """Write `tree` to `path`, all or nothing, and return notes on what was left out or changed.

        Args:
            tree: Nested dicts, lists and tuples of `LazyTensor`s and plain values.
            path: The destination; an existing one is replaced.
            like: The document from which the tree was made, if there is one.
            options: See `WriteOptions`.

        Raises:
            RepresentationError: The container cannot hold some entry of the tree; the message names it.
            DestinationError: It cannot be written.
        """
