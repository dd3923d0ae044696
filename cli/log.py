"""`optimstate log`."""

from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Json, Quiet, app, epilog
from optimstate.io.location import Location


@app.command(
    short_help="Show where a checkpoint comes from: its certificates and plans.",
    epilog=epilog(
        "optimstate log certified.pt",
        exits="0 there is a record, 1 there is none, 2 wrong usage, 3 bad input.",
        page="certificates",
    ),
)
def log(
    path: Annotated[Location, typer.Argument(help="A checkpoint, or the JSON file of a certificate.", **PLACE)],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the certificates a run was resumed from and the plans applied in between, oldest first.

    Runs that save with hooks.certify() keep this chain; optimstate remap adds its plan to it.
    """
    from optimstate.cli.render import terminal
    from optimstate.surgery.verification.certifying import log as lineage

    found = lineage(path)
    terminal.show(found, as_json=as_json, quiet=quiet)
    if not found.entries:
        raise typer.Exit(1)
