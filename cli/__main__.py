"""Entry point of the `optimstate` command."""

from __future__ import annotations

import gc
import os
import sys

from optimstate.cli import convert, demo, diff, inspect, name, remap, scan, verify
from optimstate.cli.app import run

__all__ = ["main"]

_COMMANDS = (inspect, diff, remap, convert, name, verify, scan, demo)  # imported for their registration


def main() -> None:
    """Run the command line and leave at once: freeing a large tree object by object would take longer than the work."""
    gc.disable()
    code = run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        pass
    os._exit(code)


if __name__ == "__main__":
    main()
