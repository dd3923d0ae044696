"""Signals that end the program: all of them take one way out, on which what was begun is removed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

__all__ = ["Interrupted", "clean_up", "ignore_signals", "raise_on_signals"]


class Interrupted(BaseException):
    """A signal asked the program to end; not an `Exception`, so that nothing that handles errors takes it for one.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended."""
        return 128 + self.number


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def raise_on_signals() -> None:
    """Have Ctrl-C, SIGTERM and SIGHUP raise `Interrupted`; what the caller ignores stays ignored, as nohup asks."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


def _raise(number: int, _: Any) -> None:
    raise Interrupted(number)


def ignore_signals() -> None:
    """Be deaf to the signals that end the program, because it is about to end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def clean_up(why: str = "interrupted") -> str:
    """Remove what was begun, deaf to further signals, and say so in one line."""
    ignore_signals()
    temporary = sys.modules.get("optimstate.io.temporary")
    if temporary is None:
        return f"{why}; nothing was left behind"
    removed = temporary.remove_unfinished()
    whole = [path for path in temporary.finished() if not isinstance(path, Path) or path.exists()]
    said = f"removed {', '.join(path.name for path in removed)}" if removed else "nothing was left behind"
    if temporary.kept():
        said = f"kept {', '.join(temporary.kept())}, with which the same command goes on"
    if whole:
        said += f"; {', '.join(str(path) for path in whole)} is whole"
    return f"{why}; {said}"
