"""An endpoint that redirects is refused, and nobody else learns anything."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import optimstate
from optimstate.errors import CheckpointError, DestinationError
from optimstate.io.remote import redirects
from optimstate.io.remote.redirects import client_options
from tests.remote.conftest import SECRET

pytest.importorskip("obstore")

DAY = timedelta(days=1)
TOKEN = "IQoJb3JpZ2luX2VjEXAMPLE"
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}


class Server(ThreadingHTTPServer):
    """Answers everything with one redirect, or with a byte, and keeps what it was told."""

    daemon_threads = True

    def __init__(self, status: int, target: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
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
def serving(status: int, target: str = "", context: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(status, target, context)
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
        with pytest.raises(CheckpointError, match="redirects to another server, which is not followed") as caught:
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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 and localhost, and its key, in one file."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - DAY, now + DAY)
        .add_extension(hosts, critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(signed.public_bytes(pem) + private)
    return path


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("to", ["http", "https"])
def test_from_https_only_other_ports_over_https_are_followed(
    to: str, host: str, scheme: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusted = certificate.read_bytes().partition(b"-----BEGIN PRIVATE")[0]

    def trusting(endpoint: str | None) -> dict[str, Any]:
        return {"root_certificate": trusted, **client_options(endpoint)}

    monkeypatch.setattr(redirects, "client_options", trusting)
    with (
        serving(200, context=context if to == "https" else None) as other,
        serving(307, f"{to}://{host}:{other.server_port}/bucket/a.pt", context) as first,
    ):
        credentials(monkeypatch, scheme, f"https://127.0.0.1:{first.server_port}")
        with pytest.raises(CheckpointError) as caught:  # a byte is no checkpoint
            optimstate.inspect(f"{scheme}://bucket/a.pt")
        assert first.heard
        followed = to == "https" and host == "127.0.0.1"
        assert bool(other.heard) == followed
        assert ("redirects to another server, which is not followed" in str(caught.value)) == (not followed)
    assert not any(secret in str(caught.value) for secret in (TOKEN, SECRET, "c2VjcmV0"))


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
            with pytest.raises(DestinationError, match="redirects to another server") as caught:
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
