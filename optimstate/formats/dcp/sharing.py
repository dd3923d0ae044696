"""A folder that several processes write together: dividing the bytes among them.

The first process decides and gives the others rows of files, offsets and lengths, so that they need neither the
checkpoint nor the plan. Only if something must be computed (a cast, a transposition), each process with a part of it
opens the checkpoint itself, and makes the same decision.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from optimstate.errors import CheckpointError
from optimstate.formats.dcp.columns import Box, Item
from optimstate.formats.dcp.layout import Layout, Part
from optimstate.formats.dcp.writing import write_file
from optimstate.formats.protocol import WriteOptions
from optimstate.io.extents import Extent, Progress, StoredSource
from optimstate.io.location import Location
from optimstate.io.places import located, open_source
from optimstate.io.shared import Notes, move, range_of_row, reporting
from optimstate.io.together import Stage
from optimstate.tensors.lazy import tensor_of

__all__ = ["help_out", "share_out"]

Items = dict[tuple[str, Box | None], Item]


# --- deciding ---------------------------------------------------------------------------------------------------------


def _rows(parts: Sequence[Part]) -> list[Any] | None:
    """Parts as JSON; None if one is computed."""
    made = []
    for part in parts:
        if part.box is None:
            return None
        extents = part.value.extents()
        if not all(extent.source is None or isinstance(extent.source, StoredSource) for extent in extents):
            return None
        where = [[extent.source and str(extent.source.path), extent.offset, extent.length] for extent in extents]
        made.append([part.name, part.box, part.value.dtype, where])
    return made


def _ranges(made: Layout, files: Sequence[int], folder: Location, size: int) -> list[list[Any]]:
    """The ranges of whole files to copy, in shares with equal numbers of bytes."""
    if made.source is None:
        return [[] for _ in range(size)]
    sources = [made.source.sources[number] for number in files]
    starts = [0, *accumulate(source.size for source in sources)]
    shares: list[list[Any]] = []
    for rank in range(size):
        share = []
        at, stop = (starts[-1] * rank // size, starts[-1] * (rank + 1) // size)
        while at < stop:
            place = bisect_right(starts, at) - 1
            length = min(stop, starts[place + 1]) - at
            target = str(folder / made.source.metadata.files[files[place]])
            at_in_file = at - starts[place]
            share.append([str(sources[place].path), at_in_file, target, at_in_file, length])
            at += length
        shares.append(share)
    return shares


def _whole_files(made: Layout, files: Sequence[int], folder: Location, size: int) -> list[list[Any]]:
    """The same for a store, where one process writes an object: whole files, each for the process with the least."""
    shares: list[list[Any]] = [[] for _ in range(size)]
    filled = [0] * size
    for number in files:
        assert made.source is not None
        source = made.source.sources[number]
        rank = min(range(size), key=filled.__getitem__)
        filled[rank] += source.size
        shares[rank].append([str(source.path), 0, str(folder / made.source.metadata.files[number]), 0, source.size])
    return shares


def share_out(made: Layout, stage: Stage, options: WriteOptions, *, copied: Sequence[int]) -> Items:
    """Write all files of a layout together with the other processes of a stage, in any of them.

    Args:
        made: The layout, which is the same in every process that makes it.
        stage: The shared folder.
        options: How to write.
        copied: In the first process, the numbers of the files with kept items that are copied: all that are not linked.

    Returns:
        The places of all new items; empty in processes other than the first.
    """
    team, folder = stage.team, stage.folder
    ranges: list[list[Any]] = [[] for _ in range(team.size)]
    if team.rank:
        ranges[team.rank] = stage.work()["ranges"]
    else:
        ranges = (_whole_files if stage.in_store else _ranges)(made, copied, folder, team.size)
        for number in () if stage.in_store else copied:
            assert made.source is not None
            _reserve(Path(str(folder / made.source.metadata.files[number])), made.source.sources[number].size)
        for rank in range(1, team.size):
            rows = {name: _rows(made.files[name]) for name in made.owned[rank]}
            stage.give(rank, {"ranges": ranges[rank], "files": None if None in rows.values() else rows})
    with stage.alive() as moved:
        if stage.voted() is None:
            files = {name: made.files[name] for name in made.owned[team.rank]}
            stage.vote(_done(_moved(stage, ranges[team.rank], files, options, moved)))
        if team.rank:
            stage.wait()
            return {}
        items: Items = {}
        for vote in stage.votes(options.progress):
            items.update(_items(vote))
        _check_sizes(stage, items, [row for rows in ranges for row in rows])
        return items


def help_out(stage: Stage, options: WriteOptions) -> bool:
    """Do the work that the first process gives this one.

    Returns:
        False if something must be computed, so that this process must make the layout itself and call `share_out`.
    """
    with stage.alive() as moved:
        work = stage.work()
        if work["files"] is None:
            return False
        if stage.voted() is None and "objects" in work:
            from optimstate.io.shared_objects import upload_objects

            stage.vote(upload_objects(stage, work["objects"], reporting(moved, options.progress)))
        elif stage.voted() is None:
            sources: dict[str, StoredSource] = {}
            files = {name: [_part(row, sources) for row in rows] for name, rows in work["files"].items()}
            stage.vote(_done(_moved(stage, work["ranges"], files, options, moved)))
        stage.wait()
    return True


# --- doing ------------------------------------------------------------------------------------------------------------


def _moved(
    stage: Stage,
    ranges: Sequence[Any],
    files: Mapping[str, Sequence[Part]],
    options: WriteOptions,
    moved: Progress,
) -> Items:
    """Copy ranges and write files, without what an earlier attempt has done."""
    progress = reporting(moved, options.progress)
    notes = Notes(stage)
    inner = options._replace(progress=progress, replace=True)  # replaces objects of an earlier attempt
    sources = {row[0]: open_source(row[0]) for row in ranges}
    if stage.in_store:
        for path, _, target, _, length in ranges:
            name = located(target).name
            if notes.of_file(name) is not None:
                continue
            with inner.new_file(located(target), expected_size=length) as out:
                out.copy([Extent(sources[path], 0, length)], progress)
            notes.add_file(name, length, [])
    else:
        move([range_of_row(row, sources[row[0]]) for row in ranges], progress, notes, sync=options.sync)
    items: Items = {}
    for name, parts in files.items():
        rows = notes.of_file(name)
        found = write_file(stage.folder / name, parts, inner) if rows is None else _items(rows)
        if rows is None:
            notes.add_file(name, max(item.offset + item.length for item in found.values()), _done(found))
        items.update(found)
    return items


def _reserve(path: Path, size: int) -> None:
    """Give a file a size, keeping its contents if it exists."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _done(items: Items) -> list[Any]:
    return [[name, box, item] for (name, box), item in items.items()]


def _items(rows: Iterable[Any]) -> Items:
    return {(name, _box(box)): Item(*item) for name, box, item in rows}


def _box(box: Any) -> Box | None:
    return None if box is None else (tuple(box[0]), tuple(box[1]))


def _part(row: Sequence[Any], sources: dict[str, StoredSource]) -> Part:
    name, box, dtype, where = row
    made = _box(box)
    assert made is not None
    extents = []
    for path, offset, length in where:
        if path is not None and path not in sources:
            sources[path] = open_source(path)
        extents.append(Extent(None if path is None else sources[path], offset, length))
    return Part(name, made, tensor_of(extents, dtype, made[1]))


def _check_sizes(stage: Stage, items: Items, copied: Sequence[Any]) -> None:
    """Check that every file has its full size: a file system may show less for a while, or permanently."""
    ends: dict[str, int] = {}
    for item in items.values():
        ends[item.file] = max(ends.get(item.file, 0), item.offset + item.length)
    start = len(str(stage.folder / "x")) - 1
    for _, _, target, position, length in copied:
        ends[target[start:]] = max(ends.get(target[start:], 0), position + length)
    sizes = stage.sizes()
    for name, end in ends.items():
        if sizes.get(name) != end:
            message = f"does not have the {end} bytes that a process has written"
            raise CheckpointError(message, path=stage.folder / name)
