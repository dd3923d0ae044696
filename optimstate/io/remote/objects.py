"""Object stores, accessed with obstore: S3 and compatible ones, Google's and Azure's.

Credentials are the same as those of the stores' own tools: environment, configuration, the machine's role.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from optimstate.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError
from optimstate.io.remote import redirects
from optimstate.io.remote.addresses import ALLOW_HTTP, allows_http
from optimstate.io.remote.answers import code_in, meaning, of_library
from optimstate.io.remote.multipart import S3Upload
from optimstate.io.remote.store import (
    PATIENCE,
    RETRIES,
    Answer,
    Entry,
    Upload,
    changed,
    check_sendable,
    in_window,
    is_strong,
    missing_library,
    traffic,
    without_secrets,
    without_values,
)
from optimstate.io.remote.uploads import ObjectUpload

__all__ = ["ObjectStore", "object_store"]

T = TypeVar("T")

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("STORAGE_EMULATOR_HOST", "GOOGLE_BASE_URL"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_SENT = (  # variables whose values are sent in headers
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_TOKEN",
    "GOOGLE_BEARER_TOKEN",
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")


_asking: list[int] = []
"""The process that has used obstore."""


def _expect_same_process(name: str) -> None:
    """Refuse to use obstore in a process that was forked from one that has used it: it would wait without end."""
    if not _asking:
        _asking.append(os.getpid())
    elif _asking[0] != os.getpid():
        raise CheckpointError(
            "cannot be used in this process, which was forked from one that had used a store",
            path=name,
            hint="Start processes by the method `spawn`, or use stores only after they have been forked.",
        )


def _version(meta: Mapping[str, Any]) -> str | None:
    """The ETag as used in conditions, else the time of the last change; Azure's listings leave out quotation marks."""
    tag = meta.get("e_tag") or None
    if tag is not None:
        return tag if tag.endswith('"') else f'"{tag}"'
    changed_at = meta.get("last_modified")
    return None if changed_at is None or not changed_at.timestamp() else f"{changed_at:%Y-%m-%dT%H:%M:%S}"


class ObjectStore:
    """A bucket.

    Args:
        scheme: `s3`, `gs` or `az`.
        bucket: The name of the bucket; on Azure, of the container.

    Raises:
        CheckpointError: obstore is not installed, or the configuration in the environment cannot be used.
    """

    lists = True

    def __init__(self, scheme: str, bucket: str) -> None:
        try:
            obstore: Any = import_module("obstore")
            stores: Any = import_module("obstore.store")
        except ImportError:
            raise missing_library("obstore", scheme) from None
        self.name = f"{scheme}://{bucket}"
        self.scheme = scheme
        self.bucket = bucket
        self.copies_parts: bool | None = None  # whether it copies ranges within itself; None before that was tried
        self.suffixes = scheme != "az"  # Azure has no ranges that count from the end
        self._obstore = obstore
        endpoint = self.endpoint
        plain = endpoint is not None and endpoint.startswith("http://")
        if plain and not allows_http(urlsplit(str(endpoint)).hostname):
            raise CheckpointError(
                "the endpoint in the environment is http:// and not on this machine",
                path=self.name,
                hint=f"Use https://, or set {ALLOW_HTTP}=1.",
            )
        options: dict[str, Any] = {
            "client_options": {
                "allow_http": plain,
                "connect_timeout": "10s",
                "timeout": timedelta(seconds=4 * PATIENCE),
                **redirects.client_options(endpoint),
            },
            "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=PATIENCE)},
        }
        made = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}[scheme]
        if scheme == "s3":
            options["config"] = {"endpoint": endpoint} if endpoint else {}
            options["config"] |= {"region": self.region, "copy_if_not_exists": "multipart"}
            if (provider := _profile()) is not None:
                options["credential_provider"] = provider
        elif scheme == "gs" and endpoint:
            options["config"] = {"base_url": endpoint}
            if os.environ.get("STORAGE_EMULATOR_HOST"):
                options["credential_provider"] = lambda: {"token": "", "expires_at": None}
        check_sendable(_SENT, self.name)
        try:
            self.raw: Any = made(bucket, **options)
        except Exception as error:  # noqa: BLE001  # any error of a library becomes one line
            raise _unusable(error, self.name) from None

    @property
    def endpoint(self) -> str | None:
        """The address of the server in the environment; None for the store's own server."""
        name = next((name for name in _ENDPOINTS[self.scheme] if os.environ.get(name)), None)
        if name is None:
            return None
        found = os.environ[name]
        found = found if "://" in found else f"http://{found}"
        with suppress(ValueError):
            parts = urlsplit(found)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query:
                return found
        raise CheckpointError(f"the value of {name} is not the address of a server", path=self.name)

    @property
    def region(self) -> str:
        """The region of S3."""
        return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"

    @property
    def client(self) -> Any:
        """The botocore client, for multipart uploads and copies within S3; None without botocore.

        Raises:
            CheckpointError: The configuration in the environment cannot be used.
        """
        try:
            return _client(self.endpoint, self.region)
        except Exception as error:  # noqa: BLE001  # as in `__init__`
            raise _unusable(error, self.name) from None

    def asked(self, key: str, ask: Callable[[], T]) -> T:
        """The result of a request.

        Raises:
            CheckpointError: For the answer of the store; the message contains the object's name and no secrets.
        """
        _expect_same_process(self.name)
        traffic.requests += 1
        place = f"{self.name}/{key}"
        try:
            return ask()
        except FileNotFoundError as error:
            if any(code in str(error) for code in _NO_BUCKET):
                raise CheckpointNotFoundError(
                    "there is no such bucket", path=self.name, hint="Check its name, and the endpoint."
                ) from None
            raise CheckpointNotFoundError(
                "there is no such object", path=place, hint="Check the name and the bucket."
            ) from None
        except BaseException as error:  # any error of a library becomes one line, and its panics too
            kind, text = type(error).__name__, str(error)
            if not isinstance(error, Exception):
                if kind != "PanicException":
                    raise
                raise CheckpointError("the library for stores has failed", path=place) from None
            if kind == "PreconditionError":
                raise changed(place) from None
            if (found := of_library(text, place)) is not None:
                raise found from None
            if "status code: 404" in text:
                no_bucket = not key or any(code in text for code in _NO_BUCKET)
                what, named = ("bucket", self.name) if no_bucket else ("object", place)
                raise CheckpointNotFoundError(
                    f"there is no such {what}", path=named, hint="Check the name, and the endpoint."
                ) from None
            moved = any(words in text for words in ("PermanentRedirect", "redirect without LOCATION"))
            if self.endpoint is not None and redirects.are_refused(text) and not moved:
                raise CheckpointError(
                    redirects.REFUSED, path=place, hint="Set the endpoint to the server that answers, and the region."
                ) from None
            raise _refusal(text, place, moved=moved or "301 Moved" in text) from None

    def key_of(self, name: str) -> str:
        """The name itself."""
        return name

    def get(self, key: str, start: int, stop: int, version: str | None) -> Answer:
        """The bytes [start, stop) of an object, fewer where it ends before."""
        options: dict[str, Any] = {"range": (start, stop)}
        if version is not None and is_strong(version):
            options["if_match"] = version
        return self._answer(key, options, from_beginning=not start)

    def tail(self, key: str, length: int) -> Answer:
        """The last bytes of an object."""
        return self._answer(key, {"range": {"suffix": length}}, from_beginning=True)

    def _answer(self, key: str, options: dict[str, Any], *, from_beginning: bool) -> Answer:
        def ask() -> Answer:
            found = self._obstore.get(self.raw, key, options=options)
            data = memoryview(found.bytes())
            traffic.read += len(data)
            return Answer(data, int(found.meta["size"]), _version(found.meta))

        try:
            return self.asked(key, ask)
        except CheckpointError as error:
            no_range = "416" in error.reason or isinstance(error, UnsupportedCheckpointError)
            if isinstance(error, CheckpointNotFoundError) or not from_beginning or not no_range:
                raise
            try:  # an empty object has no ranges
                found = self.asked(key, lambda: self._obstore.head(self.raw, key))
            except CheckpointError:
                raise error from None
            if found["size"]:
                raise
            return Answer(memoryview(b""), 0, _version(found))

    def listed(self, folder: str) -> Iterator[Entry]:
        """All objects below a folder."""
        stream = self.asked(folder, lambda: self._obstore.list(self.raw, folder or None, chunk_size=1000))
        while (some := self.asked(folder, lambda: next(stream, None))) is not None:
            empty = [meta["path"] for meta in some if not meta["size"] and meta["path"] != folder]
            there = dict(zip(empty, in_window((partial(self._is_there, key) for key in empty), 16), strict=True))
            for meta in some:
                if meta["size"] or there.get(meta["path"]):
                    yield Entry(meta["path"], meta["size"], _version(meta))

    def _is_there(self, key: str) -> bool:
        """Whether there is an object of this name; listings leave out the slash at the end of those for folders."""
        try:
            self.asked(key, lambda: self._obstore.head(self.raw, key))
        except CheckpointNotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove an object."""
        self.asked(key, lambda: self._obstore.delete(self.raw, key))

    def begin(self, key: str, *, expected: int, replace: bool, aside: str = "") -> Upload:
        """Begin to write an object."""
        if self.scheme == "s3" and self.client is not None:
            return S3Upload(self.client, self, key, expected=expected, replace=replace)
        _expect_same_process(self.name)
        place = f"{self.name}/{key}"
        return ObjectUpload(self._obstore, self.raw, place, key, expected=expected, replace=replace, aside=aside)

    def abort_unfinished(self, folder: str) -> None:
        """Abort every unfinished upload to a folder, where the store can list them."""
        if self.scheme != "s3" or self.client is None:
            return
        bucket = {"Bucket": self.bucket}
        with suppress(Exception):  # listing uploads may be forbidden; then a rule of the bucket must abort them
            for page in self.client.get_paginator("list_multipart_uploads").paginate(**bucket, Prefix=f"{folder}/"):
                traffic.requests += 1
                for found in page.get("Uploads", []):
                    self.client.abort_multipart_upload(**bucket, Key=found["Key"], UploadId=found["UploadId"])


@cache
def _client(endpoint: str | None, region: str) -> Any:
    try:
        config: Any = import_module("botocore.config")
        session: Any = import_module("botocore.session")
    except ImportError:
        return None
    made = config.Config(
        retries={"total_max_attempts": RETRIES + 1, "mode": "standard"},
        connect_timeout=10,
        read_timeout=4 * PATIENCE,
        max_pool_connections=16,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = session.get_session().create_client("s3", endpoint_url=endpoint, region_name=region, config=made)
    if endpoint is not None:
        client.meta.events.register_first("needs-retry.s3", redirects.raise_redirect)
    return client


def _unusable(error: Exception, name: str) -> CheckpointError:
    """The error for a configuration that a library refuses, without the values in the library's message."""
    if "Credentials" in type(error).__name__:
        message = "there are no credentials in the environment, or only a part of them"
    else:
        message = f"the configuration in the environment cannot be used: {without_values(str(error))}"
    return CheckpointError(message, path=name, hint="Check the variables of the store's own tools.")


def _refusal(text: str, place: str, *, moved: bool) -> CheckpointError:
    """The error for a library's long message about a request that failed."""
    code = "PermanentRedirect" if moved else code_in(text)
    if moved and (found := meaning(code)) is not None:
        return CheckpointError(found[0], path=place, hint=found[1])
    with suppress(ValueError):
        at = text.index("status code: ")
        status = without_secrets(text[at:]).removeprefix("status code: ")[:100]
        if (found := meaning(code) or meaning(status[:3])) is not None:
            message, hint = found
            if status[:3] == "403" and "list request" in text:
                hint += " Listing a folder needs a permission of its own."
            return CheckpointError(message, path=place, hint=hint)
        return CheckpointError(f"cannot be read: the store answers {status}", path=place)
    if "error sending request" in text:
        return CheckpointError(
            "cannot be read: the store does not answer", path=place, hint="Check the endpoint and the network."
        )
    return CheckpointError(f"cannot be read: {without_secrets(text)}", path=place)


def _profile() -> Any:
    """A provider of credentials from a configuration file, if there is one and the environment has none; else None."""
    given = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if any(os.environ.get(name) for name in (*given, "AWS_SKIP_SIGNATURE", "AWS_CONTAINER_CREDENTIALS_FULL_URI")):
        return None
    files = (os.environ.get("AWS_SHARED_CREDENTIALS_FILE"), os.environ.get("AWS_CONFIG_FILE"))
    homes = (os.path.expanduser("~/.aws/credentials"), os.path.expanduser("~/.aws/config"))  # noqa: PTH111
    if not any(path and os.path.exists(path) for path in (*files, *homes)):  # noqa: PTH110
        return None
    try:
        session: Any = import_module("botocore.session")
        provider: Any = import_module("obstore.auth.boto3")
        return provider.Boto3CredentialProvider(session.get_session())
    except Exception:  # noqa: BLE001  # without botocore, or credentials in the file, obstore looks elsewhere
        return None


@cache
def object_store(scheme: str, bucket: str) -> ObjectStore:
    """A bucket by its name; see `ObjectStore`."""
    return ObjectStore(scheme, bucket)
