"""Reading and writing one safetensors file.

Format: https://huggingface.co/docs/safetensors (header of JSON, at most 100 MB; no holes, no overlaps).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.pruning import LostStorage
from optimstate.formats.safetensors.digests import DIGEST, described, recorded_digests
from optimstate.io.checksums import Digest, Recorded, digest_of
from optimstate.io.extents import Extent, StoredSource
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.record import Record
from optimstate.tensors.dtypes import DTYPES, check_sizes
from optimstate.tensors.lazy import LazyTensor, Storage, announced, contiguous_strides

if TYPE_CHECKING:
    from optimstate.io.output import AtomicGroup

__all__ = ["BY_CODE", "MAX_HEADER", "Entry", "File", "are_natural", "read_file", "write_file"]

MAX_HEADER = 100_000_000
_INTEGERS = {int}
_PLACE = itemgetter(Extent._fields.index("offset"), Extent._fields.index("length"))
BY_CODE = {row.safetensors: row for row in DTYPES.values() if row.safetensors}


# --- reading ----------------------------------------------------------------------------------------------------------


class File(Record):
    """The contents of a file.

    Attributes:
        tensors: The tensors by name in the order of the header; also named values from the front of the file.
        metadata: The metadata of the header.
        digests: The recorded digests of the bytes.
    """

    tensors: dict[str, Any]
    metadata: dict[str, str]
    digests: list[Recorded]


def read_file(path: Location, *, start: int = 0, salvage: bool = False) -> File:
    """Open a file.

    Args:
        path: The file.
        start: The offset of the header.
        salvage: Accept a truncated file; incomplete tensors get a `LostStorage`.

    Raises:
        CheckpointError: The file is damaged.
    """
    source = open_source(path)
    raw, header = _read_header(source, start)
    base = start + 8 + len(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpointError("__metadata__ is not a mapping of strings", path=path, place="header")
    forms: dict[tuple[str, tuple[int, ...]], _Form] = {}
    found = header
    for name, entry in header.items():
        found[name] = _read_tensor(
            source, base, name, entry, forms
        )  # in the place of the entry, whose memory is reused
    end = base
    for extent in sorted((tensor.storage.pieces[0] for tensor in found.values()), key=_PLACE):
        if extent.offset != end:
            raise CorruptCheckpointError("tensors overlap or leave a hole", path=path, place=f"offset {extent.offset}")
        end += extent.length
    if salvage and end > source.size:
        for tensor in found.values():
            if tensor.nbytes and tensor.storage.pieces[0].offset + tensor.nbytes > source.size:
                tensor.storage = LostStorage((), tensor.nbytes, tensor.storage.kind)
    elif end != source.size:
        raise CorruptCheckpointError(
            f"the tensors end at byte {end}, the file has {source.size}",
            path=path,
            place=f"offset {end}",
            hint="The file is truncated or damaged; copy it again from its source.",
        )
    return File(found, metadata, recorded_digests(path, raw, metadata, found))


def _read_header(source: StoredSource, start: int = 0) -> tuple[bytes, dict[str, Any]]:
    """The header of a file, as bytes and parsed."""
    (length,) = struct.unpack("<Q", source.read(start, 8))
    if length > MAX_HEADER:
        raise LimitExceededError(f"a header of {length} bytes, over the limit of {MAX_HEADER}", path=source.path)
    try:
        raw = source.read(start + 8, length)
        header = _parsed(raw)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(
            f"the header cannot be read: {error}"[:300], path=source.path, place="header"
        ) from None
    if not isinstance(header, dict):
        raise CorruptCheckpointError("the header is not a JSON object", path=source.path, place="header")
    return raw, header


def _parsed(raw: bytes) -> Any:
    """The parsed header; duplicate keys are refused.

    Calling a function for every object would take longer than parsing. There are at least as many colons as keys, so
    if the parsed header has as many keys as there are colons, none was a duplicate.
    """
    header = json.loads(raw)
    nested = isinstance(header, dict) and all(type(entry) is dict for entry in header.values())
    if nested and raw.count(b":") == len(header) + sum(map(len, header.values())):
        return header
    return json.loads(raw, object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {describe(name)} occurs twice")
    return made


class _Form(Record):
    """What tensors of one dtype code and shape have in common: a model has few forms among a million tensors."""

    dtype: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


def _read_tensor(
    source: StoredSource, base: int, name: str, entry: Any, forms: dict[tuple[str, tuple[int, ...]], _Form]
) -> LazyTensor:
    try:
        code, sizes, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not are_natural((*sizes, start, stop)) or not isinstance(code, str):
            raise ValueError("a size or offset is not a natural number, or the dtype is not text")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"the entry of {describe(name)} is malformed: {describe(error)}", path=source.path
        ) from None
    key = code, tuple(sizes)
    form = forms.get(key)
    if form is None:
        form = forms[key] = _form(source, name, code, key[1])
    if form.nbytes != stop - start:
        raise CorruptCheckpointError(
            f"tensor {describe(name)} of shape {describe(sizes)} and dtype {code} has {describe(form.nbytes)} bytes, "
            f"but its range has {stop - start}",
            path=source.path,
        )
    storage = Storage((Extent(source, base + start, form.nbytes),), form.nbytes, form.kind)
    return LazyTensor(storage, form.dtype, form.shape, form.stride)


def _form(source: StoredSource, name: str, code: str, sizes: tuple[int, ...]) -> _Form:
    if code not in BY_CODE:
        raise UnsupportedCheckpointError(
            f"tensor {describe(name)} has the unknown dtype {describe(code)}"[:300],
            path=source.path,
            hint="A newer version may know it.",
        )
    check_sizes(sizes, len(sizes))
    dtype, shape = BY_CODE[code], sizes
    if dtype.packed > 1:
        if not shape or shape[-1] % dtype.packed:
            raise UnsupportedCheckpointError(
                f"tensor {describe(name)} of {code} has shape {describe(shape)}: {dtype.packed} numbers of its last "
                f"dimension are {dtype.itemsize} bytes",
                path=source.path,
            )
        shape = (*shape[:-1], shape[-1] // dtype.packed)
    return _Form(dtype.name, dtype.storage_class, shape, contiguous_strides(shape), prod(shape) * dtype.itemsize)


def are_natural(numbers: Collection[Any]) -> bool:
    """Whether all numbers are integers that are not negative."""
    return set(map(type, numbers)) <= _INTEGERS and min(numbers, default=0) >= 0


# --- writing ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor with its name, dtype code and shape in the header."""

    name: str
    tensor: LazyTensor
    code: str
    shape: tuple[int, ...]


def write_file(
    entries: list[Entry],
    metadata: dict[str, str],
    path: Location,
    options: WriteOptions,
    *,
    group: AtomicGroup | None = None,
) -> None:
    """Write one safetensors file; with a group it appears together with the other files.

    Raises:
        DestinationError: It cannot be written.
    """
    header = _header(entries, metadata if options.digest is None else _with_digests(entries, metadata, options.digest))
    size = len(header) + sum(entry.tensor.nbytes for entry in entries)
    announced(entry.tensor for entry in entries)
    with options.new_file(path, expected_size=size, group=group) as out:
        out.write(header)
        pieces: Iterator[Extent] = (extent for entry in entries for extent in entry.tensor.extents())
        out.copy(pieces, options.progress)
        options.confirmed()


def _with_digests(entries: list[Entry], metadata: dict[str, str], algorithm: str) -> dict[str, str]:
    """The metadata with the digests of the tensors, which are read for this, and of the header."""
    digests = {entry.name: digest_of(entry.tensor.extents(), algorithm) for entry in entries}
    bare = _header(entries, {**metadata, DIGEST: described(algorithm, digests)})
    own = Digest(algorithm)
    own.update(bare[8:])
    return {**metadata, DIGEST: described(algorithm, digests, own.value)}


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        stop = at + entry.tensor.nbytes
        header[entry.name] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": (at, stop)}
        at = stop
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    data += b" " * (-len(data) % 8)
    if len(data) > MAX_HEADER:
        raise RepresentationError(
            f"the header would have {len(data)} bytes, over safetensors' limit of {MAX_HEADER}",
            hint="Give --shard-size to spread the tensors over several files.",
        )
    return struct.pack("<Q", len(data)) + data
