"""The command line against `cp` and against torch: whole processes, ratios of neighbours in time."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import _data
from tests.bench._harness import (
    CommandError,
    Job,
    Row,
    compare,
    copy_job,
    durable_copy_job,
    print_table,
    run_job,
    standard_rows,
)

TOOL = (sys.executable, "-m", "optimstate.cli")
RENAME = "transformer.h.{i}.{p**}=model.layers.{i}.{p**}"
OLD_NAME, NEW_NAME = b"transformer.h.0.", b"model.layers.0."
# Zip pickles and safetensors headers of every file here are smaller.
NAMES_WITHIN = 32 << 20
# Memory that a streaming command may take at any file size.
STREAM_PEAK = 64.0
FLUSHES: tuple[list[str], ...] = ([], ["--no-sync"])


@dataclass(frozen=True)
class Setting:
    """What is measured: the tool, the files by their names in the tables, a folder for outputs, pairs of runs."""

    tool: Sequence[str]
    streamed: dict[str, Path]
    listed: dict[str, Path]
    tiny: Path
    many: Path
    folder: Path
    pairs: int


def torch_load(path: Path) -> Job:
    """What one does without the tool to see what a torch file holds."""
    code = f"import torch; torch.load({str(path)!r}, mmap=True, weights_only=True)"
    return Job("torch.load", [sys.executable, "-c", code])


def safetensors_load(path: Path) -> Job:
    """The same for a safetensors file."""
    code = f"from safetensors.torch import load_file; load_file({str(path)!r})"
    return Job("load_file", [sys.executable, "-c", code])


def torch_rename(source: Path, target: Path) -> Job:
    """Load, rename every parameter in model and optimizer, save: what the tool replaces."""
    code = f"""
import torch
checkpoint = torch.load({str(source)!r}, weights_only=True)
def renamed(name):
    return name.replace("transformer.h.", "model.layers.")
checkpoint["model"] = {{renamed(name): value for name, value in checkpoint["model"].items()}}
for group in checkpoint["optimizer"]["param_groups"]:
    group["param_names"] = [renamed(name) for name in group["param_names"]]
torch.save(checkpoint, {str(target)!r})
"""
    return Job("torch load and save", [sys.executable, "-c", code], outputs=[target])


def wrote(target: Path, source: Path, *, mentions: bytes) -> Callable[[str], None]:
    """A check that a command wrote all of a file, and a text near its beginning or end, where names are kept."""

    def check(_: str) -> None:
        if not target.exists():
            raise CommandError(f"nothing was written to {target.name}")
        written, expected = target.stat().st_size, source.stat().st_size
        if written < 0.9 * expected:
            raise CommandError(f"{target.name} has {written} bytes where its source has {expected}")
        with target.open("rb") as file:
            head = file.read(NAMES_WITHIN)
            file.seek(max(0, written - NAMES_WITHIN))
            if mentions not in head and mentions not in file.read():
                raise CommandError(f"{target.name} does not mention {mentions.decode()}")

    return check


def listed_slots(said: str) -> None:
    """A check that a listing names the slots of AdamW."""
    if "exp_avg_sq" not in said:
        raise CommandError(f"the listing names no slot exp_avg_sq: {said[:200]!r}")


def says_its_name(said: str) -> None:
    """A check that a version or a help was printed."""
    if "optimstate" not in said:
        raise CommandError(f"no version and no help: {said[:200]!r}")


def against_copies(setting: Setting, title: str, ours: Job, source: Path, *, wall: float) -> list[Row]:
    """A job that streams a file against a copy as durable as its own: `cp`, and `sync` after it where ours flushes."""
    target = setting.folder / "copy"
    bare, durable = copy_job(source, target), durable_copy_job(source, target)
    like, other = (bare, durable) if "--no-sync" in ours.command else (durable, bare)
    measured = compare(ours, like, pairs=setting.pairs, settle=True)
    unlike = compare(ours, other, pairs=setting.pairs, warm_up=0, settle=True)
    rows = standard_rows(f"{title} / {like.name}", measured, wall=wall, peak=STREAM_PEAK)
    return [*rows, Row(f"{title} / {other.name}: wall", unlike.wall)]


def start(setting: Setting) -> list[Row]:
    """What it takes to say something at all, against importing what the command line is built on."""
    rows = []
    peer = Job("import typer, rich", [sys.executable, "-c", "import typer, rich"])
    for words in (["--version"], ["--help"], ["remap", "--help"]):
        ours = Job("start", [*setting.tool, *words], check=says_its_name)
        measured = compare(ours, peer, pairs=setting.pairs)
        rows += standard_rows(f"{' '.join(words)} / {peer.name}", measured, wall=2.0, peak=None)
    return rows


def inspect(setting: Setting) -> list[Row]:
    """Listing a checkpoint against loading it lazily."""
    rows = []
    # 10 times faster for one large file, 15 times for very many tensors.
    goals = {"1GB": (0.1, 60.0), "4.4GB": (0.1, 60.0), "20000-tensors": (1 / 15, None)}
    for name, path in setting.listed.items():
        flat = path.suffix == ".safetensors"
        wall, peak = (None, None) if flat else goals.get(name, (None, None))
        # Loading very many tensors takes torch long: fewer pairs, and several of our runs in each.
        brief = name in setting.streamed
        pairs = setting.pairs if brief else min(setting.pairs, 3)
        for options in ([], ["--json"]):
            ours = Job("inspect", [*setting.tool, "inspect", str(path), *options], check=listed_slots)
            peer = safetensors_load(path) if flat else torch_load(path)
            measured = compare(ours, peer, pairs=pairs, warm_up=int(brief), around=0 if brief else 2)
            title = " ".join([name, path.suffix[1:], *options])
            rows += standard_rows(f"{title} / {peer.name}", measured, wall=wall, peak=peak)
    return rows


def remap(setting: Setting) -> list[Row]:
    """Renaming into a new file against copying the file; very many tensors against torch, which cp is no measure of."""
    rows = []
    target = setting.folder / "remapped.pt"
    for name, source in setting.streamed.items():
        for options in FLUSHES:
            command = [*setting.tool, "remap", str(source), str(target), "--rename", RENAME, *options]
            ours = Job("remap", command, outputs=[target], check=wrote(target, source, mentions=NEW_NAME))
            rows += against_copies(setting, " ".join([name, *options]), ours, source, wall=1.15)
    command = [*setting.tool, "remap", str(setting.many), str(target), "--rename", RENAME]
    ours = Job("remap", command, outputs=[target], check=wrote(target, setting.many, mentions=NEW_NAME))
    peer = torch_rename(setting.many, setting.folder / "peer.pt")
    measured = compare(ours, peer, pairs=min(setting.pairs, 3), warm_up=0)
    return rows + standard_rows(f"{setting.many.stem} / torch load and save", measured, wall=None, peak=None)


def in_place_job(setting: Setting, source: Path) -> Job:
    """Renaming inside a fresh copy of the source each time; the copying is not measured."""
    target = setting.folder / "in_place.pt"
    command = [*setting.tool, "remap", str(target), "--in-place", "--rename", RENAME]

    def prepare() -> None:
        shutil.copyfile(source, target)

    return Job("remap --in-place", command, [target], prepare, check=wrote(target, source, mentions=NEW_NAME))


def in_place(setting: Setting) -> list[Row]:
    """Renaming inside the file: a tenth of cp's time on top of what the same costs on a tiny file."""
    start = [run_job(in_place_job(setting, setting.tiny), settle=True) for _ in range(setting.pairs + 1)][1:]
    rows = []
    for name, source in setting.streamed.items():
        peer = copy_job(source, setting.folder / "copy")
        measured = compare(in_place_job(setting, source), peer, pairs=setting.pairs, settle=True)
        rows.append(Row(f"{name} / cp: wall beyond the same on {setting.tiny.stem}", measured.beyond(start), 0.1))
        rows += standard_rows(f"{name} / cp", measured, wall=None, peak=STREAM_PEAK)
    return rows


def convert(setting: Setting) -> list[Row]:
    """Both ways between torch zip and safetensors against copying, with and without checksums."""
    rows = []
    for name, source in setting.streamed.items():
        other = setting.folder / f"{source.stem}.safetensors"
        try:
            run_job(
                Job(
                    "convert",
                    [*setting.tool, "convert", str(source), str(other)],
                    check=wrote(other, source, mentions=OLD_NAME),
                )
            )
            for start, suffix in ((source, ".safetensors"), (other, ".pt")):
                target = setting.folder / f"converted{suffix}"
                checks = ["--verify"] if start is source else []
                for (options, wall), flush in itertools.product(((checks, 2.2), (["--no-checksums"], 1.3)), FLUSHES):
                    words = [*options, *flush]
                    command = [*setting.tool, "convert", str(start), str(target), *words]
                    ours = Job("convert", command, outputs=[target], check=wrote(target, start, mentions=OLD_NAME))
                    title = " ".join([name, start.suffix[1:], "to", suffix[1:], *words])
                    rows += against_copies(setting, title, ours, start, wall=wall)
        finally:
            other.unlink(missing_ok=True)
    return rows


PARTS: dict[str, Callable[[Setting], list[Row]]] = {
    "start": start,
    "inspect": inspect,
    "remap": remap,
    "in-place": in_place,
    "convert": convert,
}


def default_setting(*, quick: bool, full: bool) -> Setting:
    """The files of `bench-data/`, written on first use."""
    names = ["1GB", "4.4GB"] if full else ["1GB"]
    folder = _data.CACHE / "out"
    folder.mkdir(parents=True, exist_ok=True)
    large = {name: _data.checkpoint_path(name, ".pt") for name in names}
    many = _data.checkpoint_path("20000-tensors", ".pt")
    listed = large | {"20000-tensors": many}
    if not quick:
        listed["20000-tensors, flat"] = _data.checkpoint_path("20000-tensors", ".safetensors")
    tiny = _data.checkpoint_path("3MB", ".pt")
    return Setting(TOOL, large, listed, tiny, many, folder, pairs=1 if quick else 5)


def main(quick: bool, *, full: bool = False, only: Sequence[str] = (), setting: Setting | None = None) -> bool:
    """Print one table a part; False when a measured command failed."""
    unknown = set(only) - set(PARTS)
    if unknown:
        raise SystemExit(f"no such part of cli: {', '.join(sorted(unknown))} (there are {', '.join(PARTS)})")
    setting = setting or default_setting(quick=quick, full=full)
    fine = True
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        try:
            print_table(f"optimstate {name}", part(setting))
        except CommandError as error:
            print(f"\noptimstate {name}: {error}")
            fine = False
    return fine
