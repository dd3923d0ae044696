"""Trees as JSON, without loss of types: what the safetensors container writes beside the tensors.

A dict with string keys is a JSON object, a list an array; None, booleans, integers, finite floats and strings are
themselves. Everything else is an object with one key that begins with `$`:

    {"$tensor": NAME}                      a tensor of the file; further fields: see checkpoint.py
    {"$tuple": [...]}  {"$set": [...]}  {"$frozenset": [...]}
    {"$dict": [[KEY, VALUE], ...]}         a dict whose keys are not all strings, or one begins with `$`
    {"$ordered": [[KEY, VALUE], ...]}      an OrderedDict; "attributes" has its Python attributes (`_metadata`)
    {"$float": "inf" | "-inf" | "nan"}  {"$complex": [REAL, IMAGINARY]}  {"$int": HEXADECIMAL}, from 2**4096 on
    {"$bytes": BASE64}  {"$bytearray": BASE64}
    {"$global": "module.name"}             a torch dtype, a class: by name only; "module" where the name has dots
    {"$object": {...}}                     a call or an instance of a class known to hold data only (`PLAIN_CLASSES`)
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, RepresentationError
from optimstate.formats.pickles.foreign import remedy_for
from optimstate.formats.pickles.globals import PLAIN_CLASSES
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.formats.protocol import malformed
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import GlobalName, Opaque, Path, bare_value, format_path, path_key
from optimstate.tree.unfolding import check_unfolded

__all__ = ["decode", "encode"]

Note = Callable[[str], None]


def encode(tree: Any, tensor: Callable[[Path, LazyTensor], Any], note: Note | None = None) -> Any:
    """A JSON value for `tree`.

    Args:
        tree: The tree.
        tensor: Returns the JSON value for a tensor.
        note: Called with a message for each object that is only a string or a number and becomes that.

    Raises:
        LimitExceededError: Objects that occur in several places would be written too often.
        RepresentationError: An object has no representation; the message names it.
    """
    check_unfolded(tree)
    return _Encoder(tensor, note or (lambda _: None)).encode((), tree)


_MOST = 1 << 4096  # JSON parsers refuse or round integers with thousands of digits


class _Encoder:
    def __init__(self, tensor: Callable[[Path, LazyTensor], Any], note: Note) -> None:
        self.tensor = tensor
        self.note = note
        self.open: set[int] = set()

    def encode(self, path: Path, node: Any) -> Any:
        kind = type(node)
        if kind is int and not -_MOST < node < _MOST:
            return {"$int": hex(node)}
        if node is None or kind is bool or kind is int or kind is str:
            return node
        if kind is float:
            return node if math.isfinite(node) else {"$float": str(node)}
        if isinstance(node, LazyTensor):
            return self.tensor(path, node)
        if kind is complex:
            return {"$complex": [self.encode(path, node.real), self.encode(path, node.imag)]}
        if kind is bytes or kind is bytearray:
            return {f"${kind.__name__}": base64.b64encode(node).decode()}
        if isinstance(node, GlobalName):
            return {"$global": node.path} | ({"module": node.module} if "." in node.qualname else {})
        if node is OrderedDict:
            return {"$global": "collections.OrderedDict"}
        if id(node) in self.open:
            raise RepresentationError(f"{format_path(path)} contains itself")
        self.open.add(id(node))
        try:
            return self.encode_container(path, node)
        finally:
            self.open.discard(id(node))

    def encode_container(self, path: Path, node: Any) -> Any:
        if isinstance(node, dict):
            return self.encode_dict(path, node)
        if isinstance(node, list):
            return self.encode_items(path, node)
        if type(node) in (tuple, set, frozenset):
            return {f"${type(node).__name__}": self.encode_items(path, list(node))}
        if isinstance(node, Opaque) and node.type.path in PLAIN_CLASSES:
            return {"$object": self.encode_object(path, node)}
        value = bare_value(node)
        if value is not None:
            self.note(f"{format_path(path)}, an object of {node.type.path}, is kept as {describe(value)}")
            return self.encode(path, value)
        kind = tensor_kind(node)
        remedy = remedy_for(kind) if kind is not None else ""
        options = "--drop-opaque to leave such objects out, or convert to a torch container."
        raise RepresentationError(
            f"{format_path(path)} is {kind or f'an object of {_describe(node)}'}, which this container cannot hold",
            hint=f"{remedy} Or give {options}" if remedy else f"Give {options}",
        )

    def encode_dict(self, path: Path, node: dict[Any, Any]) -> Any:
        pairs = [(key, self.encode((*path, path_key(key)), value)) for key, value in node.items()]
        if isinstance(node, OrderedDict):
            made: dict[str, Any] = {"$ordered": [[self.encode(path, key), value] for key, value in pairs]}
            if vars(node):
                made["attributes"] = self.encode((*path, "."), vars(node))
            return made
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [[self.encode(path, key), value] for key, value in pairs]}

    def encode_items(self, path: Path, items: list[Any]) -> list[Any]:
        return [self.encode((*path, index), item) for index, item in enumerate(items)]

    def encode_object(self, path: Path, node: Opaque) -> dict[str, Any]:
        made: dict[str, Any] = {"class": node.type.path, "called": node.called}
        made["arguments"] = self.encode_items(path, list(node.arguments))
        if node.keywords:
            made["keywords"] = self.encode(path, node.keywords)
        if node.items:
            made["items"] = self.encode_items(path, node.items)
        if node.entries:
            made["entries"] = [[self.encode(path, k), self.encode((*path, path_key(k)), v)] for k, v in node.entries]
        if node.state is not Opaque.NOTHING:
            made["state"] = self.encode((*path, "state"), node.state)
        return made


def _describe(node: Any) -> str:
    if isinstance(node, Storage):
        return f"torch.{node.kind}, without a tensor"
    return node.type.path if isinstance(node, Opaque) else type(node).__name__


def decode(value: Any, tensor: Callable[[dict[str, Any]], LazyTensor]) -> Any:
    """The tree that a JSON value describes.

    Args:
        value: A result of `encode`.
        tensor: Returns the tensor for an object with the key `$tensor`.

    Raises:
        CorruptCheckpointError: The value is malformed.
    """
    with malformed("the description of the tree is malformed"):
        return _Decoder(tensor).decode(value)


_METHODS = frozenset(dir(OrderedDict))


class _Decoder:
    def __init__(self, tensor: Callable[[dict[str, Any]], LazyTensor]) -> None:
        self.tensor = tensor
        self.names: dict[str, GlobalName] = {}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in value.items()}
        if tag == "$tensor":
            return self.tensor(value)
        content = value[tag]
        if tag == "$ordered":
            ordered = OrderedDict(self.pairs(content))
            attributes = self.decode(value.get("attributes", {}))
            if not _METHODS.isdisjoint(attributes):
                raise CorruptCheckpointError("attributes that hide a method of an OrderedDict")
            vars(ordered).update(attributes)
            return ordered
        if tag == "$dict":
            return dict(self.pairs(content))
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self.decode(content))
        if tag == "$float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if tag == "$int":
            return int(content, 16)
        if tag == "$complex":
            return complex(*self.decode(content))
        if tag in ("$bytes", "$bytearray"):
            data = base64.b64decode(content, validate=True)
            return data if tag == "$bytes" else bytearray(data)
        if tag == "$global":
            return self.name(content, value.get("module"))
        if tag == "$object":
            return self.object(content)
        raise CorruptCheckpointError(f"unknown kind of node {describe(tag)}")

    def pairs(self, content: list[list[Any]]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in content]

    def name(self, path: str, module: str | None = None) -> Any:
        if path == "collections.OrderedDict":
            return OrderedDict
        if path not in self.names:
            module = path.rpartition(".")[0] if module is None else module
            self.names[path] = GlobalName(module, path.removeprefix(f"{module}."))
        return self.names[path]

    def object(self, content: dict[str, Any]) -> Opaque:
        if content["class"] not in PLAIN_CLASSES:
            raise CorruptCheckpointError(
                f"an object of {describe(content['class'])}, which this container does not hold"
            )
        kind: GlobalName = self.name(content["class"])
        record = kind.record(*self.decode(content["arguments"]), **self.decode(content.get("keywords", {})))
        record.called = bool(content["called"])
        record.items = self.decode(content.get("items", []))
        record.entries = self.pairs(content.get("entries", []))
        if "state" in content:
            record.state = self.decode(content["state"])
        return record


_SEQUENCES: dict[str, Callable[[Any], Any]] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
