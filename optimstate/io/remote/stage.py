"""Processes that fill a folder in a store together, with messages in objects beside it.

Stores cannot rename folders. The data files of a distributed checkpoint get their names as soon as they are complete;
the file that names the others, and so makes them a checkpoint, is written by the first process when all have voted, if
there is none yet. Other files do not exist before that: each process holds its uploads, and the first one creates all
the objects (`release`).

The messages are in `.NAME.000000000000.part/DIGEST/` beside the destination. The object `claim`, one for all attempts,
exists from the beginning to the commit and belongs to one first process. It keeps others away, and it distinguishes
objects of an unfinished attempt from those of other programs. Another process takes it over if no sign of life changes
for a while.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from types import TracebackType
from typing import Any

from optimstate.errors import CheckpointError, CheckpointNotFoundError, DestinationError, DestinationExistsError
from optimstate.io.remote.output import RemoteFile, discard, release
from optimstate.io.remote.path import Held, RemotePath
from optimstate.io.remote.uploads import PartsGoneError
from optimstate.io.together import Stage, Team

__all__ = ["StoreStage"]

_BEGUN = "begun"
_CLOSING = "closing"
_MOST = 1 << 40  # bytes of a message: all of them


class StoreStage(Stage):
    """A folder of objects that processes write together; see `Stage`.

    Args:
        path: The destination.
        digest: Twelve hexadecimal digits derived from everything that the result depends on.
        team: The processes.
        last: The name of the object without which the others are not a checkpoint.
        check: As for `Stage`.

    Raises:
        DestinationError: The store is read-only.
    """

    in_store = True

    def __init__(
        self, path: RemotePath, digest: str, team: Team, *, last: str, check: Callable[[], None] | None = None
    ) -> None:
        super().__init__(path, path, team, check)
        path.check_writable()
        self._store = path.store
        self._path = path
        self._key = path.key
        self._meeting = path.with_name(f".{path.name}.{'0' * 12}.part").key
        self._place = f"{self._meeting}/{digest}"
        self._claim = f"{self._meeting}/claim"
        self._mine = os.urandom(16).hex().encode()
        self._last = last
        self._said: dict[str, str | None] = {}
        self._count = 0
        self.beat = min(2.0, team.patience / 8)
        self.poll = self.beat / 2

    # --- the first process ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin in the first process before anything is planned: the others see its signs of life."""
        self.__enter__()

    def __enter__(self) -> RemotePath:
        if self.is_owner:
            return self._path
        said, there = self._keys(self._meeting), list(self.sizes())
        claimed = self._claim in said
        closed = any(_name(key) == _CLOSING and key != f"{self._place}/{_CLOSING}" for key in said)
        if self._last in there or (there and not claimed) or closed:
            raise DestinationExistsError(
                f"{self.destination}: there are objects below this name; a folder of a store is not replaced",
                hint="Give another name, or remove it with the store's own tools first.",
            )
        if claimed:
            self._expect_none_alive()
        self._put(self._claim, self._mine, replace=claimed)
        if claimed:  # of several processes that take it over at the same time, the last one has it
            time.sleep(self.beat)
        self._expect_claim()
        others = [key for key in said if key != self._claim and not key.startswith(f"{self._place}/")]
        for key in others:
            if _name(key).startswith(("vote.", "done.")):
                self._discard_voted(key)
        for key in others:
            with suppress(CheckpointNotFoundError):  # a held upload that was discarded above
                self._store.delete(key)
        begun = f"{self._place}/{_BEGUN}"
        if begun not in said:
            for name in there:  # objects made with another plan or source
                self._store.delete(f"{self._key}/{name}")
            self._put(begun, b"0", replace=True)
        self._look()
        for rank in range(self.team.size):  # votes of an earlier attempt, which the processes must repeat
            vote = self._read(f"vote.{rank}") if rank != self.team.rank else None
            if vote is not None:
                self._write(f"done.{rank}", vote)
                self._store.delete(f"{self._place}/vote.{rank}")
            if f"ended.{rank}" in self._said:
                self._remove(f"ended.{rank}")
        self.is_owner = True
        self._give_sign(0)
        self._path.forget()
        return self._path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if error is None:
            order = {"done": 0, "vote": 1, _BEGUN: 3}
            for key in sorted(self._keys(self._place), key=lambda key: order.get(_name(key).split(".")[0], 2)):
                self._store.delete(key)
            for key in self._keys(self._place):  # messages written meanwhile
                with suppress(CheckpointNotFoundError):
                    self._store.delete(key)
            self._store.delete(self._claim)
            self._store.abort_unfinished(self._key)  # uploads of dead processes
            self.is_owner = False
        self._path.forget()

    def clear(self) -> None:
        """Remove nothing, as messages are elsewhere; check for the last time that no other process has taken over."""
        self._expect_claim()

    def withdraw(self) -> str:
        """Remove the messages if nothing has been uploaded; returns where they are if they stay."""
        if not self.is_owner:
            return ""
        with suppress(OSError, CheckpointError):
            said = self._keys(self._place)
            if not self.sizes() and all(_name(key).split(".")[0] in ("alive", "ended", _BEGUN) for key in said):
                self._expect_claim()
                for key in (*said, self._claim):
                    self._store.delete(key)
                self.is_owner = False
                self._path.forget()
                return ""
        return str(self._path.with_name(f".{self._path.name}.{'0' * 12}.part"))

    def sizes(self) -> dict[str, int]:
        """The number of bytes of every written object, by name."""
        return {entry.key[len(self._key) + 1 :]: entry.size for entry in self._store.listed(self._key)}

    # --- held uploads -----------------------------------------------------------------------------------------------

    def place(self, name: str) -> RemotePath:
        """The path of an object in the destination by its full name."""
        return self._path / name.removeprefix(f"{self._path}/")

    def new_object(self, path: RemotePath, held: dict[str, Held]) -> RemoteFile:
        """An object to write, which does not exist before `release`.

        Args:
            path: The object.
            held: Gets the held upload for `release`, by the key of the object.
        """
        aside = f"{self._place}/held.{sha256(path.key.encode()).hexdigest()[:16]}"
        return RemoteFile(path, replace=False, held=lambda found: held.update({path.key: found}), aside=aside)

    def release(self, held: Mapping[str, Held], sizes: Mapping[str, int]) -> None:
        """Create the objects of held uploads, those that name others last.

        Args:
            held: The held uploads of all processes, by key.
            sizes: The number of bytes of every object of the result, by key.

        Raises:
            DestinationError: An object cannot be created; another attempt continues.
            CheckpointError: An object has another size than it should.
        """
        self._expect_claim()
        self._write(_CLOSING, 0)
        there = self.sizes()
        start = len(self._key) + 1
        missing = [key for key, size in sizes.items() if there.get(key[start:]) != size]
        for key in missing:
            if key not in held:
                raise DestinationError(f"{self._path / key[start:]}: no process has written it")
        try:
            release(self._store, {key: held[key] for key in missing})
        except PartsGoneError:
            for key in self._keys(self._place):
                if _name(key).startswith(("vote.", "done.")):
                    self._store.delete(key)
            raise
        discard(self._store, {key: held[key] for key in held.keys() - set(missing)})  # created by an earlier attempt
        there = self.sizes()
        for key, size in sizes.items():
            if there.get(key[start:]) != size:
                path = self._path / key[start:]
                raise CheckpointError(f"does not have the {size} bytes that a process has written", path=path)

    def discard(self, held: Mapping[str, Held]) -> None:
        """Abort held uploads."""
        discard(self._store, held)

    def _discard_voted(self, key: str) -> None:
        with suppress(CheckpointNotFoundError):
            found = json.loads(bytes(self._store.get(key, 0, _MOST, None).data))
            self.discard(found["held"] if isinstance(found, dict) else {})

    # --- who writes -----------------------------------------------------------------------------------------------

    def _expect_claim(self) -> None:
        """Check that the claim belongs to this process."""
        found = b""
        with suppress(CheckpointNotFoundError):
            found = bytes(self._store.get(self._claim, 0, _MOST, None).data)
        if found != self._mine:
            raise DestinationError(f"{self.destination}: is being written by other processes")

    def _expect_none_alive(self) -> None:
        """Check for a while that no process writes the destination."""
        signs: dict[str, object] = {}
        ends = time.monotonic() + 3 * self.beat
        while time.monotonic() < ends:
            if self._has_moved(signs, but=None):
                raise DestinationError(f"{self.destination}: is being written by other processes")
            time.sleep(self.poll)

    # --- messages ---------------------------------------------------------------------------------------------------

    def _keys(self, folder: str) -> list[str]:
        return [entry.key for entry in self._store.listed(folder)]

    def _look(self) -> None:
        self._said = {_name(entry.key): entry.version for entry in self._store.listed(self._place)}

    def _is_open(self) -> bool:
        return _BEGUN in self._said

    def _is_elsewhere(self, others: dict[str, object]) -> bool:
        return self._has_moved(others, but=self._place)

    def _has_moved(self, signs: dict[str, object], *, but: str | None) -> bool:
        """Whether the sign of a first process has changed, except that of the stage `but`."""
        moved = False
        for entry in self._store.listed(self._meeting):
            if _name(entry.key) == "alive.0" and entry.key.rpartition("/")[0] != but:
                moved |= signs.setdefault(entry.key, entry.version) != entry.version
        return moved

    def _sign_of(self, rank: int, last: object) -> tuple[object, int]:
        sign = self._said.get(f"alive.{rank}")
        if sign is None or sign == last:
            return sign, 0
        said = self._read(f"alive.{rank}")
        return sign, 0 if said is None else int(said[1])

    def _give_sign(self, moved: int) -> None:
        self._count += 1
        self._write(f"alive.{self.team.rank}", [time.time_ns() + self._count, moved])  # different each time

    def _end_signs(self) -> None:
        """Remove this process's last messages, if they were written after all others had been removed."""
        with suppress(CheckpointError, OSError):
            self._look()
            if not self._is_open():
                for name in (f"alive.{self.team.rank}", f"vote.{self.team.rank}"):
                    if name in self._said:
                        self._store.delete(f"{self._place}/{name}")

    def _has(self, name: str) -> bool:
        return name in self._said

    def _read(self, name: str) -> Any:
        if name not in self._said:
            return None
        try:
            return json.loads(bytes(self._store.get(f"{self._place}/{name}", 0, _MOST, None).data))
        except CheckpointNotFoundError:
            return None

    def _write(self, name: str, value: Any) -> None:
        self._put(f"{self._place}/{name}", json.dumps(value).encode(), replace=True)

    def _remove(self, name: str) -> None:
        with suppress(CheckpointNotFoundError):
            self._store.delete(f"{self._place}/{name}")

    def _put(self, key: str, data: bytes, *, replace: bool) -> None:
        try:
            self._store.begin(key, expected=len(data), replace=replace).complete(data)
        except DestinationExistsError:
            raise DestinationError(f"{self.destination}: is being written by other processes") from None


def _name(key: str) -> str:
    return key.rpartition("/")[2]
