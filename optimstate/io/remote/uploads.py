"""Uploads in parts: an object does not exist before the last request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from hashlib import md5
from queue import Full, Queue
from threading import Thread, current_thread, main_thread
from typing import Any

from optimstate.errors import CheckpointError, DestinationError, DestinationExistsError
from optimstate.io.remote.answers import meaning
from optimstate.io.remote.redirects import REFUSED, RedirectedError, are_refused
from optimstate.io.remote.store import PART, cannot_write, changed, is_strong, pool, traffic

__all__ = ["ObjectUpload", "PartsGoneError", "S3Upload"]

MAX_PARTS = 9_500  # of 10,000 that S3 takes
COPIED_PART = 1 << 30
IN_FLIGHT = 8
_NO_ANSWER = (  # of botocore
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "HTTPClientError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "SSLError",
)


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


class S3Upload:
    """A multipart upload to S3; unless objects may be replaced, its completion has the condition that none exists.

    Args:
        client: The botocore client.
        store: The bucket.
        key: The name of the object.
        expected: Its approximate number of bytes.
        replace: Whether it may replace an existing object.
    """

    holds = True
    created = False

    def __init__(self, client: Any, store: Any, key: str, *, expected: int, replace: bool) -> None:
        self._client = client
        self._store = store
        self._target = {"Bucket": store.bucket, "Key": key}
        self._place = f"{store.name}/{key}"
        self._replace = replace
        self._id: str | None = None
        self._repeated = False
        self._parts: list[Future[str]] = []
        self.size = max(PART, -(-expected // MAX_PARTS))

    def _begin(self) -> dict[str, Any]:
        if self._id is None:
            self._id = self._asked(lambda: self._client.create_multipart_upload(**self._target)["UploadId"])
        return {**self._target, "UploadId": self._id, "PartNumber": len(self._parts) + 1}

    def _asked(self, ask: Callable[[], Any]) -> Any:
        traffic.requests += 1
        try:
            return ask()
        except RedirectedError:
            raise DestinationError(f"{self._place}: {REFUSED}") from None
        except Exception as error:  # noqa: BLE001  # whatever a library raises becomes one line
            answer = getattr(error, "response", None) or {}
            self._repeated = answer.get("ResponseMetadata", {}).get("RetryAttempts", 0) > 0
            code = str(answer.get("Error", {}).get("Code", ""))
            if code in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise exists(self._place) from None
            if (found := meaning(code)) is not None:
                raise DestinationError(f"{self._place}: {found[0]}", hint=found[1]) from None
            if code == "NoSuchUpload":
                raise PartsGoneError(
                    f"{self._place}: the store no longer has what was uploaded of it",
                    hint="Start it again; it will be uploaded again.",
                ) from None
            if code == "NoSuchBucket":
                raise DestinationError(f"{self._place}: there is no such bucket", hint="Create it first.") from None
            if type(error).__name__ in _NO_ANSWER:
                raise DestinationError(
                    f"{self._place}: cannot be written: the store does not answer",
                    hint="Check the endpoint and the network.",
                ) from None
            if "Credentials" in type(error).__name__:
                raise DestinationError(
                    f"{self._place}: there are no credentials, or only a part of them",
                    hint="Set those of the store in the environment or its configuration.",
                ) from None
            raise cannot_write(self._place, RuntimeError(f"the store answers {code}") if code else error) from None

    def _later(self, ask: Callable[[], str]) -> None:
        if len(self._parts) >= IN_FLIGHT:
            self._parts[-IN_FLIGHT].result()
        if len(self._parts) == MAX_PARTS // 2:
            self.size *= 4
        self._parts.append(pool().submit(ask))

    def part(self, data: bytes | memoryview) -> None:
        """Append a part."""
        where = self._begin()
        traffic.written += len(data)
        self._later(lambda: self._asked(lambda: self._client.upload_part(**where, Body=bytes(data))["ETag"]))

    def copies(self, source: Any) -> bool:
        """Whether the store can copy an object itself: it is at the same endpoint, and its version is known."""
        store = source.place[0]
        return (
            getattr(store, "scheme", "") == "s3"
            and source.version is not None
            and is_strong(source.version)
            and (store.endpoint, store.region) == (self._store.endpoint, self._store.region)
        )

    def copy(self, source: Any, offset: int, length: int) -> None:
        """Append a range of another object, as parts that the store copies."""
        store, key = source.place
        count = -(-length // COPIED_PART)
        for n in range(count):
            start, stop = offset + length * n // count, offset + length * (n + 1) // count
            where = {
                **self._begin(),
                "CopySource": {"Bucket": store.bucket, "Key": key},
                "CopySourceIfMatch": source.version,
                "CopySourceRange": f"bytes={start}-{stop - 1}",
            }
            self._later(partial(self._asked_copy, where, source))

    def _asked_copy(self, where: dict[str, Any], source: Any) -> str:
        try:
            return str(self._asked(lambda: self._client.upload_part_copy(**where)["CopyPartResult"]["ETag"]))
        except DestinationExistsError:  # the failed condition is the version of the source
            raise changed(source.path) from None

    def complete(self, rest: bytes) -> None:
        """Append the last bytes and create the object."""
        condition = {} if self._replace else {"IfNoneMatch": "*"}
        if self._id is None:
            traffic.written += len(rest)
            ask = partial(self._client.put_object, **self._target, Body=rest, **condition)
            to_its_end(partial(self._create, ask, md5(rest, usedforsecurity=False).hexdigest()))
            return
        if rest:
            self.part(rest)
        tags = [part.result() for part in self._parts]
        parts = {"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]}
        complete = self._client.complete_multipart_upload
        ask = partial(complete, **self._target, UploadId=self._id, MultipartUpload=parts, **condition)
        to_its_end(partial(self._create, ask, _whole_tag(tags)))
        self._id = None

    def _create(self, ask: Callable[[], Any], tag: str | None) -> None:
        """Create the object by a request; `tag` is the ETag that it will have in stores that use checksums for it.

        If an answer was lost and the request repeated, the store may refuse it because of the object that the first
        one has created.
        """
        try:
            self._asked(ask)
        except (DestinationExistsError, PartsGoneError):
            if not self._repeated or tag is None or self._tag_there() != tag:
                raise
        except DestinationError as error:
            if "NotImplemented" in error.message and not self._replace:
                hint = "It may not support the condition that there is no object yet; --force does without it."
                raise DestinationError(error.message, hint=hint) from None
            raise
        self.created = True

    def _tag_there(self) -> str:
        """The ETag of the object that has this name, without quotation marks; empty if there is none."""
        with suppress(DestinationError):
            return str(self._asked(lambda: self._client.head_object(**self._target)).get("ETag", "")).strip('"')
        return ""

    def hold(self, rest: bytes) -> dict[str, Any]:
        """Send the last bytes, and return the ids of the upload and of its parts for `release`."""
        if rest or not self._parts:
            self.part(rest)
        held = {"id": self._id, "parts": [part.result() for part in self._parts]}
        self._id = None
        return held

    def release(self, held: Mapping[str, Any]) -> None:
        """Create the object of a held upload."""
        self._id = held["id"]
        for tag in held["parts"]:
            done: Future[str] = Future()
            done.set_result(tag)
            self._parts.append(done)
        self.complete(b"")

    def discard(self, held: Mapping[str, Any]) -> None:
        """Abort a held upload."""
        self._id = held["id"]
        self.abort()

    def abort(self) -> None:
        """Abort the upload."""
        for part in self._parts:
            part.cancel()
        for part in self._parts:
            with suppress(BaseException):
                part.result()
        if self._id is not None:
            with suppress(OSError):
                self._asked(lambda: self._client.abort_multipart_upload(**self._target, UploadId=self._id))
            self._id = None


def _whole_tag(tags: list[str]) -> str | None:
    """The ETag of an object made of parts with these ETags; None if they are not MD5 sums."""
    try:
        joined = b"".join(bytes.fromhex(tag.strip('"')) for tag in tags)
    except ValueError:
        return None
    return f"{md5(joined, usedforsecurity=False).hexdigest()}-{len(tags)}"


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

    def copy(self, source: Any, offset: int, length: int) -> None:
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
