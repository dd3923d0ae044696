"""`optimstate diff`."""

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Force, Json, Quiet, Source, app, epilog, in_vain
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
    right: Annotated[Location, typer.Argument(help="Another checkpoint, in any container.", **PLACE)],
    headers: Annotated[
        bool,
        typer.Option("--headers", help="Do not read tensors: compare names, shapes, dtypes and other values only."),
    ] = False,
    name: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Compare only names that match, e.g. 'layers.3.**'.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Ignore relative differences (of norms) up to this.", show_default=False)
    ] = 0.0,
    params: Annotated[
        bool, typer.Option("--params", help="Print a line for every difference instead of grouping layers.")
    ] = False,
    stat: Annotated[bool, typer.Option("--stat", help="Print only how many differences each section has.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML page with heat maps of the differences and a table."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare everything in two checkpoints by name: tensors, hyperparameters, and every other value.

    Layers are grouped, and what differs most comes first. Exits with 1 if there are differences. Torch is imported only
    to measure how much changed tensors differ.
    """
    import optimstate
    from optimstate.cli.render import terminal

    if stat:
        in_vain("with --stat, which prints no differences", params=params)
    if as_json:
        in_vain("with --json, which has every difference", params=params, stat=stat)
    if html is None:
        in_vain("without --html, as nothing is written", force=force)
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
