"""`optimstate name`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Force, Json, Quiet, Source, View, app, epilog
from optimstate.io.location import Location


class Order(StrEnum):
    """Of which list the names have the order."""

    model = "model"
    optimizer = "optimizer"


@app.command(
    short_help="Give an anonymous optimizer its parameter names.",
    epilog=epilog(
        "optimstate name checkpoint-1000/ --dry-run --model mypackage.models:build",
        "optimstate name checkpoint-1000/ named/ --model mypackage.models:build",
        "optimstate name checkpoint.pt named.pt --names names.txt",
        "optimstate name checkpoint.pt --dry-run --names 'optimizer=names.txt'",
        exits="0 fine, 2 wrong usage, 3 bad input, 4 the names are not determined, 5 the destination, "
        "6 the container cannot hold it.",
        page="command-line",
    ),
)
def name(
    source: Source,
    destination: Annotated[
        Location | None, typer.Argument(help="Where to write; not needed with --dry-run.", **PLACE)
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATH=]FILE",
            help="The parameter names, of the optimizer at PATH (as `inspect` prints it). Repeatable.",
        ),
    ] = None,
    order: Annotated[
        Order,
        typer.Option(help="Order of the names: that of named_parameters(), or the optimizer's own, group by group."),
    ] = Order.model,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="Build the model with this function (runs its code).")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG|FOLDER", help="Build the transformers model that this config describes."),
    ] = None,
    view: View = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report and write nothing.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Give an anonymous optimizer its parameter names, from the model stored with it or a given one.

    Nothing is guessed.
    """
    import optimstate
    from optimstate.cli.render import terminal
    from optimstate.surgery.writing.naming import read_names

    if destination is None and not dry_run:
        raise typer.BadParameter("give a destination or --dry-run")
    if model is not None and "" not in sys.path:
        sys.path.insert(0, "")  # a module in the current folder is found, as by `python -m`
    if order is Order.optimizer and not names:
        raise typer.BadParameter("--order says how the names of --names are ordered, and there are none")
    if names and (model is not None or hf is not None):
        raise typer.BadParameter("--names beside a model: give one of them")
    given = read_names(source, names) if names else None
    with terminal.progress("naming", source, quiet=quiet) as advance:
        report = optimstate.name(
            source,
            destination,
            names=given,
            order=order.value,
            model=model,
            hf=hf,
            view=view,
            dry_run=dry_run,
            force=force,
            progress=advance,
        )
    terminal.show(report, as_json=as_json, quiet=quiet)
