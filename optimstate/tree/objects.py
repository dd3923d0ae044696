"""Nodes of trees other than plain data: objects and names in a pickle, tensors with attributes, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from optimstate.describe import exact
from optimstate.tensors.lazy import LazyTensor

__all__ = ["AttributedTensor", "GlobalName", "Opaque", "OpaqueFile", "bare_value", "path_key"]


class GlobalName(type):
    """A class or function that a pickle refers to. Only its name is known: it is never imported.

    It is a class because pickles create objects from classes. Calling or instantiating it makes a record of the call.

    Attributes:
        module: The module's name as written in the pickle.
        qualname: The name in the module as written, with dots for nested classes.
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
    """How a pickle built an object: the callable, its arguments, and the state that was set on the result.

    Attributes:
        arguments: Positional arguments.
        keywords: Keyword arguments (only from `NEWOBJ_EX`).
        called: True if the callable was called, False if a bare instance was created (`cls.__new__`).
        state: The argument of `BUILD`, or `Opaque.NOTHING`.
        items: Appended items, in order.
        entries: Keys and values that were set, in order.
    """

    NOTHING: Any = ...
    __slots__ = ("arguments", "called", "entries", "items", "keywords", "state")

    def __new__(cls, *arguments: Any, **keywords: Any) -> Opaque:
        """Create a record; an unpickler calls this to create an instance."""
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

    # An unpickler calls the methods below to fill an object.
    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def append(self, item: Any) -> None:
        """Record an appended item."""
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        """Record appended items."""
        self.items.extend(items)

    add = append

    @property
    def type(self) -> GlobalName:
        """The callable that made it."""
        return cast("GlobalName", type(self))

    def parts(self) -> Iterator[tuple[str | int, Any]]:
        """The children with their keys in a path."""
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
    """The value of an object that is only a str or number of a subclass, such as `torch.__version__`; else None."""
    if not isinstance(node, Opaque) or node.called or len(node.arguments) != 1 or node.keywords:
        return None
    (value,) = node.arguments
    alone = not node.items and not node.entries and (node.state is Opaque.NOTHING or not node.state)
    return value if alone and type(value) in (str, int, float) else None


class AttributedTensor(LazyTensor):
    """A tensor on which a program set plain attributes: a persistent buffer, a parameter marked for its optimizer.

    Attributes:
        attributes: The attributes by name: numbers, text, None.
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
        """A clone as of a plain tensor, with the same attributes."""
        return AttributedTensor.of(super().clone(), self.attributes)


class OpaqueFile(NamedTuple):
    """A file of a folder that is not part of the checkpoint; it is copied as it is."""

    path: str
    nbytes: int


def path_key(key: Any) -> str | int:
    """A mapping key as it appears in a path."""
    return key if type(key) is str or (type(key) is int and -_MOST < key < _MOST) else exact(key)


_MOST = 1 << 4096  # integers beyond have more digits than Python prints
