"""The interface of stores, and the messages of their errors.

A store is a bucket, a repository or a server. Messages contain its name, but no headers, queries or credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, NoReturn, Protocol, TypeVar

from optimstate.errors import CheckpointError, CheckpointNotFoundError, DestinationError
from optimstate.record import Record

__all__ = [
    "PART",
    "UNKNOWN",
    "Answer",
    "Entry",
    "Store",
    "Traffic",
    "Upload",
    "changed",
    "check_sendable",
    "in_child",
    "is_strong",
    "missing_library",
    "pool",
    "traffic",
    "without_secrets",
    "without_values",
]

PART = 1 << 23
"""The number of bytes per request when much is read or written."""

RETRIES = 3
PATIENCE = 30.0
"""The seconds after which an unanswered request is an error."""


UNKNOWN = -1
"""The size of an object of which a listing does not say it."""


class Entry(Record):
    """An object in a listing; its size may be `UNKNOWN`."""

    key: str
    size: int
    version: str | None


class Answer(Record):
    """A range of an object.

    Attributes:
        data: The bytes of the range.
        size: The number of bytes of the whole object.
        version: The store's identifier of this version; None if there is none.
    """

    data: memoryview
    size: int
    version: str | None


class Store(Protocol):
    """A store.

    Attributes:
        name: Its name for messages, without a slash at its end: `s3://bucket`.
        lists: Whether it can list its objects.
        suffixes: Whether it can return the last bytes of an object of unknown size.
    """

    name: str
    lists: bool
    suffixes: bool

    def key_of(self, name: str) -> str:
        """The name of a file as a part of a key."""

    def get(self, key: str, start: int, stop: int, version: str | None) -> Answer:
        """The bytes [start, stop) of an object, fewer at its end; of `version`, unless that is None."""

    def tail(self, key: str, length: int) -> Answer:
        """The last bytes of an object."""

    def listed(self, folder: str) -> Iterator[Entry]:
        """All objects whose keys begin with the folder's, at any depth."""

    def delete(self, key: str) -> None:
        """Remove an object."""

    def begin(self, key: str, *, expected: int, replace: bool, aside: str = "") -> Upload:
        """Begin to write an object, which does not exist before it is complete.

        Args:
            key: The name of the object.
            expected: Its approximate number of bytes; 0 if unknown.
            replace: Whether it may replace an existing object.
            aside: The name of a held upload, in stores where parts of an upload cannot be held.
        """

    def abort_unfinished(self, folder: str) -> None:
        """Abort every unfinished upload to a folder, if the store can list them."""


class Upload(Protocol):
    """An object that is written in parts, in order.

    Attributes:
        size: The number of bytes of a part.
        holds: Whether uploaded parts can be held without another object.
        created: Whether the object exists.
    """

    size: int
    holds: bool
    created: bool

    def part(self, data: bytes | memoryview) -> None:
        """Append a part of at least 5 MiB, except for the last; the upload may continue in the background."""

    def copies(self, source: Any) -> bool:
        """Whether ranges of an object may be appended within the store."""

    def copy(self, source: Any, offset: int, length: int) -> bool:
        """Append a range of an object of the same store, within the store; at least 5 MiB.

        Returns:
            Whether the store can do that; if not, nothing was appended.
        """

    def complete(self, rest: bytes) -> None:
        """Append the last bytes and create the object.

        Raises:
            DestinationExistsError: It exists, and may not be replaced.
            DestinationError: The store refuses it.
        """

    def hold(self, rest: bytes) -> dict[str, Any]:
        """Append the last bytes; returns JSON from which `release`, in any process, creates the object later."""

    def release(self, held: Mapping[str, Any]) -> None:
        """Create the object of a held upload, in a new `Upload` of the same key.

        Raises:
            As `complete`.
        """

    def discard(self, held: Mapping[str, Any]) -> None:
        """Abort a held upload, in a new `Upload` of the same key."""

    def abort(self) -> None:
        """Abort the upload; nothing of it remains."""


class Traffic:
    """The numbers of requests to stores and of bytes, for progress and for tests."""

    def __init__(self) -> None:
        self.requests = 0
        self.read = 0
        self.written = 0


traffic = Traffic()
"""The traffic of this process."""


@cache
def pool() -> ThreadPoolExecutor:
    """The threads for requests; no task in them waits for another."""
    return ThreadPoolExecutor(24, thread_name_prefix="optimstate-store")


def in_child(clear: Callable[[], None]) -> None:
    """Have a forked process begin without threads and connections, which only its parent can use."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=clear)


in_child(pool.cache_clear)


# --- errors -----------------------------------------------------------------------------------------------------------

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
_ANSWERED = re.compile(r"<\?xml|Debug source")
_BODY = re.compile(r"(status code: \d{3} [A-Za-z ]+):.*")
_USER = re.compile(r"://[^/\s@]+@")
_VALUES = re.compile(r"\"[^\"]*\"?|'[^']*'?|`[^`]*`?|https?://.*?(?=, Error|$)|[Ss]ymbol \d+")
_GENERIC = re.compile(r"^Generic \w+ error: ")


def without_secrets(text: str) -> str:
    """A library's message in one line, without queries and users in addresses, and without the response."""
    line = _GENERIC.sub("", " ".join(_ANSWERED.split(text)[0].split()))
    line = _BODY.sub(r"\1", line)
    return _USER.sub("://", _QUERY.sub(r"\1", line)).rstrip(": ")[:300]


def without_values(text: str) -> str:
    """A library's message about a configuration in one line, without values, which may be secrets."""
    return _VALUES.sub("...", without_secrets(text))


def check_sendable(names: Sequence[str], place: str) -> None:
    """Check that the values of environment variables can be sent, without naming the values.

    Raises:
        CheckpointError: One has a character that cannot be sent, such as the end of a line.
    """
    for name in names:
        value = os.environ.get(name, "")
        if not value.isascii() or not value.isprintable():
            raise CheckpointError(
                f"the value of {name} has a character that cannot be sent, such as the end of a line",
                path=place,
                hint="Set it again without that character.",
            )


def is_strong(version: str) -> bool:
    """Whether a version is an ETag that can be the condition of a request; weak ones are only compared."""
    return version.startswith('"')


def changed(place: object) -> CheckpointError:
    """The error for an object that has changed since it was opened."""
    return CheckpointError(
        "changed while it was read", path=place, hint="Run it again after all writing to it has ended."
    )


def missing_library(name: str, scheme: str) -> CheckpointError:
    """The error for a kind of store whose library is not installed."""
    return CheckpointError(
        f"{scheme}:// needs the package {name}, which is not installed",
        hint="Install it with: pip install 'optimstate[remote]'",
    )


T = TypeVar("T")


def refused(place: object, status: int, reason: str) -> NoReturn:
    """Raise the error for an HTTP status.

    Raises:
        CheckpointError: Always.
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


def in_window(
    tasks: Sequence[Callable[[], T]] | Iterator[Callable[[], T]], width: int = 8, *, to_end: bool = False
) -> Iterator[T]:
    """The results of tasks in order, with `width` of them in progress at the same time.

    Args:
        tasks: What to do.
        width: How many are in progress.
        to_end: After an error or interrupt, wait for those in progress, because they change something.
    """
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
        if to_end:
            wait(waiting)


def cannot_write(place: object, error: BaseException) -> DestinationError:
    """The error for an object that a store does not accept."""
    return DestinationError(f"{place}: cannot be written: {without_secrets(str(error))}")
