"""moto's server of S3 as one of Google's store: the interface of XML, by which obstore writes, has S3's requests.

Some of their headers have other names in Google's, and moto lacks the condition of a copy. What is shown so is that
what is asked for is whole and in order; Google's own signatures, generations and errors are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

Environment = dict[str, Any]

SIGNED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
HEADERS = {"HTTP_X_GOOG_COPY_SOURCE": "HTTP_X_AMZ_COPY_SOURCE"}


class GoogleNames:
    """An application of WSGI that another one of S3 answers for.

    Attributes:
        asked: Method and path with query of each request.
        tokens: What came as `Authorization`.
    """

    def __init__(self, app: Callable[[Environment, Any], Iterable[bytes]]) -> None:
        self.app = app
        self.asked: list[str] = []
        self.tokens: list[str] = []

    def __call__(self, environ: Environment, start: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}")
        self.tokens.append(environ.get("HTTP_AUTHORIZATION", ""))
        environ["HTTP_AUTHORIZATION"] = SIGNED  # moto knows nobody by it, and takes it for somebody's
        for theirs, amazons in HEADERS.items():
            if theirs in environ:
                environ[amazons] = environ.pop(theirs)
        if environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None) == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
            if "HTTP_X_AMZ_COPY_SOURCE" in environ and self._is_there(environ):
                start("412 Precondition Failed", [("Content-Length", "0")])
                return [b""]
        return self.app(environ, start)

    def _is_there(self, environ: Environment) -> bool:
        found: list[str] = []
        names = ("HTTP_X_AMZ_COPY_SOURCE", "HTTP_IF_NONE_MATCH")
        asked = {name: value for name, value in environ.items() if name not in names}
        for _ in self.app({**asked, "REQUEST_METHOD": "HEAD"}, lambda status, *_: found.append(status)):
            pass
        return found[0].startswith("200")


@contextmanager
def google() -> Iterator[tuple[str, GoogleNames]]:
    """The address of such a server while the context lasts."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = GoogleNames(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", app
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
