"""What a store does for a checkpoint, and what goes wrong with one in words.

A store is a bucket, a repository or a server. Whoever implements it, nothing of it is told but its name: no header, no
query, no credentials.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NoReturn, Protocol, TypeVar

from optimstate.errors import CheckpointError, CheckpointNotFoundError, DestinationError
from optimstate.record import Record

__all__ = [
    "PART",
    "Answer",
    "Entry",
    "Store",
    "Traffic",
    "Upload",
    "changed",
    "missing_library",
    "pool",
    "traffic",
    "without_secrets",
]

PART = 1 << 23
"""Bytes of one request where much is read or written."""

RETRIES = 3
PATIENCE = 30.0
"""Seconds after which a request that is answered by nobody is an error."""


class Entry(Record):
    """What a listing says of an object."""

    key: str
    size: int
    version: str | None


class Answer(Record):
    """A range of an object.

    Attributes:
        data: Its bytes.
        size: Bytes of the whole object.
        version: What the store calls this version of it; None where it does not say.
    """

    data: memoryview
    size: int
    version: str | None


class Store(Protocol):
    """A store as checkpoints need it.

    Attributes:
        name: What is said of it, without a slash at its end: `s3://bucket`.
        lists: Whether it can say what it holds.
        suffixes: Whether it gives the last bytes of an object whose size is not known yet.
    """

    name: str
    lists: bool
    suffixes: bool

    def get(self, key: str, start: int, stop: int, version: str | None) -> Answer:
        """The bytes [start, stop) of an object, fewer where it ends before, of that version where one is given."""

    def tail(self, key: str, length: int) -> Answer:
        """The last bytes of an object."""

    def listed(self, folder: str) -> Iterator[Entry]:
        """All objects whose keys begin with the folder's, at any depth."""

    def delete(self, key: str) -> None:
        """Remove an object."""

    def begin(self, key: str, *, expected: int, replace: bool, aside: str = "") -> Upload:
        """Write an object, which is not there before it is complete.

        Args:
            key: Its name.
            expected: About how many bytes it will have, 0 where that is not known.
            replace: Whether it may take the place of another.
            aside: The name that what is held has where the store can give none to parts of an upload.
        """

    def abort_unfinished(self, folder: str) -> None:
        """Give up every upload to a folder that is not complete, where the store says which there are."""


class Upload(Protocol):
    """An object that is being written by parts, in order.

    Attributes:
        size: Bytes of a part.
        holds: Whether parts can be held back under the object's own name.
    """

    size: int
    holds: bool

    def part(self, data: bytes | memoryview) -> None:
        """Append a part of at least 5 MiB, but for the last one; it may still be under way afterwards."""

    def copies(self, source: Any) -> bool:
        """Whether ranges of an object can be appended within the store."""

    def copy(self, source: Any, offset: int, length: int) -> None:
        """Append a range of an object of the same store, within the store; at least 5 MiB."""

    def complete(self, rest: bytes) -> None:
        """Append the last bytes and make the object.

        Raises:
            DestinationExistsError: There is one, and it may not be replaced.
            DestinationError: The store does not take it.
        """

    def hold(self, rest: bytes) -> dict[str, Any]:
        """Append the last bytes; any process makes the object later, by `release` of what this returns, as JSON."""

    def release(self, held: Mapping[str, Any]) -> None:
        """Make the object of what was held, as the only thing that is done with it.

        Raises:
            As `complete`.
        """

    def discard(self, held: Mapping[str, Any]) -> None:
        """Give up what was held."""

    def abort(self) -> None:
        """Give up what was written; nothing of it is there."""


class Traffic:
    """What was asked of stores: for progress, and for tests."""

    def __init__(self) -> None:
        self.requests = 0
        self.read = 0
        self.written = 0


traffic = Traffic()
"""Of this process."""


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that requests wait in; none of their tasks waits for another."""
    return ThreadPoolExecutor(24, thread_name_prefix="optimstate-store")


# --- errors -----------------------------------------------------------------------------------------------------------

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_ANSWERED = re.compile(r"<\?xml|Debug source")
_BODY = re.compile(r"(status code: \d{3} [A-Za-z ]+):.*")
_USER = re.compile(r"://[^/\s@]+@")


def without_secrets(text: str) -> str:
    """A message of a library in one line, without queries and users in its addresses, and without what was answered."""
    line = " ".join(_ANSWERED.split(text)[0].split())
    line = _BODY.sub(r"\1", line)
    return _USER.sub("://", _QUERY.sub(r"\1", line)).rstrip(": ")[:300]


def changed(place: object) -> CheckpointError:
    """The error of an object that is not the one that was opened."""
    return CheckpointError(
        "changed while it was read", path=place, hint="Run it again when nobody writes to it any more."
    )


def missing_library(name: str, scheme: str) -> CheckpointError:
    """The error where the library for a kind of store is not installed."""
    return CheckpointError(
        f"{scheme}:// needs the package {name}, which is not installed",
        hint="Install it with: pip install 'optimstate[remote]'",
    )


T = TypeVar("T")


def refused(place: object, status: int, reason: str) -> NoReturn:
    """Raise what an answer of a store means.

    Raises:
        CheckpointError: Always; of the kind of the status.
    """
    if status == 404:
        raise CheckpointNotFoundError("there is no such object", path=place, hint="Check the name and the bucket.")
    if status in (401, 403):
        raise CheckpointError(
            f"access is denied ({status})", path=place, hint="Check the credentials in the environment, and the name."
        )
    if status == 412:
        raise changed(place)
    raise CheckpointError(f"the store answers {status}: {reason}"[:300], path=place)


def in_window(tasks: Sequence[Callable[[], T]] | Iterator[Callable[[], T]], width: int = 8) -> Iterator[T]:
    """The results of tasks in their order, so many of which are under way at once."""
    from collections import deque

    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            waiting.append(pool().submit(task))
            if len(waiting) >= width:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def cannot_write(place: object, error: BaseException) -> DestinationError:
    """What is raised where a store takes no object."""
    return DestinationError(f"{place}: cannot be written: {without_secrets(str(error))}")
