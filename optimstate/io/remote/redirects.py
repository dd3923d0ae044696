"""Refusing redirects of object stores to other hosts than the endpoint.

Neither obstore's client nor botocore's has an option for this. The former is given a proxy that does not exist, for all
hosts except the endpoint; the latter gets a handler that raises an error when it would look for the bucket's region.
This applies to endpoints from the environment, not to Google's, Amazon's and Microsoft's own servers.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

__all__ = ["REFUSED", "RedirectedError", "are_refused", "client_options", "raise_redirect"]

REFUSED = "the store redirects to another server, which is not followed"

_NOWHERE = "127.0.0.1:0"  # no server can listen on port 0
_CREDENTIALS = (
    "169.254.0.0/16",
    "fd00:ec2::254",
    "amazonaws.com",
    "amazonaws.com.cn",
    "googleapis.com",
    "metadata",
    "metadata.google.internal",
    "microsoftonline.com",
)  # hosts from which the clients get credentials
_GIVEN = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AZURE_AUTHORITY_HOST", "IDENTITY_ENDPOINT", "MSI_ENDPOINT")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class RedirectedError(Exception):
    """An endpoint redirects; the caller adds the name of the object."""


def client_options(endpoint: str | None) -> dict[str, Any]:
    """Options with which obstore's client contacts no host but the endpoint; none if the environment sets a proxy."""
    if endpoint is None or any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return {}
    given = (os.environ[name] for name in _GIVEN if os.environ.get(name))
    hosts = [urlsplit(each if "://" in each else f"//{each}").hostname for each in (endpoint, *given)]
    return {"proxy_url": f"http://{_NOWHERE}", "proxy_excludes": ",".join([*filter(None, hosts), *_CREDENTIALS])}


def are_refused(message: str) -> bool:
    """Whether an error message of obstore reports a redirect to another host or from https to another scheme."""
    return (
        _NOWHERE in message
        or "kind: Redirect" in message
        or any(f"status code: {code}" in message for code in (301, 302, 303, 307, 308))
    )


def raise_redirect(response: Any = None, **_: Any) -> None:
    """A handler for botocore's responses.

    Raises:
        RedirectedError: The response is a redirect.
    """
    if response is not None and 300 <= response[0].status_code < 400:
        raise RedirectedError
