"""Several processes, on one machine or many, that write one folder together: a shared stage, votes, and one commit.

The processes communicate only through the stage, a folder beside the destination on a file system that all of them can
access (`optimstate.io.staging`), or objects in the store to which they write (`optimstate.io.remote.stage`). Its name
is derived from everything that the result depends on, so that a second attempt continues the first. Every process
updates a file as its sign of life, notes what it has finished, and writes a vote when it is done; the first process
waits for all votes and commits. A process that ends with an error says so to the others.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Thread
from types import TracebackType
from typing import Any

from optimstate.errors import CheckpointError, DestinationError, ProcessEndedError
from optimstate.io.location import Location
from optimstate.record import Record

__all__ = ["Stage", "Team", "is_team", "team_of_environment"]

_MOMENT = 1.0  # seconds that the first process waits until the others know of its error


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


def is_team(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, or another launcher with `OPTIMSTATE_TOGETHER=1`, started this process together with others."""
    asked = environment.get("OPTIMSTATE_TOGETHER", "") not in ("", "0")
    return asked or {"TORCHELASTIC_RUN_ID", "RANK"} <= environment.keys()


def team_of_environment(environment: Mapping[str, str]) -> Team | None:
    """The processes that torchrun started together with this one; None if there is only one.

    With other launchers `OPTIMSTATE_TOGETHER` must be set beside `RANK` and `WORLD_SIZE`, because those two are set in
    every process of a training run, and each may use this library alone.

    Raises:
        DestinationError: A variable is missing, not a number, or out of range.
    """
    if not is_team(environment):
        return None
    names = ("RANK", "WORLD_SIZE")
    missing = [name for name in names if name not in environment]
    if missing:
        raise DestinationError(
            f"{' and '.join(missing)} must be set for processes that work together",
            hint="Under srun, for example: RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS, in each process.",
        )
    try:
        rank, size = (int(environment[name]) for name in names)
        patience = float(environment.get("OPTIMSTATE_PATIENCE", Team.patience))
    except ValueError as error:
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
        is_owner: Whether this process is the first one, and no other attempt's first process has the stage.
    """

    in_store = False
    beat = 1.0
    poll = 0.05
    is_owner = False
    destination: Location
    folder: Location

    def __init__(self, destination: Location, folder: Location, team: Team, check: Callable[[], None] | None) -> None:
        self.destination = destination
        self.folder = folder
        self.team = team
        self._check = check
        self._seen: dict[int, tuple[object, float]] = {}
        self._moved: dict[int, int] = {}
        self._beating: Callable[[int], None] | None = None

    @abstractmethod
    def begin(self) -> None:
        """Begin in the first process before anything is planned, where that is possible; again, it does nothing."""

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
        """Prepare the commit: everything is written but what makes a folder in a store loadable."""

    @abstractmethod
    def withdraw(self) -> str:
        """Give up what no other attempt can use; returns where the rest is, or an empty string."""

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

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Remove a message, if it exists."""

    # --- the first process ----------------------------------------------------------------------------------------

    def give(self, rank: int, work: Any) -> None:
        """Give a process its work."""
        self._write(f"work.{rank}", work)

    def votes(self, moved: Callable[[int], None] | None) -> list[Any]:
        """Wait for the votes of all processes, and return them in order.

        Args:
            moved: Called with the bytes that others have copied since the last call.

        Raises:
            DestinationError: A process is dead, or has ended with an error.
        """
        found: dict[int, Any] = {}
        while True:
            self._look()
            self._expect_none_ended(rank for rank in range(self.team.size) if rank not in (*found, self.team.rank))
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
                hint="Start it again with the same plan and number of processes.",
            )

    def _expect_none_ended(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            ended = self._read(f"ended.{rank}")
            if ended is not None:
                code, why = ended
                raise ProcessEndedError(f"{self.destination}: rank {rank} has ended: {why}", code=code)

    # --- every process --------------------------------------------------------------------------------------------

    def work(self) -> Any:
        """Wait for the work that the first process gives this one.

        Raises:
            DestinationError: The first process is dead, has not begun, or does something else.
        """
        begun = time.monotonic()
        others: dict[str, object] = {}
        opened = False
        while True:
            self._look()
            self._expect_none_ended([0])
            work = self._read(f"work.{self.team.rank}")
            if work is not None:
                return work
            if self._is_open():
                opened = True
                self._expect(0, None)
            elif opened:
                raise DestinationError(f"{self.destination}: rank 0 has ended and given this process no work")
            elif self._is_elsewhere(others):
                raise DestinationError(
                    f"{self.destination}: rank 0 writes it by another command, or from another version of the source",
                    hint="Start all processes with the same arguments after all writing to the source has ended.",
                )
            elif (waited := time.monotonic() - begun) > 10 * self.team.patience:
                raise DestinationError(
                    f"{self.destination}: rank 0 has not begun in {waited:.0f} seconds",
                    hint="All processes must see the same folders: the source, and that of the destination.",
                )
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

    def note(self, finished: Any, file: str = "") -> None:
        """Note what this process has finished of its work, or of a file, for another attempt."""
        self._write(self._note_of(file), finished)

    def noted(self, file: str = "") -> Any:
        """What this process noted last of its work, or of a file, in this attempt or an earlier one, or None."""
        return self._read(self._note_of(file))

    def _note_of(self, file: str) -> str:
        return f"note.{self.team.rank}.{file}.done" if file else f"note.{self.team.rank}"

    def end(self, code: int, why: str) -> None:
        """Tell the other processes that this one ends with an error; the first one waits a moment until they know.

        Args:
            code: The exit code, which is to be that of all.
            why: The message of the error.
        """
        rank = self.team.rank
        with suppress(OSError, CheckpointError):
            self._look()
            if not (self.is_owner if rank == 0 else self._is_open()):
                return
            self._write(f"ended.{rank}", [code, why])
            if rank:
                return
            others = set(range(1, self.team.size))
            ends = time.monotonic() + min(_MOMENT, self.team.patience)
            while others and time.monotonic() < ends:
                time.sleep(self.poll)
                self._look()
                others = {other for other in others if not self._has(f"ended.{other}")}
            for other in range(self.team.size):
                self._remove(f"ended.{other}")

    def wait(self) -> None:
        """Wait until the first process has committed.

        Raises:
            DestinationError: The first process is dead, or has ended with an error.
        """
        while True:
            self._look()
            if not self._is_open():
                return
            self._expect_none_ended([0])
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
        """Give signs of life during the block; the value is to be called with the number of bytes copied.

        A block inside another one uses the signs of the outer one.
        """
        if self._beating is not None:
            yield self._beating
            return
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
        self._beating = moved
        try:
            yield moved
        finally:
            self._beating = None
            stopped.set()
            thread.join()
            self._end_signs()
