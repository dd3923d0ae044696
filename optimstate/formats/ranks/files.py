"""Files of `torch.save` from several ranks, each with its parts of the same tensors, joined into one full state.

With FSDP1's sharded state dicts (`ShardedTensor`) and state dicts of `DTensor` (FSDP2, tensor parallelism) every rank
saves a file. `folder` recognises such files by their names, which differ in a number, and by the classes in them.
Nothing is copied: every tensor is made of pieces of the ranks' files. The joined state is written as one file with full
tensors.

Everything that is not sharded must be equal in all ranks, with two exceptions. Of a buffer that differs (running
statistics of a normalisation that was not synchronised) the first rank's is used, as in torch's full state dicts, and a
note says so. A top-level entry without sharded tensors that differs (random states) is kept for each rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.ranks.shards import SHARDED_CLASSES, ShardRecord, is_sharded, shard_record
from optimstate.formats.ranks.tiles import Box, Tile, check_tiling, region, tensor_of_pieces
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.folders import listed
from optimstate.io.location import Location
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import Path as TreePath
from optimstate.tree import difference, format_path, nodes, path_key, rebuilt_mapping

NAME = "ranks"
SUFFIXES: tuple[str, ...] = ()

_NUMBER = re.compile(r"\d+")
_RANK = re.compile(r"(?P<mark>[._-]?(?:rank|shard)[._-]?)(?P<number>\d+)", re.IGNORECASE)


def sniff(path: Location, head: bytes) -> Claim:  # noqa: ARG001
    """Never: `folder` recognises the files that belong together."""
    return Claim.NO


def read(path: Location) -> Document:
    """Open all files of a folder as the ranks' files of one run.

    Raises:
        CheckpointError: A file is damaged, or the files are not of the ranks of one run.
    """
    return join_ranks(path, {file.name: torch_zip.read(file) for file in listed(path)})


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write one file with full tensors.

    Raises:
        RepresentationError: As for a file of `torch.save`.
    """
    count = len(like.parts) if like is not None else 0
    notes = torch_zip.write(tree, path, like=None, options=options)
    return [*notes, f"one file with full tensors, made of those of {count} ranks"]


# --- which files ----------------------------------------------------------------------------------------------------


def rank_files(parts: Mapping[str, Document]) -> dict[str, list[str]]:
    """The files of a folder that hold parts of the same tensors, in order of their ranks, by a name without the rank.

    Args:
        parts: The checkpoints of a folder, by file name.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name, part in parts.items():
        if part.format == torch_zip.NAME and _mentions_shards(part):
            numbers = list(_RANK.finditer(name)) or list(_NUMBER.finditer(name))
            if numbers:
                last = numbers[-1]
                joined = (name[: last.start()] + name[last.end() :]).lstrip("._-")
                rank = int(last.groupdict().get("number") or last[0])
                found.setdefault(joined if Path(joined).suffix else f"full.{joined}", []).append((rank, name))
    return {joined: [name for _, name in sorted(members)] for joined, members in found.items()}


def _mentions_shards(part: Document) -> bool:
    return any(module.startswith("torch.distributed.") and name in SHARDED_CLASSES for module, name in part.globals)


# --- joining --------------------------------------------------------------------------------------------------------


def join_ranks(path: Location, files: Mapping[str, Document]) -> Document:
    """Join the documents of all ranks into one.

    Args:
        path: A name for the result; no file of this name need exist.
        files: The ranks' documents by file name, in the order of the ranks.

    Raises:
        CheckpointError: A rank is missing, the parts of a tensor do not fill it, or ranks differ in something that is
            not sharded.
    """
    document = Document(path, NAME, {}, parts=dict(files))
    joiner = _Joiner(list(files))
    try:
        document.tree = joiner.root([rank.tree for rank in files.values()])
    except CheckpointError as error:
        raise error.within(path=path) from error
    document.mention(name for rank in files.values() for name in rank.globals)
    document.notes = [f"{len(files)} files of ranks are joined: {', '.join(files)}", *joiner.notes]
    return document


class _Joiner:
    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.notes: list[str] = []
        self._made: dict[int, Any] = {}  # tied tensors stay one object

    def root(self, trees: Sequence[Any]) -> Any:
        """The joined tree; top-level entries without sharded tensors may differ between ranks."""
        first = trees[0]
        if not isinstance(first, Mapping) or any(map(is_sharded, first.values())):
            return self.visit((), trees)
        made = {}
        for key in self._same_keys((), trees):
            values = [tree[key] for tree in trees]
            if any(map(is_sharded, nodes(values[0]))):
                made[key] = self.visit((str(key),), values)
            elif self._differ(values):
                made[key] = {f"rank{rank}": value for rank, value in enumerate(values)}
                self.notes.append(f"{describe(key)} differs from rank to rank and is kept for each")
            else:
                made[key] = values[0]
        return rebuilt_mapping(first, made)

    def visit(self, path: TreePath, values: Sequence[Any]) -> Any:
        first = values[0]
        if id(first) in self._made:
            return self._made[id(first)]
        records = self._records(path, values)
        if records is not None:
            self._made[id(first)] = made = self._tensor(path, records)
            return made
        if isinstance(first, Mapping):
            keys = self._same_keys(path, values)
            return rebuilt_mapping(first, {key: self._entry(path, key, values) for key in keys})
        if isinstance(first, list | tuple):
            if any(type(value) is not type(first) or len(value) != len(first) for value in values):
                raise self._differing(path, values)
            items = [self.visit((*path, index), inner) for index, inner in enumerate(zip(*values, strict=True))]
            return items if isinstance(first, list) else tuple(items)
        if self._differ(values):
            raise self._differing(path, values)
        return first

    def _entry(self, path: TreePath, key: Any, values: Sequence[Mapping[Any, Any]]) -> Any:
        inner = [value[key] for value in values]
        place = (*path, path_key(key))
        if isinstance(inner[0], LazyTensor) and "state" not in path and self._differ(inner):
            self.notes.append(f"{format_path(place)} differs from rank to rank: the first rank's is used")
            return inner[0]
        return self.visit(place, inner)

    def _same_keys(self, path: TreePath, values: Sequence[Any]) -> Iterable[Any]:
        first = values[0]
        for file, value in zip(self.files, values, strict=True):
            other = value.keys() if isinstance(value, Mapping) else ()
            if other != first.keys():
                key = next(iter(first.keys() ^ other))
                has, lacks = (self.files[0], file) if key in first else (file, self.files[0])
                raise CorruptCheckpointError(
                    f"{format_path((*path, str(key)))} is in {has} but not in {lacks}",
                    hint="Files of several runs or of several kinds of state cannot be joined.",
                )
        return tuple(first)

    def _differ(self, values: Sequence[Any]) -> bool:
        return any(difference(values[0], value) is not None for value in values[1:])

    def _differing(self, path: TreePath, values: Sequence[Any]) -> CheckpointError:
        file, why = next(
            (file, why)
            for file, value in zip(self.files, values, strict=True)
            if (why := difference(values[0], value)) is not None
        )
        return CorruptCheckpointError(
            f"{format_path(path)} is not sharded, but differs between {self.files[0]} and {file}: {why}",
            hint="Nothing shows which one is right; save the full state, or files of one run and step.",
        )

    def _records(self, path: TreePath, values: Sequence[Any]) -> list[ShardRecord] | None:
        records = []
        for file, value in zip(self.files, values, strict=True):
            try:
                records.append(shard_record(value))
            except CheckpointError as error:
                raise error.within(part=f"{format_path(path)} in {file}") from error
        found = [record for record in records if record is not None]
        if not found:
            return None
        first = found[0]
        for file, record in zip(self.files, records, strict=True):
            if (
                record is None
                or (record.dtype, record.shape) != (first.dtype, first.shape)
                or (record.boxes is not first.boxes and record.boxes != first.boxes)
            ):
                raise CorruptCheckpointError(
                    f"{format_path(path)} is {_shown(first)} in {self.files[0]} and {_shown(record)} in {file}",
                    hint="Files of several runs cannot be joined.",
                )
        return found

    def _tensor(self, path: TreePath, records: Sequence[ShardRecord]) -> LazyTensor:
        """A tensor joined from the parts of all ranks; of replicas the first one is read."""
        first = records[0]
        parts: dict[Box, LazyTensor] = {}
        for record in records:
            for box, tensor in record.parts:
                parts.setdefault(box, tensor)
        for box, owner in first.boxes.items():
            if box not in parts and 0 not in box[1]:
                raise CorruptCheckpointError(
                    f"{format_path(path)} of shape {list(first.shape)} lacks {region(*box)}, the part of {owner}: "
                    f"it is in none of {', '.join(self.files)}",
                    hint="The files of all ranks must be in one folder.",
                )
        try:
            check_tiling(first.shape, list(parts))
        except CheckpointError as error:
            raise error.within(part=format_path(path)) from error
        tiles = [Tile(*box, Storage(tensor.extents(), tensor.nbytes)) for box, tensor in parts.items()]
        made = tensor_of_pieces(first.dtype, first.shape, lambda: tiles)
        made.requires_grad, made.is_parameter = first.requires_grad, first.is_parameter
        return made


def _shown(record: ShardRecord | None) -> str:
    return f"{record.dtype}{list(record.shape)} in {len(record.boxes)} parts" if record else "not a sharded tensor"
