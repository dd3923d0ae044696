"""Several processes, on one machine or many, that write one folder together: a shared stage, votes, and one commit.

The processes communicate only through the stage, a folder beside the destination on a file system that all of them can
access, or objects in the store to which they write (`optimstate.io.remote.stage`). Its name is derived from everything
that the result depends on, so that a second attempt continues the first. Every process updates a file as its sign of
life, and writes a vote when it is done; the first process waits for all votes and commits.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from optimstate.errors import CheckpointError, DestinationError
from optimstate.io.directory import AtomicDirectory
from optimstate.io.location import Location
from optimstate.io.temporary import lock, others_of, remove_dead
from optimstate.record import Record

__all__ = ["FolderStage", "Stage", "Team", "team_of_environment"]

_PREFIX = ".together."  # of the names of files that are not part of the result


class Team(Record):
    """The processes that work together.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        patience: The seconds without a sign of life after which a process counts as dead.
    """

    rank: int
    size: int
    patience: float = 60.0


def team_of_environment(environment: Mapping[str, str]) -> Team | None:
    """The processes that torchrun started together with this one; None if there is only one.

    With other launchers `OPTIMSTATE_TOGETHER` must be set beside `RANK` and `WORLD_SIZE`, because those two are set in
    every process of a training run, and each may use this library alone.

    Raises:
        DestinationError: A variable is not a number, or out of range.
    """
    if not ("TORCHELASTIC_RUN_ID" in environment or "OPTIMSTATE_TOGETHER" in environment):
        return None
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        patience = float(environment.get("OPTIMSTATE_PATIENCE", Team.patience))
    except (KeyError, ValueError) as error:
        raise DestinationError(f"RANK, WORLD_SIZE and OPTIMSTATE_PATIENCE must be numbers: {error}") from None
    if not (0 <= rank < size and 0 < patience < float("inf")):
        raise DestinationError(
            f"RANK is {rank}, WORLD_SIZE {size} and OPTIMSTATE_PATIENCE {patience}: the first must be from 0 to below "
            "the second, and the third more than 0"
        )
    return Team(rank, size, patience) if size > 1 else None


class Stage(ABC):
    """A folder that several processes fill together.

    The first process uses it as a context manager, which commits when it is left; after an error everything stays for
    another attempt. The others only call its methods.

    Args:
        destination: The final name.
        folder: The folder in which files are written until then.
        team: The processes.
        check: Called before this process votes; raises if the source has changed.

    Attributes:
        in_store: Whether files are objects in a store: each written from beginning to end by one process, never
            renamed.
        beat: The seconds between two signs of life.
        poll: The seconds between two looks at the messages of other processes.
    """

    in_store = False
    beat = 1.0
    poll = 0.05
    destination: Location
    folder: Location

    def __init__(self, destination: Location, folder: Location, team: Team, check: Callable[[], None] | None) -> None:
        self.destination = destination
        self.folder = folder
        self.team = team
        self._check = check
        self._seen: dict[int, tuple[object, float]] = {}
        self._moved: dict[int, int] = {}

    @abstractmethod
    def __enter__(self) -> Location:
        """Begin or continue; returns the folder to write to."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Commit."""

    @abstractmethod
    def clear(self) -> None:
        """Remove the files that are not part of the result, before the commit."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The number of bytes of every written file, by name."""

    # --- messages ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _look(self) -> None:
        """Update what is known about the messages, where they are not read one by one."""

    @abstractmethod
    def _is_open(self) -> bool:
        """Whether the first process has begun and not yet committed."""

    @abstractmethod
    def _is_elsewhere(self, others: dict[str, object]) -> bool:
        """Whether a first process is alive in another stage of the destination: its sign changed since the last call.

        Args:
            others: The signs seen so far; new ones are added.
        """

    @abstractmethod
    def _sign_of(self, rank: int, last: object) -> tuple[object, int]:
        """A process's sign of life, None before the first, and, if it is not `last`, the bytes that it has copied."""

    @abstractmethod
    def _give_sign(self, moved: int) -> None:
        """Give a sign of life with the number of bytes that this process has copied."""

    @abstractmethod
    def _end_signs(self) -> None:
        """Remove the signs of life of this process."""

    @abstractmethod
    def _has(self, name: str) -> bool:
        """Whether there is a message of this name."""

    @abstractmethod
    def _read(self, name: str) -> Any:
        """The message of this name, or None."""

    @abstractmethod
    def _write(self, name: str, value: Any) -> None:
        """Write a message, which appears whole."""

    # --- the first process ----------------------------------------------------------------------------------------

    def give(self, rank: int, work: Any) -> None:
        """Give a process its work."""
        self._write(f"work.{rank}", work)

    def votes(self, moved: Callable[[int], None] | None) -> list[Any]:
        """Wait for the votes of all processes, and return them in order.

        Args:
            moved: Called with the bytes that others have copied since the last call.

        Raises:
            DestinationError: A process is dead.
        """
        found: dict[int, Any] = {}
        while True:
            self._look()
            for rank in range(self.team.size):
                if rank in found:
                    continue
                vote = self._read(f"vote.{rank}")
                if vote is not None:
                    found[rank] = vote
                elif rank != self.team.rank:
                    self._expect(rank, moved)
            if len(found) == self.team.size:
                return [found[rank] for rank in range(self.team.size)]
            time.sleep(self.poll)

    def _expect(self, rank: int, moved: Callable[[int], None] | None) -> None:
        """Check for a new sign of life; the time since the last one is measured with this process's own clock."""
        now = time.monotonic()
        last, since = self._seen.get(rank, (None, now))
        sign, done = self._sign_of(rank, last)
        if moved is not None and done > self._moved.get(rank, 0):
            moved(done - self._moved.get(rank, 0))
            self._moved[rank] = done
        if rank not in self._seen or sign != last:
            self._seen[rank] = sign, now
        elif now - since > self.team.patience:
            raise DestinationError(
                f"{self.destination}: rank {rank} has given no sign of life for {self.team.patience:.0f} seconds; "
                "nothing has been committed",
                hint="Start it again with the same plan and number of processes; it continues where it stopped.",
            )

    # --- every process --------------------------------------------------------------------------------------------

    def work(self) -> Any:
        """Wait for the work that the first process gives this one.

        Raises:
            DestinationError: The first process is dead, has not begun, or does something else.
        """
        begun = time.monotonic()
        others: dict[str, object] = {}
        while True:
            self._look()
            work = self._read(f"work.{self.team.rank}")
            if work is not None:
                return work
            if self._is_open():
                self._expect(0, None)
            elif self._is_elsewhere(others):
                raise DestinationError(
                    f"{self.destination}: rank 0 writes it by another command, or from another version of the source",
                    hint="Start all processes with the same arguments after all writing to the source has ended.",
                )
            elif (waited := time.monotonic() - begun) > 10 * self.team.patience:
                raise DestinationError(f"{self.destination}: rank 0 has not begun in {waited:.0f} seconds")
            time.sleep(self.poll)

    def vote(self, done: Any) -> None:
        """Write this process's vote: its share is done.

        Raises:
            CheckpointError: The source has changed meanwhile.
        """
        if self._check is not None:
            self._check()
        self._write(f"vote.{self.team.rank}", done)

    def voted(self) -> Any:
        """This process's vote in an earlier attempt, or None."""
        self._look()
        found = self._read(f"vote.{self.team.rank}")
        return self._read(f"done.{self.team.rank}") if found is None else found

    def wait(self) -> None:
        """Wait until the first process has committed.

        Raises:
            DestinationError: The first process is dead.
        """
        while True:
            self._look()
            if not self._is_open():
                return
            with suppress(FileNotFoundError):
                if not self._has(f"vote.{self.team.rank}"):
                    done = self._read(f"done.{self.team.rank}")
                    if done is None:  # the first process has committed and is removing the messages
                        return
                    self.vote(done)
                self._expect(0, None)
            time.sleep(self.poll)

    @contextmanager
    def alive(self) -> Iterator[Callable[[int], None]]:
        """Give signs of life during the block; the value is to be called with the number of bytes copied."""
        stopped, count = Event(), [0]

        def beat() -> None:
            while True:
                with suppress(OSError, CheckpointError):
                    self._give_sign(count[0])
                if stopped.wait(self.beat):
                    return

        def moved(nbytes: int) -> None:
            count[0] += nbytes

        thread = Thread(target=beat, name="optimstate-alive", daemon=True)
        thread.start()
        try:
            yield moved
        finally:
            stopped.set()
            thread.join()
            self._end_signs()


class FolderStage(AtomicDirectory, Stage):
    """A stage in a folder beside the destination.

    Args:
        path: The destination.
        digest: Twelve hexadecimal digits derived from everything that the result depends on.
        team: The processes.
        sync: Flush to the disk before the folder gets its final name.
        check: As for `Stage`.
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
    ) -> None:
        AtomicDirectory.__init__(self, path, sync=sync)
        name = os.fsdecode(os.fsencode(path.name)[:200])
        Stage.__init__(self, self.path, path.with_name(f".{name}.{digest}.part"), team, check)

    def _begin(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.fd = os.open(self.folder, os.O_RDONLY)
        if lock(self.fd) is False:
            raise DestinationError(f"{self.path}: is being written by other processes with the same plan")
        for rank in range(self.team.size):  # votes of an earlier attempt, which the processes must repeat
            if rank != self.team.rank:
                with suppress(FileNotFoundError):
                    (self.folder / f"{_PREFIX}vote.{rank}").replace(self.folder / f"{_PREFIX}done.{rank}")
        for dead in others_of(self.path):
            if dead != self.folder:
                remove_dead(dead)
        self._temporary = self.folder

    def _complete(self) -> None:
        super()._complete()
        self.clear()  # a sign of life may have been written meanwhile

    def _discard(self) -> None:
        with suppress(OSError):
            self._close()

    def clear(self) -> None:
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
        if self.folder.is_dir():
            (self.folder / f"{_PREFIX}alive.{self.team.rank}").write_text(str(moved))

    def _has(self, name: str) -> bool:
        return (self.folder / f"{_PREFIX}{name}").exists()

    def _write(self, name: str, value: Any) -> None:
        path = self.folder / f"{_PREFIX}{name}"
        part = path.with_name(f"{path.name}.new")
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / f"{_PREFIX}{name}").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
