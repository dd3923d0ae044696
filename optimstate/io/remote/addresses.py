"""Deciding which servers may be contacted without encryption."""

from __future__ import annotations

import os

__all__ = ["ALLOW_HTTP", "allows_http"]

ALLOW_HTTP = "OPTIMSTATE_ALLOW_HTTP"
"""The environment variable that, set to 1, allows unencrypted connections to other machines."""


def allows_http(host: str | None) -> bool:
    """Whether an unencrypted connection to a host is allowed: to this machine always, to others with `ALLOW_HTTP`."""
    loopback = host is not None and (host in ("localhost", "::1") or host.startswith("127."))
    return loopback or os.environ.get(ALLOW_HTTP) == "1"
