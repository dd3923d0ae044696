"""Several processes, on one machine or many, that fill one folder: a stage they share, votes, and one commit.

They meet in the stage alone, a folder beside the destination on a file system that all of them see, or objects of the
store that they write to (`optimstate.io.remote.stage`); no connection is made between them. The stage is named after
what is to be done, so that a second attempt finds what the first has done. Every process says that it lives by a file
that it touches, and that it is done by a vote; the first process waits for all votes and commits.
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

_PREFIX = ".together."  # of the files that are not part of the result


class Team(Record):
    """The processes that work together.

    Attributes:
        rank: The number of this one.
        size: How many there are.
        patience: Seconds without a sign of life after which a process counts as dead.
    """

    rank: int
    size: int
    patience: float = 60.0


def team_of_environment(environment: Mapping[str, str]) -> Team | None:
    """The processes that torchrun has started with this one; None where there is one only.

    Other launchers set `OPTIMSTATE_TOGETHER` beside `RANK` and `WORLD_SIZE`: those two alone are there in every process
    of a training run, which may call this library for itself.
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
    """What processes fill together, as the first of them and as the others see it.

    As a context manager, for the first process, it commits when it is left, and stays as it is after an error, to go on
    with. The others only call its methods.

    Args:
        destination: Its name when it is complete.
        folder: Where the files of the result are written.
        team: The processes.
        check: Raises where the source is not what it was; asked before this process says that it is done.

    Attributes:
        in_store: Whether files are objects: written from beginning to end by one process each, and never renamed.
        beat: Seconds between two signs of life.
        poll: Seconds between two looks at what others say.
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
        """Begin, or go on; the place to write to."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Commit."""

    @abstractmethod
    def clear(self) -> None:
        """Remove what is not part of the result, before it takes its name."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The bytes of every file that is written, by name."""

    # --- what is said ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _look(self) -> None:
        """Learn what others say, where that is not asked one by one."""

    @abstractmethod
    def _is_open(self) -> bool:
        """Whether the first process has begun, and not committed."""

    @abstractmethod
    def _is_elsewhere(self, others: dict[str, object]) -> bool:
        """Whether a first process lives in another stage of the destination: its sign has moved since it was seen."""

    @abstractmethod
    def _sign_of(self, rank: int, last: object) -> tuple[object, int]:
        """What changes while a process lives, None before; the bytes it has moved, where it is not the last one."""

    @abstractmethod
    def _give_sign(self, moved: int) -> None:
        """Say that this process lives and has moved so many bytes."""

    @abstractmethod
    def _end_signs(self) -> None:
        """This process says no more."""

    @abstractmethod
    def _has(self, name: str) -> bool:
        """Whether something was said."""

    @abstractmethod
    def _read(self, name: str) -> Any:
        """What was said, or None."""

    @abstractmethod
    def _write(self, name: str, value: Any) -> None:
        """Say something, whole."""

    # --- the first process ----------------------------------------------------------------------------------------

    def give(self, rank: int, work: Any) -> None:
        """Tell a process what to do."""
        self._write(f"work.{rank}", work)

    def votes(self, moved: Callable[[int], None] | None) -> list[Any]:
        """What every process has done, in order, when all have.

        Args:
            moved: Called with the bytes that others have moved since the last call.

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
        """A sign of life that is newer than the last, as this process's own clock counts."""
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
                hint="Start it again with the same plan and number of processes: it goes on where it stopped.",
            )

    # --- every process --------------------------------------------------------------------------------------------

    def work(self) -> Any:
        """What this process is to do, when the first one has said so.

        Raises:
            DestinationError: It does not.
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
                    hint="Start all processes with the same arguments, when nobody writes to the source any more.",
                )
            elif (waited := time.monotonic() - begun) > 10 * self.team.patience:
                raise DestinationError(f"{self.destination}: rank 0 has not begun in {waited:.0f} seconds")
            time.sleep(self.poll)

    def vote(self, done: Any) -> None:
        """Say that this process has done its share.

        Raises:
            CheckpointError: The source has changed meanwhile.
        """
        if self._check is not None:
            self._check()
        self._write(f"vote.{self.team.rank}", done)

    def voted(self) -> Any:
        """What this process said it had done at an earlier attempt, or None."""
        self._look()
        found = self._read(f"vote.{self.team.rank}")
        return self._read(f"done.{self.team.rank}") if found is None else found

    def wait(self) -> None:
        """Until the first process has committed.

        Raises:
            DestinationError: It does not.
        """
        while True:
            self._look()
            if not self._is_open():
                return
            with suppress(FileNotFoundError):
                if not self._has(f"vote.{self.team.rank}"):
                    done = self._read(f"done.{self.team.rank}")
                    if done is None:  # all is done, and what is not part of the result is being removed
                        return
                    self.vote(done)
                self._expect(0, None)
            time.sleep(self.poll)

    @contextmanager
    def alive(self) -> Iterator[Callable[[int], None]]:
        """Give signs of life meanwhile; the value is to be called with bytes that were moved."""
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
    """A folder beside the destination, whose name it takes when it is left without an error.

    Args:
        path: The destination.
        digest: Twelve hexadecimal digits of everything that the result depends on.
        team: The processes.
        sync: Flush to the disk before the folder takes its name.
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
        for rank in range(self.team.size):  # what was done at an earlier attempt is to be said again, by who is there
            if rank != self.team.rank:
                with suppress(FileNotFoundError):
                    (self.folder / f"{_PREFIX}vote.{rank}").replace(self.folder / f"{_PREFIX}done.{rank}")
        for dead in others_of(self.path):
            if dead != self.folder:
                remove_dead(dead)
        self._temporary = self.folder

    def _complete(self) -> None:
        super()._complete()
        self.clear()  # a sign of life may have come since

    def _discard(self) -> None:
        with suppress(OSError):
            self._close()

    def clear(self) -> None:
        """Remove what is not part of the result, what asks the others for another vote before their votes."""
        for folder in (self.folder, self.path):
            for file in sorted(folder.glob(f"{_PREFIX}*"), key=lambda file: not file.name.startswith(f"{_PREFIX}done")):
                file.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """The bytes of every file that is written, by name."""
        return {file.name: file.stat().st_size for file in self.folder.iterdir() if file.is_file()}

    def _look(self) -> None:
        """Nothing: files are looked at one by one."""

    def _end_signs(self) -> None:
        """Nothing: they go with the folder's other files."""

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
