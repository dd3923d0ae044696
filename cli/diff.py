"""`optimstate diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Json, app


@app.command(epilog="Example: optimstate diff checkpoint-1000/ checkpoint-2000/ --headers")
def diff(
    left: Annotated[Path, typer.Argument(help="A checkpoint file or folder.", show_default=False)],
    right: Annotated[Path, typer.Argument(help="Another, of any container.", show_default=False)],
    headers: Annotated[bool, typer.Option("--headers", help="Compare names, shapes, dtypes and values only.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints by name: added, removed, renamed, reshaped, changed tensors and hyperparameters.

    Exits with 1 when there are differences. Torch is imported only to measure how far changed tensors are apart.
    """
    from optimstate import surgery

    report = surgery.diff(left, right, headers=headers)
    if as_json:
        typer.echo(report.to_json())
    else:
        from optimstate.cli import _render

        _render.compared(report)
    if report.changes:
        raise typer.Exit(1)
