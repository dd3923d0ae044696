"""What stores answer to requests that fail, in plain words and without the answers themselves."""

from __future__ import annotations

import re

from optimstate.describe import describe
from optimstate.errors import CheckpointError, UnsupportedCheckpointError

__all__ = ["code_in", "meaning", "of_library"]

_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_DENIED = ("access is denied", "Check the credentials in the environment, and the name.")
_EXPIRED = ("the credentials have expired", "Get new ones.")
_REGION = ("the bucket is in another region", "Set AWS_REGION to its region.")
_MEANINGS = {
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "InvalidAccessKeyId": _DENIED,
    "SignatureDoesNotMatch": _DENIED,
    "AuthenticationFailed": _DENIED,
    "AuthorizationFailure": _DENIED,
    "401": _DENIED,
    "403": _DENIED,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": ("the session token is not valid", "Set AWS_SESSION_TOKEN to that of the other credentials."),
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "Set it; signatures contain the time."),
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "AuthorizationHeaderMalformed": (
        "the store does not accept the signature",
        "Set AWS_REGION to the region of the bucket, and check the credentials in the environment.",
    ),
}

# What obstore says about answers that it cannot use.
_UNUSABLE = (
    "Content-Length Header missing",
    "CONTENT_RANGE header",
    "Content-Range header",
    "Unable to extract metadata",
)
_PATH = re.compile(r'Path "(.{1,200}?)"(?::| contained)', re.DOTALL)


def code_in(text: str) -> str:
    """The code of an error in a store's answer, such as `AccessDenied`; empty if there is none."""
    found = _CODE.search(text)
    return found[1] if found else ""


def meaning(code: str) -> tuple[str, str] | None:
    """What a code or status means and what helps; None for those that say no more than that the request failed."""
    return _MEANINGS.get(code)


def of_library(text: str, place: str) -> CheckpointError | None:
    """The error for an answer that obstore cannot use, or for a name that it does not accept; None for others."""
    if "non-partial response" in text:
        return UnsupportedCheckpointError(
            "the server does not support ranges", path=place, hint="Download the file first."
        )
    if "UnexpectedRange" in text:
        return CheckpointError("the store sent another range than requested", path=place)
    if any(words in text for words in _UNUSABLE):
        return UnsupportedCheckpointError(
            "the server does not say which bytes it sends", path=place, hint="Download the file first."
        )
    if "body error" in text or "decoding response body" in text:
        return CheckpointError("the connection broke while it was read", path=place, hint="Run it again.")
    if "invalid list response" in text:
        return CheckpointError("the store's list of objects cannot be read", path=place, hint="Check the endpoint.")
    if "builder error" in text:
        return CheckpointError("the endpoint in the environment is not an address", path=place)
    if "invalid path" in text or "Could not parse path" in text:
        found = _PATH.search(text)
        name = f": {describe(found[1])}" if found else ""
        return UnsupportedCheckpointError(
            f"the name of an object below it cannot be used{name}",
            path=place,
            hint="Rename or move that object: parts of names cannot be empty, . or .., or have control characters.",
        )
    return None
