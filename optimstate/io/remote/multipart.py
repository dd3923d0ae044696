"""Uploads to S3 by botocore, in parts that are sent or that the store copies itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from hashlib import md5
from typing import Any

from optimstate.errors import DestinationError, DestinationExistsError
from optimstate.io.remote.answers import meaning
from optimstate.io.remote.redirects import REFUSED, RedirectedError
from optimstate.io.remote.store import PART, cannot_write, changed, is_strong, pool, traffic
from optimstate.io.remote.uploads import IN_FLIGHT, MAX_PARTS, PartsGoneError, exists, to_its_end

__all__ = ["S3Upload"]

COPIED_PART = 1 << 30
TRIED_PART = 5 << 20
"""The number of bytes of the first part that a store is asked to copy."""

_UNSUPPORTED = ("NotImplemented", "MethodNotAllowed", "501", "405")
_NO_ANSWER = (  # of botocore
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "HTTPClientError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "SSLError",
)


class _NotSupportedError(DestinationError):
    """The store does not have this kind of request."""


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
            refusal = cannot_write(self._place, RuntimeError(f"the store answers {code}") if code else error)
            raise (_NotSupportedError(refusal.message) if code in _UNSUPPORTED else refusal) from None

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
        """Whether the store may be able to copy an object: it is at the same endpoint, and its version is known."""
        store = source.place[0]
        return (
            self._store.copies_parts is not False
            and getattr(store, "scheme", "") == "s3"
            and source.version is not None
            and is_strong(source.version)
            and (store.endpoint, store.region) == (self._store.endpoint, self._store.region)
        )

    def copy(self, source: Any, offset: int, length: int) -> bool:
        """Append a range of another object, as parts that the store copies; False if it turns out that it cannot."""
        end = offset + length
        if self._store.copies_parts is None:
            tried = TRIED_PART if length >= 2 * TRIED_PART else length
            self._copy_part(source, offset, offset + tried)
            try:
                self._parts[-1].result()
            except _NotSupportedError:
                self._parts.pop()
                self._store.copies_parts = False
                return False
            self._store.copies_parts = True
            offset += tried
        count = -(-(end - offset) // COPIED_PART)
        for n in range(count):
            length = end - offset
            self._copy_part(source, offset + length * n // count, offset + length * (n + 1) // count)
        return True

    def _copy_part(self, source: Any, start: int, stop: int) -> None:
        store, key = source.place
        if stop > start:
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
        except _NotSupportedError as error:
            hint = "It may not support the condition that there is no object yet; --force does without it."
            raise DestinationError(error.message, hint="" if self._replace else hint) from None
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
