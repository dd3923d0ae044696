"""Element types: their names, sizes and spellings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import LimitExceededError, UnsupportedCheckpointError

__all__ = [
    "COMPLEX",
    "DTYPES",
    "INEXACT",
    "ITEMSIZE_OF_STORAGE",
    "DType",
    "check_sizes",
    "decode_scalar",
    "encode_elements",
]


class DType(NamedTuple):
    """The names of an element type in torch and in the containers.

    Attributes:
        name: The name in torch: `torch.<name>`.
        itemsize: Bytes per element.
        storage: The class of torch's typed storage; empty if torch has none and saves an untyped one.
        safetensors: The code in safetensors headers; empty if the format has none.
        packed: Numbers per element. The last dimension counts numbers in safetensors, and elements in torch.
        in_torch: Whether torch has this dtype.
    """

    name: str
    itemsize: int
    storage: str
    safetensors: str
    packed: int = 1
    in_torch: bool = True

    @property
    def storage_class(self) -> str:
        """The class of torch's storages with elements of this type: `UntypedStorage` where there is no typed one."""
        return self.storage or "UntypedStorage"


DTYPES: dict[str, DType] = {
    str(row[0]): DType(*row)  # type: ignore[arg-type]
    for row in (
        ("float64", 8, "DoubleStorage", "F64"),
        ("float32", 4, "FloatStorage", "F32"),
        ("float16", 2, "HalfStorage", "F16"),
        ("bfloat16", 2, "BFloat16Storage", "BF16"),
        ("int64", 8, "LongStorage", "I64"),
        ("int32", 4, "IntStorage", "I32"),
        ("int16", 2, "ShortStorage", "I16"),
        ("int8", 1, "CharStorage", "I8"),
        ("uint8", 1, "ByteStorage", "U8"),
        ("bool", 1, "BoolStorage", "BOOL"),
        ("complex64", 8, "ComplexFloatStorage", "C64"),
        ("complex128", 16, "ComplexDoubleStorage", ""),
        ("complex32", 4, "", ""),
        ("bcomplex32", 4, "", ""),  # since torch 2.14: two bfloat16
        ("uint16", 2, "", "U16"),
        ("uint32", 4, "", "U32"),
        ("uint64", 8, "", "U64"),
        ("float8_e4m3fn", 1, "", "F8_E4M3"),
        ("float8_e5m2", 1, "", "F8_E5M2"),
        ("float8_e4m3fnuz", 1, "", "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", 1, "", "F8_E5M2FNUZ"),
        ("float8_e8m0fnu", 1, "", "F8_E8M0"),
        ("float4_e2m1fn_x2", 1, "", "F4", 2),
        ("float6_e2m3fn_x4", 3, "", "F6_E2M3", 4, False),
        ("float6_e3m2fn_x4", 3, "", "F6_E3M2", 4, False),
        ("float8_e3m4", 1, "", "F8_E3M4", 1, False),
        ("float8_e4m3b11fnuz", 1, "", "F8_E4M3B11FNUZ", 1, False),
        ("quint8", 1, "QUInt8Storage", ""),
        ("qint8", 1, "QInt8Storage", ""),
        ("qint32", 4, "QInt32Storage", ""),
        ("quint4x2", 1, "QUInt4x2Storage", ""),
        ("quint2x4", 1, "QUInt2x4Storage", ""),
        ("bits8", 1, "", ""),
        ("bits16", 2, "", ""),
        ("bits1x8", 1, "", ""),
        ("bits2x4", 1, "", ""),
        ("bits4x2", 1, "", ""),
        *((f"{kind}{bits}", 1, "", "") for kind in ("int", "uint") for bits in range(1, 8)),
    )
}


COMPLEX = ("complex", "bcomplex")
"""Prefixes of the names of complex dtypes."""

INEXACT = ("float", "bfloat", *COMPLEX)
"""Prefixes of the names of floating-point and complex dtypes, which can hold an optimizer's results."""


ITEMSIZE_OF_STORAGE = {row.storage: row.itemsize for row in DTYPES.values() if row.storage}
"""Bytes per element of each class of torch's typed storages."""


_STRUCT_CODES = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "bool": "?",
}


def decode_scalar(data: bytes, dtype: str) -> bool | int | float | complex:
    """The Python value of one little-endian element of `dtype`."""
    import struct

    if dtype == "bfloat16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype in ("complex64", "complex128"):
        real, imaginary = struct.unpack("<ff" if dtype == "complex64" else "<dd", data)
        return complex(real, imaginary)
    if dtype not in _STRUCT_CODES:
        raise UnsupportedCheckpointError(f"an element of dtype {dtype} cannot be shown as a number")
    value: bool | int | float = struct.unpack("<" + _STRUCT_CODES[dtype], data)[0]
    return value


def encode_elements(numbers: Sequence[Any], storage: str) -> bytes:
    """The little-endian bytes of the elements of a typed storage.

    Raises:
        ValueError: Its elements have no Python value, or `numbers` is not a list or tuple.
        struct.error: A number does not fit the type.
    """
    import struct

    name = next((row.name for row in DTYPES.values() if row.storage == storage), "")
    if name not in _STRUCT_CODES or not isinstance(numbers, list | tuple):
        raise ValueError(f"elements of a {storage} cannot be made of {type(numbers).__name__}")
    return struct.pack(f"<{len(numbers)}{_STRUCT_CODES[name]}", *numbers)


MAX_DIMENSIONS = 64
"""The limit of torch and NumPy."""

_MAX_SIZE = 1 << 63


def check_sizes(numbers: Sequence[int], dimensions: int) -> None:
    """Refuse sizes that no tensor can have, before anything is computed with them.

    Args:
        numbers: Sizes, strides and offsets.
        dimensions: How many sizes there are.

    Raises:
        LimitExceededError: There are too many, or one is too large.
    """
    if dimensions > MAX_DIMENSIONS:
        raise LimitExceededError(f"a tensor of {dimensions} dimensions, over the limit of {MAX_DIMENSIONS}")
    if numbers and max(numbers) >= _MAX_SIZE:
        raise LimitExceededError(f"a size or stride of {describe(max(numbers))}, over the limit of 2**63 - 1")
