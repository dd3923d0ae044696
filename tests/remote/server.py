"""A server of ranges over a folder, on loopback: as the web has them, and as S3 does, with a listing.

It counts, waits, and does wrong what it is told to.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class RangeServer(ThreadingHTTPServer):
    """What it serves, what it was asked, and what it does wrong.

    Attributes:
        root: The folder; below an endpoint of S3 its folders are the buckets.
        delay: Seconds before each answer.
        requests: Method, path with query, range and authorization of each request.
        sent: Bytes of the bodies.
        faults: By path: `ignore-range`, `more`, `size`, `short`, `cut`, `no-size`, `no-range`, `chunked`, `packed`,
            `no-etag`, `dated` (no ETag either, but the time of the last change), `weak`, a status, bytes to answer
            with, or the address of a redirect.
        most: The largest number of requests at the same time.
        changes_after: The number of requests after which every file has another ETag.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.delay = 0.0
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.sent = 0
        self.faults: dict[str, Any] = {}
        self.fails: Counter[str] = Counter()
        self.changes_after: int | None = None
        self.lock = Lock()
        self.now = self.most = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away at any time."""

    def forget(self) -> None:
        self.requests.clear()
        self.sent = self.most = 0

    def etag(self, file: Path) -> str:
        status = file.stat()
        changed = self.changes_after is not None and len(self.requests) > self.changes_after
        return f'"{status.st_size:x}-{status.st_mtime_ns:x}{"-changed" if changed else ""}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self._get()
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _get(self) -> None:
        server = self.server
        with server.lock:
            wanted = self.headers.get("Range")
            server.requests.append((self.command, self.path, wanted, self.headers.get("Authorization")))
        time.sleep(server.delay)
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            self._list(path, query)
            return
        fault = server.faults.get(path)
        if server.fails[path] > 0:
            server.fails[path] -= 1
            fault = 503
        file = server.root / path.lstrip("/")
        if isinstance(fault, int):
            self._answer(fault, b"<secret>no</secret>", {})
        elif isinstance(fault, bytes):
            self._answer(200, fault, {"Content-Type": "application/json"})
        elif isinstance(fault, str) and "://" in fault:
            self._answer(302, b"", {"Location": fault})
        elif not file.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        else:
            self._file(file, wanted, fault)

    do_HEAD = do_GET

    def _file(self, file: Path, wanted: str | None, fault: str | None) -> None:
        size = file.stat().st_size
        etag = self.server.etag(file)
        condition = self.headers.get("If-Match")
        if condition is not None and (condition != etag or fault == "weak"):
            self._answer(412, b"", {})
            return
        headers = {"ETag": etag, "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
        if fault == "no-etag":
            headers = {}
        if fault == "dated":
            headers = {"Last-Modified": formatdate(file.stat().st_mtime, usegmt=True)}
        if fault == "weak":  # which no condition can name
            headers["ETag"] = f"W/{etag}"
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
        if match is None or fault == "ignore-range":
            self._stream(200, file, 0, size, headers)
            return
        first, last = match[1], match[2]
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        told = 50 << 40 if fault == "size" else size
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{told}"
        if fault == "no-size":
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/*"
        if fault == "no-range":
            del headers["Content-Range"]
        if fault == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        if fault == "packed":
            headers["Content-Encoding"] = "gzip"
        if fault == "more":
            stop = min(stop + 100_000, size)
        if fault == "short":
            stop = start + (stop - start) // 2
        self._stream(206, file, start, stop, headers, cut=fault == "cut")

    def _stream(
        self, status: int, file: Path, start: int, stop: int, headers: dict[str, str], *, cut: bool = False
    ) -> None:
        chunked = "Transfer-Encoding" in headers
        self.send_response(status)
        for name, value in (headers if chunked else {**headers, "Content-Length": str(stop - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if chunked:
            data = file.read_bytes()[start:stop]
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
            return
        if cut:
            self.wfile.write(bytes((stop - start) // 2))
            self.wfile.flush()
            self.connection.shutdown(SHUT_RDWR)
            self.close_connection = True
            return
        with file.open("rb") as opened:
            opened.seek(start)
            while start < stop:
                data = opened.read(min(1 << 20, stop - start))
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True
                    return
                start += len(data)
                with self.server.lock:
                    self.server.sent += len(data)

    def _list(self, path: str, query: dict[str, list[str]]) -> None:
        bucket = self.server.root / path.strip("/")
        prefix = query.get("prefix", [""])[0]
        found = sorted(file for file in bucket.rglob("*") if file.is_file())
        keys = [(str(file.relative_to(bucket)), file) for file in found]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.server.etag(file))}</ETag><Size>{file.stat().st_size}</Size></Contents>"
            for key, file in keys
            if key.startswith(prefix)
        )
        body = f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>'
        self._answer(200, body.encode(), {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """A server of a folder while the context lasts."""
    server = RangeServer(root)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
