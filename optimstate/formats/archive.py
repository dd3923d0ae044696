"""Zip archives whose members are files, some of them checkpoints: what stable-baselines3 saves.

The tree is a dict by member name, as for a folder. Members written by `torch.save` are read in place; the others are
kept as they are.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import partial
from io import BufferedReader
from typing import IO, Any

from optimstate.describe import describe
from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    RepresentationError,
    UnrecognizedFormatError,
    UnsupportedCheckpointError,
)
from optimstate.formats.protocol import HEAD_BYTES, Claim, Document, WriteOptions
from optimstate.formats.torch import zip as torch_zip
from optimstate.formats.torch import zip_writer
from optimstate.formats.torch.zip_end import LOCAL
from optimstate.io.checksums import Recorded, recorded
from optimstate.io.extents import FileSlice, StoredSource, chunks
from optimstate.io.location import Location
from optimstate.io.output import FileOutput
from optimstate.io.places import open_source
from optimstate.io.streams import SourceFile
from optimstate.tree import OpaqueFile

NAME = "zip"
SUFFIXES = (".zip",)
OPTIONS = frozenset({"checksums"})

_MAX_MEMBERS = 10_000


def sniff(path: Location, head: bytes) -> Claim:
    """Any zip archive, if no other format claims more."""
    return Claim.FALLBACK if head[:4] == b"PK\x03\x04" and path.suffix != ".distcp" else Claim.NO


def read(path: Location) -> Document:
    """Open every checkpoint of the archive.

    Raises:
        CheckpointError: It is damaged, or a checkpoint in it is compressed.
        UnrecognizedFormatError: There is no checkpoint in it.
    """
    source = open_source(path)
    document = Document(path, NAME, {}, checksums=[partial(recorded_members, source, path)], handle={})
    for info in members(path):
        part = FileSlice(source, data_offset(source, info), info.compress_size)
        head = part.read(0, min(HEAD_BYTES, part.size)) if info.compress_type == zipfile.ZIP_STORED else b""
        document.handle[info.filename] = (info, part)
        if torch_zip.sniff(path, head):  # likely or certain
            tree, names, archive = torch_zip.read_archive(part)
            document.tree[info.filename] = tree
            document.parts[info.filename] = Document(path, torch_zip.NAME, tree, names, handle=archive)
            document.mention(names)
        elif info.filename.endswith(torch_zip.SUFFIXES) and info.compress_type != zipfile.ZIP_STORED:
            raise UnsupportedCheckpointError(
                f"member {describe(info.filename)} is compressed",
                path=path,
                hint="Unpack the archive and give the folder.",
            )
        else:
            document.tree[info.filename] = OpaqueFile(f"{path}:{info.filename}", info.file_size)
    if not document.parts:
        raise UnrecognizedFormatError("a zip archive without a checkpoint of torch.save", path=path)
    return document


def members(path: Location) -> list[zipfile.ZipInfo]:
    """The files in an archive.

    Raises:
        CorruptCheckpointError: Its directory is damaged, has duplicate names, or has more than 10,000 members.
    """
    try:
        with BufferedReader(SourceFile(open_source(path))) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        folders = {id(info) for info in members if info.is_dir()}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
    except Exception as error:  # zipfile raises many things for bytes it does not expect
        raise CorruptCheckpointError(f"the zip directory cannot be read: {describe(error)}", path=path) from error
    names = {info.filename for info in members}
    if len(names) != len(members) or len(members) > _MAX_MEMBERS:
        raise CorruptCheckpointError(f"{len(members)} members with {len(names)} names", path=path)
    return [info for info in members if id(info) not in folders]


def recorded_members(source: StoredSource, path: Location) -> Iterator[Recorded]:
    """The checksum of every member, computed over its uncompressed bytes."""
    for info in members(path):
        place = f"member {describe(info.filename)}"
        if info.compress_type == zipfile.ZIP_STORED:
            extents = (source.extent(data_offset(source, info), info.compress_size),)
            yield recorded(path, place, extents, info.CRC)
        else:
            yield Recorded(path, place, partial(_inflated, source, path, info.filename), info.CRC)


def _inflated(source: StoredSource, path: Location, name: str, buffer: memoryview) -> Iterator[bytes]:  # noqa: ARG001
    """The uncompressed bytes of a member, never more than the size in the directory.

    Raises:
        CorruptCheckpointError: The member is damaged.
    """
    try:
        with (
            BufferedReader(SourceFile(source)) as file,
            zipfile.ZipFile(file) as archive,
            archive.open(name) as member,
        ):
            while block := member.read(1 << 20):
                yield block
    except CheckpointError:
        raise
    except Exception as error:  # the exceptions of compression libraries have no common base class
        message = f"member {describe(name)} cannot be unpacked: {describe(error)}"
        raise CorruptCheckpointError(message, path=path) from error


def data_offset(source: StoredSource, info: zipfile.ZipInfo) -> int:
    """The offset of the first byte of a member's data.

    Raises:
        CorruptCheckpointError: The member's header is missing, or has another name than the directory.
    """
    fields = LOCAL.unpack(source.read(info.header_offset, LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise CorruptCheckpointError(
            f"member {describe(info.filename)} has no local header",
            path=source.path,
            place=f"offset {info.header_offset}",
        )
    name = source.read(info.header_offset + LOCAL.size, int(fields[9]))
    if name.decode("utf-8" if int(fields[2]) & 0x800 else "cp437", "replace") != info.orig_filename:
        raise CorruptCheckpointError(
            f"member {describe(info.filename)} has the name {describe(name)} in its header",
            path=source.path,
            place=f"offset {info.header_offset}",
        )
    return info.header_offset + LOCAL.size + int(fields[9]) + int(fields[10])


# --- writing --------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write an archive with the same members; changed checkpoints are saved again, the others copied.

    Raises:
        RepresentationError: The tree was not read from a zip archive.
    """
    options = options or WriteOptions()
    if like is None or like.format != NAME:
        raise RepresentationError(
            "only what was read from a zip archive of files can be written as one", hint="Give another file name."
        )
    with options.new_file(path) as out:
        with out.stream() as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, node in tree.items():
                _write_member(archive, name, node, like, options)
        options.confirmed()
    return []


def _write_member(archive: zipfile.ZipFile, name: str, node: Any, like: Document, options: WriteOptions) -> None:
    info, part = like.handle[name]
    made = zipfile.ZipInfo(name, info.date_time)
    made.external_attr = info.external_attr
    with archive.open(made, "w", force_zip64=info.file_size > 1 << 30) as member:
        if isinstance(node, OpaqueFile) and info.compress_type != zipfile.ZIP_STORED:
            _copy(_inflated(part.file, like.path, name, memoryview(b"")), member, options)
        elif name not in like.parts or node is like.parts[name].tree:
            _copy(chunks([part.extent(0, part.size)]), member, options)
        else:
            with tempfile.TemporaryFile() as buffer:
                zip_writer.write_archive(FileOutput(buffer.fileno()), node, options)
                buffer.seek(0)
                _copy(iter(partial(buffer.read, 1 << 20), b""), member, options)


def _copy(blocks: Iterable[bytes], member: IO[bytes], options: WriteOptions) -> None:
    for block in blocks:
        member.write(block)
        if options.progress:
            options.progress(len(block))
