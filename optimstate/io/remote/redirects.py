"""Redirects of object stores: to another host than the endpoint's they are not followed.

Neither obstore's client nor botocore's can be told so. The former goes to every host but the endpoint's by way of a
proxy that there is not; the latter raises where it would look for the bucket's region. Google's, Amazon's and
Microsoft's own servers are left alone: an endpoint is another's where the environment names it.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

__all__ = ["REFUSED", "RedirectedError", "are_refused", "client_options", "raise_redirect"]

REFUSED = "the store redirects to another place, which is not followed"

_NOWHERE = "127.0.0.1:0"  # a port that nobody can listen at
_CREDENTIALS = (
    "169.254.0.0/16",
    "fd00:ec2::254",
    "amazonaws.com",
    "amazonaws.com.cn",
    "googleapis.com",
    "metadata",
    "metadata.google.internal",
    "microsoftonline.com",
)  # where the clients get them from
_GIVEN = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AZURE_AUTHORITY_HOST", "IDENTITY_ENDPOINT", "MSI_ENDPOINT")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class RedirectedError(Exception):
    """An endpoint redirects; whoever asked says what was asked for."""


def client_options(endpoint: str | None) -> dict[str, Any]:
    """What obstore's client needs so as to stay at an endpoint; nothing where proxies decide who is spoken to."""
    if endpoint is None or any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return {}
    given = (os.environ[name] for name in _GIVEN if os.environ.get(name))
    hosts = [urlsplit(each if "://" in each else f"//{each}").hostname for each in (endpoint, *given)]
    return {"proxy_url": f"http://{_NOWHERE}", "proxy_excludes": ",".join([*filter(None, hosts), *_CREDENTIALS])}


def are_refused(message: str) -> bool:
    """Whether what obstore says is that a redirect led elsewhere, or from https to another scheme."""
    return (
        _NOWHERE in message
        or "kind: Redirect" in message
        or any(f"status code: {code}" in message for code in (301, 302, 303, 307, 308))
    )


def raise_redirect(response: Any = None, **_: Any) -> None:
    """A handler of botocore for what is answered.

    Raises:
        RedirectedError: It is a redirect.
    """
    if response is not None and 300 <= response[0].status_code < 400:
        raise RedirectedError
