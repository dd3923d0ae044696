"""`optimstate verify`."""

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Json, Quiet, Source, View, app, epilog, in_vain, read_plan
from optimstate.io.location import Location


@app.command(
    short_help="Prove that a run can resume from a checkpoint.",
    epilog=epilog(
        "optimstate verify checkpoint.pt",
        "optimstate verify new.pt --against old.pt --plan plan.toml",
        "optimstate verify certified.pt --certificate certificate.json",
        exits="0 healthy, 1 a fault or nothing recognised, 2 wrong usage, 3 bad input, 4 the plan does not fit SRC.",
        page="explanation/same-run",
    ),
)
def verify(
    path: Source,
    against: Annotated[
        Location | None, typer.Option(metavar="SRC", help="The checkpoint that this one was made from.", **PLACE)
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The plan that it was made with; - reads standard input.")
    ] = None,
    certificate: Annotated[
        Location | None,
        typer.Option(metavar="FILE", help="What hooks.certify() wrote, or a checkpoint with it.", **PLACE),
    ] = None,
    view: View = None,
    no_numbers: Annotated[bool, typer.Option("--no-numbers", help="Do not read tensors (no torch needed).")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prove that a run can resume: coverage, steps, moments, dtypes, aliases, learning rates, names, checksums.

    Exits with 1 if there is a fault or nothing was recognised. With --against and --plan, accounts for every byte; with
    --certificate, checks that weights, slots, groups and schedule are what they were when the run stopped.
    """
    import optimstate
    from optimstate.cli.render import terminal
    from optimstate.surgery.verification.verifying import verify_against

    if (against is None) != (plan is None):
        raise typer.BadParameter("--against and --plan belong together")
    if certificate is not None and against is not None:
        raise typer.BadParameter("--certificate is of one checkpoint, --against of another: verify one after the other")
    if against is not None:
        in_vain("with --against, which compares every byte", view=view, no_numbers=no_numbers)
    if against is not None and plan is not None:
        report = verify_against(path, against, read_plan(plan))
    else:
        sources = (path,) if no_numbers else (path, path)  # checksums, then numbers
        with terminal.progress("verifying", *sources, quiet=quiet) as advance:
            report = optimstate.verify(
                path, numbers=not no_numbers, progress=advance, certificate=certificate, view=view
            )
    terminal.show(report, as_json=as_json, quiet=quiet)
    if not report.healthy:
        raise typer.Exit(1)
