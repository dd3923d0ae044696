"""The partitions of DeepSpeed's ZeRO stages 1, 2 and 3, joined into one named optimizer: read only.

A tag folder (`global_step4/`) has model states and, for each data-parallel rank, a file of optimizer states. In stages
1 and 2 every param group is one flat vector divided equally among the ranks; in stage 3 every parameter is divided
separately, rounded up and padded. The fp32 weights of mixed-precision training (masters) become the slot `fp32_param`
beside the optimizer's own. Nothing is copied: every tensor is made of pieces of the rank files.

The tree is that of the model states with `model` in place of `module`, and `optimizer` with `state`, `param_groups` and
`zero`, which has the first rank's other values (loss scaler, clipping).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.protocol import Claim, Document, malformed, read_only
from optimstate.formats.registry import detect
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import Extent
from optimstate.io.folders import listed
from optimstate.io.location import Location
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, tensor_of
from optimstate.tree import Opaque

NAME = "deepspeed"
SUFFIXES: tuple[str, ...] = ()

MASTER = "fp32_param"

_OPTIMIZER_FILE = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
# Keys that describe the partitions, which do not apply to full tensors.
PARTITIONING = {
    "base_optimizer_state",
    "ds_zero_partition_groups",
    "fp32_flat_groups",
    "group_paddings",
    "optimizer_state_dict",
    "param_alignment_paddings",
    "param_slice_mappings",
    "partition_count",
    "single_partition_of_fp32_groups",
}

Shapes = dict[str, tuple[int, ...]]


def sniff(path: Location, head: bytes) -> Claim:
    """Whether it is a tag folder, with optimizer states of ranks and model states."""
    if head or not path.is_dir():
        return Claim.NO
    names = [file.name for file in listed(path)]
    whole = any(map(_OPTIMIZER_FILE.fullmatch, names)) and any(map(_MODEL_FILE.fullmatch, names))
    return Claim.CERTAIN if whole else Claim.NO


def read(path: Location) -> Document:
    """Open a tag folder.

    Raises:
        CheckpointError: A rank's file is missing or damaged, or the partitions do not add up to the parameters.
        UnsupportedCheckpointError: The model was split over several ranks (tensor parallelism).
    """
    document = Document(path, NAME, {})
    ranks = [load_part(document, file) for file in _rank_files(path, _OPTIMIZER_FILE)]
    models = [load_part(document, file) for file in _rank_files(path, _MODEL_FILE)]
    states = [_field(rank, "optimizer_state_dict", path) for rank in ranks]
    main = models[0]
    shapes = _field(main, "param_shapes", path) or ()
    with malformed("the optimizer states are malformed", path=path):
        groups = [{name: shape_of(size) for name, size in group.items()} for group in shapes]
        if "fp32_flat_groups" in states[0]:
            state, param_groups, model = _stage_3(states, groups, models)
            document.notes.append("weights are the fp32 masters: stage 3 stores no others")
        else:
            state, param_groups = _stage_1_or_2(states, groups)
            model = main["module"]
    rest = {key: value for key, value in states[0].items() if key not in PARTITIONING}
    if is_stage_3(rest):
        rest["partition_count"] = len(ranks)
    document.tree = {"model": model, "optimizer": {"state": state, "param_groups": param_groups, "zero": rest}}
    document.tree.update({key: value for key, value in main.items() if key not in ("module", "optimizer")})
    _add_other_files(document)
    return document


def is_stage_3(zero: Mapping[str, Any]) -> bool:
    """Whether `zero` of an optimizer has the `zero_stage` 3, as a number or as the record of an enum."""
    stage = zero.get("zero_stage")
    if isinstance(stage, Opaque) and stage.arguments:
        stage = stage.arguments[0]
    return type(stage) is int and stage == 3


# Partitions fit only one number of ranks.
write = read_only(
    "partitions of ZeRO are read, but not written",
    hint="`optimstate convert --to deepspeed-universal` writes what DeepSpeed loads on any number of ranks.",
)


# --- files ----------------------------------------------------------------------------------------------------------


def _rank_files(path: Location, pattern: re.Pattern[str]) -> list[Location]:
    """The files of all data-parallel ranks, in order."""
    found: dict[int, Location] = {}
    for file in listed(path):
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        if int(match[2]):
            raise UnsupportedCheckpointError(
                f"{file.name}: the model was split over several ranks (tensor parallelism)",
                path=path,
                hint="DeepSpeed's ds_to_universal.py merges it; the universal checkpoint can be read.",
            )
        found[int(match[1] or 0)] = file
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(max(found) + 1)) - found.keys())
        raise CorruptCheckpointError(f"the file of rank {missing} is missing", path=path)
    return [found[rank] for rank in range(len(found))]


def load_part(document: Document, file: Location) -> Any:
    """The tree of a file of `torch.save`, whose globals and checksums are added to the document.

    Raises:
        CheckpointError: It is damaged or hostile.
    """
    return _added(document, torch_zip.read(file))


def _added(document: Document, part: Document) -> Any:
    document.mention(part.globals)
    document.checksums += part.checksums
    return part.tree


def _add_other_files(document: Document) -> None:
    """Add the checkpoints of experts and other checkpoints in the folder, by name."""
    for file in listed(document.path):
        if _OPTIMIZER_FILE.fullmatch(file.name) or _MODEL_FILE.fullmatch(file.name) or not file.is_file():
            continue
        found = detect(file)
        if found is not None:
            document.tree[file.name] = _added(document, found.read(file))
            document.notes.append(f"{file.name} is not merged into the model or the optimizer")


def _field(tree: Any, name: str, path: Location) -> Any:
    if not isinstance(tree, Mapping) or name not in tree:
        raise CorruptCheckpointError(f"{describe(name)} is missing", path=path)
    return tree[name]


def shape_of(size: Any) -> tuple[int, ...]:
    """The shape in the record of a `torch.Size`.

    Raises:
        CorruptCheckpointError: It is not the record of a size.
    """
    numbers = size.arguments[0] if isinstance(size, Opaque) and size.arguments else size
    if not isinstance(numbers, tuple) or not all(type(n) is int and n >= 0 for n in numbers):
        raise CorruptCheckpointError(f"a shape is {describe(size)}"[:200])
    return numbers


# --- flat vectors ---------------------------------------------------------------------------------------------------


class _Slice(NamedTuple):
    """Elements [start, start + numel) of one rank's flat vector."""

    rank: int
    start: int
    numel: int


def _gathered(name: str, shape: tuple[int, ...], flats: Sequence[LazyTensor], slices: Iterable[_Slice]) -> LazyTensor:
    """A parameter's tensor from slices of the ranks' flat vectors; elements beyond its shape are padding."""
    dtype = flats[0].dtype
    itemsize = DTYPES[dtype].itemsize
    missing = prod(shape)
    pieces: list[Extent] = []
    for rank, start, numel in slices:
        flat = flats[rank]
        taken = min(numel, missing)
        if start < 0 or numel < 0 or start + taken > flat.numel or flat.dtype != dtype:
            raise CorruptCheckpointError(
                f"{describe(name)} needs {dtype} elements {start} to {start + taken} of rank {rank}, "
                f"which has {describe(flat)}"
            )
        first = flat.offset + start
        pieces += flat.storage.cut(first * itemsize, (first + taken) * itemsize)
        missing -= taken
    if missing:
        raise CorruptCheckpointError(f"{describe(name)} of shape {shape} lacks {missing} elements in the ranks' files")
    return tensor_of(pieces, dtype, shape)


def _flat_slots(states: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The state of a flat vector: the names of the slots that are vectors, and the slots common to all parameters."""
    vectors = [slot for slot, value in states[0].items() if isinstance(value, LazyTensor) and value.shape]
    return vectors, {slot: value for slot, value in states[0].items() if slot not in vectors}


def _own(value: Any) -> Any:
    """A copy of a value that several parameters share."""
    return value.clone() if isinstance(value, LazyTensor) else value


# --- stages 1 and 2 -------------------------------------------------------------------------------------------------


def _stage_1_or_2(
    ranks: Sequence[Mapping[str, Any]], groups: Sequence[Shapes]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    bases = [rank["base_optimizer_state"] for rank in ranks]
    if not isinstance(bases[0], Mapping):
        raise UnsupportedCheckpointError("elastic optimizer states (elastic_checkpoint) have no param groups")
    param_groups = _named_groups(bases[0]["param_groups"], groups)
    state: dict[str, Any] = {}
    for index, shapes in enumerate(groups):
        masters = [rank["single_partition_of_fp32_groups"][index] for rank in ranks]
        flats = {MASTER: masters}
        vectors, common = _flat_slots([base["state"].get(index, {}) for base in bases])
        flats.update({slot: [base["state"][index][slot] for base in bases] for slot in vectors})
        slices = _slices_of_group(ranks, index, shapes, masters)
        for name, shape in shapes.items():
            slots = {slot: _own(value) for slot, value in common.items()}
            slots.update({slot: _gathered(name, shape, found, slices[name]) for slot, found in flats.items()})
            state[name] = slots
    return state, param_groups


def _slices_of_group(
    ranks: Sequence[Mapping[str, Any]], index: int, shapes: Shapes, masters: Sequence[LazyTensor]
) -> dict[str, list[_Slice]]:
    """The slices of each parameter: as recorded in the files, else in order."""
    found: dict[str, list[_Slice]] = {name: [] for name in shapes}
    if all("param_slice_mappings" in rank for rank in ranks):
        for number, rank in enumerate(ranks):
            for name, address in rank["param_slice_mappings"][index].items():
                if name in found:
                    found[name].append(_Slice(number, address.state["start"], address.state["numel"]))
        return found
    ends = list(accumulate(master.numel for master in masters))
    at = 0
    for name, shape in shapes.items():
        stop = at + prod(shape)
        for number, end in enumerate(ends):
            begin = end - masters[number].numel
            low, high = max(at, begin), min(stop, end)
            if low < high:
                found[name].append(_Slice(number, low - begin, high - low))
        at = stop
    return found


def _named_groups(param_groups: Sequence[Mapping[str, Any]], groups: Sequence[Shapes]) -> list[dict[str, Any]]:
    if len(param_groups) != len(groups):
        raise CorruptCheckpointError(f"{len(param_groups)} param groups, but shapes of {len(groups)}")
    return [{**group, "params": list(shapes)} for group, shapes in zip(param_groups, groups, strict=True)]


# --- stage 3 --------------------------------------------------------------------------------------------------------


def _stage_3(
    ranks: Sequence[Mapping[str, Any]], groups: Sequence[Shapes], models: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    bases = [rank["optimizer_state_dict"] for rank in ranks]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    flats = {MASTER: [_joined(rank["fp32_flat_groups"]) for rank in ranks]}
    order = sorted(bases[0]["state"])
    vectors, common = _flat_slots([bases[0]["state"][index] for index in order[:1]] or [{}])
    for slot in vectors:
        flats[slot] = [_joined([base["state"][index][slot] for index in order]) for base in bases]
    state: dict[str, Any] = {}
    for name, slices in _slices_per_parameter(shapes, len(ranks)):
        slots = {slot: _own(value) for slot, value in common.items()}
        slots.update({slot: _gathered(name, shapes[name], found, slices) for slot, found in flats.items()})
        state[name] = slots
    main = models[0]
    weights: dict[str, Any] = {name: slots[MASTER].clone() for name, slots in state.items()}
    weights.update(frozen(models))
    weights.update({name: main["module"][name] for name in main["buffer_names"] if name in main["module"]})
    for alias, name in (main.get("shared_params") or {}).items():
        weights[alias] = weights[name]
    return state, _named_groups(bases[0]["param_groups"], groups), weights


def _slices_per_parameter(shapes: Shapes, world: int) -> Iterator[tuple[str, list[_Slice]]]:
    at = 0
    for name, shape in shapes.items():
        part = -(-prod(shape) // world)
        yield name, [_Slice(rank, at, part) for rank in range(world)]
        at += part


def _joined(flats: Sequence[LazyTensor]) -> LazyTensor:
    """The concatenated flat vectors of one rank's sub-groups."""
    if len(flats) == 1:
        return flats[0]
    pieces = [extent for flat in flats for extent in flat.extents()]
    return tensor_of(pieces, flats[0].dtype, (sum(flat.numel for flat in flats),))


def frozen(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, LazyTensor]]:
    """Parameters that were not trained, joined from the fragments that the ranks' model states have."""
    for name, size in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name] for model in models]
        shape = shape_of(size)
        slices = [_Slice(rank, 0, fragment.numel) for rank, fragment in enumerate(fragments)]
        yield name, _gathered(name, shape, fragments, slices)
