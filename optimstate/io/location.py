"""The location of a checkpoint: a local path, or a name in a store, which contains `://`.

`Location` is the part of `pathlib.Path` that formats and verbs use; names in stores implement it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

__all__ = ["InStore", "Location", "Place", "Status"]


class Status(Protocol):
    """The attributes of `os.stat_result` that are used."""

    @property
    def st_size(self) -> int:
        """The number of bytes."""

    @property
    def st_mode(self) -> int:
        """The mode, for `stat.S_ISREG` and `stat.S_ISDIR`."""


@runtime_checkable
class InStore(Protocol):
    """What a name in a store has beside the methods of `Location`."""

    def check_writable(self) -> None:
        """Raise a `DestinationError` if the store is read-only; sends no request."""


class Location(Protocol):
    """A file or folder; for the methods see `pathlib.Path`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def stem(self) -> str: ...  # noqa: D102

    @property
    def suffix(self) -> str: ...  # noqa: D102

    @property
    def parent(self) -> Self: ...  # noqa: D102

    def __truediv__(self, name: str, /) -> Self: ...

    def __lt__(self, other: Any, /) -> bool: ...

    def with_name(self, name: str, /) -> Self: ...  # noqa: D102

    def relative_to(self, other: Any, /) -> Any: ...  # noqa: D102

    def exists(self) -> bool: ...  # noqa: D102

    def is_file(self) -> bool: ...  # noqa: D102

    def is_dir(self) -> bool: ...  # noqa: D102

    def is_symlink(self) -> bool: ...  # noqa: D102

    def stat(self) -> Status: ...  # noqa: D102

    def iterdir(self) -> Iterator[Self]: ...  # noqa: D102

    def glob(self, pattern: str, /) -> Iterator[Self]: ...  # noqa: D102

    def rglob(self, pattern: str, /) -> Iterator[Self]: ...  # noqa: D102

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None: ...  # noqa: D102

    def unlink(self, missing_ok: bool = False) -> None: ...  # noqa: D102


Place: TypeAlias = str | PathLike[str] | Location
"""A file or folder as verbs accept it: a name or a `Location`."""
