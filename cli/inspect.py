"""`optimstate inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from optimstate import errors
from optimstate.cli.app import PLACE, Force, Json, Quiet, View, app, epilog, in_vain, until_exit
from optimstate.cli.words import Sort
from optimstate.io.location import Location


@app.command(
    short_help="Show what a checkpoint holds, and whether a run can resume from it.",
    epilog=epilog(
        "optimstate inspect checkpoint.pt",
        "optimstate inspect checkpoint-1000/ --params",
        "optimstate inspect checkpoint.pt --section model --sort size --top 10",
        "optimstate inspect checkpoint-*/ --stats",
        "optimstate inspect checkpoint.pt --stats --html report.html",
        exits="0 fine, 2 wrong usage, 3 bad input, 5 the page cannot be written.",
        page="checkpoints",
    ),
)
def inspect(
    paths: Annotated[
        list[Location],
        typer.Argument(
            metavar="PATH...", help="Checkpoint files or folders; several, or a pattern, give a table.", **PLACE
        ),
    ],
    params: Annotated[
        bool, typer.Option("--params", help="List every parameter with its slots (also in --json).")
    ] = False,
    groups: Annotated[bool, typer.Option("--groups", help="List all options of every param group.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read every tensor for norms, ranges, zeros and NaN (imports torch).")
    ] = False,
    name: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Show only parameters that match, e.g. 'layers.3.**'.")
    ] = None,
    section: Annotated[str | None, typer.Option(metavar="KIND|PATH", help="Show only this section.")] = None,
    sort: Annotated[Sort | None, typer.Option(help="List parameters by name, or the largest first.")] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="N", help="List only the first N parameters.")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show names as a tree of modules.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List all other entries, however many.")] = False,
    view: View = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write an HTML page with histograms of moments and steps, heat maps and tables."
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds, and whether a run can resume from it.

    Lists sections, algorithm, groups, parameters, slots, steps, sizes, all other entries, and anything unusual. Nothing
    in the file is executed; torch is imported only for --stats, --sort norm and --html.
    """
    import optimstate
    from optimstate.cli.render import terminal
    from optimstate.formats.registry import open_checkpoint
    from optimstate.surgery.inspection.text import View

    found_paths = _expanded(paths)
    if html is not None:
        from optimstate.io.destination import check_destination

        if len(found_paths) > 1:
            raise typer.BadParameter("--html shows one checkpoint: give one path")
        check_destination(html, found_paths, force=force)
    if len(found_paths) > 1 and not as_json:
        in_vain(
            "in a table of checkpoints: give one path, or --json",
            params=params,
            groups=groups,
            sort=sort,
            top=top,
            tree=tree,
            all=everything,
        )
    if as_json:
        in_vain("with --json, which has all of it", groups=groups, tree=tree)
    if html is None:
        in_vain("without --html, as nothing is written", force=force)
    if section is not None or name is not None:
        in_vain("with --section or --name, which leave other entries out", all=everything)
    if params or sort is not None or top is not None:
        in_vain("where parameters are listed one by one (--params, --sort, --top)", tree=tree)
    measure = stats or html is not None
    reads = measure or sort == "norm"
    documents = [until_exit(open_checkpoint(path)) for path in found_paths]
    inspections = []
    with terminal.progress("measuring", *(found_paths if reads else []), quiet=quiet) as advance:
        for document in documents:
            try:
                found = optimstate.inspect(
                    document,
                    parameters=params,
                    statistics=measure,
                    name=name,
                    section=section,
                    sort=sort,
                    top=top,
                    everything=everything,
                    view=view,
                    progress=advance,
                )
            except errors.MigrationError as error:
                raise typer.BadParameter(f"--section: {error.message}") from None
            inspections.append(found)
    if (
        groups
        and section is not None
        and not any(shown.kind == "optimizer" for found in inspections for shown in found.sections)
    ):
        in_vain("with a --section that is not an optimizer", groups=groups)
    if len(inspections) > 1:
        from optimstate.surgery.inspection.history import History

        terminal.show(History(tuple(inspections)), as_json=as_json, quiet=quiet)
        return
    (found,) = inspections
    if html is not None:
        from optimstate.cli.render.page import inspection_page, write_page
        from optimstate.surgery.inspection.updates import updates

        write_page(inspection_page(found, list(updates(documents[0]))), html)
    text = None
    if not quiet and not as_json:
        text = found.text(View(params, groups, stats or sort == "norm", sort, top, tree, everything))
    terminal.show(found, text, as_json=as_json, quiet=quiet)
    if html is not None and not (quiet or as_json):
        typer.echo(f"\nwrote {html}")


def _expanded(paths: list[Location]) -> list[Location]:
    """The paths, and what patterns stand for that the shell left alone."""
    found: list[Location] = []
    for path in paths:
        pattern = str(path)
        left_alone = isinstance(path, Path) and any(sign in pattern for sign in "*?[") and not path.exists()
        found += (_matches(pattern) if left_alone else []) or [path]
    return found


def _matches(pattern: str) -> list[Path]:
    from glob import glob  # takes longer to import than most files to inspect

    return [Path(found) for found in sorted(glob(pattern))]  # noqa: PTH207 - of absolute patterns too
