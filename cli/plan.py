"""`optimstate plan suggest | derive | check | invert | show`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import PLACE, SETTINGS, Application, Force, Json, Quiet, app, epilog, in_vain, read_plan
from optimstate.io.location import Location

plans = Application(
    name="plan",
    help="Write, check, invert and show plans: TOML files that say which parameters are made from which.\n\n"
    "Torch is never imported and no checkpoint is changed.",
    short_help="Suggest, derive, check, invert and show plans.",
    epilog=epilog(
        "optimstate plan suggest old.pt new-model.pt -o plan.toml",
        "optimstate plan check plan.toml old.pt --target new-model.pt",
        "optimstate remap old.pt new.pt --plan plan.toml --force",
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=SETTINGS,
)
app.add_typer(plans)


class Layout(StrEnum):
    """The two layouts of a transformers model."""

    live = "live"
    hub = "hub"


PlanFile = Annotated[Path, typer.Argument(help="A plan file (TOML); - reads standard input.")]
Out = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the plan to FILE; - prints it instead of the report."),
]


@plans.command(
    short_help="Propose the plan from one checkpoint to another.",
    epilog=epilog(
        "optimstate plan suggest old.pt new-model.pt -o plan.toml",
        "optimstate plan suggest old.pt new-model.pt --headers --json",
        "optimstate plan suggest old.pt new-model.pt --rehearse resume_check.py",
        "optimstate plan suggest old.pt new-model.pt -o - | optimstate plan check - old.pt",
        exits="0 everything is explained, 1 part of TARGET is not, or a rule does not fit SOURCE, "
        "2 wrong usage, 3 bad input, 5 the destination.",
        page="command-line",
    ),
)
def suggest(
    source: Annotated[Location, typer.Argument(help="The checkpoint to move.", **PLACE)],
    target: Annotated[
        Location, typer.Argument(help="A checkpoint of the new model (the weights are enough).", **PLACE)
    ],
    output: Out = None,
    rehearse: Annotated[
        Path | None,
        typer.Option(metavar="SCRIPT", help="Decide open questions with a script for `optimstate rehearse`."),
    ] = None,
    headers: Annotated[
        bool, typer.Option("--headers", help="Compare names and shapes only. Contents identify renames more reliably.")
    ] = False,
    layouts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of further known layouts, in the form of the built-in one."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Propose a plan that turns the names and shapes of SOURCE into those of TARGET.

    Every rule comes with a confidence from 0 to 1 and the reason: the contents are the same, a library's layout is
    known, nothing else has the shape, the sizes add up. Where names and shapes do not decide, the possibilities are
    ranked and none is taken. What no rule explains is listed. Read the plan before you use it.
    """
    import optimstate
    from optimstate.cli.render import terminal

    _check(output, source, target, force=force, as_json=as_json)
    keeps = None
    if rehearse is not None:
        from optimstate.cli.scripts import rehearsed_script
        from optimstate.rehearsal.deciding import trial

        keeps = trial(rehearsed_script(rehearse))
    with terminal.progress("comparing", source, target, quiet=quiet or headers) as advance:
        report = optimstate.suggest(source, target, headers=headers, layouts=layouts, keeps=keeps, progress=advance)
    if not _put(report.plan, output):
        terminal.show(report, as_json=as_json, quiet=quiet)
        _wrote(output, quiet=quiet or as_json)
    if not report.complete:
        raise typer.Exit(1)


@plans.command(
    short_help="Read a plan off a weight-conversion function or script, or off transformers.",
    epilog=epilog(
        "optimstate plan derive old.pt --function converter:renamed -o plan.toml",
        "optimstate plan derive old.pt --function converter:grown --old-model converter:Old --new-model converter:New",
        "optimstate plan derive old.pt --script convert.py --writes new.pt -- --in old.pt --out new.pt",
        "optimstate plan derive checkpoint-1000 --transformers checkpoint-1000 --to live --json",
        exits="0 fine, 2 wrong usage, 3 bad input, 4 no plan says what the function does, 5 the destination.",
        page="derive",
    ),
)
def derive(
    like: Annotated[
        Location, typer.Argument(help="A checkpoint with the names and shapes that the function expects.", **PLACE)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS]", help="What the script is called with.", show_default=False),
    ] = None,
    function: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="A function that takes a state dict and returns one.")
    ] = "",
    old_model: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="Builds the old module, for a function of two modules.")
    ] = "",
    new_model: Annotated[
        str, typer.Option(metavar="MODULE:NAME", help="Builds the new module, into which the function copies.")
    ] = "",
    script: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A Python script that reads the checkpoint and writes another."),
    ] = None,
    writes: Annotated[Path | None, typer.Option(metavar="PATH", help="What the script writes: file or folder.")] = None,
    transformers: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", help="Use the converters of transformers for this config.json (file or folder)."
        ),
    ] = None,
    to: Annotated[Layout, typer.Option(help="With --transformers, the layout to produce.")] = Layout.live,
    allow_drop: Annotated[bool, typer.Option("--allow-drop", help="Allow the function to leave tensors out.")] = False,
    python: Annotated[
        Path | None,
        typer.Option("--python", metavar="PYTHON", help="The interpreter that runs the function (default: this one)."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Stop the function's process after this time.")
    ] = 600,
    output: Out = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Derive the plan that does to a whole checkpoint what a function does to weights.

    The function runs a few times, in a separate process, on tensors whose elements are numbered; the plan is read from
    where they end up. No value of the checkpoint is read. The plan is compared with the function before it is printed.
    With --old-model and --new-model the function copies weights from one module into another, in place.

    A --script is run likewise, on copies: where its arguments, behind --, name the checkpoint or what --writes names, a
    file of numbered elements and a place of its own are meant. Absolute paths inside the script are not seen.
    """
    import sys

    from optimstate.cli.render import terminal
    from optimstate.surgery.plans.deriving import derive_plan

    if sum((bool(function), script is not None, transformers is not None)) != 1:
        raise typer.BadParameter("give one of --function, --script and --transformers")
    if (script is None) != (writes is None) or (arguments and script is None):
        raise typer.BadParameter("--script goes with --writes, and arguments behind -- with both")
    if bool(old_model) != bool(new_model) or (old_model and not function):
        raise typer.BadParameter("--old-model, --new-model and --function go together")
    if transformers is None:
        in_vain("without --transformers", to=to is not Layout.live)
    _check(output, like, force=force, as_json=as_json)
    report = derive_plan(
        like,
        function=function,
        models=(old_model, new_model) if old_model else None,
        script=script or "",
        writes=writes or "",
        arguments=arguments or (),
        transformers=transformers or "",
        to=to.value,
        allow_drop=allow_drop,
        python=python or sys.executable,
        timeout=timeout,
    )
    if not _put(report.plan, output):
        terminal.show(report, as_json=as_json, quiet=quiet)
        _wrote(output, quiet=quiet or as_json)


@plans.command(
    short_help="Find everything that is wrong with a plan.",
    epilog=epilog(
        "optimstate plan check plan.toml",
        "optimstate plan check plan.toml old.pt",
        "optimstate plan check plan.toml old.pt --target new-model.pt --quiet && echo 'it fits'",
        exits="0 it fits, 2 wrong usage, 3 bad input, 4 it does not fit or cannot be read.",
        page="command-line",
    ),
)
def check(
    plan: PlanFile,
    checkpoint: Annotated[Location | None, typer.Argument(help="The checkpoint the plan is for.", **PLACE)] = None,
    target: Annotated[
        Location | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="A checkpoint of the new model, whose names and shapes the result must have.",
            **PLACE,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find all problems of a plan at once: by itself, for a checkpoint, and against the model it should lead to.

    Each problem names the parameter, both sides and a remedy.
    """
    from optimstate.cli.render import terminal
    from optimstate.surgery.plans import checking

    if target is not None and checkpoint is None:
        raise typer.BadParameter("--target needs the checkpoint that the plan is for")
    report = checking.check_plan(read_plan(plan), checkpoint, target=target)
    terminal.show(report, as_json=as_json, quiet=quiet)
    if not report.fits:
        raise typer.Exit(4)


@plans.command(
    short_help="Write the plan that undoes a plan.",
    epilog=epilog(
        "optimstate plan invert plan.toml",
        "optimstate plan invert plan.toml old.pt -o back.toml",
        exits="0 fine, 2 wrong usage, 3 bad input, 4 it loses something and cannot be undone, 5 the destination.",
        page="explanation/undo",
    ),
)
def invert(
    plan: PlanFile,
    checkpoint: Annotated[
        Location | None,
        typer.Argument(
            help="The checkpoint the plan is for (not its result), which shows sizes that are not equal.", **PLACE
        ),
    ] = None,
    output: Out = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write the plan that undoes a plan, or say which rules lose what.

    Without --output, the plan is printed.
    """
    from optimstate.surgery.plans import inverting

    _check(output, plan, *(() if checkpoint is None else (checkpoint,)), force=force, as_json=as_json)
    report = inverting.invert_plan(read_plan(plan), checkpoint)
    if as_json:
        typer.echo(report.to_json())
    _put(report.plan, output or (None if as_json or quiet else Path("-")))
    _wrote(output, quiet=quiet or as_json)


@plans.command(
    short_help="Show what a plan says, and what it does to a checkpoint.",
    epilog=epilog(
        "optimstate plan show plan.toml",
        "optimstate plan show plan.toml old.pt",
        "optimstate plan show plan.toml old.pt --params",
        exits="0 fine, 2 wrong usage, 3 bad input, 4 it does not fit or cannot be read.",
        page="command-line",
    ),
)
def show(
    plan: PlanFile,
    checkpoint: Annotated[Location | None, typer.Argument(help="The checkpoint the plan is for.", **PLACE)] = None,
    params: Annotated[
        bool, typer.Option("--params", help="List every parameter and slot instead of grouping layers.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML page of which old parameters feed which new ones."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the rules of a plan in order and, given a checkpoint, what becomes of every parameter and slot.

    Each slot is exact, approximate, fresh or dropped, with the reason.
    """
    from optimstate.cli.render import terminal
    from optimstate.surgery.plans import files, showing

    if checkpoint is None:
        in_vain("without a checkpoint, whose parameters it is about", params=params)
    if as_json:
        in_vain("with --json, which has every parameter", params=params)
    if html is None:
        in_vain("without --html, as nothing is written", force=force)
    if html is not None:
        files.check_plan_destination(html, plan, *([] if checkpoint is None else [checkpoint]), force=force)
    report = showing.show_plan(read_plan(plan), checkpoint)
    if html is not None:
        from optimstate.cli.render.lineage import lineage_page
        from optimstate.cli.render.page import write_page

        write_page(lineage_page(plan.name, report), html)
    terminal.show(report, report.text(str(plan), params=params), as_json=as_json, quiet=quiet)
    _wrote(html, quiet=quiet or as_json)


def _check(output: Path | None, *sources: Location, force: bool, as_json: bool) -> None:
    """Refuse what cannot be written before any work is done."""
    from optimstate.surgery.plans import files

    if str(output) == "-" and as_json:
        raise typer.BadParameter("--json has the plan in it: leave out -o -")
    if output is None or str(output) == "-":
        in_vain("without the name of a file to write (--output FILE)", force=force)
    else:
        files.check_plan_destination(output, *sources, force=force)


def _put(text: str, output: Path | None) -> bool:
    """Write a plan where it was asked for; whether that was standard output, which then holds nothing else."""
    from optimstate.surgery.plans import files

    if output is None:
        return False
    if str(output) == "-":
        typer.echo(text, nl=False)
        return True
    files.save_plan(text, output)
    return False


def _wrote(output: Path | None, *, quiet: bool) -> None:
    if output is not None and str(output) != "-" and not quiet:
        typer.echo(f"wrote {output}")
