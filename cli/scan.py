"""`optimstate scan`."""

from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Json, Quiet, app, epilog
from optimstate.io.location import Location


@app.command(
    short_help="List what the pickles of a checkpoint name, without running anything.",
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

    Archives, compressed files and arrays are searched, also inside one another. Exits with 1 if a name is not known to
    build plain data only, or if anything could not be scanned.
    """
    import optimstate
    from optimstate.cli.render import terminal

    report = optimstate.scan(path)
    terminal.show(report, as_json=as_json, quiet=quiet)
    if not report.clean:
        raise typer.Exit(1)
