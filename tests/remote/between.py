"""moto's server of S3 behind rules, by which a test has it wait, answer something else, or lose an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socket import SHUT_RDWR
from threading import Thread
from typing import Any

Environment = dict[str, Any]
Answer = tuple[str, bytes]
"""A status with its reason, and a body of XML."""

ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s</Message></Error>'


def error(status: str, code: str, message: str = "") -> Answer:
    """An answer as S3 has them for errors."""
    return status, ERROR % (code.encode(), message.encode())


class Between:
    """An application of WSGI before moto's.

    Attributes:
        address: Where it listens.
        rule: Gets method and path with query of each request; may return an answer, or `LOSE`.
        rule_of_all: The same, with the whole request.
        asked: What it got.
    """

    LOSE: Answer = ("", b"")
    """moto carries out the request, and the connection ends without its answer."""

    def __init__(self, app: Callable[[Environment, Any], Iterable[bytes]]) -> None:
        self.app = app
        self.address = ""
        self.rule: Callable[[str], Answer | None] = lambda _: None
        self.rule_of_all: Callable[[str, Environment], Answer | None] = lambda asked, _: self.rule(asked)
        self.asked: list[str] = []

    def __call__(self, environ: Environment, start: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}"
        self.asked.append(asked)
        answer = self.rule_of_all(asked, environ)
        if answer is None:
            return self.app(environ, start)
        if answer is self.LOSE:
            for _ in self.app(environ, lambda *_: None):
                pass
            environ["werkzeug.socket"].shutdown(SHUT_RDWR)
            raise ConnectionError
        status, body = answer
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def serving() -> Iterator[Between]:
    """Such a server while the context lasts."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    app = Between(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    app.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield app
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
