"""All forms of a tensor in torch's pickles, from torch 0.1 to today: those that are read, and names for the others.

In a pickle a tensor is a call of a function, which torch keeps so that it can read old files, or of a class. `READ` has
the calls that become a `LazyTensor`: strided tensors with all their elements in the file. `RECORDS` has those whose
elements mean something else (sparse, quantized, nested, without a device) or that have a class of their own; they stay
records, which are shown by name, copied into torch's container, and refused by name elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.pickles.foreign import known_class
from optimstate.io.extents import InMemory
from optimstate.record import Record
from optimstate.tensors.dtypes import DTYPES, check_sizes, decode_scalar
from optimstate.tensors.lazy import LazyTensor, Storage, contiguous_strides, tensor_of
from optimstate.tree import AttributedTensor, GlobalName, Opaque, nodes

__all__ = [
    "READ",
    "RECORDS",
    "STORAGE_OF_TENSOR",
    "TensorBuilder",
    "numpy_array",
    "numpy_scalar",
    "tensor_kind",
]

READ = {
    "torch._utils._rebuild_tensor": "_tensor_v1",  # 0.1.10 to 0.3
    "torch._utils._rebuild_tensor_v2": "_tensor_v2",  # since 0.4
    "torch._utils._rebuild_tensor_v3": "_tensor_v3",  # since 2.1, dtypes without a typed storage
    "torch._utils._rebuild_parameter": "_parameter",  # since 0.4
    "torch._utils._rebuild_parameter_with_state": "_parameter_with_state",  # since 2.0
    "torch.tensor._rebuild_from_type": "_from_type_v2",  # 1.7 and 1.8
    "torch._tensor._rebuild_from_type": "_from_type_v2",  # 1.9 and 1.10
    "torch._tensor._rebuild_from_type_v2": "_from_type_v2",  # since 1.11
    "torch._utils._rebuild_xla_tensor": "_from_numpy",  # 1.6 to 2.2
    "torch._utils._rebuild_mlc_tensor": "_from_numpy",  # 1.9 to 1.11
    "torch._utils._rebuild_hpu_tensor": "_from_numpy",  # 1.11 to 1.13
    "torch._utils._rebuild_device_tensor_from_numpy": "_from_numpy",  # since 1.12
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "_from_cpu",  # since 2.4
    "torch.autograd.variable.Variable": "_variable",  # before 0.4
    "torch.nn.parameter.Parameter": "_old_parameter",  # before 0.4
}
"""Function or class -> the method of `TensorBuilder` that reads it. `torch.FloatTensor` and so on are read too."""

RECORDS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch.nested._internal.nested_tensor._rebuild_njt": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the meta device, without elements",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a wrapper class",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_ort_tensor": "a tensor of another device",
    "torch.nn.parameter.UninitializedParameter": "a parameter without a shape",
    "torch.nn.parameter.UninitializedBuffer": "a buffer without a shape",
    "torch.multiprocessing.reductions.rebuild_tensor": "a tensor in the shared memory of a process",
    "torch.multiprocessing.reductions.rebuild_cuda_tensor": "a tensor in the memory of a process",
}
"""Function or class -> the kind of its records."""

_FROM_TYPE = frozenset(path for path, method in READ.items() if method == "_from_type_v2")
_PARAMETERS = frozenset(path for path, method in READ.items() if "parameter" in method)


def tensor_kind(node: Any) -> str | None:
    """The kind of tensor that a record stands for, `a sparse tensor` or `a tensor of class my.Tensor`.

    None for anything else, also for a tensor that was read.
    """
    if not isinstance(node, Opaque):
        return None
    path = node.type.path
    if path in _PARAMETERS and node.arguments:
        return tensor_kind(node.arguments[0]) or _attributed(node)
    if path in _FROM_TYPE and len(node.arguments) == 4:
        build, kind = node.arguments[:2]
        if isinstance(kind, GlobalName) and kind.path != "torch.Tensor":
            known = known_class(kind.path)
            return f"{known.what} ({kind.qualname})" if known else f"a tensor of class {kind.path}"
        return RECORDS.get(build.path) if isinstance(build, GlobalName) else "a tensor of unknown class"
    if path in RECORDS:
        return RECORDS[path]
    is_rebuilt = path.startswith("torch.") and node.type.qualname.startswith("_rebuild_")
    return f"a tensor rebuilt by {path}" if is_rebuilt else None


def _attributed(node: Opaque) -> str | None:
    """The kind of a parameter with objects as attributes, which show its library; torch does not store its class."""
    if len(node.arguments) < 4:
        return None
    state = node.arguments[3]
    paths = [found.type.path for found in nodes(state) if isinstance(found, Opaque)]
    known = next(filter(None, map(known_class, paths)), None)
    if known is not None:
        return known.what
    if isinstance(state, Mapping) and {"CB", "SCB"} <= state.keys():
        return "a quantized weight of bitsandbytes"
    return "a parameter with objects set on it"


class _Variable(LazyTensor):
    """A tensor that then gets its flags: `(requires_grad, volatile, hooks)`, or five values with the tensor first."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) not in (3, 5):
            raise CorruptCheckpointError(f"the state of a Variable is {describe(state)}"[:200])
        grad, hooks = (state[0], state[2]) if len(state) == 3 else (state[3], state[2])
        if hooks:
            raise UnsupportedCheckpointError("a tensor with backward hooks")
        self.requires_grad = bool(grad)
        self.__class__ = LazyTensor  # type: ignore[assignment]


class _Empty(LazyTensor):
    """A tensor that then gets its storage, offset, size and stride."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 4:
            raise CorruptCheckpointError(f"the state of a tensor is {describe(state)}"[:200])
        storage, offset, size, stride = state
        if not isinstance(storage, Storage) or storage.kind != self.storage.kind:
            raise CorruptCheckpointError(f"a {self.dtype} tensor over {describe(storage)}"[:200])
        if _end(self.dtype, offset, size, stride) > storage.nbytes:
            _refuse_tensor(storage, offset, size, stride, ())
        self.storage, self.shape, self.stride, self.offset = storage, size, stride, offset
        self.__class__ = LazyTensor  # type: ignore[assignment]


class TensorBuilder:
    """Builds the tensors of one pickle."""

    def __init__(self) -> None:
        self._signatures: dict[tuple[Any, ...], tuple[str, int]] = {}  # checkpoints have many tensors and few shapes
        self._waiting: list[LazyTensor] = []
        self._without_state: list[dict[str, Any]] = []

    def find(self, path: str) -> Callable[..., Any] | None:
        """The function that builds a tensor from a call of `path`, or None if such calls are not read."""
        if path in READ:
            return getattr(self, READ[path])  # type: ignore[no-any-return]
        kind = STORAGE_OF_TENSOR.get(path)
        return None if kind is None else self._empty(kind)

    def finished(self) -> None:
        """Finish the tensors whose state may have followed."""
        for tensor in self._waiting:
            tensor.__class__ = LazyTensor
        if any(self._without_state):
            raise UnsupportedCheckpointError(
                "a tensor on which an object was set that holds the tensor itself", hint="Save its state dict."
            )

    def _tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> LazyTensor:
        try:  # nearly all tensors have a signature that was seen before
            plain = type(offset) is int and _INT.issuperset(map(type, size + stride))  # True and 1.0 equal 1
            signature = self._signatures.get((storage.kind, offset, size, stride)) if plain else None
        except (TypeError, AttributeError):
            signature = None
        dtype, end = signature or self._signature(storage, offset, size, stride)
        if hooks or end > storage.nbytes:
            _refuse_tensor(storage, offset, size, stride, hooks)
        made = _new(LazyTensor)  # this is the most frequent call; __init__ would take a third of its time
        made.storage = storage
        made.dtype = dtype
        made.shape = size
        made.stride = stride
        made.offset = offset
        made.requires_grad = bool(grad)
        made.is_parameter = False
        made.metadata = metadata
        return made

    def _signature(self, storage: Any, offset: Any, size: Any, stride: Any) -> tuple[str, int]:
        """The dtype of a tensor, and the number of bytes of its storage that it needs."""
        dtype = _DTYPE_OF_STORAGE.get(storage.kind) if isinstance(storage, Storage) else None
        if dtype is None:
            raise CorruptCheckpointError(f"a tensor over {describe(storage)}"[:200])
        found = self._signatures[storage.kind, offset, size, stride] = dtype, _end(dtype, offset, size, stride)
        return found

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> LazyTensor:
        name = dtype.qualname if isinstance(dtype, GlobalName) and dtype.module == "torch" else None
        if not isinstance(storage, Storage) or name not in DTYPES:
            raise UnsupportedCheckpointError(f"a tensor of dtype {describe(dtype)} over {describe(storage)}"[:200])
        if hooks or _end(name, offset, size, stride) > storage.nbytes:
            _refuse_tensor(storage, offset, size, stride, hooks)
        return LazyTensor(storage, name, size, stride, offset, bool(grad), False, metadata)

    def _parameter(self, data: Any, grad: Any, hooks: Any) -> Any:
        if not isinstance(data, LazyTensor) or hooks or data.is_parameter:
            return GlobalName("torch._utils", "_rebuild_parameter")(data, grad, hooks)
        return LazyTensor(
            data.storage, data.dtype, data.shape, data.stride, data.offset, bool(grad), True, data.metadata
        )

    def _parameter_with_state(self, data: Any, grad: Any, hooks: Any, state: Any) -> Any:
        made = self._parameter(data, grad, hooks)
        if isinstance(made, LazyTensor) and state and _are_plain(state):  # an empty dict may be filled later
            return AttributedTensor.of(made, state)
        return GlobalName("torch._utils", "_rebuild_parameter_with_state")(data, grad, hooks, state)

    def _from_type_v2(self, build: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor with attributes; tensors of other classes stay records."""
        known = isinstance(build, GlobalName) and build.path in _PLAIN_REBUILDERS and type(arguments) is tuple
        if known and isinstance(kind, GlobalName) and kind.path == "torch.Tensor" and _are_plain(state):
            made = build(*arguments)
            if not state:
                self._without_state.append(state)
            return AttributedTensor.of(made, state) if state else made
        return GlobalName("torch._tensor", "_rebuild_from_type_v2")(build, kind, arguments, state)

    def _tensor_v1(self, storage: Any, offset: Any, size: Any, stride: Any) -> LazyTensor:
        """As written by torch 0.1.10 to 0.3, where a Variable around the tensor has `requires_grad`."""
        return self._tensor_v2(storage, offset, size, stride, False, ())

    def _variable(self, data: Any, grad: Any = False) -> Any:
        return self._unfinished(data, "torch.autograd.variable", "Variable", grad)

    def _old_parameter(self, data: Any, grad: Any = True) -> Any:
        """As written by torch before 0.4; `torch.nn.Parameter(data)` means the same today."""
        made = self._unfinished(data, "torch.nn.parameter", "Parameter", grad)
        if isinstance(made, LazyTensor):
            made.is_parameter = True
        return made

    def _unfinished(self, data: Any, module: str, name: str, grad: Any) -> Any:
        if not isinstance(data, LazyTensor) or data.is_parameter:
            return GlobalName(module, name)(data)
        made = _Variable(data.storage, data.dtype, data.shape, data.stride, data.offset, bool(grad), False)
        self._waiting.append(made)
        return made

    def _empty(self, kind: str) -> Callable[..., Any]:
        """`torch.FloatTensor()`, which gets its storage afterwards in files of torch before 0.1.10."""

        def build(*arguments: Any) -> Any:
            if arguments:
                return GlobalName("torch", kind.replace("Storage", "Tensor"))(*arguments)
            made = _Empty(Storage((), 0, kind), _DTYPE_OF_STORAGE[kind], (0,))
            self._waiting.append(made)
            return made

        return build

    def _from_numpy(self, data: Any, dtype: Any, device: Any, grad: Any) -> Any:
        """A tensor on a device for which torch stores a NumPy array instead of bytes."""
        array = _ndarray(data)
        if array is None or not isinstance(dtype, GlobalName) or dtype.path != f"torch.{array.dtype}":
            return GlobalName("torch._utils", "_rebuild_device_tensor_from_numpy")(data, dtype, device, grad)
        return array.tensor(grad=bool(grad))

    def _from_cpu(self, data: Any, dtype: Any, device: Any, grad: Any) -> Any:
        same = isinstance(data, LazyTensor) and isinstance(dtype, GlobalName) and dtype.path == f"torch.{data.dtype}"
        if not same:
            return GlobalName("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")(data, dtype, device, grad)
        return LazyTensor(data.storage, data.dtype, data.shape, data.stride, data.offset, bool(grad))


def _are_plain(attributes: Any) -> bool:
    return type(attributes) is dict and all(
        type(key) is str and (value is None or type(value) in (bool, int, float, str))
        for key, value in attributes.items()
    )


def _end(dtype: str, offset: Any, size: Any, stride: Any) -> int:
    """The number of bytes of its storage that a tensor needs."""
    if type(size) is not tuple or type(stride) is not tuple or type(offset) is not int or offset < 0:
        raise CorruptCheckpointError(
            f"a tensor with size {describe(size)}, stride {describe(stride)}, offset {describe(offset)}"[:200]
        )
    span = _span(size, stride)
    return (offset + span) * DTYPES[dtype].itemsize if span else 0


def _refuse_tensor(storage: Storage, offset: Any, size: Any, stride: Any, hooks: Any) -> NoReturn:
    if hooks:
        raise UnsupportedCheckpointError("a tensor with backward hooks")
    raise CorruptCheckpointError(
        f"a tensor of size {describe(size)}, stride {describe(stride)}, offset {offset} reaches past its storage of "
        f"{storage.nbytes} bytes"[:300]
    )


def _span(size: tuple[Any, ...], stride: tuple[Any, ...]) -> int:
    """The number of elements from the first to the last one of a view, both included."""
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (*size, *stride)):
        raise CorruptCheckpointError(f"a tensor with size {describe(size)} and stride {describe(stride)}"[:200])
    check_sizes((*size, *stride), len(size))
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def numpy_array(record: Any) -> LazyTensor | None:
    """The record of a NumPy array as a tensor; None for anything else, and for arrays that are not like a tensor."""
    found = _ndarray(record)
    return None if found is None else found.tensor()


def numpy_scalar(record: Any) -> bool | int | float | complex | None:
    """The value of the record of a NumPy scalar; None for anything else."""
    if not isinstance(record, Opaque) or record.type.qualname != "scalar" or len(record.arguments) != 2:
        return None
    kind, content = record.arguments
    name = _numpy_dtype(kind)
    if name is None or not isinstance(content, bytes) or len(content) != DTYPES[name].itemsize:
        return None
    return decode_scalar(content, name)


class _Array(Record):
    """A NumPy array in a pickle: its dtype, shape and elements, in column-major order with `fortran`."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes
    fortran: bool

    def tensor(self, *, grad: bool = False) -> LazyTensor:
        """The same elements as a tensor."""
        stride = tuple(reversed(contiguous_strides(self.shape[::-1]))) if self.fortran else None
        tensor = tensor_of(InMemory(self.content).extents(), self.dtype, self.shape, stride)
        tensor.requires_grad = grad
        return tensor


def _ndarray(record: Any) -> _Array | None:
    """The array of a record as pickled up to protocol 4, or from protocol 5 on; None for any other record."""
    if not isinstance(record, Opaque):
        return None
    if record.type.qualname == "_reconstruct" and type(record.state) is tuple and len(record.state) == 5:
        _, shape, kind, fortran, content = record.state
    elif record.type.path.endswith("core.numeric._frombuffer") and len(record.arguments) == 4:
        content, kind, shape, order = record.arguments
        fortran = order == "F"
    else:
        return None
    name = _numpy_dtype(kind)
    if name is None or not isinstance(content, bytes | bytearray) or type(shape) is not tuple:
        return None
    fits = _end(name, 0, shape, contiguous_strides(shape)) == len(content)
    return _Array(name, shape, bytes(content), bool(fortran)) if fits else None


def _numpy_dtype(record: Any) -> str | None:
    """The name of a little-endian NumPy dtype from its record; None for any other record."""
    if not isinstance(record, Opaque) or not record.arguments or not isinstance(record.arguments[0], str):
        return None
    order = record.state[1] if type(record.state) is tuple and len(record.state) > 1 else "<"
    return None if order == ">" else _NUMPY_CODES.get(record.arguments[0])


_new = object.__new__
_INT = frozenset({int})
_PLAIN_REBUILDERS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)
_DTYPE_OF_STORAGE = {row.storage: row.name for row in DTYPES.values() if row.storage}
STORAGE_OF_TENSOR = {
    f"{module}.{kind.replace('Storage', 'Tensor')}": kind
    for kind in _DTYPE_OF_STORAGE
    for module in ("torch", "torch.cuda")
}
_NUMPY_CODES = {
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"i{size}": f"int{8 * size}" for size in (1, 2, 4, 8)},
    **{f"u{size}": f"uint{8 * size}" for size in (1, 2, 4, 8)},
    "b1": "bool",
    "c8": "complex64",
    "c16": "complex128",
}
