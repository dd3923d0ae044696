"""DeepSpeed's universal checkpoints: one file per parameter and slot, for any number of ranks.

    <tag>_universal/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    <tag>_universal/zero/optimizer_state.pt            param groups, loss scaler
    <tag>_universal/mp_rank_00_model_states.pt         model, shapes by param group, counters

Stages 1 and 2 write {"param": tensor, "cat_dim": 0}. Stage 3 writes plain flat tensors, the steps in
optimizer_state.pt, and a file of model states for each rank, zero_pp_rank_<r>_mp_rank_00_model_states.pt, whose weights
are empty because the masters have them. `zero_stage` in the tree, which is that of the format `deepspeed`, selects
between the two when writing.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, RepresentationError
from optimstate.formats.deepspeed.zero import MASTER, PARTITIONING, Shapes, frozen, is_stage_3, load_part, shape_of
from optimstate.formats.protocol import Claim, Document, WriteOptions, malformed
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import Extent
from optimstate.io.location import Location
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tensors.lazy import LazyTensor, tensor_of
from optimstate.tree import GlobalName, difference, rebuilt_mapping

NAME = "deepspeed-universal"
SUFFIXES = ("_universal",)
OPTIONS = frozenset({"checksums"})

_MODEL_FILE = "mp_rank_00_model_states.pt"
_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
_OPTIMIZER_FILE = "optimizer_state.pt"
_MASTER_FILE = "fp32"


def sniff(path: Location, head: bytes) -> Claim:
    """Whether it is a folder with a file per parameter under `zero`."""
    return Claim.CERTAIN if not head and (path / "zero" / _OPTIMIZER_FILE).is_file() else Claim.NO


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Location) -> Document:
    """Open a universal checkpoint.

    Raises:
        CheckpointError: A file is missing or damaged, or a shape differs from that of the model.
    """
    document = Document(path, NAME, {})
    models = [load_part(document, file) for file in _model_files(path)]
    main = models[0]
    stored = dict(load_part(document, path / "zero" / _OPTIMIZER_FILE))
    by_rank = not (path / _MODEL_FILE).is_file()
    with malformed("the checkpoint is malformed", path=path):
        shapes: list[Shapes] = [
            {name: shape_of(size) for name, size in group.items()} for group in main["param_shapes"] or ()
        ]
        groups = stored["param_groups"]
        if len(groups) != len(shapes):
            raise CorruptCheckpointError(f"{len(groups)} param groups, but shapes of {len(shapes)}", path=path)
        param_groups = [{**group, "params": list(names)} for group, names in zip(groups, shapes, strict=True)]
        steps = list(_steps(stored, len(groups)))
        state = {
            name: {**steps[index], **_slots(document, path / "zero" / name, name, shape)}
            for index, group in enumerate(shapes)
            for name, shape in group.items()
        }
        model = _weights(models, state) if by_rank else main.get("module")
    zero = {key: value for key, value in stored.items() if key not in PARTITIONING and key != "param_groups"}
    if by_rank:
        zero.setdefault("zero_stage", 3)
        zero["partition_count"] = len(models)
    document.tree = {
        "model": model,
        "optimizer": {"state": state, "param_groups": param_groups, "zero": zero},
        **{key: value for key, value in main.items() if key not in ("module", "optimizer")},
    }
    return document


def _model_files(path: Location) -> list[Location]:
    """The files of model states: one, or in stage 3 one for each rank, in order."""
    if (path / _MODEL_FILE).is_file():
        return [path / _MODEL_FILE]
    found = {int(match[1]): file for file in path.iterdir() if (match := _RANK_FILE.fullmatch(file.name))}
    missing = min(set(range(max(found, default=0) + 1)) - found.keys(), default=None)
    if missing is not None:
        where = f"the model states of rank {missing} are missing" if found else "there are no model states"
        raise CorruptCheckpointError(where, path=path, hint="Copy the folder again; it has a *_model_states.pt file.")
    return [found[rank] for rank in sorted(found)]


def _steps(stored: Mapping[str, Any], groups: int) -> Iterator[dict[str, Any]]:
    """For each param group the slots that stage 3 stores once for all its parameters: the step."""
    base = stored.get("optimizer_state_dict")
    states = base.get("state", {}) if isinstance(base, Mapping) else {}
    for index in range(groups):
        common = states.get(index, states.get(0, {}))  # a group may be several vectors, and one vector all groups
        yield {slot: value for slot, value in common.items() if not (isinstance(value, LazyTensor) and value.shape)}


def _weights(models: Sequence[Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The model of stage 3: trained weights are the masters; others are joined from fragments, or are in the model."""
    main = models[0]
    others = dict(frozen(models))
    made: dict[str, Any] = {}
    for name, value in main["module"].items():
        trained = state.get(name, {}).get(MASTER)
        made[name] = others.get(name, value) if trained is None else trained.clone()
    for alias, name in (main.get("shared_params") or {}).items():
        made[alias] = made[name]
    return made


def _slots(document: Document, folder: Location, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if not folder.is_dir():
        raise CorruptCheckpointError(f"parameter {describe(name)} has no folder", path=folder)
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.pt")):
        slot = MASTER if file.stem == _MASTER_FILE else file.stem
        value = load_part(document, file)
        if isinstance(value, Mapping):
            value = value.get("param")
        found[slot] = _shaped(value, shape, file) if isinstance(value, LazyTensor) and value.shape else value
    return found


def _shaped(tensor: LazyTensor, shape: tuple[int, ...], file: Location) -> LazyTensor:
    """The tensor in the parameter's shape; stage 3 stores it flat."""
    if tensor.shape == shape:
        return tensor
    if tensor.numel != prod(shape) or len(tensor.shape) != 1 or not tensor.is_contiguous():
        raise CorruptCheckpointError(f"shape {tensor.shape}, but the parameter has {shape}", path=file)
    return LazyTensor(tensor.storage, tensor.dtype, shape, offset=tensor.offset)


# --- writing --------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:  # noqa: ARG001
    """Write a tree with a `model` and an `optimizer` that has parameter names.

    The masters are the slot `fp32_param`, or else the weights if they are float32.

    Raises:
        RepresentationError: The tree has no such model and optimizer, or a parameter has no master.
    """
    options = options or WriteOptions()
    model, optimizer = _parts(tree, path)
    notes: list[str] = []
    groups: list[tuple[Mapping[str, Any], tuple[str, ...]]] = [
        (group.options, group.names or ()) for group in optimizer.groups
    ]
    zero = dict(optimizer.node.get("zero", {}))
    stage_3 = is_stage_3(zero)
    with options.new_folder(path) as folder:
        (folder / "zero").mkdir()
        for _, name, slots in optimizer.parameters():
            assert name is not None
            _write_slots(folder / "zero" / name, _with_master(name, model, slots), options, flat=stage_3)
        param_groups = [{**group, "params": [index]} for index, (group, _) in enumerate(groups)]
        states = {**zero, "param_groups": param_groups}
        if stage_3:
            states["optimizer_state_dict"] = {"state": _common_slots(optimizer), "param_groups": param_groups}
        torch_zip.write(states, folder / "zero" / _OPTIMIZER_FILE, options=options)
        counters = _model_states(tree, model, [names for _, names in groups], notes)
        if stage_3:
            counts = (zero.get("partition_count"), counters.get("dp_world_size"))
            world = next((count for count in counts if type(count) is int and count > 0), 1)
            for rank in range(world):
                made = _of_rank(counters, rank, world)
                file = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
                torch_zip.write(made, file, options=options)
        else:
            torch_zip.write(counters, folder / _MODEL_FILE, options=options)
        options.confirmed()
    orphans = optimizer.of_no_parameter()
    if orphans:
        notes.append(f"left out: state under {len(orphans)} keys that are in no group, first {describe(orphans[0])}")
    return notes


def _parts(tree: Any, path: Location) -> tuple[Mapping[str, Any], OptimizerState]:
    """The model and the optimizer; all parameters of the optimizer are tensors of the model."""
    model = tree.get("model") if isinstance(tree, Mapping) else None
    sections = (
        find_sections({"optimizer": tree["optimizer"]}) if isinstance(model, Mapping) and "optimizer" in tree else []
    )
    found = next((one.optimizer() for one in sections if one.path == ("optimizer",) and one.kind == "optimizer"), None)
    if not isinstance(model, Mapping) or found is None or not found.is_named:
        raise RepresentationError(
            f"{path.name}: a universal checkpoint needs `model` and an `optimizer` with parameter names",
            hint="`optimstate name` gives an optimizer its parameter names.",
        )
    for _, name, _ in found.parameters():
        assert name is not None
        if not isinstance(model.get(name), LazyTensor):
            raise RepresentationError(
                f"parameter {describe(name)} of the optimizer is not a tensor of the model",
                hint="Take wrapper prefixes (module., _orig_mod.) off both with a plan first.",
            )
        if Path(name).name != name or name in (".", ".."):
            raise RepresentationError(f"parameter {describe(name)} cannot be the name of a folder")
    return model, found


def _with_master(name: str, model: Mapping[str, Any], slots: Mapping[str, Any] | None) -> dict[str, Any]:
    made = dict(slots or {})
    weight = model[name]
    if MASTER not in made:
        if weight.dtype != "float32":
            raise RepresentationError(
                f"parameter {describe(name)} is {weight.dtype} and has no fp32 master (slot {describe(MASTER)})",
                hint="Convert the model to float32 first.",
            )
        made[MASTER] = weight
    return made


def _write_slots(folder: Location, slots: Mapping[str, Any], options: WriteOptions, *, flat: bool) -> None:
    folder.mkdir()
    for slot, value in slots.items():
        file = folder / f"{_MASTER_FILE if slot == MASTER else slot}.pt"
        like_param = isinstance(value, LazyTensor) and bool(value.shape)
        if like_param:
            value = value.reshape((value.numel,)) if flat else {"cat_dim": 0, "param": value}
        elif flat:
            continue  # stage 3 stores it once for all parameters
        torch_zip.write(value, file, options=options)


def _common_slots(optimizer: OptimizerState) -> dict[int, dict[str, Any]]:
    """For each group the slots that stage 3 stores once for its parameters: the step.

    Raises:
        RepresentationError: The parameters of a group have different values.
    """
    made: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, group in enumerate(optimizer.groups) for name in group.names or ()}
    for _, name, slots in optimizer.parameters():
        assert name is not None
        kept = {slot: v for slot, v in (slots or {}).items() if not (isinstance(v, LazyTensor) and v.shape)}
        first = made.setdefault(index_of[name], kept)
        if difference(first, kept, aliases=False) is not None:
            raise RepresentationError(
                f"parameter {describe(name)} is at another step than the first one of its group, "
                "and stage 3 keeps one step",
                hint="Fill in or drop the state of new parameters first.",
            )
    return made


def _of_rank(counters: Mapping[str, Any], rank: int, world: int) -> dict[str, Any]:
    """The model states of one rank in stage 3: empty weights, and its fragments of untrained parameters."""
    module, buffers = counters["module"], set(counters["buffer_names"])
    listed = counters.get("frozen_param_shapes")
    not_trained = dict.fromkeys(listed if isinstance(listed, Mapping) else ())
    empty = {
        name: value if name in buffers or not isinstance(value, LazyTensor) else tensor_of((), value.dtype, (0,))
        for name, value in module.items()
    }
    fragments = OrderedDict((name, _fragment(module[name], rank, world)) for name in not_trained if name in module)
    return {**counters, "module": rebuilt_mapping(module, empty), "frozen_param_fragments": fragments}


def _fragment(tensor: LazyTensor, rank: int, world: int) -> LazyTensor:
    """One rank's part of a tensor in stage 3: sizes are rounded up, and the last parts padded with zeros."""
    numel = -(-tensor.numel // world)
    whole = tensor.contiguous()
    start, stop = (min(edge * numel, tensor.numel) * tensor.itemsize for edge in (rank, rank + 1))
    padding = numel * tensor.itemsize - (stop - start)
    pieces = whole.storage.cut(start, stop) + ((Extent(None, 0, padding),) if padding else ())
    return tensor_of(pieces, tensor.dtype, (numel,))


# Other values that DeepSpeed's engine expects in model states, as they are before the first step.
_COUNTERS: dict[str, Any] = {
    "lr_scheduler": None,
    "data_sampler": None,
    "random_ltd": None,
    "sparse_tensor_module_names": [],
    "skipped_steps": 0,
    "global_steps": 0,
    "global_samples": 0,
    "dp_world_size": 1,
    "mp_world_size": 1,
    "ds_config": {},
    "ds_version": "",
}


_REBUILT = ("model", "optimizer", "param_shapes", "buffer_names")


def _model_states(
    tree: Mapping[str, Any], model: Mapping[str, Any], groups: list[tuple[str, ...]], notes: list[str]
) -> dict[str, Any]:
    size = GlobalName("torch", "Size")
    shapes = [OrderedDict((name, size(tuple(model[name].shape))) for name in names) for names in groups]
    trained = {name for names in groups for name in names}
    listed = tree.get("frozen_param_shapes")
    not_trained = listed if isinstance(listed, Mapping) else None
    made: dict[str, Any] = {
        "module": model,
        "buffer_names": [name for name in model if name not in trained and name not in (not_trained or ())],
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
    }
    made.update({key: value for key, value in tree.items() if key not in _REBUILT})
    if "global_steps" not in made:
        notes.append("DeepSpeed's counters (global_steps, global_samples, skipped_steps) start at 0")
        made.update({key: value for key, value in _COUNTERS.items() if key not in made})
    return made
