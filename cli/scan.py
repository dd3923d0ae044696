"""`optimstate scan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Json, app


@app.command(epilog="Example: optimstate scan downloaded-checkpoint/ || echo 'look before you load'")
def scan(
    path: Annotated[Path, typer.Argument(help="A file or folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """List every class and function that the pickles of a checkpoint name, without running any.

    Exits with 1 when one of them is not known to build plain data only.
    """
    from optimstate import surgery

    report = surgery.scan(path)
    if as_json:
        typer.echo(report.to_json())
    else:
        from optimstate.cli import _render

        _render.scanned(report)
    if not report.clean:
        raise typer.Exit(1)
