"""`optimstate inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Json, Quiet, app, epilog


@app.command(
    short_help="Show what a checkpoint holds.",
    epilog=epilog(
        "optimstate inspect checkpoint.pt",
        "optimstate inspect checkpoint-1000/ --params",
        exits="0 fine, 2 wrong usage, 3 bad input.",
    ),
)
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or folder.", show_default=False)],
    params: Annotated[
        bool, typer.Option("--params", help="List every parameter with its slots (in --json too).")
    ] = False,
    groups: Annotated[bool, typer.Option("--groups", help="List every group with its options.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: sections, algorithm, groups, parameters, slots, steps, sizes, oddities.

    Torch is not imported and nothing in the file is executed.
    """
    from optimstate import surgery
    from optimstate.cli import _render

    found = surgery.inspect(path, parameters=params)
    _render.show(found, lambda it: _render.inspection(it, params=params, groups=groups), as_json=as_json, quiet=quiet)
