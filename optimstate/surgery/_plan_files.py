"""Plan files written: whole or not at all, and over nothing that is there."""

from __future__ import annotations

from pathlib import Path

from optimstate.files import AtomicFile, check_destination

__all__ = ["check_plan_destination", "save_plan"]


def check_plan_destination(path: str | Path, *sources: str | Path, force: bool = False) -> None:
    """Refuse to write a plan where something else is; `-` is standard output, which is always free.

    Raises:
        DestinationError: It exists and `force` is false, is a source, or its folder does not exist.
    """
    if str(path) != "-":
        check_destination(Path(path), [Path(source) for source in sources if str(source) != "-"], force=force)


def save_plan(text: str, path: str | Path) -> None:
    """Write a plan file, all of it or nothing.

    Raises:
        DestinationError: It cannot be written.
    """
    with AtomicFile(path) as file:
        file.write(text.encode())
