"""Paths of objects and folders in a store, with the methods of `pathlib.Path`.

All paths derived from one name share a listing and the opened objects, so that each object is read in one version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from fnmatch import fnmatchcase
from stat import S_IFDIR, S_IFREG
from typing import Any
from urllib.parse import urlsplit

from optimstate.errors import CheckpointError, CheckpointNotFoundError, LimitExceededError, UsageError
from optimstate.io.remote.source import Cache, RemoteSource, fetched_together
from optimstate.io.remote.store import UNKNOWN, Entry, Store, in_window, pool
from optimstate.record import Record

__all__ = ["Held", "RemotePath", "opened_together", "remote"]

SCHEMES = ("s3", "gs", "az", "hf", "https", "http")
MAX_LISTED = 500_000
# Suffixes of names that are probably those of objects, and not of folders.
_OBJECTS = (
    *(".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".zip", ".npz", ".npy", ".safetensors", ".json", ".pkl"),
    *(".pickle", ".distcp", ".metadata", ".txt", ".toml"),
)

_FORMS = (
    "Names are s3://BUCKET/NAME, gs://BUCKET/NAME, az://CONTAINER/NAME, hf://OWNER/NAME/PATH or https://SERVER/PATH."
)

Held = dict[str, Any]
"""A held upload, of which `Upload.release` makes an object."""


class _Status(Record):
    """The size and kind of an object or folder; see `Status`."""

    st_size: int
    st_mode: int


class _Opening:
    """The listing and the opened objects that paths derived from one name share."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.held: dict[str, Held] | None = None
        self.made: list[RemotePath] = []
        self.cache = Cache()
        self.sources: dict[str, RemoteSource] = {}
        self._entries: dict[str, Entry] = {}
        self._folders: set[str] = set()
        self._listed: list[str] = []
        self._absent: set[str] = set()

    def forget(self) -> None:
        """Clear everything that may have changed, after something was written."""
        self._listed.clear()
        self._entries.clear()
        self._folders.clear()
        self._absent.clear()
        self.sources.clear()

    def list_all(self, folder: str) -> None:
        """List all objects below a folder, once."""
        if self._covers(folder):
            return
        if not self.store.lists:
            raise CheckpointError(
                "a web server does not list folders",
                path=f"{self.store.name}/{folder}",
                hint="Give the address of a file; for shards, that of their .index.json.",
            )
        found: dict[str, Entry] = {}
        for entry in self.store.listed(folder):
            if found.setdefault(entry.key, entry) is not entry:
                raise CheckpointError(
                    "there are two objects whose names differ only in slashes at their ends",
                    path=f"{self.store.name}/{entry.key}",
                    hint="Rename or remove one of them.",
                )
            parent = entry.key.rpartition("/")[0]
            while parent and parent not in self._folders:
                self._folders.add(parent)
                parent = parent.rpartition("/")[0]
            if len(found) > MAX_LISTED:
                raise LimitExceededError(
                    f"more than {MAX_LISTED} objects, the limit", path=f"{self.store.name}/{folder}"
                )
        for key in self._folders & found.keys():
            if found[key].size:
                raise self._ambiguous(key)
            del found[key]  # an object with which some tools represent a folder
        self._entries |= found
        self._listed.append(folder)

    def _ambiguous(self, key: str) -> CheckpointError:
        return CheckpointError(
            "there is an object with this name, and there are objects below it as in a folder",
            path=f"{self.store.name}/{key}",
            hint="Rename the object, or give the name of the folder with a slash at its end.",
        )

    def _covers(self, key: str) -> bool:
        return any(not folder or key == folder or key.startswith(f"{folder}/") for folder in self._listed)

    def below(self, folder: str, *, deep: bool) -> list[str]:
        """The keys of all objects below a folder (`deep`), or of the objects and folders directly in it."""
        self.list_all(folder)
        start = f"{folder}/" if folder else ""
        inside = [key for key in self._entries if key.startswith(start)]
        if deep:
            return sorted(inside)
        return sorted({start + key[len(start) :].split("/", 1)[0] for key in inside})

    def entry(self, key: str) -> Entry | None:
        """The entry of an object in the listing, or None."""
        return self._entries.get(key)

    def source(self, path: RemotePath, *, at_once: bool = True) -> RemoteSource:
        """The object, opened once."""
        key = path.key
        if key not in self.sources:
            entry = self._entries.get(key)
            if entry is None and (self._covers(key.rpartition("/")[0]) or not key):
                hint = "The folder may be incomplete: copy it again from its source."
                raise CheckpointNotFoundError("there is no such object", path=path, hint=hint)
            self.sources[key] = RemoteSource(self.store, key, path, self.cache, entry, at_once=at_once)
        return self.sources[key]

    def kind(self, path: RemotePath) -> str | None:
        """`file`, `folder` or None."""
        key = path.key
        if self._covers(key):
            return "file" if key in self._entries else "folder" if key in self._folders or not key else None
        if path.is_named_as_folder or not key:
            return self._is_folder(path) or self._is_object(path)
        if not self.store.lists or path.name.endswith(_OBJECTS):
            return self._is_object(path) or self._is_folder(path)
        trying = pool().submit(path.try_to_open)
        try:
            kind = self._is_folder(path)
        finally:
            wait([trying])
        if kind is None:
            return self._is_object(path)
        if trying.exception() is None and key in self.sources:
            if self.sources[key].size:
                raise self._ambiguous(key)
            del self.sources[key]  # an object with which some tools represent a folder
        return kind

    def _is_object(self, path: RemotePath) -> str | None:
        if not path.key or path.key in self._absent:
            return None
        try:
            self.source(path)
        except CheckpointNotFoundError:
            self._absent.add(path.key)
            return None
        return "file"

    def _is_folder(self, path: RemotePath) -> str | None:
        if not self.store.lists:
            return None
        if self.below(path.key, deep=False):
            return "folder"
        self._listed.remove(path.key)
        return None


class RemotePath:
    """An object or folder in a store, with the methods of `Location`.

    Args:
        opening: Shared by all paths derived from one name.
        key: The name in the store, without slashes at its ends.
        is_named_as_folder: Whether the name ended with a slash.
    """

    __slots__ = ("_opening", "is_named_as_folder", "key")

    def __init__(self, opening: _Opening, key: str, *, is_named_as_folder: bool = False) -> None:
        self._opening = opening
        self.key = key
        self.is_named_as_folder = is_named_as_folder

    def __str__(self) -> str:
        return f"{self._opening.store.name}/{self.key}"

    def __repr__(self) -> str:
        return f"RemotePath({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath, /) -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str, /) -> RemotePath:
        return RemotePath(self._opening, f"{self.key}/{self.store.key_of(name)}".strip("/"))

    @property
    def name(self) -> str:
        """The last part of the key; for a whole store, of its name."""
        return (self.key or self._opening.store.name).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        at = self.name.rfind(".")
        return self.name[at:] if 0 < at < len(self.name) - 1 else ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name[: len(self.name) - len(self.suffix)]

    @property
    def parent(self) -> RemotePath:
        """The folder of the object."""
        return RemotePath(self._opening, self.key.rpartition("/")[0])

    @property
    def held(self) -> dict[str, Held] | None:
        """The held uploads of a folder that is being written, by key; None if uploads are not held."""
        return self._opening.held

    @property
    def made(self) -> list[RemotePath]:
        """The objects of a folder that is being written that exist already."""
        return self._opening.made

    def hold(self, held: dict[str, Held] | None, made: list[RemotePath]) -> None:
        """Hold all further uploads to paths of this opening in `held`, or list in `made` what had to be created."""
        self._opening.held, self._opening.made = held, made

    @property
    def store(self) -> Store:
        """The store."""
        return self._opening.store

    def with_name(self, name: str, /) -> RemotePath:
        """The path of another name in the same folder."""
        return self.parent / name

    def relative_to(self, other: RemotePath, /) -> str:
        """The part of the key after that of a folder."""
        return self.key[len(other.key) :].lstrip("/")

    def exists(self) -> bool:
        """Whether there is an object with this name, or one below it."""
        return self._opening.kind(self) is not None

    def is_file(self) -> bool:
        """Whether there is an object with this name."""
        return self._opening.kind(self) == "file"

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        return self._opening.kind(self) == "folder"

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def stat(self) -> _Status:
        """The size and the kind.

        Raises:
            FileNotFoundError: There is neither an object nor a folder with this name.
        """
        kind = self._opening.kind(self)
        if kind is None:
            raise FileNotFoundError(str(self))
        if kind == "folder":
            return _Status(0, S_IFDIR)
        entry = self._opening.entry(self.key)
        return _Status(self.open_source().size if entry is None or entry.size == UNKNOWN else entry.size, S_IFREG)

    def iterdir(self) -> Iterator[RemotePath]:
        """The objects and folders directly in a folder."""
        return (RemotePath(self._opening, key) for key in self._opening.below(self.key, deep=False))

    def rglob(self, pattern: str, /) -> Iterator[RemotePath]:
        """The objects at any depth whose names match a pattern."""
        for key in self._opening.below(self.key, deep=True):
            path = RemotePath(self._opening, key)
            if fnmatchcase(path.name, pattern):
                yield path

    def glob(self, pattern: str, /) -> Iterator[RemotePath]:
        """The objects and folders directly in a folder whose names match a pattern."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: in a store a folder is only a part of names."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        if missing_ok and not self.is_file():
            return
        self.store.delete(self.key)
        self.forget()

    def open_source(self) -> RemoteSource:
        """The object opened for reading, once for all paths of one opening.

        Raises:
            CheckpointNotFoundError: There is no such object.
            CheckpointError: It cannot be read.
        """
        return self._opening.source(self)

    def try_to_open(self) -> None:
        """Open it in a thread of the pool; if it does not exist, reading it will raise the error."""
        with suppress(CheckpointNotFoundError):
            self._opening.source(self, at_once=False)

    def check_writable(self) -> None:
        """Raise a `DestinationError` if the store is read-only; sends no request."""
        self.store.begin(self.key, expected=0, replace=False)

    def forget(self) -> None:
        """Clear everything known about the store that may have changed, after something was written."""
        self._opening.forget()


def opened_together(files: Iterable[RemotePath]) -> None:
    """Fetch the beginnings of objects in a folder at the same time, and the ends of possible archives."""
    paths = list(files)
    if paths and not paths[0].store.lists:
        for _ in in_window([path.try_to_open for path in paths], 16):
            pass
        return
    if paths:
        paths[0].parent.iterdir()  # one listing instead of a request for each
    sources = [path.open_source() for path in paths if path.is_file()]
    fetched_together((source, offset, length) for source in sources for offset, length in source.begin())


def remote(url: str) -> RemotePath:
    """The path of a name in a store.

    Raises:
        UsageError: The kind of store is unknown, or the name contains credentials.
        CheckpointError: The library for it is not installed.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise UsageError.unknown(f"{scheme}:// is not a known kind of store", scheme, SCHEMES)
    try:
        parts = urlsplit(url)
        port = parts.port if scheme in ("http", "https") else None
    except ValueError:
        raise UsageError(f"{scheme}://: what follows is not a name or an address", hint=_FORMS) from None
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in url):
        raise UsageError(f"{scheme}://: a name in a store cannot have control characters")
    if port == 0 or (scheme in ("http", "https") and "#" in url):
        raise UsageError(
            f"{scheme}://{parts.hostname}: an address has no part that begins with #, and no port 0",
            hint="In the name of a file, write %23 for #.",
        )
    if parts.username is not None or parts.password is not None or (scheme != "hf" and "@" in parts.netloc):
        raise UsageError(
            f"{scheme}://{parts.hostname}: the name contains credentials",
            hint="Put them into the environment or the configuration of the store's own tools.",
        )
    store: Store
    if scheme in ("http", "https"):
        from optimstate.io.remote.web import web_store

        store, key = web_store(url)
    elif scheme == "hf":
        from optimstate.io.remote.hub import hub_store

        store, key = hub_store(rest)
    else:
        bucket, _, key = rest.partition("/")
        if "?" in rest or not bucket:
            raise UsageError(
                f"{scheme}://{rest.partition('?')[0]}: a name in a store is {scheme}://BUCKET/NAME, without ?",
                hint="Signed addresses begin with https://; a version of an object cannot be given.",
            )
        if any(part in ("", ".", "..") for part in key.removesuffix("/").split("/") if key):
            raise UsageError(
                f"{scheme}://{rest}: a part of the name is empty, . or ..",
                hint=f"A name in a store is {scheme}://BUCKET/NAME, with one slash between its parts.",
            )
        from optimstate.io.remote.objects import object_store

        store = object_store(scheme, bucket)
    return RemotePath(_Opening(store), key.strip("/"), is_named_as_folder=key.endswith("/"))
