"""The exit codes of errors and signals."""

from __future__ import annotations

from typer.exceptions import TyperException

from optimstate import errors
from optimstate.cli.interrupts import Interrupted

__all__ = ["CRASHED", "EXIT_CODES", "INTERRUPTED", "code_of"]

EXIT_CODES: tuple[tuple[type[errors.OptimStateError], int], ...] = (
    (errors.UsageError, 2),
    (errors.CheckpointError, 3),
    (errors.PlanError, 4),
    (errors.DestinationError, 5),
    (errors.RepresentationError, 6),
    (errors.TorchError, 7),
    (errors.OptimStateError, 3),  # of what a script gave: it fits no live state, or cannot be followed
)
CRASHED = 70
"""What sysexits calls an internal software error: never a finding."""
INTERRUPTED = 130


def code_of(error: BaseException) -> int:
    """The exit code for an error or a signal."""
    if isinstance(error, errors.ProcessEndedError):
        return error.code
    if isinstance(error, Interrupted | TyperException):
        return error.exit_code
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), CRASHED)
