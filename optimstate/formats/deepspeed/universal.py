"""DeepSpeed's universal checkpoints: one file per parameter and slot, for any number of ranks.

    <tag>_universal/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    <tag>_universal/zero/optimizer_state.pt            param groups, loss scaler
    <tag>_universal/mp_rank_00_model_states.pt         model, shapes by param group, counters

Stages 1 and 2 write {"param": tensor, "cat_dim": 0}, stage 3 a bare flat tensor. The tree is that of `deepspeed`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from optimstate.errors import CorruptCheckpointError, RepresentationError
from optimstate.formats.deepspeed.zero import MASTER, Shapes, shape_of
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.output import AtomicDirectory
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName

NAME = "deepspeed-universal"
SUFFIXES = ("_universal",)

_MODEL_FILE = "mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = "optimizer_state.pt"
_MASTER_FILE = "fp32"


def sniff(path: Path, head: bytes) -> Claim:
    """Whether it is a folder with a file per parameter under `zero`."""
    return Claim.CERTAIN if not head and (path / "zero" / _OPTIMIZER_FILE).is_file() else Claim.NO


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Document:
    """Open a universal checkpoint.

    Raises:
        CheckpointError: A file is missing or damaged, or a shape is not that of the model.
    """
    document = Document(path, NAME, {})
    main = _load(document, path / _MODEL_FILE)
    optimizer = dict(_load(document, path / "zero" / _OPTIMIZER_FILE))
    try:
        shapes: list[Shapes] = [
            {name: shape_of(size) for name, size in group.items()} for group in main["param_shapes"] or ()
        ]
        groups = optimizer.pop("param_groups")
        if len(groups) != len(shapes):
            raise CorruptCheckpointError(f"{len(groups)} param groups, but shapes of {len(shapes)}", path=path)
        param_groups = [{**group, "params": list(names)} for group, names in zip(groups, shapes, strict=True)]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"the checkpoint is malformed: {error!r}"[:300], path=path) from error
    state = {
        name: _slots(document, path / "zero" / name, name, shape) for group in shapes for name, shape in group.items()
    }
    document.tree = {
        "model": main.get("module"),
        "optimizer": {"state": state, "param_groups": param_groups, "zero": optimizer},
        **{key: value for key, value in main.items() if key not in ("module", "optimizer")},
    }
    return document


def _load(document: Document, file: Path) -> Any:
    part = torch_zip.read(file)
    document.globals = list(dict.fromkeys([*document.globals, *part.globals]))
    return part.tree


def _slots(document: Document, folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if not folder.is_dir():
        raise CorruptCheckpointError(f"parameter {name!r} has no folder", path=folder)
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.pt")):
        slot = MASTER if file.stem == _MASTER_FILE else file.stem
        value = _load(document, file)
        if isinstance(value, Mapping):
            value = value.get("param")
        found[slot] = _shaped(value, shape, file) if isinstance(value, LazyTensor) and value.shape else value
    return found


def _shaped(tensor: LazyTensor, shape: tuple[int, ...], file: Path) -> LazyTensor:
    """The tensor in the parameter's shape; stage 3 stores it flat."""
    if tensor.shape == shape:
        return tensor
    if tensor.numel != prod(shape) or len(tensor.shape) != 1 or not tensor.is_contiguous():
        raise CorruptCheckpointError(f"shape {tensor.shape}, but the parameter has {shape}", path=file)
    return LazyTensor(tensor.storage, tensor.dtype, shape, offset=tensor.offset)


# --- writing --------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Path, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:  # noqa: ARG001
    """Write a tree that has `model` and an `optimizer` with names, keyed by them or by position.

    The masters are the slot `fp32_param`, or the weights themselves where they are float32.

    Raises:
        RepresentationError: There is no such model and optimizer, or a parameter has no master.
    """
    options = options or WriteOptions()
    model, optimizer = _parts(tree, path)
    notes: list[str] = []
    groups: list[tuple[Mapping[str, Any], tuple[str, ...]]] = [
        (group.options, group.names or ()) for group in optimizer.groups
    ]
    with AtomicDirectory(path, sync=options.sync) as folder:
        (folder / "zero").mkdir()
        for _, name, slots in optimizer.parameters():
            assert name is not None
            _write_slots(folder / "zero" / name, _with_master(name, model, slots), options)
        states = {
            **optimizer.node.get("zero", {}),
            "param_groups": [{**group, "params": [index]} for index, (group, _) in enumerate(groups)],
        }
        torch_zip.write(states, folder / "zero" / _OPTIMIZER_FILE, options=options)
        counters = _model_states(tree, model, [names for _, names in groups], notes)
        torch_zip.write(counters, folder / _MODEL_FILE, options=options)
    orphans = optimizer.orphans()
    if orphans:
        notes.append(f"left out: state of {len(orphans)} parameters that are in no group, first {orphans[0]!r}")
    return notes


def _parts(tree: Any, path: Path) -> tuple[Mapping[str, Any], OptimizerState]:
    """The model and the optimizer, every parameter of which is a tensor of the model."""
    model = tree.get("model") if isinstance(tree, Mapping) else None
    sections = (
        find_sections({"optimizer": tree["optimizer"]}) if isinstance(model, Mapping) and "optimizer" in tree else []
    )
    found = next((section.optimizer() for section in sections if section.path == ("optimizer",)), None)
    if not isinstance(model, Mapping) or found is None or not found.is_named:
        raise RepresentationError(
            f"{path.name}: a universal checkpoint needs `model` and an `optimizer` with parameter names",
            hint="`optimstate name` gives an optimizer its parameter names.",
        )
    for _, name, _ in found.parameters():
        assert name is not None
        if not isinstance(model.get(name), LazyTensor):
            raise RepresentationError(
                f"parameter {name!r} of the optimizer is no tensor of the model",
                hint="Take wrapper prefixes (module., _orig_mod.) off both with a plan first.",
            )
        if Path(name).name != name or name in (".", ".."):
            raise RepresentationError(f"parameter {name!r} cannot be the name of a folder")
    return model, found


def _with_master(name: str, model: Mapping[str, Any], slots: Mapping[str, Any] | None) -> dict[str, Any]:
    made = dict(slots or {})
    weight = model[name]
    if MASTER not in made:
        if weight.dtype != "float32":
            raise RepresentationError(
                f"parameter {name!r} is {weight.dtype} and has no fp32 master (slot {MASTER!r})",
                hint="Convert the model to float32 first.",
            )
        made[MASTER] = weight
    return made


def _write_slots(folder: Path, slots: Mapping[str, Any], options: WriteOptions) -> None:
    folder.mkdir()
    for slot, value in slots.items():
        file = folder / f"{_MASTER_FILE if slot == MASTER else slot}.pt"
        like_param = isinstance(value, LazyTensor) and bool(value.shape)
        torch_zip.write({"cat_dim": 0, "param": value} if like_param else value, file, options=options)


# What DeepSpeed's engine asks of model states beside the model, as it is before the first step.
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


def _model_states(
    tree: Mapping[str, Any], model: Mapping[str, Any], groups: list[tuple[str, ...]], notes: list[str]
) -> dict[str, Any]:
    size = GlobalName("torch", "Size")
    shapes = [OrderedDict((name, size(tuple(model[name].shape))) for name in names) for names in groups]
    trained = {name for names in groups for name in names}
    made: dict[str, Any] = {
        "module": model,
        "buffer_names": [name for name in model if name not in trained],
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
    }
    made.update({key: value for key, value in tree.items() if key not in ("model", "optimizer", "param_shapes")})
    if "global_steps" not in made:
        notes.append("DeepSpeed's counters (global_steps, global_samples, skipped_steps) start at 0")
        made.update({key: value for key, value in _COUNTERS.items() if key not in made})
    return made
