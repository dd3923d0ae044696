"""The Typer application: options shared by commands, and how errors become messages and exit codes.

Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 bad input, 4 the plan does not fit, 5 the destination, 6 the container
cannot hold it, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from optimstate import __version__, errors

__all__ = ["COMMANDS", "EXIT_CODES", "Force", "Json", "NoSync", "app", "register", "run"]

EXIT_CODES: tuple[tuple[type[errors.OptimStateError], int], ...] = (
    (errors.CheckpointError, 3),
    (errors.PlanError, 4),
    (errors.DestinationError, 5),
    (errors.RepresentationError, 6),
)
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing destination.")]

NoSync = Annotated[
    bool,
    typer.Option("--no-sync", help="Leave flushing to the disk to the system, as cp does: faster, not power-safe."),
]

app = typer.Typer(
    name="optimstate",
    help="Inspect, remap and convert optimizer checkpoints by parameter name. Nothing in a file is ever executed.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"optimstate {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 bad input, 4 plan, 5 destination, 6 container, "
    "130 interrupted."
)
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


COMMANDS = ("inspect", "diff", "remap", "convert", "name", "verify", "scan", "demo")
"""In the order of the help. Each is a module of this package that registers itself when it is imported."""


def register(arguments: list[str]) -> None:
    """Import the command that was asked for, or all of them where none was: importing takes longer than most work."""
    asked = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for command in (asked,) if asked else COMMANDS:
        import_module(f"optimstate.cli.{command}")


def run() -> int:
    """Run the application; every known error becomes a message on stderr and an exit code."""
    try:
        app(standalone_mode=True)
    except errors.OptimStateError as error:
        for line in error.message.splitlines():
            typer.echo(f"error: {line}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except BrokenPipeError:  # the reader of our output went away, which is its right
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was left behind", err=True)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
