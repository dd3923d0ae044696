"""Scripts of the user's own that say what to rehearse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

__all__ = ["rehearsed_script"]


def rehearsed_script(path: Path) -> dict[str, Any]:
    """What a script defines; it is executed.

    Raises:
        BadParameter: It is not there, or lacks a name.
    """
    import runpy

    if not path.is_file():
        raise typer.BadParameter(f"{path} is not a file")
    given = runpy.run_path(str(path))
    missing = [name for name in ("old", "new", "batch", "loss") if name not in given]
    if missing:
        raise typer.BadParameter(f"{path} does not define {', '.join(missing)}")
    return given
