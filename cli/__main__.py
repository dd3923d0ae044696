"""Entry point of the `optimstate` command."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from contextlib import suppress

from optimstate.cli.interrupts import Interrupted, clean_up, raise_on_signals
from optimstate.cli.together import is_first_here

__all__ = ["main"]


def main() -> None:
    """Run the command line and leave at once: freeing a large tree object by object would take longer than the work."""
    # Torch works without NumPy, and so do we: nobody who inspects a checkpoint needs to hear of it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    gc.disable()  # before the imports, a tenth of whose time it would take
    _open_what_is_closed()
    raise_on_signals()
    try:
        code = _run()
    except Interrupted as signal:
        code = signal.exit_code
        said = clean_up(f"interrupted by {signal}" if str(signal) != "SIGINT" else "interrupted")
        if is_first_here():  # torchrun ends all of them
            _say(said)
    except BaseException:
        clean_up()
        raise
    os._exit(code)


def _run() -> int:
    from optimstate.cli.app import run

    code = run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # the reader of our output went away, which is its right
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _say(f"error: standard output: cannot be written: {reason}")
        code = 5
    return code


def _say(line: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _open_what_is_closed() -> None:
    """Cron and services may start a program with closed streams: no file of ours may take their places."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


if __name__ == "__main__":
    main()
