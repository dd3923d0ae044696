"""The container formats by name; a format's module is imported when a file may be of that format.

The format that reads a file is the one with the highest `Claim`, in whatever order they are asked; two equal claims are
an error. Formats of other packages (entry points `optimstate.formats`) are asked about every file that no format here
is certain of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import cast

from optimstate.describe import describe
from optimstate.entry_points import entry_points_of
from optimstate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LimitExceededError,
    OptimStateError,
    RepresentationError,
    UnrecognizedFormatError,
    UsageError,
)
from optimstate.formats.protocol import HEAD_BYTES, Claim, Document, Format
from optimstate.io.folders import kind_of, leftover_notes
from optimstate.io.location import Location, Place
from optimstate.io.places import beginning, located
from optimstate.record import Record
from optimstate.tree import no_garbage_collection

__all__ = [
    "ENTRY_POINTS",
    "FORMATS",
    "Registration",
    "format_for_destination",
    "get_format",
    "open_checkpoint",
    "salvaged",
]

ENTRY_POINTS = "optimstate.formats"
"""The entry point group with which other packages add formats."""


class Registration(Record):
    """What is known about a format before its module is imported.

    Attributes:
        module: The module's full name.
        suffixes: The module's `SUFFIXES`.
        marks: Signatures; every file of the format begins with one of them.
        within: How many other bytes may precede a signature.
        names: Name suffixes of files that may be of the format whatever they contain.
        folders: Whether a folder can be of this format.
    """

    module: str
    suffixes: tuple[str, ...] = ()
    marks: tuple[bytes, ...] = ()
    within: int = 0
    names: tuple[str, ...] = ()
    folders: bool = False

    def may_be(self, path: Location, head: bytes, *, is_folder: bool) -> bool:
        """Whether the format should be asked for its claim."""
        if is_folder:
            return self.folders
        in_head = any(mark in head[: self.within + len(mark)] for mark in self.marks)
        return in_head or path.name.endswith(self.names)


_MODULE = "optimstate.formats"
_ZIP = (b"PK\x03", b"PK\x05")

FORMATS: dict[str, Registration] = {
    "torch": Registration(f"{_MODULE}.torch.zip", (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th"), _ZIP),
    "torchscript": Registration(f"{_MODULE}.torch.script"),  # `torch` recognises these archives by their directory
    "zip": Registration(f"{_MODULE}.archive", (".zip",), _ZIP),
    "safetensors": Registration(
        f"{_MODULE}.safetensors.container",
        (".safetensors",),
        (b"{",),
        within=8,
        names=(".safetensors", ".safetensors.index.json"),
    ),
    "dcp": Registration(f"{_MODULE}.dcp.folder", (".dcp",), folders=True),
    "deepspeed": Registration(f"{_MODULE}.deepspeed.zero", folders=True),
    "deepspeed-universal": Registration(f"{_MODULE}.deepspeed.universal", ("_universal",), folders=True),
    "torch-legacy": Registration(
        f"{_MODULE}.torch.legacy",
        (),
        (b"\x8a\n\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"storages\0", b"tensors\0", b"pickle\0", b"sys_info\0"),
        within=24,
    ),
    "torch-checkpointing": Registration(f"{_MODULE}.torch_checkpointing", folders=True),
    "torch-unpacked": Registration(f"{_MODULE}.torch.unpacked", folders=True),
    "numpy": Registration(f"{_MODULE}.numpy_files", (), (*_ZIP, b"\x93NUMPY")),
    "pickle": Registration(
        f"{_MODULE}.torch.pickle_file",
        (),
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        names=(".pkl", ".pickle"),
    ),
    "ranks": Registration(f"{_MODULE}.ranks.files"),  # `folder` recognises which files belong together
    "folder": Registration(f"{_MODULE}.folder", folders=True),
}


@cache
def _outside() -> Mapping[str, Format]:
    """The formats of other packages, by name.

    Raises:
        RepresentationError: A format has the name of another, or lacks an attribute.
    """
    found: dict[str, Format] = {}
    for point in entry_points_of(ENTRY_POINTS):
        made = point.load()
        missing = [name for name in ("NAME", "SUFFIXES", "sniff", "read", "write") if not hasattr(made, name)]
        if missing or point.name != made.NAME:
            what = f"has no {missing[0]}" if missing else f"calls itself {describe(made.NAME)}"
            raise RepresentationError(
                f"the container format {describe(point.name)} of {point.value} {what}",
                hint="`optimstate.formats.protocol` describes what a format provides.",
            )
        if point.name in FORMATS or point.name in found:
            raise RepresentationError(
                f"{point.value} adds a container format {describe(point.name)}, but there is one of that name",
                hint="Uninstall one of the packages.",
            )
        found[point.name] = made
    return found


def get_format(name: str) -> Format:
    """The format with this name.

    Raises:
        UsageError: There is none.
    """
    if name in FORMATS:
        return cast("Format", import_module(FORMATS[name].module))
    outside = _outside()
    if name not in outside:
        raise UsageError.unknown(f"no container format is called {describe(name)}", name, [*FORMATS, *outside])
    return outside[name]


def detect(path: Location) -> Format | None:
    """The format a file or folder is of, or None.

    Raises:
        CheckpointNotFoundError: There is nothing at `path`.
        UnrecognizedFormatError: Two formats claim it equally.
    """
    head = b""
    if kind_of(path) == "file":
        head = beginning(path, HEAD_BYTES)
    claims = []
    with _os_errors_of(path):
        for claim in _claims(path, head):
            claims.append(claim)
            if claim[0] is Claim.CERTAIN:  # no other format has this signature, so no other module is imported
                break
    surest = max((claim for claim, _ in claims), default=Claim.NO)
    if surest < Claim.CERTAIN:
        claims += [(_checked(found.sniff(path, head), found), found) for found in _outside().values()]
        surest = max((claim for claim, _ in claims), default=Claim.NO)
    if surest is Claim.NO:
        return None
    best = [found for claim, found in claims if claim is surest]
    if len(best) > 1:
        names = " and ".join(f"'{found.NAME}'" for found in best)
        raise UnrecognizedFormatError(
            f"the formats {names} both claim it", path=path, hint="Report this: one of them claims too much."
        )
    return best[0]


@contextmanager
def _os_errors_of(path: Location) -> Iterator[None]:
    """Raises a `CheckpointError` that names the file in place of an `OSError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OptimStateError):
            raise
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=error.filename or path) from error


def _claims(path: Location, head: bytes) -> Iterator[tuple[Claim, Format]]:
    is_folder = not head and path.is_dir()
    for name, known in FORMATS.items():
        if known.may_be(path, head, is_folder=is_folder):
            found = get_format(name)
            yield _checked(found.sniff(path, head), found), found


def _checked(claim: Claim, found: Format) -> Claim:
    if not isinstance(claim, Claim):
        raise TypeError(f"`sniff` of the format {describe(found.NAME)} must return a Claim, not {describe(claim)}")
    return claim


def open_checkpoint(path: Place, *, salvage: bool = False) -> Document:
    """Open a checkpoint of any known container format.

    Args:
        path: A file or folder.
        salvage: Read the intact parts of a damaged checkpoint; `Document.lost` names the rest.

    Raises:
        CheckpointError: It does not exist, is damaged, or is not of a known format.
    """
    path = located(path)
    found = detect(path)
    if found is None:
        what = "an empty file" if path.is_file() and not path.stat().st_size else "not a checkpoint of a known format"
        raise UnrecognizedFormatError(
            what,
            path=path,
            hint="Known are files of torch.save, old and new, pickles of state dicts, safetensors, single or sharded, "
            "folders of torch.distributed.checkpoint and of DeepSpeed, zip archives and folders of these.",
        )
    try:
        with no_garbage_collection(), _os_errors_of(path):
            document = salvaged(found, path) if salvage else found.read(path)
    except RecursionError:
        raise LimitExceededError("nested too deeply", path=path) from None
    if path.is_dir():
        document.notes.extend(leftover_notes(path))
    return document


def salvaged(found: Format, path: Location) -> Document:
    """A file read with its format; if it is damaged, the intact parts of it.

    Raises:
        CheckpointError: It cannot be read, and no part of it is intact.
    """
    rescue = getattr(found, "salvage", None)
    if rescue is None:
        return found.read(path)
    try:
        return found.read(path)
    except (CorruptCheckpointError, CheckpointNotFoundError):
        return cast("Document", rescue(path))


def format_for_destination(path: Location, name: str | None) -> Format:
    """The format to write: the one with this name, else the one with the longest matching suffix of the destination.

    Raises:
        UsageError: There is no name and no matching suffix.
    """
    if name is not None:
        return get_format(name)
    known = {suffix: key for key, row in FORMATS.items() for suffix in row.suffixes}
    if not path.name.endswith(tuple(known)):
        known.update((suffix, key) for key, found in _outside().items() for suffix in found.SUFFIXES)
    fitting = [suffix for suffix in known if path.name.endswith(suffix)]
    if fitting:
        return get_format(known[max(fitting, key=len)])
    raise UsageError(
        f"{describe(path.name)}: the suffix does not say which container to write",
        hint="Use .pt, .pth, .bin, .ckpt or .safetensors, or give --to.",
    )
