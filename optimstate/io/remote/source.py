"""Reading ranges of one version of an object in a store.

Small reads are served from cached spans: at least 64 KB are fetched at a time, and announced ranges are fetched
together. Large reads bypass the cache. No range is fetched on a guess.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial
from threading import RLock

from optimstate.errors import CorruptCheckpointError, LimitExceededError
from optimstate.io.extents import Extent, StoredSource
from optimstate.io.location import Location
from optimstate.io.remote.store import PART, UNKNOWN, Answer, Entry, Store, changed, in_window, pool

__all__ = ["LANES", "RemoteSource", "fetched_together"]

BLOCK = 1 << 16
HEAD = 1 << 16
TAIL = 1 << 17
GAP = 1 << 16  # bytes between announced ranges up to which they are one request
KEPT = 1 << 25  # bytes of cached spans, of all sources of one opening
SMALL = 1 << 22  # bytes up to which reads are cached
SMALL_READS = 1 << 28  # bytes that small reads may fetch beyond the size of the object
LANES = 8
_NEIGHBOURS = 4

_WITH_TAIL = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".zip", ".npz")


class Cache:
    """The cached spans of all sources of one opening; the oldest are dropped."""

    def __init__(self) -> None:
        self._spans: OrderedDict[tuple[int, int], tuple[RemoteSource, memoryview]] = OrderedDict()
        self._held = 0
        self.lock = RLock()

    def add(self, source: RemoteSource, start: int, data: memoryview) -> None:
        """Add a span."""
        with self.lock:
            key = (id(source), start)
            known = self._spans.pop(key, None)
            if known is not None:
                self._held -= len(known[1])
                data = data if len(data) >= len(known[1]) else known[1]
            else:
                insort(source.starts, start)
            self._spans[key] = (source, data)
            self._held += len(data)
            while self._held > KEPT and len(self._spans) > 1:
                (_, dropped), (owner, old) = self._spans.popitem(last=False)
                owner.starts.remove(dropped)
                self._held -= len(old)

    def find(self, source: RemoteSource, offset: int, length: int) -> memoryview | None:
        """The bytes if a span has all of them, else None."""
        with self.lock:
            at = bisect_right(source.starts, offset)
            for start in reversed(source.starts[max(at - _NEIGHBOURS, 0) : at]):
                data = self._spans[id(source), start][1]
                if offset + length <= start + len(data):
                    return data[offset - start : offset - start + length]
        return None

    def end_of(self, source: RemoteSource, offset: int) -> int:
        """The end of the cached bytes that begin at or before an offset; -1 if there are none."""
        with self.lock:
            at = bisect_right(source.starts, offset)
            starts = source.starts[max(at - _NEIGHBOURS, 0) : at]
            return max((start + len(self._spans[id(source), start][1]) for start in starts), default=-1)


class RemoteSource(StoredSource):
    """An object opened for reading.

    Args:
        store: The store.
        key: The name of the object in the store.
        path: The name for messages.
        cache: The cache for its spans.
        entry: Its entry in a listing; without one, or without its size, its beginning is fetched, and also the end of
            a possible archive.
        at_once: Fetch both at the same time; False in threads of the pool.

    Raises:
        CheckpointNotFoundError: There is no such object.
        CheckpointError: It cannot be read.
    """

    lanes = LANES

    def __init__(
        self, store: Store, key: str, path: Location, cache: Cache, entry: Entry | None = None, *, at_once: bool = True
    ) -> None:
        self.path = path
        self.starts: list[int] = []
        self._store = store
        self._key = key
        self._cache = cache
        self._small = 0
        self._begun = False
        self._unpinned = entry is not None and entry.size != UNKNOWN and entry.version is None
        if entry is not None and entry.size != UNKNOWN:
            self.size, self.version = entry.size, entry.version
        else:
            self._open(at_once=at_once)

    @property
    def place(self) -> tuple[Store, str]:
        """The store, and the name of the object in it."""
        return self._store, self._key

    def _open(self, *, at_once: bool) -> None:
        self._begun = True
        ending = self.path.name.endswith(_WITH_TAIL) and self._store.suffixes
        tail = pool().submit(self._store.tail, self._key, TAIL) if ending and at_once else None
        head = self._store.get(self._key, 0, HEAD, None)
        self.size, self.version = head.size, head.version
        if len(head.data) != min(HEAD, self.size):
            raise self._short(0, min(HEAD, self.size), len(head.data))
        self._cache.add(self, 0, head.data)
        if ending:
            end = tail.result() if tail is not None else self._store.tail(self._key, TAIL)
            self._check_answer(end)
            if len(end.data) != min(TAIL, self.size):
                raise self._short(self.size - len(end.data), min(TAIL, self.size), len(end.data))
            self._cache.add(self, self.size - len(end.data), end.data)

    def _check_answer(self, answer: Answer) -> None:
        if self._unpinned:
            self.version, self._unpinned = answer.version, False
        if answer.size != self.size or answer.version != self.version:
            raise changed(self.path)

    def _short(self, offset: int, asked: int, came: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"requested {asked} bytes, got {came}", path=self.path, place=f"offset {offset}")

    def _fetch(self, offset: int, length: int) -> memoryview:
        """Exactly these bytes of this version, with one request."""
        answer = self._store.get(self._key, offset, offset + length, self.version)
        self._check_answer(answer)
        if len(answer.data) != length:
            raise self._short(offset, length, len(answer.data))
        return answer.data

    def _fetch_small(self, offset: int, length: int) -> None:
        with self._cache.lock:
            self._small += length
            if self._small > SMALL_READS + self.size:
                raise LimitExceededError(
                    f"small reads fetched {self._small} bytes of an object of {self.size}, over the limit",
                    path=self.path,
                )
        self._cache.add(self, offset, self._fetch(offset, length))

    def begin(self) -> list[tuple[int, int]]:
        """The ranges to fetch first: the beginning, and the end of a possible archive; none after the first call."""
        if self._begun or not self.size:
            return []
        self._begun = True
        ranges = [(0, min(HEAD, self.size))]
        if self.path.name.endswith(_WITH_TAIL) and self.size > HEAD:
            start = max(self.size - TAIL, HEAD)
            ranges.append((start, self.size - start))
        return ranges

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            CorruptCheckpointError: The object ends before that.
            CheckpointError: It changed since it was opened, or cannot be read.
        """
        self.check(offset, length)
        if not length:
            return b""
        if length > PART:
            return b"".join(self.ahead([Extent(self, offset, length)]))
        found = self._cache.find(self, offset, length)
        if found is not None:
            return bytes(found)
        if length > SMALL:
            return bytes(self._fetch(offset, length))
        begin = self.begin()
        if begin and offset < HEAD:
            fetched_together((self, start, size) for start, size in begin)
            found = self._cache.find(self, offset, length)
            if found is not None:
                return bytes(found)
        here = self._cache.end_of(self, offset)
        if offset < here:  # the beginning is cached, so only the rest is fetched
            return self.read(offset, here - offset) + self.read(here, offset + length - here)
        start = offset // BLOCK * BLOCK
        stop = min(-(-(offset + length) // BLOCK) * BLOCK, self.size)
        self._fetch_small(start, stop - start)
        found = self._cache.find(self, offset, length)
        return bytes(self._fetch(offset, length) if found is None else found)

    def prefetch(self, extents: Iterable[Extent]) -> None:
        """Fetch extents that will be read soon, neighbouring ones with one request, with many requests at once."""
        fetched_together(_ranges(extents))

    def trips(self, extents: Iterable[Extent]) -> int:
        """The number of requests that `prefetch` would make."""
        return sum(1 for _ in _requests(_ranges(extents)))

    def missing(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The requests for those ranges that are not cached."""
        begun, end = -1, -1
        for offset, length in sorted(ranges):
            stop = min(offset + length, self.size)
            if offset < 0 or stop <= offset or self._cache.find(self, offset, stop - offset) is not None:
                continue
            if begun >= 0 and offset - end <= GAP and max(stop, end) - begun <= PART:
                end = max(stop, end)
                continue
            if begun >= 0:
                yield begun, end - begun
            begun, end = offset, stop
        if begun >= 0:
            yield begun, end - begun

    def ahead(self, extents: Iterable[Extent]) -> Iterator[bytes | memoryview]:
        """The bytes of extents of any objects in order, with several requests in progress in advance."""
        return in_window(partial(_part, *part) for part in _parts(extents))


def _part(source: RemoteSource, offset: int, length: int) -> memoryview:
    found = source._cache.find(source, offset, length)  # of this module
    return source._fetch(offset, length) if found is None else found


def _parts(extents: Iterable[Extent]) -> Iterator[tuple[RemoteSource, int, int]]:
    """Extents as requests: consecutive ones are joined, long ones divided."""
    source: RemoteSource | None = None
    start = stop = 0
    for extent in extents:
        if not extent.length:
            continue
        assert isinstance(extent.source, RemoteSource)
        extent.source.check(extent.offset, extent.length)
        if source is not extent.source or extent.offset != stop:
            if source is not None and stop > start:
                yield source, start, stop - start
            source, start = extent.source, extent.offset
        stop = extent.offset + extent.length
        while stop - start >= PART:
            yield source, start, PART
            start += PART
    if source is not None and stop > start:
        yield source, start, stop - start


def _ranges(extents: Iterable[Extent]) -> Iterator[tuple[RemoteSource, int, int]]:
    return ((each.source, each.offset, each.length) for each in extents if isinstance(each.source, RemoteSource))


def _requests(ranges: Iterable[tuple[RemoteSource, int, int]]) -> Iterator[tuple[RemoteSource, int, int]]:
    """The requests for those ranges of objects that are not cached."""
    by_source: dict[int, tuple[RemoteSource, list[tuple[int, int]]]] = {}
    for source, offset, length in ranges:
        by_source.setdefault(id(source), (source, []))[1].append((offset, length))
    for source, wanted in by_source.values():
        for offset, length in source.missing(wanted):
            yield source, offset, length


def fetched_together(ranges: Iterable[tuple[RemoteSource, int, int]]) -> None:
    """Fetch ranges of several objects into the cache, with many requests at once.

    Raises:
        CheckpointError: An object cannot be read.
    """
    for _ in in_window([partial(source._fetch_small, *wanted) for source, *wanted in _requests(ranges)], 16):
        pass
