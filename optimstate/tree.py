"""Checkpoints as trees: nested dicts, lists and tuples whose leaves are tensors, scalars and opaque records.

An object of a class this library does not know is kept as an `Opaque` record of how its pickle built it. Nothing is
imported or called for it; it can be shown, compared and written back.
"""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from optimstate.describe import describe, exact
from optimstate.errors import LimitExceededError, UnsupportedCheckpointError
from optimstate.io.extents import chunks
from optimstate.tensors.lazy import LazyTensor, Storage

__all__ = [
    "AttributedTensor",
    "GlobalName",
    "Opaque",
    "OpaqueFile",
    "Path",
    "bare_value",
    "difference",
    "format_path",
    "tensors",
    "walk",
]

MAX_DEPTH = 1000
"""Containers within one another that are walked with their paths; no honest checkpoint has a twentieth of it."""

Path = tuple[str | int, ...]
"""Keys from the root to a node. Keys that are neither str nor int appear as their repr."""


class GlobalName(type):
    """A class or function a pickle mentions, known by name only: never imported.

    It is a class itself because pickles create objects from classes; calling or instantiating it only takes notes.

    Attributes:
        module: As written in the pickle.
        qualname: As written; dotted for nested classes.
    """

    module: str
    qualname: str

    def __new__(mcs, module: str, qualname: str) -> GlobalName:
        """A fresh class for the name."""
        made = super().__new__(mcs, "Opaque", (Opaque,), {"__slots__": ()})
        made.module = module
        made.qualname = qualname
        return made

    def __init__(cls, _module: str, _qualname: str) -> None:
        super().__init__("Opaque", (Opaque,), {})

    def __call__(cls, *arguments: Any) -> Opaque:
        """A record of a call."""
        record = cls.record(*arguments)
        record.called = True
        return record

    def record(cls, *arguments: Any, **keywords: Any) -> Opaque:
        """A record of an instance created without a call."""
        return cast("Opaque", cast("Any", cls).__new__(cls, *arguments, **keywords))

    def __repr__(cls) -> str:
        return f"<{cls.path}>"

    def __describe__(cls) -> str:
        return f"<{cls.path}>"

    @property
    def path(cls) -> str:
        """`module.qualname`."""
        return f"{cls.module}.{cls.qualname}"


class Opaque:
    """How a pickle built an object: the callable, its arguments, and what was put into the result.

    Attributes:
        arguments: Positional arguments.
        keywords: Keyword arguments (only from `NEWOBJ_EX`).
        called: True when the callable was called, False when a bare instance was created (`cls.__new__`).
        state: What `BUILD` gave it, or `Opaque.NOTHING`.
        items: What was appended to it.
        entries: What was set on it by key.
    """

    NOTHING: Any = ...
    __slots__ = ("arguments", "called", "entries", "items", "keywords", "state")

    def __new__(cls, *arguments: Any, **keywords: Any) -> Opaque:
        """What an unpickler does to create an instance."""
        self = object.__new__(cls)
        self.arguments = arguments
        self.keywords = keywords
        self.called = False
        self.state = Opaque.NOTHING
        self.items = []
        self.entries = []
        return self

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    called: bool
    state: Any
    items: list[Any]
    entries: list[tuple[Any, Any]]

    # The names below are what an unpickler uses to fill an object.
    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def append(self, item: Any) -> None:
        """Note an appended item."""
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        """Note appended items."""
        self.items.extend(items)

    def add(self, item: Any) -> None:
        """Note an added element."""
        self.items.append(item)

    @property
    def type(self) -> GlobalName:
        """The callable that made it."""
        return cast("GlobalName", type(self))

    def parts(self) -> Iterator[tuple[str | int, Any]]:
        """Everything inside, labelled."""
        yield from enumerate(self.arguments)
        yield from self.keywords.items()
        yield from enumerate(self.items, len(self.arguments))
        for key, value in self.entries:
            yield path_key(key), value
        if isinstance(self.state, Mapping):
            for key, value in self.state.items():
                yield path_key(key), value
        elif self.state is not Opaque.NOTHING:
            yield "state", self.state

    def __repr__(self) -> str:
        return f"<{self.type.path} object>"

    __describe__ = __repr__


def bare_value(node: Any) -> str | int | float | None:
    """What an object of a subclass of text or numbers is, if it is nothing but that: `torch.__version__`."""
    if not isinstance(node, Opaque) or node.called or len(node.arguments) != 1 or node.keywords:
        return None
    (value,) = node.arguments
    alone = not node.items and not node.entries and (node.state is Opaque.NOTHING or not node.state)
    return value if alone and type(value) in (str, int, float) else None


class AttributedTensor(LazyTensor):
    """A tensor on which a program had set plain attributes: a persistent buffer, a parameter marked for its optimizer.

    Attributes:
        attributes: What was set, by name: numbers, text, None.
    """

    __slots__ = ("attributes",)

    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, tensor: LazyTensor, attributes: Mapping[str, Any]) -> AttributedTensor:
        """The same view of the same storage, with attributes."""
        made = cls(
            tensor.storage,
            tensor.dtype,
            tensor.shape,
            tensor.stride,
            tensor.offset,
            tensor.requires_grad,
            tensor.is_parameter,
            tensor.metadata,
        )
        made.attributes = attributes
        return made

    def clone(self) -> LazyTensor:
        """As for a plain tensor; the attributes are those of the clone too."""
        return AttributedTensor.of(super().clone(), self.attributes)


class OpaqueFile(NamedTuple):
    """A file of a folder that is no checkpoint: copied as it is."""

    path: str
    nbytes: int


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Building a tree allocates only live objects; collecting meanwhile costs more than the building."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def path_key(key: Any) -> str | int:
    """A mapping key as it appears in a path."""
    return key if type(key) is str or (type(key) is int and -_MOST < key < _MOST) else exact(key)


_MOST = 1 << 4096  # integers beyond have more digits than Python prints


def format_path(path: Path) -> str:
    """A path as it is shown to people: `optimizer['state'][0]['exp_avg']`, or `(root)`."""
    if not path:
        return "(root)"
    first, *rest = path
    head = str(first) if isinstance(first, str) else f"[{describe(first)}]"
    return head + "".join(f"[{describe(key)}]" for key in rest)


def children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """The nodes directly inside `node`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield path_key(key), value
        attributes = vars(node) if isinstance(node, OrderedDict) else None
        if attributes:
            for name, value in attributes.items():
                yield f".{name}", value
    elif isinstance(node, list | tuple) and not isinstance(node, OpaqueFile):
        yield from enumerate(node)
    elif isinstance(node, Opaque):
        yield from node.parts()


def walk(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every container and leaf, parents first, in order. A container met twice is entered once, so cycles end.

    Raises:
        LimitExceededError: Containers are nested more than `MAX_DEPTH` deep.
    """
    seen: set[int] = set()
    stack: list[Iterator[tuple[Path, Any]]] = [iter([(path, node)])]
    while stack:
        for place, found in stack[-1]:
            yield place, found
            if isinstance(found, dict | list | tuple | Opaque) and id(found) not in seen:
                if len(stack) > MAX_DEPTH:
                    raise LimitExceededError(f"containers nested more than {MAX_DEPTH} deep")
                seen.add(id(found))
                stack.append(iter([((*place, key), child) for key, child in children(found)]))
                break
        else:
            stack.pop()


def nodes(node: Any) -> Iterator[Any]:
    """Every container and leaf, without paths, in no particular order."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        yield found
        if isinstance(found, dict | list | tuple | Opaque) and id(found) not in seen:
            seen.add(id(found))
            if type(found) is dict:
                stack.extend(found.values())
            else:
                stack.extend(child for _, child in children(found))


def census(node: Any, is_tensor: Callable[[Any], bool] = lambda _: False) -> tuple[int, Counter[str]]:
    """How many tensors there are, and how many objects of each class known by name only.

    Args:
        node: A tree.
        is_tensor: Whether an object is the record of one tensor, whatever is in it.
    """
    tensor_count = 0
    records: Counter[str] = Counter()
    seen: set[int] = {id(node)}
    stack: list[Any] = [node]
    while stack:
        found = stack.pop()
        if isinstance(found, Opaque):
            records[found.type.path] += 1
        inner = found.values() if type(found) is dict else [child for _, child in children(found)]
        kinds = list(map(type, inner))
        plain_tensors = kinds.count(LazyTensor)
        tensor_count += plain_tensors
        if plain_tensors == len(kinds):
            continue
        tensor_count += kinds.count(AttributedTensor)
        for child, kind in zip(inner, kinds, strict=True):
            if kind not in _LEAVES and isinstance(child, dict | list | tuple | Opaque):
                if isinstance(child, Opaque) and is_tensor(child):
                    tensor_count += 1
                    records[child.type.path] += id(child) not in seen
                    seen.add(id(child))
                elif id(child) not in seen:
                    seen.add(id(child))
                    stack.append(child)
    return tensor_count + isinstance(node, LazyTensor), records


_LEAVES = frozenset({LazyTensor, AttributedTensor, int, float, str, bool, type(None), bytes})


def tensors(node: Any) -> Iterator[tuple[Path, LazyTensor]]:
    """Every tensor with its path."""
    return ((path, found) for path, found in walk(node) if isinstance(found, LazyTensor))


def replaced(tree: Any, nodes: Mapping[int, Any]) -> Any:
    """The tree with some containers exchanged.

    Args:
        tree: Never changed; whatever holds nothing exchanged is shared with the result.
        nodes: What stands for the container of each `id`.

    Raises:
        UnsupportedCheckpointError: Something exchanged is inside a container that contains itself.
    """
    done: dict[int, Any] = dict(nodes)
    entered: set[int] = set()
    recursive: set[int] = set()

    def visit(node: Any) -> Any:
        key = id(node)
        if key in done:
            return done[key]
        if not isinstance(node, dict | list | tuple) or isinstance(node, OpaqueFile):
            return node
        if key in entered:
            recursive.add(key)
            return node
        entered.add(key)
        made = _with_children(node, visit)
        if made is not node and key in recursive:
            raise UnsupportedCheckpointError("a container that contains itself would have to change")
        done[key] = made
        return made

    return visit(tree)


def _with_children(node: Any, visit: Callable[[Any], Any]) -> Any:
    """The container with each child visited, or the container itself where none changes."""
    if isinstance(node, dict):
        items = {key: visit(value) for key, value in node.items()}
        return node if all(items[key] is value for key, value in node.items()) else rebuilt_mapping(node, items)
    children = [visit(item) for item in node]
    if all(new is old for new, old in zip(children, node, strict=True)):
        return node
    return children if isinstance(node, list) else tuple(children)


def cloned(node: Any) -> Any:
    """A copy whose tensors share memory with nothing else; plain values and names are shared.

    A container that stands in several places is copied once, with all that is in it.
    """
    return _cloned(node, {})


def _cloned(node: Any, done: dict[int, Any]) -> Any:
    if isinstance(node, LazyTensor):
        return node.clone()
    if isinstance(node, Storage):
        return Storage(node.pieces, node.nbytes, node.kind, node.location)
    if not isinstance(node, Mapping | list | tuple | Opaque):
        return node
    if id(node) not in done:
        done[id(node)] = _cloned_container(node, done)
    return done[id(node)]


def _cloned_container(node: Any, done: dict[int, Any]) -> Any:
    if isinstance(node, Mapping):
        return rebuilt_mapping(node, {key: _cloned(value, done) for key, value in node.items()})
    if isinstance(node, list | tuple):
        items = [_cloned(item, done) for item in node]
        return items if isinstance(node, list) else tuple(items)
    made = node.type.record(*_cloned(node.arguments, done), **_cloned(node.keywords, done))
    made.called = node.called
    made.items = _cloned(node.items, done)
    made.entries = [(key, _cloned(value, done)) for key, value in node.entries]
    made.state = _cloned(node.state, done)
    return made


def rebuilt_mapping(like: Mapping[Any, Any], items: Mapping[Any, Any]) -> dict[Any, Any]:
    """`items` as a mapping of the same type and with the same attributes as `like`."""
    if isinstance(like, OrderedDict):
        made: dict[Any, Any] = OrderedDict(items)
        vars(made).update(vars(like))
        return made
    return dict(items)


def difference(a: Any, b: Any, *, strides: bool = True, aliases: bool = True) -> str | None:
    """The first place where two trees differ, or None when they are equal in types, keys, order, values and sharing.

    Tensors are compared by dtype, shape, bytes and, unless told otherwise, strides and which of them share storage.
    """
    return _Comparison(strides, aliases).differ((), a, b)


class _Comparison:
    def __init__(self, strides: bool, aliases: bool) -> None:
        self.strides = strides
        self.aliases = aliases
        self.storage_of: dict[int, int] = {}
        self.visited: set[tuple[int, int]] = set()
        self.keep: list[Any] = []

    def differ(self, path: Path, a: Any, b: Any) -> str | None:
        where = format_path(path)
        if isinstance(a, LazyTensor) and isinstance(b, LazyTensor):
            return self._differ_tensor(where, a, b)
        if isinstance(a, GlobalName) and isinstance(b, GlobalName):
            return None if a.path == b.path else f"{where}: {describe(a)} != {describe(b)}"
        if isinstance(a, Opaque) and isinstance(b, Opaque):
            if a.type.path != b.type.path or a.called != b.called:
                return f"{where}: {describe(a)} != {describe(b)}"
        elif isinstance(a, Storage) and isinstance(b, Storage):
            return self._differ_storage(where, a, b)
        elif type(a) is not type(b):
            return f"{where}: {type(a).__name__} != {type(b).__name__}"
        if not isinstance(a, dict | list | tuple | Opaque):
            same = a == b or (a != a and b != b)
            return None if same else f"{where}: {describe(a)} != {describe(b)}"
        if (id(a), id(b)) in self.visited:
            return None
        self.visited.add((id(a), id(b)))
        left, right = list(children(a)), list(children(b))
        self.keep.append((left, right))
        if isinstance(a, dict):  # keys that look alike in a path may differ in type
            left_keys, right_keys = [list(map(path_key, side)) for side in (a, b)]
            types = [list(map(type, side)) for side in (a, b)]
            if left_keys != right_keys or types[0] != types[1]:
                return f"{where}: keys differ: {_first_difference(left_keys, right_keys)}"
        if [key for key, _ in left] != [key for key, _ in right]:
            return f"{where}: parts differ: {_first_difference([k for k, _ in left], [k for k, _ in right])}"
        for (key, x), (_, y) in zip(left, right, strict=True):
            found = self.differ((*path, key), x, y)
            if found:
                return found
        return None

    def _differ_tensor(self, where: str, a: LazyTensor, b: LazyTensor) -> str | None:
        kinds = ("dtype", "shape", "requires_grad", "is_parameter") + (("stride",) if self.strides else ())
        for name in kinds:
            x, y = getattr(a, name), getattr(b, name)
            if x != y:
                return f"{where}: {name} {x} != {y}"
        one, other = getattr(a, "attributes", {}), getattr(b, "attributes", {})
        if one != other:
            return f"{where}: attributes {describe(one)} != {describe(other)}"
        if any(x != y for x, y in zip(a.chunks(), b.chunks(), strict=True)):
            return f"{where}: contents differ"
        return self._differ_sharing(where, a.storage, b.storage)

    def _differ_storage(self, where: str, a: Storage, b: Storage) -> str | None:
        if (a.kind, a.nbytes) != (b.kind, b.nbytes):
            return f"{where}: storage {a.kind} of {a.nbytes} bytes != {b.kind} of {b.nbytes}"
        if any(x != y for x, y in zip(chunks(a.pieces), chunks(b.pieces), strict=True)):
            return f"{where}: contents differ"
        return self._differ_sharing(where, a, b)

    def _differ_sharing(self, where: str, a: Storage, b: Storage) -> str | None:
        if self.aliases and self.storage_of.setdefault(id(a), id(b)) != id(b):
            return f"{where}: shares its storage with another tensor on one side only"
        return None


def _first_difference(a: list[Any], b: list[Any]) -> str:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y or type(x) is not type(y):
            return f"{describe(x)} != {describe(y)} at position {index}"
    return f"{len(a)} != {len(b)} entries"
