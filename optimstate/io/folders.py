"""Listing folders without the leftovers of unfinished writers; whatever cannot be examined is an error."""

from __future__ import annotations

from pathlib import Path
from stat import S_ISDIR, S_ISREG

from optimstate.errors import CheckpointError, CheckpointNotFoundError
from optimstate.io.location import Location
from optimstate.io.temporary import is_leftover, leftovers

__all__ = ["kind_of", "leftover_notes", "listed"]

_MAX_NOTES = 5


def listed(folder: Location) -> list[Location]:
    """The files and folders in a folder, sorted by name, without the leftovers of killed writers.

    Raises:
        CheckpointNotFoundError: The folder does not exist.
        CheckpointError: It cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if not is_leftover(path.name))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError("no such folder", path=folder) from error
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror}", path=folder) from error


def kind_of(path: Location) -> str:
    """`file` or `folder`; links are followed.

    Raises:
        CheckpointNotFoundError: The path does not exist.
        CheckpointError: It cannot be examined, or is a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except CheckpointError:
        raise
    except FileNotFoundError:
        hint = "Check the path for a typing mistake."
        raise CheckpointNotFoundError("no such file or folder", path=path, hint=hint) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"cannot be read: {reason}", path=path) from error
    if S_ISREG(mode):
        return "file"
    if S_ISDIR(mode):
        return "folder"
    raise CheckpointError("is not a regular file or folder", path=path, hint="Copy its contents into a file first.")


def leftover_notes(folder: Location) -> list[str]:
    """Notes on the leftovers of killed writers in a folder and below."""
    if not isinstance(folder, Path):
        return []  # in a store unfinished uploads are not objects
    found = list(leftovers(folder))
    notes = [
        f"{path.relative_to(folder)} was left by an optimstate that was killed; it is ignored and may be deleted"
        for path in found[:_MAX_NOTES]
    ]
    return notes + ([f"and {len(found) - _MAX_NOTES} more of its kind"] if len(found) > _MAX_NOTES else [])
