"""Which servers may be spoken to without encryption."""

from __future__ import annotations

import os

__all__ = ["ALLOW_HTTP", "allows_http"]

ALLOW_HTTP = "OPTIMSTATE_ALLOW_HTTP"
"""Set to 1, servers on other machines are spoken to without encryption, too."""


def allows_http(host: str | None) -> bool:
    """Whether a host may be spoken to without encryption: this machine, or any where that was asked for."""
    loopback = host is not None and (host in ("localhost", "::1") or host.startswith("127."))
    return loopback or os.environ.get(ALLOW_HTTP) == "1"
