"""`optimstate remap`."""

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import PLACE, Copy, Force, Json, NoSync, Quiet, Ranks, Source, Verify, app, epilog, read_plan
from optimstate.cli.together import helped, joined, rank_of, stage_of
from optimstate.io.location import Location


@app.command(
    short_help="Rename, duplicate, drop or rebuild parameters by a plan.",
    epilog=epilog(
        "optimstate remap old.pt new.pt --rename 'encoder.{i}.{p**}=blocks.{i}.{p**}'",
        "optimstate remap old.pt new.pt --duplicate 'mlp.{p}=experts.{e=0..3}.{p}'",
        "optimstate remap old.pt --dry-run --drop 'head.**' --set 'weight_decay=0.05'",
        "optimstate remap old.pt new.pt --plan plan.toml --like new-model.pt --force",
        "optimstate plan suggest old.pt new-model.pt -o - | optimstate remap old.pt new.pt --plan -",
        exits="0 fine, 2 wrong usage, 3 bad input, 4 the plan does not fit, 5 the destination, "
        "6 the container cannot hold it, 130 interrupted.",
        page="cookbook",
    ),
)
def remap(
    source: Source,
    destination: Annotated[
        Location | None, typer.Argument(help="Where to write; not needed with --in-place or --dry-run.", **PLACE)
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A plan file (TOML); - reads standard input.")
    ] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename parameters.")] = None,
    duplicate: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW,NEW", help="Copy parameters with their state.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Drop parameters and their state.")] = None,
    fresh: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Reset the optimizer state of existing parameters, or declare new ones."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[WHERE:]KEY=VALUE",
            help="Set an option of all param groups, of group number WHERE, or of the parameters that the template "
            "WHERE matches ('**.bias:weight_decay=0.0'), which then get a group of their own. With several optimizers, "
            "put the path of one in front: 'dis_optimizer:0:lr=1e-4'.",
        ),
    ] = None,
    schedules: Annotated[
        list[str] | None,
        typer.Option(
            "--set-schedule",
            metavar="[PATH:]KEY=VALUE",
            help="Set an argument of every scheduler as if it had always had that value (T_max=40), or only of the "
            "one at PATH, or of a part of one ('_schedulers[1]:T_max=40').",
        ),
    ] = None,
    like: Annotated[
        Location | None,
        typer.Option(
            **PLACE,
            metavar="MODEL|NAMES.txt",
            help="Write the optimizer in the order (and groups) of the new model, since torch loads by position. "
            "MODEL is a checkpoint of it (the weights are enough); NAMES.txt lists its parameter names, one per line.",
        ),
    ] = None,
    plan_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save all of this as a plan; - prints the plan instead of the report."),
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Rename within the file, by appending to it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be done and write no checkpoint.")
    ] = False,
    verify: Verify = None,
    force: Force = False,
    copy: Copy = False,
    ranks: Ranks = None,
    no_sync: NoSync = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Rename, duplicate, drop or rebuild parameters: weights, every optimizer slot, groups and averages together.

    Templates match whole dotted names: {i} is one component, {rest**} several, {x=q|k|v} and {e=0..7} enumerate. The
    options become rules of one plan, after those of --plan: the first rule that matches a name applies. The
    report says what becomes of every slot (exact, approximate, fresh, dropped) and why, and gives the equivalent plan.
    """
    import optimstate
    from optimstate.cli.render import terminal
    from optimstate.plan.language.plan import Plan
    from optimstate.surgery.plans import files

    alone = ["--plan -"] if str(plan) == "-" else []
    rank = rank_of(*alone, *(["--in-place"] if in_place else []))
    rules = read_plan(plan) if plan else Plan()
    rules += Plan.from_options(rename=rename or (), duplicate=duplicate or (), drop=drop or (), fresh=fresh or ())
    if rules == Plan() and not (settings or schedules or like):
        raise typer.BadParameter(
            f"nothing to do: the plan {plan} is empty"
            if plan
            else "nothing to do: give --plan, --rename, --duplicate, --drop, --fresh, --set, --set-schedule or --like"
        )
    if destination is None and not (in_place or dry_run):
        raise typer.BadParameter("give a destination, --in-place or --dry-run")
    if destination is not None and in_place:
        raise typer.BadParameter("--in-place takes no destination")
    if plan_out is not None and str(plan_out) == "-" and as_json:
        raise typer.BadParameter("--json has the plan in it: leave out --plan-out -")
    if plan_out is not None:
        files.check_plan_destination(plan_out, source, force=force)
    if dry_run and rank:
        return  # the first one says it
    asked = ["remap", rules.to_toml(), settings, schedules, str(like), copy, ranks]
    stage = None if dry_run else stage_of(source, destination, asked, like=like, sync=not no_sync, force=force)
    with joined(stage), terminal.progress("remapping", source, quiet=quiet or bool(rank)) as advance:
        if helped(stage, sync=not no_sync):
            return
        if settings or schedules:
            from optimstate.surgery.writing.settings import with_options, with_schedules

            rules = with_options(rules, source, settings) if settings else rules
            rules = with_schedules(rules, schedules) if schedules else rules
        report = optimstate.remap(
            source,
            destination,
            rules,
            like=like,
            in_place=in_place,
            dry_run=dry_run,
            force=force,
            verify=verify,
            sync=not no_sync,
            progress=advance,
            copy=copy,
            ranks=ranks,
            stage=stage,
        )
    if rank:
        return
    if plan_out is not None and str(plan_out) == "-":
        typer.echo(report.plan, nl=False)
        return
    if plan_out is not None:
        files.save_plan(report.plan, plan_out)
    terminal.show(report, as_json=as_json, quiet=quiet)
