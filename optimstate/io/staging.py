"""A folder beside its destination that several processes fill together, on a file system that all can access."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimstate.errors import DestinationError, DestinationExistsError
from optimstate.io.directory import AtomicDirectory
from optimstate.io.temporary import count_as_parts, lock, others_of, remove, remove_dead
from optimstate.io.together import Stage, Team

__all__ = ["FolderStage"]

_PREFIX = ".together."  # of the names of files that are not part of the result


class FolderStage(AtomicDirectory, Stage):
    """A stage in a folder beside the destination.

    Args:
        path: The destination.
        digest: Twelve hexadecimal digits derived from everything that the result depends on.
        team: The processes.
        sync: Flush to the disk before the folder gets its final name.
        check: As for `Stage`.
        force: Replace a destination that exists.
    """

    folder: Path

    def __init__(
        self,
        path: Path,
        digest: str,
        team: Team,
        *,
        sync: bool = True,
        check: Callable[[], None] | None = None,
        force: bool = False,
    ) -> None:
        self._force = force
        self._is_held = False  # from `begin` to `withdraw`, also after an error
        AtomicDirectory.__init__(self, path, sync=sync)
        name = os.fsdecode(os.fsencode(path.name)[:200])
        Stage.__init__(self, self.path, path.with_name(f".{name}.{digest}.part"), team, check)

    def begin(self) -> None:
        """Begin in the first process before anything is planned, if the destination has a folder to be in."""
        if self.path.parent.is_dir():
            self._is_held = True
            self._or_nothing(self._begin)

    def _begin(self) -> None:
        if self._temporary is not None:
            return
        self.folder.mkdir(exist_ok=True)
        self.fd = os.open(self.folder, os.O_RDONLY)
        if lock(self.fd) is False:
            raise DestinationError(
                f"{self.path}: is being written by other processes with the same plan",
                hint="Wait until they have ended.",
            )
        self._temporary, self.is_owner = self.folder, True
        for other in others_of(self.path):
            if other != self.folder and remove_dead(other) is False:
                raise DestinationError(
                    f"{self.path}: is being written by another command",
                    hint="Wait until it has ended, or give another destination.",
                )
        for name in ("work", "ended"):  # of an earlier attempt
            for file in self.folder.glob(f"{_PREFIX}{name}.*"):
                file.unlink(missing_ok=True)
        for rank in range(1, self.team.size):  # votes of an earlier attempt, which the processes must repeat
            with suppress(FileNotFoundError):
                (self.folder / f"{_PREFIX}vote.{rank}").replace(self.folder / f"{_PREFIX}done.{rank}")

    def _complete(self) -> None:
        if not self._force and os.path.lexists(self.path):
            raise DestinationExistsError(
                f"{self.path}: was made by another program meanwhile",
                hint="Give --force to replace it, or remove it: the same command then continues where it stopped.",
            )
        self._remove_messages()
        super()._complete()
        self._remove_messages()  # a sign of life may have been written meanwhile

    def _discard(self) -> None:
        if not self._is_held:
            self._let_go()

    def _let_go(self) -> None:
        self._temporary = None
        with suppress(OSError):
            self._close()

    def clear(self) -> None:
        """Nothing: the messages are removed with the commit, so that a process killed before it loses nothing."""

    def withdraw(self) -> str:
        """Remove the folder if there are only messages in it; returns its path if it stays."""
        count_as_parts(self.folder)
        if self._temporary is None:
            return ""
        passing = tuple(f"{_PREFIX}{name}." for name in ("alive", "ended"))
        with suppress(OSError):
            if all(entry.name.startswith(passing) for entry in self.folder.iterdir()):
                remove(self.folder)
        self._let_go()
        return str(self.folder) if self.folder.is_dir() else ""

    def _remove_messages(self) -> None:
        """Remove the files that are not part of the result, earlier votes first: they ask processes to vote again."""
        for folder in (self.folder, self.path):
            for file in sorted(folder.glob(f"{_PREFIX}*"), key=lambda file: not file.name.startswith(f"{_PREFIX}done")):
                file.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """The number of bytes of every written file, by name."""
        return {file.name: file.stat().st_size for file in self.folder.iterdir() if file.is_file()}

    def _look(self) -> None:
        """Nothing: files are read one by one."""

    def _end_signs(self) -> None:
        """Nothing: `clear` removes them."""

    def _is_open(self) -> bool:
        return self.folder.is_dir()

    def _is_elsewhere(self, others: dict[str, object]) -> bool:
        for other in others_of(self.path):
            with suppress(OSError):
                beat = (other / f"{_PREFIX}alive.0").stat().st_mtime
                if others.setdefault(other.name, beat) != beat:
                    return True
        return False

    def _sign_of(self, rank: int, last: object) -> tuple[object, int]:  # noqa: ARG002  # it is read in any case
        path = self.folder / f"{_PREFIX}alive.{rank}"
        beat: float | None = None
        with suppress(OSError, ValueError):
            beat = path.stat().st_mtime
            return beat, int(path.read_text() or 0)
        return beat, 0

    def _give_sign(self, moved: int) -> None:
        signs = self.folder if self.team.rank == 0 else self.folder / f"{_PREFIX}alive.0"
        if signs.exists():  # not in a folder that another program has put in the place of this one
            (self.folder / f"{_PREFIX}alive.{self.team.rank}").write_text(str(moved))

    def _has(self, name: str) -> bool:
        return (self.folder / f"{_PREFIX}{name}").exists()

    def _write(self, name: str, value: Any) -> None:
        path = self.folder / f"{_PREFIX}{name}"
        part = path.with_name(
            f"{path.name}.{os.urandom(4).hex()}"
        )  # of an attempt that still lives there may be another
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value))  # json.dump takes ten times as long
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / f"{_PREFIX}{name}").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _remove(self, name: str) -> None:
        (self.folder / f"{_PREFIX}{name}").unlink(missing_ok=True)
