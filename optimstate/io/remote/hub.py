"""Repositories of the Hugging Face Hub: `hf://owner/name[@revision]/path`, always read at one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from urllib.parse import quote

from optimstate.errors import CheckpointError, CheckpointNotFoundError, UsageError
from optimstate.io.remote.store import UNKNOWN, Entry, check_sendable, missing_library, without_secrets
from optimstate.io.remote.web import WebStore

__all__ = ["HubStore", "hub_store"]

_UNREADABLE = "the Hub's answer about the repository cannot be read"
_KINDS = {"datasets": "dataset", "spaces": "space"}


class HubStore(WebStore):
    """A repository at one commit; its files are on web servers."""

    lists = True
    kind = "the Hub"

    def __init__(self, name: str, base: str, entries: list[Entry], token: str | None) -> None:
        super().__init__(name, base, headers={"Authorization": f"Bearer {token}"} if token else None)
        self._entries = entries

    def key_of(self, name: str) -> str:
        """The name itself: keys are the paths of the repository's files."""
        return name

    def _address(self, key: str) -> str:
        return super()._address(quote(key))

    def listed(self, folder: str) -> Iterator[Entry]:
        """The files of the commit below a folder."""
        start = f"{folder}/" if folder else ""
        return (entry for entry in self._entries if entry.key.startswith(start))


def hub_store(rest: str) -> tuple[HubStore, str]:
    """The repository in a name without its scheme, and the path in it.

    Raises:
        UsageError: The name does not contain a repository.
        CheckpointError: huggingface_hub is not installed, or the repository does not exist.
    """
    pieces = rest.split("/")
    kind = _KINDS.get(pieces[0])
    if kind is not None:
        pieces = pieces[1:]
    if len(pieces) < 2 or not all(pieces[:2]):
        raise UsageError("hf://: a repository is hf://OWNER/NAME[@REVISION][/PATH]")
    owner, (name, _, revision), path = pieces[0], pieces[1].partition("@"), pieces[2:]
    if revision == "refs" and len(path) >= 2:  # refs/pr/1, refs/convert/parquet
        revision, path = "/".join(("refs", *path[:2])), path[2:]
    if any(part in ("", ".", "..") for part in path[:-1]) or path[-1:] in ([".."], ["."]):
        raise UsageError("hf://: a part of the path is empty, . or ..", hint="Write one slash between its parts.")
    try:
        hub: Any = import_module("huggingface_hub")
        failures: Any = import_module("huggingface_hub.errors")
    except ImportError:
        raise missing_library("huggingface_hub", "hf") from None
    check_sendable(("HF_TOKEN",), f"hf://{owner}/{name}")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    repository = f"{owner}/{name}"
    shown = f"hf://{repository}" if kind is None else f"hf://{kind}s/{repository}"
    try:
        found: Any = hub.HfApi(endpoint=endpoint).repo_info(
            repository, revision=revision or None, repo_type=kind, files_metadata=True
        )
    except failures.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 404):
            raise CheckpointNotFoundError(
                "there is no such repository or revision, or you have no access to it",
                path=shown,
                hint="Check the name; `hf auth login` gives access to private repositories.",
            ) from None
        raise CheckpointError(f"the Hub answers {status}", path=shown) from None
    except Exception as error:  # noqa: BLE001  # any error of a library becomes one line
        if type(error).__name__ == "HFValidationError":
            raise UsageError(f"{shown}: the Hub has no repositories with such names") from None
        if isinstance(error, LookupError | TypeError | ValueError | AttributeError):
            raise CheckpointError(_UNREADABLE, path=shown) from None
        raise CheckpointError(f"the Hub cannot be reached: {without_secrets(str(error))}", path=shown) from None
    if not isinstance(found.sha, str) or not re.fullmatch(r"[0-9a-f]{40,64}", found.sha):
        raise CheckpointError(_UNREADABLE, path=shown)
    address = hub.hf_hub_url(repository, "_", repo_type=kind, revision=found.sha, endpoint=endpoint).removesuffix("/_")
    # The server with a file may send no ETag of its own; the commit identifies the version.
    entries = [Entry(_name_of(file, shown), _size_of(file), None) for file in found.siblings or ()]
    return HubStore(f"{shown}@{found.sha[:12]}", address, entries, hub.get_token()), "/".join(path)


def _name_of(file: Any, shown: str) -> str:
    """The path of a file in the repository, which cannot be outside of it."""
    name = file.rfilename
    if not isinstance(name, str) or any(part in ("", ".", "..") for part in name.split("/")):
        raise CheckpointError(_UNREADABLE, path=shown)
    return name


def _size_of(file: Any) -> int:
    """The size of a file; mirrors of the Hub may not say it."""
    return file.size if isinstance(file.size, int) and 0 <= file.size < 1 << 62 else UNKNOWN
