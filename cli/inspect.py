"""`optimstate inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Json, app


@app.command(epilog="Example: optimstate inspect checkpoint-1000/ --params")
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or folder.", show_default=False)],
    params: Annotated[
        bool, typer.Option("--params", help="List every parameter with its slots (in --json too).")
    ] = False,
    groups: Annotated[bool, typer.Option("--groups", help="List every group with its options.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: sections, algorithm, groups, parameters, slots, steps, sizes, oddities.

    Torch is not imported and nothing in the file is executed.
    """
    from optimstate import surgery

    found = surgery.inspect(path, parameters=params)
    if as_json:
        typer.echo(found.to_json())
        return
    from optimstate.cli import _render

    _render.inspection(found, params=params, groups=groups)
