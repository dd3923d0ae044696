"""`optimstate inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Force, Json, app


@app.command(epilog="Example: optimstate inspect checkpoint-1000/ --stats --html report.html")
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or folder.", show_default=False)],
    params: Annotated[
        bool, typer.Option("--params", help="List every parameter with its slots (in --json too).")
    ] = False,
    groups: Annotated[bool, typer.Option("--groups", help="List every group with all its options.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read every tensor: norms, ranges, zeros, NaN (imports torch).")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with tables and heat maps of norms.", show_default=False),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, and whether a run can resume from it.

    Sections, algorithm, groups, parameters, slots, steps, sizes, oddities. Nothing in the file is executed, and torch
    is imported for --stats and --html alone.
    """
    from optimstate import surgery
    from optimstate.cli import _render

    if html is not None:
        from optimstate.files import check_destination

        check_destination(html, [path], force=force)
    measure = stats or html is not None
    with _render.progress(path, "measuring", wanted=measure) as advance:
        found = surgery.inspect(path, parameters=params, statistics=measure, progress=advance)
    if html is not None:
        from optimstate.cli._html import write_page

        write_page(found, html)
    if as_json:
        typer.echo(found.to_json())
        return
    from optimstate.cli import _render_inspect

    _render_inspect.inspection(found, params=params, groups=groups, stats=stats)
    if html is not None:
        typer.echo(f"\nwrote {html}")
