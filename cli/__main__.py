"""Entry point of the `optimstate` command."""

from __future__ import annotations

import gc
import os
import sys
import warnings

__all__ = ["main"]


def main() -> None:
    """Run the command line and leave at once: freeing a large tree object by object would take longer than the work."""
    # Torch works without NumPy, and so do we: nobody who inspects a checkpoint needs to hear of it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)
    gc.disable()  # before the imports, a tenth of whose time it would take
    from optimstate.cli.app import run

    code = run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        pass
    os._exit(code)


if __name__ == "__main__":
    main()
