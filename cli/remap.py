"""`optimstate remap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimstate.cli.app import Force, Json, NoSync, app


@app.command(
    epilog="Example: optimstate remap old.pt new.pt --rename 'encoder.{i}.{p**}=blocks.{i}.{p**}' "
    "--duplicate 'mlp.{p}=experts.{e=0..3}.{p}' --drop 'head.**'"
)
def remap(
    source: Annotated[Path, typer.Argument(help="A checkpoint file or folder.", show_default=False)],
    destination: Annotated[
        Path | None, typer.Argument(help="Where to write; left out with --in-place or --dry-run.", show_default=False)
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file (TOML).", show_default=False)] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW", show_default=False)] = None,
    duplicate: Annotated[list[str] | None, typer.Option(metavar="OLD=NEW,NEW", show_default=False)] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="NAME", show_default=False)] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Rename inside the file by appending to it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report what would be done and write nothing.")] = False,
    force: Force = False,
    no_sync: NoSync = False,
    as_json: Json = False,
) -> None:
    """Rename, duplicate or drop parameters: weights, every optimizer slot, groups and averages together.

    Templates match whole dotted names: {i} is one component, {rest**} several, {x=q|k|v} and {e=0..7} enumerate.
    """
    from optimstate import surgery
    from optimstate.cli import _render
    from optimstate.plan.rules import Plan

    rules = Plan.from_file(plan) if plan else Plan()
    rules += Plan.from_options(rename=rename or (), duplicate=duplicate or (), drop=drop or ())
    if not rules.rules:
        raise typer.BadParameter("nothing to do: give --plan, --rename, --duplicate or --drop")
    if destination is None and not (in_place or dry_run):
        raise typer.BadParameter("give a destination, --in-place or --dry-run")
    if destination is not None and in_place:
        raise typer.BadParameter("--in-place takes no destination")
    with _render.progress(source, "remapping") as advance:
        report = surgery.remap(
            source,
            destination,
            rules,
            in_place=in_place,
            dry_run=dry_run,
            force=force,
            sync=not no_sync,
            progress=advance,
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        _render.remapped(report)
