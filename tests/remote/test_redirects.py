"""An endpoint that redirects is refused, and nobody else learns anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import optimstate
from optimstate.errors import CheckpointError, DestinationError
from optimstate.io.remote.redirects import client_options
from tests.remote.conftest import SECRET

pytest.importorskip("obstore")

TOKEN = "IQoJb3JpZ2luX2VjEXAMPLE"
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}


class Server(ThreadingHTTPServer):
    """Answers everything with one redirect, or with a byte, and keeps what it was told."""

    daemon_threads = True

    def __init__(self, status: int, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.target = status, target
        self.heard: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append(f"{self.command} {self.path} {self.headers}")
        body = b"" if self.server.target else b"x"
        self.send_response(self.server.status)
        for name, value in {"Location": self.server.target, "ETag": '"1"', "Content-Length": str(len(body))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer


@contextmanager
def serving(status: int, target: str = "") -> Iterator[Server]:
    server = Server(status, target)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def credentials(monkeypatch: pytest.MonkeyPatch, scheme: str, endpoint: str) -> None:
    monkeypatch.setenv(ENDPOINTS[scheme], endpoint)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_another_host_is_asked_nothing(scheme: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(200) as other, serving(status, f"http://localhost:{other.server_port}/bucket/a.pt") as first:
        credentials(monkeypatch, scheme, f"http://127.0.0.1:{first.server_port}")
        with pytest.raises(CheckpointError, match="redirects to another place, which is not followed") as caught:
            optimstate.inspect(f"{scheme}://bucket/a.pt")
        assert other.heard == []
        assert first.heard
    assert not any(secret in str(caught.value) for secret in (TOKEN, SECRET, "c2VjcmV0"))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://localhost/a.pt", "gopher://localhost/", "//", "x:y"])
def test_other_schemes_are_not_followed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(307, target) as first:
        credentials(monkeypatch, "s3", f"http://127.0.0.1:{first.server_port}")
        with pytest.raises(CheckpointError) as caught:
            optimstate.inspect("s3://bucket/a.pt")
    assert TOKEN not in str(caught.value)
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize("library", ["botocore", "obstore"])
def test_nothing_is_written_to_another_host(
    library: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimstate.io.places import located
    from optimstate.io.remote.objects import ObjectStore

    if library == "obstore":
        monkeypatch.setattr(ObjectStore, "client", None)
    with serving(200) as other, serving(307, f"http://localhost:{other.server_port}/bucket/a.pt") as first:
        credentials(monkeypatch, "s3", f"http://127.0.0.1:{first.server_port}")
        store = located("s3://bucket/a.pt").store  # type: ignore[attr-defined]
        for size in (10, 6 << 20):
            upload = store.begin("a.pt", expected=size, replace=True)
            with pytest.raises(DestinationError, match="redirects to another place") as caught:
                _written(upload, size)
            assert TOKEN not in str(caught.value)
        assert other.heard == []
        assert first.heard


def _written(upload: object, size: int) -> None:
    try:
        if size > 10:
            upload.part(bytes(size))  # type: ignore[attr-defined]
        upload.complete(bytes(10))  # type: ignore[attr-defined]
    except BaseException:
        upload.abort()  # type: ignore[attr-defined]
        raise


def test_the_clouds_and_proxies_decide_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_options(None) == {}
    assert client_options("https://store.example")["proxy_excludes"].startswith("store.example,")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert client_options("https://store.example") == {}
