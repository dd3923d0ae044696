"""Entry point of the `optimstate` command."""

from __future__ import annotations

import gc
import os
import sys

from optimstate.cli.app import register, run

__all__ = ["main"]


def main() -> None:
    """Run the command line and leave at once: freeing a large tree object by object would take longer than the work."""
    gc.disable()
    register(sys.argv[1:])
    code = run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        pass
    os._exit(code)


if __name__ == "__main__":
    main()
