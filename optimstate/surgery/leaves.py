"""A tree as its leaves by path: what `inspect` shows of the rest of a checkpoint, and what `diff` compares."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path as FilePath
from typing import IO, Any

from optimstate.describe import exact
from optimstate.errors import LimitExceededError
from optimstate.io.places import is_remote, open_source
from optimstate.io.streams import SourceFile
from optimstate.state.records import is_tensor
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import (
    AttributedTensor,
    GlobalName,
    Opaque,
    OpaqueFile,
    Path,
    children,
    difference,
    format_path,
    path_key,
)

__all__ = ["Shape", "checksum_of_number", "is_leaf", "key_in_path", "leaves", "opened_file", "same", "spelled"]

MAX_LEAVES = 5_000_000
MAX_JSON = 1 << 24  # bytes of a JSON file that is looked into


class Shape:
    """A leaf that stands for a container: its type, and for an object its class."""

    def __init__(self, node: Any) -> None:
        if isinstance(node, Opaque):
            self.text = node.type.path + ("" if node.called else " (made without a call)")
        else:
            self.text = "dict" if isinstance(node, Mapping) else type(node).__name__
        self.size = 0 if isinstance(node, Opaque) else len(node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return f"{self.text} of {self.size}" if self.size else self.text


def is_leaf(value: Any) -> bool:
    """Whether nothing inside has a path of its own."""
    return not isinstance(value, Mapping | list | tuple | Opaque) or isinstance(value, OpaqueFile) or is_tensor(value)


def leaves(node: Any, path: Path = (), *, skip: Collection[int] = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path, and for every container a `Shape`; JSON files of a folder are looked into.

    Keys of a mapping that only look alike (`1`, `"1"`, `True`) have different paths.

    Args:
        node: A tree.
        path: Where it stands.
        skip: The `id`s of nodes to leave out, with all that is in them.

    Raises:
        LimitExceededError: There are more than five million: a small file can say one list a thousand times over.
    """
    count = 0
    around: set[int] = set()
    stack: list[tuple[Path, Any, bool]] = [(path, node, False)]
    while stack:
        place, found, done = stack.pop()
        if done:
            around.discard(id(found))
            continue
        if id(found) in skip:
            continue
        count += 1
        if count > MAX_LEAVES:
            raise LimitExceededError(f"more than {MAX_LEAVES:,} values, at {format_path(place)}")
        if isinstance(found, OpaqueFile):
            found = opened_file(found)
        if is_leaf(found):
            yield place, found
            continue
        if id(found) in around:
            yield place, "(contains itself)"
            continue
        yield place, Shape(found)
        around.add(id(found))
        stack.append((place, found, True))
        stack += [((*place, key), child, False) for key, child in reversed(list(_children(found)))]


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """What is directly inside; keys that are neither strings nor numbers are marked."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield key_in_path(key), value
    else:
        yield from children(node)


def key_in_path(key: Any) -> str | int:
    """A key as paths of leaves show it; one that is neither a string nor a number is marked."""
    return key if isinstance(key, str) or type(key) is int else f"({type(key).__name__}) {path_key(key)}"


def spelled(path: Path) -> str:
    """A path as `format_path` shows it, but in full and unambiguous.

    `m['a']` is an entry `a` of what is called `m`; what is itself called `m['a']` is quoted.
    """
    first, *rest = path or ("(root)",)
    plain = isinstance(first, str) and "[" not in first
    return (str(first) if plain else f"[{exact(first)}]") + "".join(f"[{exact(key)}]" for key in rest)


def opened_file(file: OpaqueFile) -> Any:
    """What a JSON file of a folder says; the file itself where it is of another kind, or cannot be read as JSON."""
    if file.path.endswith(".json") and file.nbytes <= MAX_JSON:
        import json

        try:
            with _opened(file) as stream:
                return json.loads(stream.read(MAX_JSON + 1))
        except (OSError, ValueError, RecursionError):
            pass
    return file


@contextmanager
def _opened(file: OpaqueFile) -> Iterator[IO[bytes]]:
    """The bytes of a file: of a folder, or a member of an archive, whose path is `archive:member`."""
    if is_remote(file.path):
        with BufferedReader(SourceFile(open_source(file.path))) as stream:
            yield stream
        return
    path = FilePath(file.path)
    if path.is_file():
        with path.open("rb") as stream:
            yield stream
        return
    at = file.path.find(":")
    while at >= 0 and not FilePath(file.path[:at]).is_file():
        at = file.path.find(":", at + 1)
    if at < 0:
        raise FileNotFoundError(file.path)
    import zipfile  # for members of archives alone

    try:
        with zipfile.ZipFile(file.path[:at]) as archive, archive.open(file.path[at + 1 :]) as stream:
            yield stream
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(str(error)) from error


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are equal: in type, value and, for tensors, dtype, shape and every byte."""
    if isinstance(a, OpaqueFile) and isinstance(b, OpaqueFile):
        return a.nbytes == b.nbytes and _equal_files(a, b)
    if isinstance(a, Shape) or isinstance(b, Shape):
        return bool(a == b)
    if isinstance(a, GlobalName) and isinstance(b, GlobalName):
        return a.path == b.path
    if isinstance(a, LazyTensor) and isinstance(b, LazyTensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _attributes(a) == _attributes(b) and _equal_elements(a, b)
    if isinstance(a, Opaque | Storage | set | frozenset) or isinstance(b, Opaque):
        return difference(a, b, strides=False, aliases=False) is None
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _attributes(tensor: LazyTensor) -> Mapping[str, Any]:
    return tensor.attributes if isinstance(tensor, AttributedTensor) else {}


def checksum_of_number(tensor: LazyTensor) -> int | None:
    """The CRC-32 of a number, if its container recorded one: it is unique for up to four bytes."""
    storage = tensor.storage
    return storage.crc if tensor.nbytes == storage.nbytes <= 4 else None


def _equal_elements(a: LazyTensor, b: LazyTensor) -> bool:
    if a.flags == b.flags and a.numel == 1:
        known = checksum_of_number(a), checksum_of_number(b)
        if None not in known:
            return known[0] == known[1]
    if a.flags == b.flags:
        return all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))
    from optimstate.surgery.statistics import blocks

    return all(bool((x == y).all()) for x, y in zip(blocks(a), blocks(b), strict=True))


def _equal_files(a: OpaqueFile, b: OpaqueFile) -> bool:
    try:
        with _opened(a) as one, _opened(b) as other:
            while block := one.read(1 << 20):
                if block != other.read(1 << 20):
                    return False
            return not other.read(1)
    except OSError:
        return False
