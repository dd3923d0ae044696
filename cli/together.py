"""Commands that torchrun starts several times: the first process does them, the others help it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimstate import __version__

if TYPE_CHECKING:
    from optimstate.io.together import Stage

__all__ = ["helped", "rank_of", "stage_of"]


def rank_of(*alone: str) -> int:
    """The number of this process among those that torchrun has started; 0 for a command that runs alone.

    Args:
        alone: What was asked for that one process does alone; nothing of it may be where there are several.

    Raises:
        UsageError: Something is.
        DestinationError: The environment is not that of torchrun.
    """
    if "RANK" not in os.environ:
        return 0
    from optimstate.errors import UsageError
    from optimstate.io.together import team_of_environment

    team = team_of_environment(os.environ)
    if team is not None and alone:
        raise UsageError(f"{alone[0]} is for one process, and torchrun has started {team.size}", hint="Run it without.")
    return 0 if team is None else team.rank


def stage_of(source: Any, destination: Any, asked: Any, *, like: Any = None, sync: bool = True) -> Stage | None:
    """The folder that this process and others fill together; None for a command that runs alone.

    Args:
        source: The checkpoint.
        destination: Where to write; None where nothing is written.
        asked: Everything else that the result depends on.
        like: Another file or folder that it depends on.
        sync: Flush the folder to the disk before it takes its name.

    Raises:
        DestinationError: The environment is not that of torchrun, or the destination is in a store that is only read.
    """
    if "RANK" not in os.environ or destination is None:
        return None
    import json
    from hashlib import sha256  # takes milliseconds, which a command that runs alone need not wait for

    from optimstate.errors import CheckpointError
    from optimstate.io.places import located
    from optimstate.io.together import FolderStage, team_of_environment

    team = team_of_environment(os.environ)
    if team is None:
        return None
    version = _version(source)
    others = None if like is None else _version(like)
    digest = sha256(json.dumps([__version__, team.size, asked, version, others], default=str).encode())

    def check() -> None:
        if _version(source) != version:
            raise CheckpointError(
                "changed while it was read", path=source, hint="Start again after all writing to it has ended."
            )

    place, name = located(str(destination)), digest.hexdigest()[:12]
    if isinstance(place, Path):
        return FolderStage(place, name, team, sync=sync, check=check)
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


def helped(stage: Stage | None, *, sync: bool) -> bool:
    """Whether this process was one that helps, and has done its share."""
    if stage is None or stage.team.rank == 0:
        return False
    from optimstate.formats.dcp.sharing import help_out
    from optimstate.formats.protocol import WriteOptions

    return help_out(stage, WriteOptions(sync=sync))
