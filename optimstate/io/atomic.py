"""The base class of outputs that appear whole or not at all; wherever one fails, nothing is left of it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from optimstate.errors import CheckpointError, DestinationError
from optimstate.io.destination import cannot_write
from optimstate.io.temporary import remove

__all__ = ["Atomic"]


class Atomic(ABC):
    """A context manager for an output with a temporary name, which gets its final name if no error is raised.

    Attributes:
        path: The final name.
        fd: The descriptor of the locked temporary file or folder; -1 if there is none.
    """

    path: Path
    fd = -1
    _temporary: Path | None = None

    @abstractmethod
    def _complete(self) -> None:
        """Give the output its final name; everything is written."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._or_nothing(self._complete)
        else:
            self._fail(error)

    def _or_nothing(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Remove what was written; raise an `OSError` as an error that names the output."""
        self._discard()
        if isinstance(error, OSError) and not isinstance(error, DestinationError | CheckpointError):
            raise cannot_write(self.path, error) from error

    def _discard(self) -> None:
        if self._temporary is not None:
            remove(self._temporary)
        with suppress(OSError):
            self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
