"""Commands that torchrun starts several times: the first process does them, the others help it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimstate import __version__
from optimstate.cli.interrupts import Interrupted, ignore_signals

if TYPE_CHECKING:
    from optimstate.io.together import Stage

__all__ = ["helped", "is_first_here", "is_first_of_all", "is_heard", "joined", "rank_of", "stage_of"]


def is_first_of_all() -> bool:
    """Whether this process alone, or the first of several, prints what is printed once: results and JSON."""
    from optimstate.errors import DestinationError

    try:
        return rank_of() == 0
    except DestinationError:
        return True


def is_first_here() -> bool:
    """Whether this process is the first on its host, and so says what all of them would say."""
    return is_first_of_all() or os.environ.get("LOCAL_RANK", "0") == "0"


_own: list[BaseException] = []  # errors of this process's share, which no other process has
_MOMENTS = 5.0  # seconds in which torchrun ends the others after one has ended


def is_heard(error: BaseException) -> bool:
    """Whether this process prints an error: those that all processes of a host have are printed by the first.

    When the first one ends, torchrun ends the others. One that is not ended within some seconds has the error alone, or
    was not started by torchrun: then it prints the error, too.
    """
    if is_first_here() or error in _own:
        return True
    from time import sleep

    try:
        sleep(_MOMENTS)
    except Interrupted:
        return False
    return True


def _may_be_team() -> bool:
    """Whether to import what several processes need; most commands run alone."""
    return "RANK" in os.environ or "OPTIMSTATE_TOGETHER" in os.environ


def rank_of(*alone: str) -> int:
    """The number of this process among those that torchrun has started; 0 for a command that runs alone.

    Args:
        alone: What was asked for that one process does alone; nothing of it may be where there are several.

    Raises:
        UsageError: Something is.
        DestinationError: The environment is not that of torchrun.
    """
    if not _may_be_team():
        return 0
    from optimstate.errors import UsageError
    from optimstate.io.together import team_of_environment

    team = team_of_environment(os.environ)
    if team is not None and alone:
        raise UsageError(
            f"{alone[0]} is for one process, and torchrun has started {team.size}", hint="Run it without torchrun."
        )
    return 0 if team is None else team.rank


def stage_of(
    source: Any, destination: Any, asked: Any, *, like: Any = None, sync: bool = True, force: bool = False
) -> Stage | None:
    """The folder that this process and others fill together; None for a command that runs alone.

    Args:
        source: The checkpoint.
        destination: Where to write; None where nothing is written.
        asked: Everything else that the result depends on.
        like: Another file or folder that it depends on.
        sync: Flush the folder to the disk before it takes its name.
        force: Replace a destination that exists.

    Raises:
        DestinationError: The environment is not that of torchrun, the destination is in a store that is only read, or
            it exists or is the source.
    """
    if not _may_be_team() or destination is None:
        return None
    import json
    from hashlib import sha256  # takes milliseconds, which a command that runs alone need not wait for

    from optimstate.errors import CheckpointError
    from optimstate.io.destination import check_destination
    from optimstate.io.places import located
    from optimstate.io.staging import FolderStage
    from optimstate.io.together import team_of_environment

    team = team_of_environment(os.environ)
    if team is None:
        return None
    version = _version(source)
    others = None if like is None else _version(like)
    digest = sha256(json.dumps([__version__, team.size, asked, sync, version, others], default=str).encode())

    def check() -> None:
        if _version(source) != version:
            raise CheckpointError(
                "changed while it was read", path=source, hint="Start again after all writing to it has ended."
            )

    place, name = located(str(destination)), digest.hexdigest()[:12]
    check_destination(place, [located(str(source))], force=force or not isinstance(place, Path))
    if isinstance(place, Path):
        return FolderStage(place, name, team, sync=sync, check=check, force=force)
    from optimstate.io.remote.path import RemotePath
    from optimstate.io.remote.stage import StoreStage

    assert isinstance(place, RemotePath)
    return StoreStage(place, name, team, last=".metadata", check=check)


def _version(source: Any) -> list[Any]:
    """Names, sizes and times of everything in a checkpoint; of objects what the store calls their version."""
    if "://" in str(source):
        from optimstate.io.places import located, open_source

        place = located(str(source))
        objects = sorted(place.rglob("*")) if place.is_dir() else [place]
        opened = ((each, open_source(each)) for each in objects)
        return [(str(each), found.size, found.version) for each, found in opened]
    path = Path(str(source))
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]


@contextmanager
def joined(stage: Stage | None) -> Iterator[None]:
    """The work of this process: if it ends with an error, the others are told, and what stays is said."""
    if stage is None:
        yield
        return
    rank = stage.team.rank
    try:
        if rank:
            yield
            return
        stage.begin()
        with stage.alive() if stage.is_owner else nullcontext():
            yield
    except BaseException as error:
        _end(stage, error)
        raise


_KEPT = (
    "What is done is kept in {}: the same command with as many processes goes on from there, and any other command for "
    "this destination removes it."
)


def _end(stage: Stage, error: BaseException) -> None:
    """Tell the other processes of an error, and add what is kept to its message."""
    from optimstate.cli.codes import code_of
    from optimstate.errors import OptimStateError, ProcessEndedError
    from optimstate.io import temporary

    rank = stage.team.rank
    if rank == 0 or not isinstance(error, ProcessEndedError):
        ignore_signals()  # torchrun ends all processes as soon as one has ended, but this one has something to say
    message = error.message if isinstance(error, OptimStateError) else f"{type(error).__name__}: {error}"
    if rank == 0 or isinstance(error, Exception):
        stage.end(code_of(error), message)
    if rank and isinstance(error, OptimStateError) and not isinstance(error, ProcessEndedError):
        _own.append(error)
        error.message = f"rank {rank}: {message}"
    kept = stage.withdraw()
    if kept and isinstance(error, OptimStateError):
        error.hint = f"{error.hint} {_KEPT.format(kept)}".strip()
    elif kept:
        temporary.keep(kept)


def helped(stage: Stage | None, *, sync: bool) -> bool:
    """Whether this process was one that helps, and has done its share."""
    if stage is None or stage.team.rank == 0:
        return False
    from optimstate.formats.dcp.sharing import help_out
    from optimstate.formats.protocol import WriteOptions

    return help_out(stage, WriteOptions(sync=sync))
