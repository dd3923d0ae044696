"""`optimstate inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optimstate.cli.app import Force, Json, Quiet, app, epilog, until_exit

if TYPE_CHECKING:
    pass


@app.command(
    short_help="Show what a checkpoint holds, and whether a run can resume from it.",
    epilog=epilog(
        "optimstate inspect checkpoint.pt",
        "optimstate inspect checkpoint-1000/ --params",
        "optimstate inspect checkpoint.pt --stats --html report.html",
        exits="0 fine, 2 wrong usage, 3 bad input, 5 the page cannot be written.",
    ),
)
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
        typer.Option(
            metavar="FILE", help="Write a page: histograms of moments and steps, heat maps, tables.", show_default=False
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, and whether a run can resume from it.

    Sections, algorithm, groups, parameters, slots, steps, sizes, oddities. Nothing in the file is executed, and torch
    is imported for --stats and --html alone.
    """
    import optimstate
    from optimstate.cli.render import terminal
    from optimstate.formats.registry import open_checkpoint

    if html is not None:
        from optimstate.io.output import check_destination

        check_destination(html, [path], force=force)
    measure = stats or html is not None
    document = until_exit(open_checkpoint(path))
    with terminal.progress("measuring", *([path] if measure else []), quiet=quiet) as advance:
        found = optimstate.inspect(document, parameters=params, statistics=measure, progress=advance)
    if html is not None:
        from optimstate.cli.render.page import inspection_page, write_page
        from optimstate.surgery.updates import updates

        write_page(inspection_page(found, list(updates(document))), html)

    from contextlib import redirect_stdout
    from io import StringIO

    from optimstate.cli.render import inspect as render_inspect

    with redirect_stdout(StringIO()) as text:
        if not quiet and not as_json:
            render_inspect.inspection(found, params=params, groups=groups, stats=stats)
            if html is not None:
                typer.echo(f"\nwrote {html}")
    terminal.show(found, text.getvalue().removesuffix("\n"), as_json=as_json, quiet=quiet)
