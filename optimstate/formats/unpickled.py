"""Finding everything in a file that a loader would unpickle: every pickle in every container.

Nothing here decides what is harmless. A part of a file that no rule below covers is reported as `Unread`, never
skipped.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from optimstate.errors import CheckpointError, CorruptCheckpointError
from optimstate.formats.byte_kinds import MAX_TEXT, is_safetensors, is_tar, is_text
from optimstate.formats.byte_sources import Part, unpacker
from optimstate.formats.dcp.items import ends, fill, read_item
from optimstate.formats.pickles.mentions import Mention, Mentions, mentions_in_a_row
from optimstate.formats.torch.zip_directory import Archive
from optimstate.formats.torch.zip_end import LOCAL, archive_length, read_in_two_ways
from optimstate.io.extents import FileSlice, InMemory, StoredSource, announce
from optimstate.io.streams import Source, SourceFile
from optimstate.record import Record

__all__ = ["MAX_UNPACKED", "Pickled", "Unread", "pickles_in"]

MAX_UNPACKED = 1 << 28
"""The largest total of bytes decompressed from one file."""

MAX_NESTING = 8
"""The deepest nesting of containers."""

_MAX_MEMBERS = 100_000
_HEAD = 512  # bytes that decide the kind of a source
_FEW = 2048  # bytes of a member whose findings are kept, because equal members are frequent
_KNOWN = 4096  # such members that are kept
_TOGETHER = 512  # items whose ends are fetched at the same time from a store
_HERE = "\0"  # stands for the record of a member in findings that are kept


class Pickled(Record):
    """One pickle.

    Attributes:
        record: Where it is: the names of archive members, outermost first, and the byte at which it begins.
        mentions: The classes and functions that it names.
    """

    record: str
    mentions: Mentions


class Unread(Record):
    """A part that could not be examined.

    Attributes:
        record: As in `Pickled`; empty for the file itself.
        reason: Why not.
    """

    record: str
    reason: str


Found = Iterator[Pickled | Unread]


def pickles_in(source: Source, *, suffix: str = "", items: Sequence[tuple[int, int]] = ()) -> Found:
    """Every pickle in a file, and every part of it that could not be examined.

    Args:
        source: The file.
        suffix: The suffix of its name, for containers that nothing else distinguishes.
        items: Of a data file of a distributed checkpoint, the offset and length of every item according to the
            metadata, by which loaders find them. If they do not fill the file, they are looked for in its bytes.
    """
    return _Search(items).whole(source, "", 0, suffix)


class _Search:
    def __init__(self, items: Sequence[tuple[int, int]] = ()) -> None:
        self._of_metadata = items
        self._room = MAX_UNPACKED
        self._members = 0
        self._known: dict[tuple[bytes, int], tuple[Pickled | Unread, ...]] = {}

    def whole(self, source: Source, record: str, depth: int, suffix: str = "") -> Found:
        """The findings in a file or a member, by its bytes."""
        if depth > MAX_NESTING:
            yield Unread(record, f"more than {MAX_NESTING} containers within one another")
            return
        try:
            head = source.read(0, min(source.size, _HEAD))
            if suffix in (".distcp", ".safetensors") and head[:4] == b"PK\x03\x04":
                yield from self._items(source, record, depth)
            elif head[:2] == b"PK" and head[2:4] in (b"\x03\x04", b"\x05\x06", b"\x01\x02", b"\x06\x06", b"\x07\x08"):
                yield from self._zip(source, record, depth)
            elif (how := unpacker(head)) is not None:
                kind, unpack = how
                yield from self._compressed(source, unpack, record, _inside(record, kind), depth)
            elif head[:6] == b"\x93NUMPY":
                yield from self._npy(source, record)
            elif source.size <= _FEW and record:
                yield from self._few(source.read(0, source.size), record, depth)
            else:
                yield from self._other(source, head, record, depth)
        except CheckpointError as error:
            yield Unread(record, error.message)
        except _UNEXPECTED as error:
            yield Unread(record, f"cannot be read: {type(error).__name__}")

    def _few(self, data: bytes, record: str, depth: int) -> Found:
        """As `_other`, for a small member: many archives have thousands of equal ones."""
        key = (data, depth)
        seen = self._known.get(key)
        if seen is None:
            seen = tuple(self._other(InMemory(data), data[:_HEAD], _HERE, depth))
            if len(self._known) < _KNOWN:
                self._known[key] = seen
        for found in seen:
            yield found._replace(record=record + found.record.removeprefix(_HERE))

    def _other(self, source: Source, head: bytes, record: str, depth: int) -> Found:
        """Tar archives, consecutive pickles, or neither; a file can be a tar archive and a pickle at once."""
        known = False
        if head[257:262] == b"ustar" or (source.size >= 512 and is_tar(head)):
            known = True
            yield from self._tar(source, record, depth)
        end = 0
        for start, stop, found in mentions_in_a_row(source):
            known, end = True, stop
            yield Pickled(_at_byte(record, start), found)
            for inner in found.embedded:
                yield from self.whole(InMemory(inner), _inside(_at_byte(record, start), "storage"), depth + 1)
        if end:
            from optimstate.formats.torch.legacy import MAGIC_BYTES, read_stream

            if MAGIC_BYTES in head[:32]:
                read_stream(source)  # checks that the storages of old torch follow, or raises
            elif end < source.size:
                yield Unread(record, f"{source.size - end} bytes after the pickle that ends at byte {end}")
        if not known:
            yield from self._without_pickle(source, head, record, depth)

    def _without_pickle(self, source: Source, head: bytes, record: str, depth: int) -> Found:
        """Kinds of files that are known to hold no pickle, or only as text."""
        if not source.size or head.startswith(_IMAGES) or is_safetensors(source):
            return
        if not is_text(source, head):
            yield Unread(record, "bytes of no known kind")
        elif b'":serialized:"' in source.read(0, min(source.size, MAX_TEXT)):
            yield from self._serialized(source.read(0, source.size), record, depth)

    def _serialized(self, text: bytes, record: str, depth: int) -> Found:
        """The pickles that stable-baselines3 stores as base64 in its JSON, and loads."""
        import base64

        data = json.loads(text)
        for key, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, dict) and isinstance(value.get(":serialized:"), str):
                decoded = base64.b64decode(value[":serialized:"])
                yield from self.whole(InMemory(decoded), _inside(record, str(key)), depth + 1)

    # --- compressed -----------------------------------------------------------------------------------------------

    def _compressed(self, source: Source, unpack: Any, packed: str, record: str, depth: int) -> Found:
        """The findings in a compressed source; `packed` is its record, `record` that of the decompressed bytes."""
        data = self._unpacked(source, unpack)
        if data is None:
            yield Unread(packed, f"unpacks to more than {MAX_UNPACKED} bytes, the limit")
        else:
            yield from self.whole(InMemory(data), record, depth + 1)

    def _unpacked(self, source: Source, unpack: Any) -> bytes | None:
        """All compressed streams of a source, joined; None if they are too large."""
        parts: list[bytes] = []
        stream = unpack()
        at, rest = 0, b""
        while at < source.size or rest:
            if not rest:
                rest = source.read(at, min(1 << 16, source.size - at))
                at += len(rest)
            if stream.eof:
                stream = unpack()
            part = stream.decompress(rest, self._room + 1)
            self._room -= len(part)
            if self._room < 0:
                return None
            parts.append(part)
            rest = stream.unused_data if stream.eof else getattr(stream, "unconsumed_tail", b"")
        if not stream.eof:
            raise CorruptCheckpointError("the compressed data is cut off")
        return b"".join(parts)

    # --- archives -------------------------------------------------------------------------------------------------

    def _tar(self, source: Source, record: str, depth: int) -> Found:
        """The members of an archive; those of torch 0.1, which mix pickles and raw numbers, by their own reader."""
        import tarfile

        from optimstate.formats.torch.legacy import read_tar

        read: tuple[str, ...] = ()
        if isinstance(source, StoredSource):
            try:
                _, names = read_tar(source)
            except CheckpointError:
                pass
            else:
                read = ("storages", "tensors")
                found = tuple(Mention(module, name, 0, 1, True) for module, name in names)
                yield Pickled(_inside(record, "storages and tensors"), Mentions(found, (), ""))
        try:
            with tarfile.open(fileobj=io.BufferedReader(SourceFile(source)), mode="r:") as archive:
                for member in archive:
                    if self._too_many():
                        yield Unread(record, f"more than {_MAX_MEMBERS} members, the limit")
                        return
                    name = _inside(record, member.name)
                    if member.issparse():
                        yield Unread(name, "a sparse member")
                    elif member.isreg() and member.name not in read:
                        yield from self.whole(Part(source, member.offset_data, member.size), name, depth + 1)
        except (tarfile.TarError, OverflowError) as error:
            yield Unread(record, f"the tar archive cannot be read: {error}"[:200])

    def _too_many(self) -> bool:
        self._members += 1
        return self._members > _MAX_MEMBERS

    def _zip(self, source: Source, record: str, depth: int) -> Found:
        if (why := read_in_two_ways(source)) is not None:
            yield Unread(record, f"an archive that programs read in different ways: {why}")
        if isinstance(source, StoredSource | FileSlice):
            try:
                archive = Archive(source)
            except CheckpointError:
                archive = None
            if archive is not None and "data.pkl" in archive.records:
                yield from self._torch_records(archive, record, depth)
                return
        yield from self._zip_members(source, record, depth)

    def _torch_records(self, archive: Archive, record: str, depth: int) -> Found:
        """All records except storages, which every loader of such an archive takes as raw bytes."""
        for name, entry in archive.records.items():
            if _RAW_STORAGE.fullmatch(name):
                continue
            where = _inside(record, archive.root + name)
            extent = archive.extent(entry)
            part = Part(archive.source, extent.offset - _start(archive.source), extent.length)
            yield from self.whole(part, where, depth + 1)
            local = archive.source.read(entry.header, LOCAL.size + len((archive.root + name).encode()))
            if local[LOCAL.size :] != (archive.root + name).encode():
                yield Unread(where, "has another name in its own header")

    def _zip_members(self, source: Source, record: str, depth: int) -> Found:
        try:
            with zipfile.ZipFile(SourceFile(source)) as opened:
                entries = opened.infolist()
        except Exception as error:  # noqa: BLE001  # zipfile raises many things for what it does not expect
            yield Unread(record, f"the archive cannot be read: {error or type(error).__name__}"[:200])
            return
        roots = {e.filename[: -len("data.pkl")] for e in entries if e.filename.endswith("/data.pkl")}
        for entry in entries:
            if self._too_many():
                yield Unread(record, f"more than {_MAX_MEMBERS} members, the limit")
                return
            name = _inside(record, entry.filename)
            folder, _, last = entry.filename.rpartition("data/")
            if folder in roots and last.isdigit() and last.isascii() and entry.compress_type == zipfile.ZIP_STORED:
                continue
            if entry.is_dir() and not entry.file_size and not entry.compress_size:
                continue
            try:
                yield from self._member(source, entry, name, depth)
            except CheckpointError as error:
                yield Unread(name, error.message)
            except (zlib.error, struct.error, EOFError) as error:
                yield Unread(name, f"cannot be unpacked: {error}"[:200])

    def _member(self, source: Source, entry: zipfile.ZipInfo, name: str, depth: int) -> Found:
        header = source.read(entry.header_offset, LOCAL.size) if entry.header_offset >= 0 else b""
        if len(header) < LOCAL.size or header[:4] != b"PK\x03\x04":
            yield Unread(name, "has no header of its own")
            return
        fields = LOCAL.unpack(header)
        called = source.read(entry.header_offset + LOCAL.size, int(fields[9]))
        if called not in (_encoded(entry.orig_filename, "utf-8"), _encoded(entry.orig_filename, "cp437")):
            yield Unread(name, "has another name in its own header")
        if int(fields[3]) != entry.compress_type:
            yield Unread(name, "has another compression method in its own header")
        if (entry.flag_bits | int(fields[2])) & 0x2061:
            yield Unread(name, "is encrypted, or a patch")
        start = entry.header_offset + LOCAL.size + int(fields[9]) + int(fields[10])
        packed = Part(source, start, entry.compress_size)
        if entry.compress_type == zipfile.ZIP_STORED:
            if entry.compress_size != entry.file_size:
                yield Unread(name, f"has {entry.compress_size} stored bytes and declares {entry.file_size}")
            yield from self.whole(packed, name, depth + 1)
        elif entry.compress_type == zipfile.ZIP_DEFLATED:
            yield from self._compressed(packed, lambda: zlib.decompressobj(-15), name, name, depth)
        else:
            yield Unread(name, f"is packed by method {entry.compress_type}")

    def _items(self, source: Source, record: str, depth: int) -> Found:
        """The consecutive archives in a file of torch.distributed.checkpoint."""
        if not depth and isinstance(source, StoredSource) and fill(self._of_metadata, source.size):
            for first in range(0, len(self._of_metadata), _TOGETHER):
                places = self._of_metadata[first : first + _TOGETHER]
                announce(extent for place in places for extent in ends(source, *place))
                for start, size in places:
                    yield from self.whole(read_item(source, start, size), _at_byte(record, start), depth + 1)
            return
        start = 0
        while start < source.size:
            size = archive_length(source, start)
            if not size:
                rest = Part(source, start, source.size - start)
                if not is_safetensors(rest):
                    yield Unread(_at_byte(record, start), "bytes of no known kind")
                return
            item = read_item(source, start, size) if isinstance(source, StoredSource) else Part(source, start, size)
            yield from self.whole(item, _at_byte(record, start), depth + 1)
            start += size

    # --- arrays ---------------------------------------------------------------------------------------------------

    def _npy(self, source: Source, record: str) -> Found:
        """A NumPy array: raw numbers, or a pickle of objects. See `numpy.lib.format` for the header."""
        version = source.read(6, 2)
        width, form = (2, "<H") if version[:1] == b"\x01" else (4, "<I")
        (length,) = struct.unpack(form, source.read(8, width))
        start = 8 + width + int(length)
        if version[:1] not in b"\x01\x02\x03" or length > 1 << 16 or start > source.size:
            yield Unread(record, "an array with a header that cannot be read")
            return
        header = source.read(8 + width, int(length))
        if _PLAIN_ARRAY.search(header) and b"O" not in header.replace(b"'fortran_order'", b""):
            return
        objects = Part(source, start, source.size - start)
        end = 0
        for begin, stop, found in mentions_in_a_row(objects):
            end = stop
            yield Pickled(_at_byte(record, start + begin), found)
        if end < objects.size or not objects.size:
            yield Unread(record, "an array of objects that cannot be read to its end")


# What libraries raise for unexpected bytes.
_UNEXPECTED = (
    OSError,
    ValueError,
    struct.error,
    zlib.error,
    LookupError,
    RecursionError,
    EOFError,
    MemoryError,
    TypeError,
)
_RAW_STORAGE = re.compile(r"data/\d+")
_PLAIN_ARRAY = re.compile(rb"'descr': *(?:'[<>|=]?[biufcSUVmM]\d+(?:\[\w+\])?'|\[)")
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")


def _inside(record: str, name: str) -> str:
    return f"{record}/{name}" if record else name


def _at_byte(record: str, at: int) -> str:
    if not record:
        return f"byte {at}"
    return f"{record} byte {at}" if at else record


def _encoded(text: str, encoding: str) -> bytes | None:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return None


def _start(source: StoredSource | FileSlice) -> int:
    return source.start if isinstance(source, FileSlice) else 0
