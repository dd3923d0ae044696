"""`optimstate rehearse`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import SETTINGS, Json, Quiet, app, epilog
from optimstate.cli.scripts import rehearsed_script


@app.command(
    context_settings=SETTINGS,
    short_help="Run old and new side by side to see what a resume would lose.",
    epilog=epilog(
        "optimstate rehearse --script resume_check.py",
        "optimstate rehearse --script resume_check.py --steps 5 --json",
        exits="0 the run goes on as the plan says, 1 it does not, 2 wrong usage, 3 bad input, 4 the plan does not fit.",
        page="rehearse",
    ),
)
def rehearse(
    script: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Defines old, new, batch and loss, and plan, checkpoint, load if needed."),
    ],
    steps: Annotated[int, typer.Option(min=1, help="How many steps both runs take.")] = 2,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare a run with its continuation in a changed model: function, gradients, then parameters and slots.

    The script is your own Python code, and is executed. `old()` and `new()` build (model, optimizer), or these and a
    scheduler; `batch` is what
    `loss(model, batch)` takes; `plan` is a plan or the path of one, `checkpoint` what the old run is loaded from, and
    `load(state, model, optimizer)` loads the new run where that is not optimstate's.
    """
    from optimstate.cli.render import terminal
    from optimstate.rehearsal import rehearse as rehearsed

    given = rehearsed_script(script)
    with redirect_stdout(sys.stderr):  # what the script prints is no part of the report
        report = rehearsed(
            given["old"],
            given["new"],
            given.get("plan"),
            given["batch"],
            given["loss"],
            steps=steps,
            checkpoint=given.get("checkpoint"),
            load=given.get("load"),
        )
    terminal.show(report, as_json=as_json, quiet=quiet)
    if not report.holds:
        raise typer.Exit(1)
