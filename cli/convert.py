"""`optimstate convert`."""

from typing import Annotated

import typer

from optimstate.cli import words
from optimstate.cli.app import PLACE, Copy, Force, Json, NoSync, Quiet, Ranks, Source, Verify, app, epilog
from optimstate.cli.together import helped, joined, rank_of, stage_of
from optimstate.describe import describe
from optimstate.io.location import Location


def parse_size(text: str) -> int:
    """Bytes from `500MB`, `2GiB`, `1000000`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BKMGIbkmgi ")
    unit = text.strip()[len(number) :].strip().upper()
    if unit not in units or not number.replace(".", "", 1).isdigit() or not float(number):
        raise typer.BadParameter(f"{describe(text)} is not a size; write 500MB or 2GiB", param_hint="--shard-size")
    return int(float(number) * units[unit])


@app.command(
    short_help="Write a checkpoint in another container, dtype or optimizer.",
    epilog=epilog(
        "optimstate convert checkpoint.pt checkpoint.safetensors",
        "optimstate convert checkpoint.pt weights.safetensors --section model --dtype model=bf16",
        "optimstate convert checkpoint.pt small.pt --without optimizer",
        "optimstate convert checkpoint.pt sharded --shard-size 500MB --verify",
        exits="0 fine, 1 something was lost (--salvage), 2 wrong usage, 3 bad input, 4 the state has no such form, "
        "5 the destination, 6 the container cannot hold it, 130 interrupted.",
        page="command-line",
    ),
)
def convert(
    source: Source,
    destination: Annotated[Location, typer.Argument(help="Where to write; the suffix decides the container.", **PLACE)],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="torch, safetensors, dcp, deepspeed-universal or torch-checkpointing (default: by suffix).",
            autocompletion=words.formats,
        ),
    ] = None,
    section: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND|PATH",
            help="Write this alone: model, ema, optimizer or scheduler, or a path in the checkpoint. Given several "
            "times, these and nothing else.",
            autocompletion=words.sections,
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND|PATH",
            help="Leave this out and keep everything else.",
            autocompletion=words.sections,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT=DTYPE", help="Cast a section or slot: model=bf16, exp_avg=bf16.", autocompletion=words.dtypes
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Make the state that of Adam, Lion, Adafactor, ...", autocompletion=words.optimizers
        ),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Write a folder of shards no larger than this.")
    ] = None,
    verify: Verify = None,
    no_checksums: Annotated[
        bool, typer.Option("--no-checksums", help="Write zip records without CRC-32, as torch can.")
    ] = False,
    digest: Annotated[
        str | None,
        typer.Option(
            metavar="sha256|xxh3",
            help="Record digests of tensors and header in safetensors files; verify and convert compare them.",
        ),
    ] = None,
    drop_opaque: Annotated[
        bool, typer.Option("--drop-opaque", help="Leave out objects of other classes; what is lost is reported.")
    ] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Write what is intact in a damaged source and name what is lost.")
    ] = False,
    clone_views: Annotated[
        bool, typer.Option("--clone-views", help="Store tensors that share memory as separate copies.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check that it would work and write nothing.")] = False,
    force: Force = False,
    copy: Copy = False,
    ranks: Ranks = None,
    no_sync: NoSync = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another container, without loss and in constant memory.

    Can also select sections, change dtypes, or translate the state for another optimizer; whatever that rounds or
    loses is reported.
    """
    import optimstate
    from optimstate.cli.render import terminal
    from optimstate.formats.protocol import WriteOptions

    if section and without:
        raise typer.BadParameter("--section and --without exclude each other: what is not chosen is left out")
    size = None if shard_size is None else parse_size(shard_size)
    rank = rank_of()
    if rank and dry_run:
        return  # the first one says it
    asked = ["convert", to, section, without, dtype, optimizer, drop_opaque, salvage, copy, ranks]
    asked += [size, no_checksums, digest, clone_views]
    stage = None if dry_run else stage_of(source, destination, asked, sync=not no_sync, force=force)
    with joined(stage), terminal.progress("converting", source, quiet=quiet or bool(rank)) as advance:
        if helped(stage, sync=not no_sync):
            return
        options = WriteOptions(
            not no_checksums, clone_views, size, not no_sync, advance, digest, copy=copy, ranks=ranks, stage=stage
        )
        report = optimstate.convert(
            source,
            destination,
            to=to,
            section=section or (),
            without=without or (),
            dtypes=_parsed(dtype),
            optimizer=optimizer,
            drop_opaque=drop_opaque,
            salvage=salvage,
            verify=verify,
            dry_run=dry_run,
            force=force,
            options=options,
        )
    if rank:
        return
    terminal.show(report, as_json=as_json, quiet=quiet)
    if report.lost:
        raise typer.Exit(1)


def _parsed(dtypes: list[str] | None) -> dict[str, str]:
    if not dtypes:
        return {}
    from optimstate.surgery.writing.casting import parse_dtypes

    return parse_dtypes(dtypes)
