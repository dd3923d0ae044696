"""Scripts of the user's own that say what to rehearse."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

__all__ = ["rehearsed_script"]


def rehearsed_script(path: Path) -> dict[str, Any]:
    """What a script defines; it is executed.

    Raises:
        BadParameter: It is not there, or lacks a name.
        UserCodeError: It failed.
    """
    from optimstate.user_code import run_script

    if not path.is_file():
        raise typer.BadParameter(f"{path} is not a file")
    sys.path.insert(0, str(path.resolve().parent))  # what it calls later may import what stands beside it
    with redirect_stdout(sys.stderr):
        given = run_script(path, name="<rehearsed>")
    missing = [name for name in ("old", "new", "batch", "loss") if name not in given]
    if missing:
        raise typer.BadParameter(f"{path} does not define {', '.join(missing)}")
    return given
