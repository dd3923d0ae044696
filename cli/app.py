"""The Typer application: options shared by commands, and how errors become messages and exit codes.

Exit codes: 0 fine, 1 findings, 2 wrong usage, 3 bad input, 4 the plan does not fit, 5 the destination, 6 the container
cannot hold it, 7 torch is missing or too old, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from optimstate import __version__, errors
from optimstate.cli.codes import CRASHED, EXIT_CODES, INTERRUPTED, code_of
from optimstate.cli.together import is_first_of_all, is_heard, rank_of
from optimstate.describe import describe, escaped
from optimstate.io.location import Location

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from optimstate.plan.language.plan import Plan

__all__ = [
    "COMMANDS",
    "CRASHED",
    "EXIT_CODES",
    "INTERRUPTED",
    "PLACE",
    "SETTINGS",
    "SHARED",
    "Application",
    "View",
    "Copy",
    "Force",
    "Json",
    "NoSync",
    "Quiet",
    "Ranks",
    "Source",
    "Verify",
    "app",
    "epilog",
    "in_vain",
    "read_plan",
    "register",
    "run",
    "until_exit",
]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, and what --json or - asks for.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing destination.")]

Copy = Annotated[
    bool,
    typer.Option("--copy", help="Copy the unchanged data files of a distributed checkpoint instead of linking them."),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        metavar="N",
        help="Reshard the tensors of a distributed checkpoint for N processes instead of keeping their shards.",
    ),
]
View = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A plan from the layout of the stored weights to the layout of the optimizer."),
]

Verify = Annotated[
    bool | None,
    typer.Option("--verify/--no-verify", help="Check the source's checksums while copying (the default)."),
]
NoSync = Annotated[
    bool,
    typer.Option("--no-sync", help="Do not flush to disk, as cp does: faster, but not safe against power loss."),
]


class _Misplaced(Exception):
    """Carries the refusal of a place past Typer, which puts sentences of its own around a ValueError."""

    def __init__(self, refusal: errors.OptimStateError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def _place(name: str) -> Location:
    from optimstate.io.places import located  # `--version` and help do not need it

    try:
        return located(name)
    except errors.OptimStateError as error:
        raise _Misplaced(error) from None


PLACE: dict[str, Any] = {"parser": _place}
"""Of arguments that are a file, a folder or a place in a store, which no `Path` could hold."""

Source = Annotated[Location, typer.Argument(help="A checkpoint file or folder.", **PLACE)]

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class _InOrder(TyperGroup):
    """Lists commands in one order, however they were registered."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=COMMANDS.index)


T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")


def _values(given: Any) -> Sequence[Any]:
    """The values of a parameter, be it repeatable or not."""
    return given if isinstance(given, list | tuple) else [given]


class _Command(TyperCommand):
    """A command that refuses empty values, and an option of one value that is given twice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            # Where a parameter keeps its checks: until typer 0.27 with its type, since then with what it was made of.
            made_of = getattr(parameter, "type_descriptor", None)
            checks = getattr(parameter, "type", None) if made_of is None else made_of.parameter_info
            if checks is not None and hasattr(checks, "readable"):
                checks.readable = False  # that an input cannot be read is for the verbs to say

    def make_parser(self, ctx: Any) -> Any:
        """The parser, told to refuse a second value."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parse_once(args: list[str]) -> Any:
            words = set(args)  # the parser takes them away
            found = parse(args=args)
            for parameter in found[2]:
                both = [one for one in (parameter.opts, parameter.secondary_opts) if not words.isdisjoint(one)]
                if len(both) > 1:
                    ctx.fail(f"{parameter.opts[0]} and {parameter.secondary_opts[0]} exclude each other")
                single = parameter.param_type_name == "option" and not (parameter.multiple or parameter.is_flag)
                if single and found[2].count(parameter) > 1:
                    ctx.fail(f"{parameter.opts[0]} is given {found[2].count(parameter)} times, but it takes one value")
                given = found[0].get(parameter.name)
                if any(isinstance(value, str) and not value.strip() for value in _values(given)):
                    empty = f"the value of {parameter.opts[0]}" if parameter.param_type_name == "option" else "a path"
                    ctx.fail(f"{empty} is empty: an empty variable of the shell is often the reason")
            return found

        parser.parse_args = parse_once
        return parser


class Application(typer.Typer):
    """A Typer application whose commands refuse options that are given twice."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[F], F]:
        """Register a command."""
        register: Callable[[F], F] = super().command(*arguments, **{"cls": _Command, **options})
        return register


_KEPT: list[object] = []

app = Application(
    name="optimstate",
    cls=_InOrder,
    help="Inspect, remap and convert optimizer checkpoints by parameter name. Nothing in a file is ever executed.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def in_vain(why: str, **options: object) -> None:
    """Refuse options that would have no effect.

    Args:
        why: Where they have none.
        options: By name, each with its value; what is false was not given.

    Raises:
        BadParameter: Some were given.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise typer.BadParameter(f"{' and '.join(given)}: without effect {why}")


def epilog(*examples: str, exits: str = "", page: str = "") -> str:
    """What stands below the options of a command: examples, its exit codes, and the page that explains it."""
    shown = "\n".join(f"  {_broken(example)}" for example in examples)
    codes = f"\n\nExit codes: {exits}" if exits else ""
    more = f"\n\nMore: docs/{page}.md" if page else ""
    return f"\b\n{'Examples' if len(examples) > 1 else 'Example'}:\n{shown}{codes}{more}"


def _broken(example: str) -> str:
    """A command in lines of at most 74 columns, broken before options and pipes as a shell reads them."""
    lines = [""]
    for part in re.split(r" (?=--?\w|\|)", example):
        if lines[-1] and len(lines[-1]) + len(part) > 70:
            lines.append("    " + part)
        else:
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return " \\\n  ".join(lines)


def until_exit(value: T) -> T:
    """Keep a large value from being taken apart object by object when the command is done, just before the end."""
    _KEPT.append(value)
    return value


def read_plan(path: Path) -> Plan:
    """The plan in a file, or on standard input where the path is `-`."""
    from optimstate.plan.language.plan import Plan

    if str(path) != "-":
        return Plan.from_file(path)
    try:
        return Plan.from_toml(sys.stdin.read(), name="standard input")
    except UnicodeDecodeError as error:
        raise errors.PlanSyntaxError(f"standard input: the plan is not UTF-8 text: {error}") from None


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"optimstate {__version__}")
        raise typer.Exit


@app.callback(
    epilog=epilog(
        "optimstate inspect checkpoint.pt",
        "optimstate remap checkpoint.pt new.pt --rename 'layers.{i}.{p**}=blocks.{i}.{p**}'",
        exits="0 fine, 1 findings, 2 wrong usage, 3 bad input, 4 the plan does not fit, 5 the destination, "
        "6 the container cannot hold it, 7 torch is missing or too old, 70 a fault of optimstate, 130 interrupted.",
    )
)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if os.environ.get("NO_COLOR"):
        context.color = False
    if context.invoked_subcommand not in (None, *SHARED):
        rank_of(f"optimstate {context.invoked_subcommand}")


COMMANDS = ("inspect", "diff", "remap", "plan", "convert", "name", "verify", "rehearse", "log", "scan", "demo")
"""In the order of the help. Each is a module of this package that registers itself when it is imported."""
SHARED = ("remap", "convert")
"""The commands whose work several processes share."""


def register(arguments: list[str]) -> None:
    """Import the command that was asked for, or all of them where none was: importing takes longer than most work."""
    if arguments in (["--version"], ["-V"]):
        return
    asked = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for command in (asked,) if asked else COMMANDS:
        import_module(f"optimstate.cli.{command}")


def run() -> int:
    """Run the application; every error becomes a message on stderr and an exit code, even one that nobody foresaw."""
    try:
        return _run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not look like a finding
        if os.environ.get("OPTIMSTATE_DEBUG"):
            import traceback

            traceback.print_exc()
        with suppress(OSError, ValueError):
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            typer.echo(f"error: this is a fault of optimstate {__version__}, not of the file: {what}", err=True)
            typer.echo(
                "hint: Please report it with the command and what OPTIMSTATE_DEBUG=1 prints before this line "
                "(CONTRIBUTING.md says how).",
                err=True,
            )
        return CRASHED


def _run() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:  # as git and others have it
        arguments = [*arguments[1:], "--help"]
    register(arguments)
    try:
        code = app(arguments, standalone_mode=False, prog_name="optimstate")
    except errors.OptimStateError as error:
        return _refused(error)
    except _Misplaced as carrier:
        return _refused(carrier.refusal)
    except TyperException as error:
        return _wrong_usage(error)
    except SystemExit as stop:  # typer's own endings
        if isinstance(stop.__context__, BrokenPipeError):  # the reader of our output went away, which is its right
            return 0
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OSError as error:  # of our output: what a verb meets is an error of its own
        reason = f"{error.filename}: {error.strerror}" if error.filename else f"output: {error.strerror or error}"
        with suppress(OSError, ValueError):
            typer.echo(f"error: {reason}", err=True)
        return 5
    if code == INTERRUPTED:
        typer.echo("interrupted; nothing was left behind", err=True)
    return code or 0


def _refused(error: errors.OptimStateError) -> int:
    """Say what is wrong and what helps; the exit code of its kind."""
    if is_heard(error):
        for line in error.message.splitlines():
            typer.echo(f"error: {line}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
    _echo_json(type(error).__name__, error.message, error.hint, [problem._asdict() for problem in error.problems])
    return code_of(error)


def _echo_json(kind: str, message: str, hint: str, problems: Sequence[Mapping[str, Any]] = ()) -> None:
    """Print an error as the one JSON document of a command that fails, if JSON was asked for."""
    if "--json" in sys.argv[1:] and is_first_of_all():
        from optimstate.reporting import to_json

        fields = {"kind": kind, "message": message, "hint": hint, "problems": problems}
        typer.echo(to_json("error", {"error": fields}))


def _nearest_choice(error: TyperException) -> str:
    """For an option of fixed words: which of them was probably meant."""
    from difflib import get_close_matches

    parameter = getattr(error, "param", None)
    words = getattr(getattr(parameter, "type", None), "choices", None)
    if words is None:  # typer 0.28 and later: what the parameter was made of
        words = get_args(getattr(getattr(parameter, "type_descriptor", None), "annotation", None))
    choices = list(map(str, words))
    given = (word.rpartition("=")[2] for word in sys.argv[1:])
    near = [found for word in given if word not in choices for found in get_close_matches(word, choices, n=1)]
    return f"Did you mean {describe(near[0])}? " if near else ""


def _wrong_usage(error: TyperException) -> int:
    """What is wrong and where to read more; a command without its arguments shows its help."""
    message = escaped(error.format_message().replace(": Value error, ", ": "), lines=True)  # pydantic's, of typer 0.28
    if not is_heard(error):
        pass
    elif message.startswith("Usage:"):
        typer.echo(message, err=True)
    else:
        typer.echo(f"error: {message}", err=True)
        context: typer.Context | None = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "optimstate"
        hint = f"{_nearest_choice(error)}`{command} --help` shows what it takes."
        typer.echo(f"hint: {hint}", err=True)
        _echo_json("UsageError", message, hint)
    return error.exit_code
