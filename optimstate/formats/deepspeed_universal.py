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
from optimstate.files import AtomicDirectory
from optimstate.formats import torch_zip
from optimstate.formats._protocol import Document, WriteOptions
from optimstate.formats.deepspeed import MASTER, Shapes, shape_of
from optimstate.tensors import LazyTensor
from optimstate.tree import GlobalName

NAME = "deepspeed-universal"
SUFFIXES = ("_universal",)

_MODEL_FILE = "mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = "optimizer_state.pt"
_MASTER_FILE = "fp32"


def sniff(path: Path, head: bytes) -> bool:
    """Whether it is a folder with a file per parameter under `zero`."""
    return not head and (path / "zero" / _OPTIMIZER_FILE).is_file()


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
    """Write a tree that has `model` and a named `optimizer`.

    The masters are the slot `fp32_param`, or the weights themselves where they are float32.

    Raises:
        RepresentationError: There is no such model and optimizer, or a parameter has no master.
    """
    options = options or WriteOptions()
    model, optimizer = _parts(tree, path)
    notes: list[str] = []
    with AtomicDirectory(path) as folder:
        (folder / "zero").mkdir()
        for group in optimizer["param_groups"]:
            for name in group["params"]:
                _write_slots(folder / "zero" / name, _with_master(name, model, optimizer["state"].get(name)), options)
        torch_zip.write(_optimizer_state(optimizer), folder / "zero" / _OPTIMIZER_FILE, options=options)
        torch_zip.write(_model_states(tree, model, optimizer), folder / _MODEL_FILE, options=options)
    extra = sorted(map(str, optimizer["state"].keys() - {n for g in optimizer["param_groups"] for n in g["params"]}))
    if extra:
        notes.append(f"left out: state of {len(extra)} names that are in no param group, first {extra[0]}")
    return notes


def _parts(tree: Any, path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    model = tree.get("model") if isinstance(tree, Mapping) else None
    optimizer = tree.get("optimizer") if isinstance(tree, Mapping) else None
    named = isinstance(optimizer, Mapping) and all(
        isinstance(name, str) for group in optimizer.get("param_groups", [{"params": [0]}]) for name in group["params"]
    )
    if not isinstance(model, Mapping) or not named:
        raise RepresentationError(
            f"{path.name}: a universal checkpoint needs `model` and an `optimizer` whose parameters are keyed by name",
            hint="`optimstate name` gives an optimizer its parameter names.",
        )
    assert isinstance(optimizer, Mapping)
    for group in optimizer["param_groups"]:
        for name in group["params"]:
            if not isinstance(model.get(name), LazyTensor) or Path(name).name != name:
                raise RepresentationError(f"parameter {name!r} of the optimizer is no tensor of the model")
    return model, optimizer


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


def _optimizer_state(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [index]} for index, group in enumerate(optimizer["param_groups"])]
    return {**optimizer.get("zero", {}), "param_groups": groups}


def _model_states(tree: Mapping[str, Any], model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed reads beside the parameters; what a tree from elsewhere lacks gets DeepSpeed's initial values."""
    size = GlobalName("torch", "Size")
    shapes = [
        OrderedDict((name, size(tuple(model[name].shape))) for name in group["params"])
        for group in optimizer["param_groups"]
    ]
    trained = {name for group in shapes for name in group}
    made: dict[str, Any] = {
        "module": model,
        "buffer_names": [name for name in model if name not in trained],
        "optimizer": None,
        "param_shapes": shapes,
    }
    made.update({key: value for key, value in tree.items() if key not in ("model", "optimizer", *made)})
    return made
