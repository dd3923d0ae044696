"""`optimstate scan`."""

from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Json, Quiet, app, epilog
from optimstate.io.location import Location


@app.command(
    short_help="List what the pickles of a checkpoint name, running nothing.",
    epilog=epilog(
        "optimstate scan checkpoint.pt",
        "optimstate scan downloaded-checkpoint/ --quiet || echo 'look before you load'",
        exits="0 plain data only, 1 something else is named or something was not scanned, 2 wrong usage, 3 bad input.",
        page="security",
    ),
)
def scan(
    path: Annotated[Location, typer.Argument(help="A file or folder.", **PLACE)],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List every class and function that the pickles of a checkpoint name, without running any.

    Archives, compressed files and arrays are looked into, one within another. Exits with 1 when a name is not known to
    build plain data only, or when there is anything that was not scanned.
    """
    import optimstate
    from optimstate.cli.render import terminal

    report = optimstate.scan(path)
    terminal.show(report, as_json=as_json, quiet=quiet)
    if not report.clean:
        raise typer.Exit(1)
