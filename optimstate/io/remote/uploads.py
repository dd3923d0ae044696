"""Uploads in parts: an object does not exist before the last request. Those to S3 are in `multipart`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import suppress
from queue import Full, Queue
from threading import Thread, current_thread, main_thread
from typing import Any

from optimstate.errors import CheckpointError, DestinationError, DestinationExistsError
from optimstate.io.remote.redirects import REFUSED, are_refused
from optimstate.io.remote.store import PART, cannot_write, pool, traffic

__all__ = ["IN_FLIGHT", "MAX_PARTS", "ObjectUpload", "PartsGoneError", "exists", "to_its_end"]

MAX_PARTS = 9_500  # of 10,000 that S3 takes
IN_FLIGHT = 8


class PartsGoneError(DestinationError):
    """The uploaded parts of an object are gone, because somebody or a rule of the bucket has aborted the upload."""


def exists(place: str) -> DestinationExistsError:
    """The error for an object that may not be replaced."""
    return DestinationExistsError(f"{place}: exists already", hint="Give --force to replace it.")


def to_its_end(ask: Callable[[], object]) -> None:
    """Make the request that creates an object; if interrupted, wait for its answer first, so that this is known."""
    if current_thread() is not main_thread():  # signals interrupt only the main thread
        ask()
        return
    asked = pool().submit(ask)
    try:
        asked.result()
    finally:
        wait([asked])


class ObjectUpload:
    """An upload with obstore in a thread; an object that may not replace another gets its name at the end.

    Args:
        library: obstore.
        store: The bucket in obstore.
        place: The name for messages.
        key: The name of the object.
        expected: Its approximate number of bytes.
        replace: Whether it may replace an existing object.
        aside: The name of the object until then; empty for a temporary name beside it.
    """

    holds = False
    created = False

    def __init__(
        self, library: Any, store: Any, place: str, key: str, *, expected: int, replace: bool, aside: str = ""
    ) -> None:
        self._library = library
        self._store = store
        self._place = place
        self._key = key
        self._replace = replace
        self._temporary = aside
        self._queue: Queue[bytes | None] = Queue(2)
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._stopped = False
        self.size = max(PART, -(-expected // MAX_PARTS))

    def _given(self) -> Iterator[bytes]:
        while (data := self._queue.get()) is not None:
            yield data
        if self._stopped:
            raise CheckpointError("given up", path=self._place)

    def _send(self) -> None:
        try:
            name = self._temporary or self._key
            self._library.put(
                self._store, name, self._given(), use_multipart=True, chunk_size=self.size, max_concurrency=IN_FLIGHT
            )
        except BaseException as error:  # noqa: BLE001  # raised by the writer's thread
            self._failure = error

    def part(self, data: bytes | memoryview) -> None:
        """Append a part."""
        if self._thread is None:
            if not self._replace and not self._temporary:
                folder, _, name = self._key.rpartition("/")
                self._temporary = f"{folder}/.{name}.{os.urandom(6).hex()}.part".lstrip("/")
            self._thread = Thread(target=self._send, name="optimstate-upload", daemon=True)
            self._thread.start()
        traffic.requests += 1
        traffic.written += len(data)
        self._put(bytes(data))

    def _put(self, data: bytes | None) -> None:
        while True:
            if self._failure is not None:
                raise self._refusal(self._failure) from None
            try:
                self._queue.put(data, timeout=0.2)
                return
            except Full:
                continue

    def copies(self, source: Any) -> bool:  # noqa: ARG002
        """False: obstore can copy only whole objects."""
        return False

    def copy(self, source: Any, offset: int, length: int) -> bool:
        """Never called."""
        raise NotImplementedError

    def complete(self, rest: bytes) -> None:
        """Append the last bytes and create the object."""
        to_its_end(lambda: self._create(rest))

    def _create(self, rest: bytes) -> None:
        self._asked(lambda: self._finish(rest))
        if self._temporary:
            self._take_name()
        self.created = True

    def hold(self, rest: bytes) -> dict[str, Any]:
        """Send the last bytes, and say what `release` needs to make the object."""
        self._asked(lambda: self._finish(rest))
        held = {"aside": self._temporary}
        self._temporary = ""
        return held

    def release(self, held: Mapping[str, Any]) -> None:
        """Create the object of a held upload."""
        self._temporary = held["aside"]
        self._take_name()

    def discard(self, held: Mapping[str, Any]) -> None:
        """Abort a held upload."""
        self._temporary = held["aside"]
        self.abort()

    def _asked(self, ask: Callable[[], object]) -> None:
        traffic.requests += 1
        try:
            ask()
        except DestinationError:
            raise
        except Exception as error:  # noqa: BLE001  # as above
            raise self._refusal(error) from None

    def _refusal(self, error: BaseException) -> DestinationError:
        """The error for an object that the store refuses."""
        if type(error).__name__ == "AlreadyExistsError":
            return exists(self._place)
        if are_refused(str(error)):
            return DestinationError(f"{self._place}: {REFUSED}")
        return cannot_write(self._place, error)

    def _finish(self, rest: bytes) -> None:
        if self._thread is None:
            traffic.written += len(rest)
            mode = "overwrite" if self._replace or self._temporary else "create"
            self._library.put(self._store, self._temporary or self._key, rest, mode=mode, use_multipart=False)
            return
        if rest:
            self._put(rest)
        self._put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _take_name(self) -> None:
        self._asked(lambda: self._library.rename(self._store, self._temporary, self._key, overwrite=False))
        self._temporary = ""

    def abort(self) -> None:
        """Abort the upload; obstore does so when the iterator that it reads raises an error."""
        self._stopped = True
        while self._thread is not None and self._thread.is_alive():
            with suppress(Full):
                self._queue.put(None, timeout=0.2)
            self._thread.join(0.2)
        if self._temporary:
            with suppress(Exception):
                self._library.delete(self._store, self._temporary)
