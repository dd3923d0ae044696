"""`optimstate diff`."""

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Force, Json, Quiet, Source, app, epilog
from optimstate.io.location import Location


@app.command(
    short_help="Compare two checkpoints by name.",
    epilog=epilog(
        "optimstate diff checkpoint-1000/ checkpoint-2000/ --headers",
        "optimstate diff checkpoint-1000/ checkpoint-2000/ --stat --tolerance 1e-6",
        "optimstate diff checkpoint.pt checkpoint.safetensors --quiet && echo 'the same'",
        exits="0 no differences, 1 differences, 2 wrong usage, 3 bad input.",
        page="command-line",
    ),
)
def diff(
    left: Source,
    right: Annotated[Location, typer.Argument(help="Another, of any container.", **PLACE)],
    headers: Annotated[bool, typer.Option("--headers", help="Compare names, shapes, dtypes and values only.")] = False,
    name: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Compare only what has such a name, e.g. 'layers.3.**'.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative differences up to this, by the norm, are none.", show_default=False)
    ] = 0.0,
    params: Annotated[bool, typer.Option("--params", help="A line for every difference, not layers together.")] = False,
    stat: Annotated[bool, typer.Option("--stat", help="Only how many differences each part has.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page: heat maps of the differences, a table.")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare everything in two checkpoints by name: tensors, hyperparameters, and every other value.

    Layers are shown together, what differs most first. Exits with 1 when there are differences. Torch is imported only
    to measure how far changed tensors are apart.
    """
    import optimstate
    from optimstate.cli.render import terminal

    if html is not None:
        from optimstate.io.destination import check_destination

        check_destination(html, [left, right], force=force)
    with terminal.progress("comparing", left, right, quiet=quiet or headers) as advance:
        report = optimstate.diff(left, right, headers=headers, name=name, tolerance=tolerance, progress=advance)
    if html is not None:
        from optimstate.cli.render.page import diff_page, write_page

        write_page(diff_page(report), html)
    terminal.show(report, report.text(params=params, stat=stat), as_json=as_json, quiet=quiet)
    if html is not None and not (quiet or as_json):
        typer.echo(f"wrote {html}")
    if report.changes:
        raise typer.Exit(1)
