"""Copies without objects of foreign classes, as containers of plain data and `weights_only=True` require.

Containers that are nothing but their entries (configurations, named options) become dicts and lists, values of other
types that are one value (NumPy scalars, paths, `torch.__version__`) become that value, arrays become tensors. Every
other object is left out: an entry of a dict goes, in a list None keeps the place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from optimstate.describe import few
from optimstate.errors import RepresentationError
from optimstate.formats.pickles.globals import PLAIN_CLASSES
from optimstate.formats.pickles.tensors import RECORDS, numpy_array, numpy_scalar, tensor_kind
from optimstate.record import Record
from optimstate.state.records import is_tensor
from optimstate.state.sections import find_sections
from optimstate.surgery.text import plural, size
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import (
    GlobalName,
    Opaque,
    OpaqueFile,
    Path,
    bare_value,
    format_path,
    path_key,
    rebuilt_mapping,
    tensors,
    walk,
)

__all__ = ["Plain", "held_by_json", "held_by_weights_only", "plain_copy"]

Holds = Callable[[Opaque | GlobalName], bool]

_WEIGHTS_ONLY = frozenset(
    {
        *(path for path in RECORDS if path.startswith("torch._utils._rebuild_") and "csr" not in path),
        *("collections.Counter", "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device"),
        *("torch.nn.parameter.Parameter", "torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2"),
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
        *(f"torch.{kind}" for kind in ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine")),
        *("torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams"),
        *(f"torch.{row.name}" for row in DTYPES.values() if row.in_torch),
        *(f"torch.{row.storage}" for row in DTYPES.values() if row.storage),
    }
)
"""What `torch.load(weights_only=True)` allows, as far as records name it."""

_ENTRIES = frozenset(
    {
        "collections.defaultdict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "mmengine.config.config.ConfigDict",
        "mmcv.utils.config.ConfigDict",
        "addict.addict.Dict",
        "easydict.EasyDict",
        "yacs.config.CfgNode",
        "fvcore.common.config.CfgNode",
        "detectron2.config.config.CfgNode",
        "ml_collections.config_dict.config_dict.ConfigDict",
    }
)
_ATTRIBUTES = frozenset({"argparse.Namespace", "types.SimpleNamespace"})
_ITEMS = frozenset({"collections.deque", "fastcore.foundation.L"})
_PATHS = frozenset(
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
)
_OMEGACONF = ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig")


class Plain(Record):
    """A tree that a container can hold, and what became of the rest.

    Attributes:
        tree: The copy; whatever had nothing to lose is shared with the original.
        notes: What was left out, with the tensors that were in it, and what became plain data.
    """

    tree: Any
    notes: list[str]


def held_by_json(node: Opaque | GlobalName) -> bool:
    """Whether the JSON tree beside safetensors can hold it."""
    return isinstance(node, GlobalName) or node.type.path in PLAIN_CLASSES


def held_by_weights_only(node: Opaque | GlobalName) -> bool:
    """Whether `torch.load(weights_only=True)` takes it."""
    if isinstance(node, GlobalName):
        return node.path in _WEIGHTS_ONLY
    kind = node.type.path
    return kind in _WEIGHTS_ONLY and all(
        held_by_weights_only(part) for _, part in walk(list(node.arguments)) if isinstance(part, Opaque | GlobalName)
    )


def plain_copy(tree: Any, holds: Holds) -> Plain:
    """The tree without objects that a container cannot hold.

    Args:
        tree: Never changed.
        holds: Whether the container holds a record or a name.

    Raises:
        RepresentationError: Weights would be lost, or nothing would be left.
    """
    copy = _PlainCopy(holds)
    made = copy.visit((), tree)
    hint = "Give --section to write what is wanted alone."
    if made is _GONE or (copy.lost and not _holds_anything(made)):
        what = copy.lost[0].what if copy.lost else "it is empty"
        raise RepresentationError(f"nothing would be left to write: {what}", hint=hint)
    _refuse_lost_weights(tree, copy.lost)
    named = {id(tensor) for _, tensor in tensors(made)}
    return Plain(made, [*copy.notes, *(lost.note(named) for lost in copy.lost)])


def _holds_anything(node: Any) -> bool:
    return any(not isinstance(leaf, dict | list | tuple | set | type(None)) for _, leaf in walk(node))


def _refuse_lost_weights(tree: Any, lost: list[_Lost]) -> None:
    """A pickled module is weights in a form that only its own classes read; so is a quantized or sparse weight."""
    places = {entry.path for entry in lost}
    weights = {entry.path: entry for entry in lost if is_tensor(entry.node) and _names_a_weight(entry.path)}
    for section in find_sections(tree):
        gone = [path for path in weights if path[:-1] == section.path and section.kind in ("model", "ema")]
        if gone:
            others = f" and {len(gone) - 1} more, of the model" if len(gone) > 1 else " of the model"
            raise RepresentationError(
                f"{weights[gone[0]].what}{others}, which would be lost",
                hint="A torch file keeps them without --drop-opaque; make them plain (dequantized, dense) for others.",
            )
        inside = next((section.path[:n] for n in range(len(section.path) + 1) if section.path[:n] in places), None)
        if inside is not None and section.kind in ("model", "ema"):
            found = section.tensors()
            raise RepresentationError(
                f"{format_path(inside)} holds the {plural(len(found), 'tensor')} of a model, which would be lost",
                hint=f"--section {section.label} writes them by name; a torch file keeps them without --drop-opaque.",
            )


def _names_a_weight(path: Path) -> bool:
    """Whether the last key is a parameter's name: of a module in a module, or `weight` and the like."""
    return bool(path) and isinstance(path[-1], str) and ("." in path[-1] or path[-1] in ("weight", "bias"))


class _Lost(Record):
    path: Path
    node: Any

    @property
    def what(self) -> str:
        described = tensor_kind(self.node) or f"an object of {_name(self.node)}"
        return f"{format_path(self.path)} is {described}"

    def note(self, named: set[int]) -> str:
        """What is lost with a node, without tensors that are kept elsewhere or were already named."""
        inside = {id(tensor): (path, tensor) for path, tensor in tensors(self.node) if id(tensor) not in named}
        named.update(inside)
        if not inside:
            return f"left out: {self.what}"
        names = [format_path((*self.path, *path)) for path, _ in inside.values()]
        total = sum(tensor.nbytes for _, tensor in inside.values())
        return f"left out: {self.what}, with {plural(len(inside), 'tensor')} in it, {size(total)}: {few(names, 5)}"


def _name(node: Any) -> str:
    if isinstance(node, GlobalName):
        return f"class {node.path}"
    return node.type.path if isinstance(node, Opaque) else type(node).__name__


class _Gone:
    pass


_GONE = _Gone()


class _PlainCopy:
    def __init__(self, holds: Holds) -> None:
        self.holds = holds
        self.lost: list[_Lost] = []
        self.notes: list[str] = []
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def visit(self, path: Path, node: Any) -> Any:
        """The copy of a node, or `_GONE`."""
        if node == b"" and type(node) is bytes and self.holds is held_by_weights_only:
            self.notes.append(f"kept as plain data: {format_path(path)}, empty bytes, as a bytearray")
            return bytearray()
        if isinstance(node, LazyTensor | OpaqueFile) or not isinstance(
            node, Mapping | list | tuple | set | frozenset | Opaque | GlobalName
        ):
            return node
        key = id(node)
        if key in self._done:
            return self._done[key]
        if key in self._open:
            return node
        self._open.add(key)
        self._done[key] = made = self._copied(path, node)
        self._open.discard(key)
        return made

    def _copied(self, path: Path, node: Any) -> Any:
        if isinstance(node, Opaque | GlobalName):
            return self._record(path, node)
        if isinstance(node, Mapping):
            return self._mapping(path, node)
        if isinstance(node, set | frozenset):
            return self._set(path, node)
        items = self._items(path, node)
        if all(new is old for new, old in zip(items, node, strict=True)):
            return node
        return items if isinstance(node, list) else tuple(items)

    def _set(self, path: Path, node: set[Any] | frozenset[Any]) -> Any:
        items = [self.visit((*path, path_key(item)), item) for item in node]
        kept = [item for item in items if item is not _GONE and isinstance(item, Hashable)]
        if isinstance(node, frozenset) and self.holds is held_by_weights_only:
            self.notes.append(f"kept as plain data: {format_path(path)}, a frozenset, as a set")
            return set(kept)
        return node if len(kept) == len(node) else type(node)(kept)

    def _items(self, path: Path, items: Any) -> list[Any]:
        made = [self.visit((*path, index), item) for index, item in enumerate(items)]
        return [None if item is _GONE else item for item in made]  # positions must not move

    def _mapping(self, path: Path, node: Mapping[Any, Any]) -> Any:
        entries = {key: self.visit((*path, path_key(key)), value) for key, value in node.items()}
        plain_keys = {
            key: self.visit(path, key) for key in entries if isinstance(key, tuple | frozenset | Opaque | GlobalName)
        }
        kept = {
            plain_keys.get(key, key): value
            for key, value in entries.items()
            if value is not _GONE
            and plain_keys.get(key) is not _GONE
            and isinstance(plain_keys.get(key, key), Hashable)
        }
        if len(kept) == len(node) and all(node.get(key, _GONE) is value for key, value in kept.items()):
            return node
        return rebuilt_mapping(node, kept)

    def _record(self, path: Path, node: Opaque | GlobalName) -> Any:
        if self.holds(node):
            return node if isinstance(node, GlobalName) else self._cleaned(path, node)
        found = _plain(node) if isinstance(node, Opaque) else _GONE
        if found is _GONE:
            self.lost.append(_Lost(path, node))
            return _GONE
        self.notes.append(f"kept as plain data: {format_path(path)}, an object of {_name(node)}")
        return self.visit(path, found) if isinstance(found, dict | list) else found

    def _cleaned(self, path: Path, node: Opaque) -> Opaque:
        """A record that can be held, without what cannot be held inside it."""
        arguments = self._items(path, node.arguments)
        items = self._items(path, node.items)
        entries = [(key, self.visit((*path, path_key(key)), value)) for key, value in node.entries]
        state = node.state if node.state is Opaque.NOTHING else self.visit(path, node.state)
        same = all(a is b for a, b in zip([*arguments, *items], [*node.arguments, *node.items], strict=True))
        if (
            same
            and state is node.state
            and all(new[1] is old[1] for new, old in zip(entries, node.entries, strict=True))
        ):
            return node
        made = node.type.record(*arguments, **node.keywords)
        made.called, made.items = node.called, items
        made.entries = [(key, value) for key, value in entries if value is not _GONE]
        made.state = Opaque.NOTHING if state is _GONE else state
        return made


def _plain(node: Opaque) -> Any:
    """The plain data that a record stands for, else `_GONE`."""
    kind, state = node.type.path, node.state
    if kind in _ENTRIES:
        return dict(node.entries)
    if kind in _ATTRIBUTES and isinstance(state, Mapping):
        return dict(state)
    if kind in _ITEMS:
        return (
            list(state["items"]) if isinstance(state, Mapping) and isinstance(state.get("items"), list) else node.items
        )
    if kind in _PATHS and all(isinstance(part, str) for part in node.arguments):
        return _joined([str(part) for part in node.arguments], windows="Windows" in kind)
    if kind in _OMEGACONF or kind.startswith("omegaconf.nodes."):
        return _omegaconf(node)
    if (number := numpy_scalar(node)) is not None:
        return number
    if (value := bare_value(node)) is not None:
        return value
    array = numpy_array(node)
    return _GONE if array is None else array


def _joined(parts: list[str], *, windows: bool) -> str:
    from pathlib import PurePosixPath, PureWindowsPath

    return str((PureWindowsPath if windows else PurePosixPath)(*parts))


def _omegaconf(node: Opaque) -> Any:
    """The contents of a container or node of omegaconf: values, without interpolation."""
    state = node.state
    if not isinstance(state, Mapping):
        return _GONE
    if "_val" in state:
        return state["_val"]
    content = state.get("_content")
    if isinstance(content, Mapping):
        return dict(_values(content.items()))
    if isinstance(content, list):
        return [value for _, value in _values(enumerate(content))]
    return content if content is None or isinstance(content, str) else _GONE


def _values(pairs: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in pairs:
        found = _omegaconf(value) if isinstance(value, Opaque) else value
        yield key, value if found is _GONE else found
