"""Web servers: ranges of one version of a file, read over https.

Redirects are followed here and not by the library, which cannot restrict them: they may not lead from https to http,
nor into a private network unless the first server is in one, and credentials are sent only to the first server.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from optimstate.errors import CheckpointError, DestinationError, UnsupportedCheckpointError, UsageError
from optimstate.io.remote.addresses import ALLOW_HTTP, allows_http
from optimstate.io.remote.store import (
    PATIENCE,
    RETRIES,
    Answer,
    Entry,
    changed,
    in_child,
    is_strong,
    missing_library,
    refused,
    traffic,
)

__all__ = ["WebStore", "web_store"]

MAX_REDIRECTS = 5
REMEMBERED = 240.0  # seconds for which the target of a redirect is used again; signed addresses expire
_AGAIN = (429, 500, 502, 503, 504)


class WebStore:
    """A server, or a folder on it.

    Args:
        name: The name for messages.
        base: The address before the keys.
        query: Appended to every address, such as a signature; not in messages.
        headers: Sent to this server only, such as a token; not in messages.
    """

    lists = False
    suffixes = True
    kind = "a web server"

    def __init__(self, name: str, base: str, *, query: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._base = base
        self._query = query
        self._headers = dict(headers or {})
        self._ends: dict[str, tuple[str, float]] = {}
        self._lock = Lock()
        first = urlsplit(base)
        self._origin = (first.scheme, first.netloc)
        if first.scheme == "http" and not allows_http(first.hostname):
            raise UsageError(
                f"{name}: http:// is not encrypted",
                hint=f"Use https://, or set {ALLOW_HTTP}=1 if you trust the network.",
            )

    def _address(self, key: str) -> str:
        return f"{self._base}/{key}" + (f"?{self._query}" if self._query else "")

    def key_of(self, name: str) -> str:
        """The name of a file as a part of an address."""
        return _quoted(name)

    def get(self, key: str, start: int, stop: int, version: str | None) -> Answer:
        """The bytes [start, stop) of an object, fewer at its end."""
        return self._ranged(key, f"bytes={start}-{stop - 1}", stop - start, version, start=start)

    def tail(self, key: str, length: int) -> Answer:
        """The last bytes of an object."""
        return self._ranged(key, f"bytes=-{length}", length, None)

    def listed(self, folder: str) -> Iterator[Entry]:
        """Never called."""
        raise NotImplementedError

    def delete(self, key: str) -> None:
        """Refused.

        Raises:
            DestinationError: Always.
        """
        raise DestinationError(f"{self.name}/{key}: {self.kind} can be read, but not written")

    def abort_unfinished(self, folder: str) -> None:
        """Does nothing: there are no uploads."""

    def begin(self, key: str, *, expected: int, replace: bool, aside: str = "") -> Any:  # noqa: ARG002
        """Refused.

        Raises:
            DestinationError: Always.
        """
        raise DestinationError(
            f"{self.name}/{key}: {self.kind} can be read, but not written",
            hint="Write to a file or to s3://, gs://, az://.",
        )

    def _ranged(self, key: str, wanted: str, length: int, version: str | None, start: int | None = None) -> Answer:
        place = f"{self.name}/{key}"
        headers = {"Range": wanted, "Accept-Encoding": "identity", "User-Agent": "optimstate"}
        if version is not None and is_strong(version):
            headers["If-Match"] = version
        for attempt in range(RETRIES + 1):
            try:
                response = self._follow(key, place, headers)
            except OSError as error:
                if attempt == RETRIES or isinstance(error, CheckpointError):
                    raise
                time.sleep(0.2 * 2**attempt)
                continue
            if response.status in _AGAIN and attempt < RETRIES:
                response.close()
                time.sleep(0.2 * 2**attempt)
                continue
            try:
                if response.status not in (200, 206):
                    if response.status == 416 and _total(response.headers.get("Content-Range")) == 0:
                        return Answer(memoryview(b""), 0, _version(response))
                    refused(place, response.status, str(response.reason or ""))
                return self._answer(response, place, length, version, start)
            except _Broken:
                if attempt == RETRIES:
                    raise CheckpointError("the connection broke while it was read", path=place) from None
                time.sleep(0.2 * 2**attempt)
            finally:
                response.release_conn() if response.status == 206 else response.close()
        raise AssertionError

    def _answer(self, response: Any, place: str, length: int, version: str | None, start: int | None) -> Answer:
        if response.status == 200:
            total = int(response.headers.get("Content-Length") or -1)
            if not 0 <= total <= length or start:
                raise UnsupportedCheckpointError(
                    "the server does not support ranges", path=place, hint="Download the file first."
                )
        else:
            total = _total(response.headers.get("Content-Range"))
            first = str(response.headers.get("Content-Range")).removeprefix("bytes ").partition("-")[0]
            if total < 0 or (start is not None and first != str(start)):
                raise UnsupportedCheckpointError("the server does not send the range in its answer", path=place)
        found = _version(response)
        if version is not None and found != version:
            raise changed(place)
        packed = str(response.headers.get("Content-Encoding") or "identity").lower()
        if packed != "identity":
            raise UnsupportedCheckpointError(
                f"the server sends it compressed ({packed[:20]}), so that no ranges of the file itself can be read",
                path=place,
                hint="Download the file first.",
            )
        data = _body(response, length, place)
        traffic.read += len(data)
        return Answer(memoryview(data), total, found)

    def _follow(self, key: str, place: str, headers: Mapping[str, str]) -> Any:
        """The response after all redirects."""
        address = first = self._address(key)
        known, until = self._ends.get(key, ("", 0.0))
        if known and time.monotonic() < until:
            address = known
        for _ in range(MAX_REDIRECTS + 1):
            response = self._ask(address, place, headers, moved=address != first)
            if response.status in (401, 403, 404, 410) and address == known:
                response.close()
                self._ends.pop(key, None)
                known, address = "", first
                continue
            if response.status not in (301, 302, 303, 307, 308):
                if address != first:
                    self._ends[key] = (address, time.monotonic() + REMEMBERED)
                return response
            target = urljoin(address, str(response.headers.get("Location") or ""))
            response.drain_conn()
            self._check_redirect(address, target, place)
            address = target
        raise CheckpointError("the server redirects without end", path=place)

    def _check_redirect(self, address: str, target: str, place: str) -> None:
        old, new = urlsplit(address), urlsplit(target)
        allowed = new.scheme == "https" or (new.scheme == "http" and old.scheme == "http" and allows_http(new.hostname))
        if not allowed or not new.hostname:
            raise CheckpointError(
                f"the server redirects to {new.scheme or 'nowhere'}://{new.hostname or ''}, which is not followed",
                path=place,
                hint="Redirects are followed from https to https only.",
            )

    def _ask(self, address: str, place: str, headers: Mapping[str, str], *, moved: bool) -> Any:
        urllib3 = _library("https")
        parts = urlsplit(address)
        sent = dict(headers)
        if (parts.scheme, parts.netloc) == self._origin:
            sent.update(self._headers)
        traffic.requests += 1
        try:
            manager = _manager(parts.scheme, private_allowed=not moved or _is_private(urlsplit(self._base).hostname))
            return manager.request(
                "GET", urlunsplit(parts), headers=sent, redirect=False, preload_content=False, retries=False
            )
        except _PrivateAddressError:
            raise CheckpointError(
                f"the server redirects to {parts.hostname}, an address of a private network, which is not followed",
                path=place,
            ) from None
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            if "certificate" in str(reason).lower():
                raise CheckpointError("the certificate of the server is not valid", path=place) from None
            if isinstance(error, urllib3.exceptions.LocationParseError):
                raise CheckpointError("the server redirects to something that is not an address", path=place) from None
            raise CheckpointError(f"the server does not answer ({type(error).__name__})", path=place) from None


class _Broken(Exception):  # caught where it is raised
    """The body is shorter than announced."""


def _body(response: Any, length: int, place: str) -> bytes:
    """The body of a response, which may not be longer than `length`."""
    urllib3 = _library("https")
    try:
        data: bytes = response.read(length + 1, decode_content=False)
        while len(data) <= length:
            more = response.read(length + 1 - len(data), decode_content=False)
            if not more:
                break
            data += more
    except urllib3.exceptions.HTTPError:
        raise _Broken from None
    if len(data) > length:
        raise CheckpointError(f"requested {length} bytes, got more", path=place)
    return data


def _total(header: str | None) -> int:
    """The size of the whole object in `Content-Range: bytes 0-9/100`; -1 if there is none."""
    total = (header or "").rpartition("/")[2]
    return int(total) if total.isdecimal() else -1


def _version(response: Any) -> str | None:
    """The ETag, else the time of the last change."""
    found = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return str(found) if found else None


class _PrivateAddressError(Exception):
    """A redirect led into a private network."""


def _is_private(host: str | None) -> bool:
    """Whether the name of a host is one of a private network."""
    if host in (None, "localhost"):
        return True
    try:
        return not ipaddress.ip_address(str(host)).is_global
    except ValueError:
        return not str(host).count(".")


def _library(scheme: str) -> Any:
    try:
        return import_module("urllib3")
    except ImportError:
        raise missing_library("urllib3", scheme) from None


@cache
def _manager(scheme: str, *, private_allowed: bool) -> Any:
    """A pool of connections; without `private_allowed` each connection refuses a private address of the server."""
    urllib3 = _library(scheme)
    timeout = urllib3.Timeout(connect=10, read=PATIENCE)
    proxies = _proxies()
    if proxies.get(scheme):
        return urllib3.ProxyManager(proxies[scheme], timeout=timeout, maxsize=24)
    manager = urllib3.PoolManager(timeout=timeout, maxsize=24)
    if private_allowed:
        return manager

    def public(connection: type[Any]) -> type[Any]:
        class Public(connection):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                address = self.sock.getpeername()[0]
                if not ipaddress.ip_address(address.partition("%")[0]).is_global:
                    self.close()
                    raise _PrivateAddressError

        return Public

    class Http(urllib3.HTTPConnectionPool):  # type: ignore[misc,name-defined]
        ConnectionCls = public(urllib3.connection.HTTPConnection)

    class Https(urllib3.HTTPSConnectionPool):  # type: ignore[misc,name-defined]
        ConnectionCls = public(urllib3.connection.HTTPSConnection)

    manager.pool_classes_by_scheme = {"http": Http, "https": Https}
    return manager


in_child(_manager.cache_clear)


def _proxies() -> Mapping[str, str]:
    from urllib.request import getproxies

    return getproxies()


def web_store(url: str) -> tuple[WebStore, str]:
    """The server of an address, and the path of the file.

    Raises:
        UsageError: The address has no server, or is http:// and on another machine.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise UsageError(f"{parts.scheme}://: this address has no server")
    base = f"{parts.scheme}://{parts.netloc}"
    return WebStore(base, base, query=parts.query), _quoted(parts.path).lstrip("/")


def _quoted(path: str) -> str:
    """A path as in addresses; one in which something is quoted already stays as it is."""
    return quote(path, safe="/%:@!$&'()*+,;=~")
