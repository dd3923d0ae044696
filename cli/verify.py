"""`optimstate verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Json, app


@app.command(epilog="Example: optimstate verify new.pt --against old.pt --plan plan.toml")
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or folder.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(metavar="SRC", help="The checkpoint it was made from.", show_default=False)
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan it was made by.", show_default=False)] = None,
    no_numbers: Annotated[bool, typer.Option("--no-numbers", help="Do not look into tensors (no torch).")] = False,
    as_json: Json = False,
) -> None:
    """Prove that a run can resume: coverage, steps, moments, dtypes, aliases, learning rates, names, checksums.

    Exits with 1 when there is a fault. With --against and --plan, every byte is accounted for.
    """
    from optimstate import surgery
    from optimstate.cli import _render
    from optimstate.plan.rules import Plan

    if (against is None) != (plan is None):
        raise typer.BadParameter("--against and --plan belong together")
    if against is not None and plan is not None:
        report = surgery.verify_against(path, against, Plan.from_file(plan))
    else:
        report = surgery.verify(path, numbers=not no_numbers)
    if as_json:
        typer.echo(report.to_json())
    else:
        _render.verified(report)
    if not report.healthy:
        raise typer.Exit(1)
