"""Values that are not tensors in files of torch's `HuggingFaceStorageWriter`: options of an optimizer, counters.

That writer puts each such value in front of the safetensors header as a separate archive of `torch.save`; its
superclasses do the same with `SerializationFormat.SAFETENSORS`. No other reader, not even torch's, reads such a file.
The names of the values are only in the index, in the order of the archives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.io.extents import FileSlice, StoredSource
from optimstate.io.location import Location

__all__ = ["begins_with_archive", "named_values", "read_values"]

_MAX_VALUES = 1_000_000


def begins_with_archive(source: StoredSource) -> bool:
    """Whether a file has values in front of its header."""
    return source.size >= 4 and source.read(0, 4) == b"PK\x03\x04"


def read_values(source: StoredSource) -> tuple[list[Any], list[tuple[str, str]], int]:
    """The values in front of a header, the globals that their pickles mention, and the offset of the header.

    Raises:
        CheckpointError: A value is damaged.
    """
    from optimstate.formats.torch.zip import read_archive  # few safetensors files need a reader of pickles
    from optimstate.formats.torch.zip_end import archive_length

    values: list[Any] = []
    names: dict[tuple[str, str], None] = {}
    start = 0
    while source.size - start >= 4 and source.read(start, 4) == b"PK\x03\x04":
        length = archive_length(source, start)
        if not length or len(values) > _MAX_VALUES:
            raise CorruptCheckpointError("an archive that does not end", path=source.path, place=f"offset {start}")
        tree, mentioned, _ = read_archive(FileSlice(source, start, length))
        values.append(tree)
        names.update(dict.fromkeys(mentioned))
        start += length
    return values, list(names), start


def named_values(
    path: Location, values: Sequence[Any], names: Sequence[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """The values by name, and notes.

    Args:
        path: The file.
        values: The values in the order of the file.
        names: Their names in the index; None if there is no index.

    Raises:
        CorruptCheckpointError: The numbers of values and names differ.
    """
    if names is None:
        note = (
            f"{path.name}: {len(values)} values that are not tensors (options of an optimizer, counters) have no names "
            "without the index of the folder, and are left out"
        )
        return {}, [note] if values else []
    if len(names) != len(values):
        raise CorruptCheckpointError(
            f"the index has {len(names)} names for {len(values)} values that are not tensors", path=path
        )
    return dict(zip(names, values, strict=True)), []
