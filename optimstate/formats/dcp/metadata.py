"""The `.metadata` of `torch.distributed.checkpoint`: a pickle that describes the items and their places in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.dcp.columns import Box, Chunk, Form, Item, Metadata
from optimstate.formats.dcp.opcodes import UnfamiliarError
from optimstate.formats.dcp.stream import parse
from optimstate.formats.pickles.unpickle import load
from optimstate.formats.protocol import malformed
from optimstate.io.location import Location
from optimstate.tensors.dtypes import DTYPES, check_sizes
from optimstate.tree import GlobalName, Opaque

__all__ = ["load_metadata", "merged"]


def load_metadata(data: bytes) -> tuple[Metadata, list[tuple[str, str]]]:
    """Read the pickle inertly.

    Pickles in the form that torch writes are read opcode by opcode into columns, all others with the general inert
    unpickler, which also raises the errors.

    Returns:
        The metadata, and every global that the pickle mentions.

    Raises:
        CheckpointError: It is damaged, hostile, or of an unknown form.
    """
    made = Metadata()
    try:
        names = parse(data, made)
        made.check()
        return made, names
    except (UnfamiliarError, CheckpointError):
        pass
    tree, names = load(data)
    with malformed("the metadata is malformed"):
        return _metadata(tree), names


def _metadata(tree: Any) -> Metadata:
    if not isinstance(tree, Opaque) or tree.type.qualname != "Metadata":
        raise CorruptCheckpointError(f"the metadata is {describe(tree)}"[:200])
    fields = tree.state
    made = Metadata()
    for name, entry in fields["state_dict_metadata"].items():
        if type(name) is not str:
            raise CorruptCheckpointError(f"an item has the name {describe(name)}"[:200])
        if entry.type.qualname == "TensorStorageMetadata":
            state = entry.state
            boxes = [(_size(chunk.state["offsets"]), _size(chunk.state["sizes"])) for chunk in state["chunks"]]
            made.add(name, _form(name, state["properties"].state, _size(state["size"])), boxes)
        else:
            made.add(name, None)
    for index, info in (fields["storage_data"] or {}).items():
        name, start = index.state["fqn"], index.state.get("offset")
        made.place(name, None if start is None else _size(start), _place(name, info.state))
    made.check()
    paths = fields.get("planner_data")
    if isinstance(paths, Mapping):
        made.paths = {name: tuple(path) for name, path in paths.items()}
    return made


def _place(name: str, info: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    transforms = info.get("transform_descriptors")
    if transforms:
        raise UnsupportedCheckpointError(
            f"item {describe(name)} went through {', '.join(map(str, transforms))} when it was written",
            hint="Load it with torch and save it without extensions.",
        )
    return info["relative_path"], info["offset"], info["length"]


def _form(name: str, properties: Sequence[Any], shape: tuple[int, ...]) -> Form:
    dtype, _, requires_grad, *_ = properties
    if not isinstance(dtype, GlobalName) or dtype.qualname not in DTYPES:
        raise UnsupportedCheckpointError(f"tensor {describe(name)} has dtype {describe(dtype)}")
    return Form(dtype.qualname, shape, requires_grad is True)


def _size(value: Any) -> tuple[int, ...]:
    numbers = value.arguments[0] if isinstance(value, Opaque) else value
    if not isinstance(numbers, tuple | list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise CorruptCheckpointError(f"a size or offset is {describe(numbers)}"[:200])
    check_sizes(numbers, len(numbers))
    return tuple(numbers)


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(ranks: Sequence[Metadata], path: Location) -> tuple[Metadata, list[str]]:
    """Merge the metadata of all ranks.

    Of objects and of parts that several ranks have, the first rank's is used, as in torch when ranks save together.

    Args:
        ranks: The metadata in the order of the ranks.
        path: The folder, for messages.

    Returns:
        The merged metadata, and notes for people.

    Raises:
        CorruptCheckpointError: The ranks contradict one another about a tensor.
    """
    made = Metadata()
    forms: dict[str, Form | None] = {}
    chunks: dict[str, dict[Box | None, Item]] = {}
    for rank in ranks:
        made.paths = {**rank.paths, **made.paths}
        for number, name in enumerate(rank.order):
            form = rank.forms[number]
            known = forms.setdefault(name, form)
            if (known is None) != (form is None):
                raise CorruptCheckpointError(
                    f"item {describe(name)} is a tensor for one rank and none for another", path=path
                )
            if form and known and (known.dtype, known.shape) != (form.dtype, form.shape):
                raise CorruptCheckpointError(
                    f"tensor {describe(name)} is {known.dtype}{list(known.shape)} in the metadata of one rank and "
                    f"{form.dtype}{list(form.shape)} in that of another",
                    path=path,
                    hint="The folder holds files of several checkpoints.",
                )
            own = chunks.setdefault(name, {})
            for row in rank.rows(number):
                own.setdefault(rank.boxes[row], rank.item(row))
    for name, form in forms.items():
        if form is None:
            made.add_object(name, chunks[name][None])
        else:
            made.add_tensor(name, form, (Chunk(box, item) for box, item in chunks[name].items() if box))
    notes = [f"the metadata of {len(ranks)} ranks is merged"]
    objects = sorted(name for name, form in forms.items() if form is None)
    if objects:
        notes.append(f"of items that are not tensors the first rank's are used: {', '.join(objects[:5])}")
    return made, notes
