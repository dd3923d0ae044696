"""What a class or function named by a pickle would mean if it were called. It never is, here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from optimstate.tensors.dtypes import DTYPES

__all__ = ["PLAIN_CLASSES", "Verdict", "classify", "dangerous"]

Verdict = Literal["data", "unknown", "dangerous"]

PLAIN_CLASSES = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "collections.Counter",
        "collections.defaultdict",
        "collections.deque",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch.serialization._get_layout",
    }
)
"""Calls that only make data: a record of one is stored; a record of anything else is opaque and is refused."""

_DANGEROUS_MODULES = frozenset(
    """
    _posixsubprocess _thread asyncio bdb cProfile cffi cloudpickle code codeop commands ctypes dill distutils doctest
    ensurepip ftplib http httplib importlib inspect joblib marshal mmap multiprocessing nt operator os pdb pickle pip
    pkgutil platform popen2 posix profile pty pydoc requests runpy setuptools shutil signal smtplib socket ssl
    subprocess sys telnetlib tempfile threading timeit trace types urllib urllib2 venv webbrowser
    """.split()  # noqa: SIM905 - a list of words
)
_DANGEROUS_BUILTINS = frozenset(
    """
    __import__ apply breakpoint compile delattr eval exec execfile exit file globals help input locals memoryview open
    quit setattr type vars
    """.split()  # noqa: SIM905
)
_DANGEROUS_NAMES = frozenset(
    {
        "functools.partial",
        "functools.reduce",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.utils.cpp_extension.load",
        "torch.utils._config_module.load_config",
        "torch.storage._load_from_bytes",
        "torch.serialization.load",
        "torch._dynamo.guards.GuardBuilder.get",
        "torch._inductor.codecache.compile_file",
        "numpy.load",
        "numpy.testing._private.utils.runstring",
    }
)
_DATA_MODULES = ("collections", "builtins", "__builtin__", "_codecs", "copyreg", "copy_reg", "enum", "decimal")
_DATA_NAMES = frozenset(
    {"torch._utils." + name for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")}
    | {"torch._utils._rebuild_parameter", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor"}
    | {"torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2", "torch.Tensor"}
    | {"torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.storage.TypedStorage"}
    | {"torch.distributed.checkpoint.filesystem._StorageInfo"}
    | {
        "torch.distributed.checkpoint.metadata." + name
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {"torch." + name for name in DTYPES}
    | {"torch." + row.storage for row in DTYPES.values() if row.storage}
    | PLAIN_CLASSES
)


def classify(module: str, name: str) -> Verdict:
    """What calling `module.name` could do: build data, something unknown, or run what the file's author chose."""
    path = f"{module}.{name}"
    if path in _DATA_NAMES:
        return "data"
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        if name == "getattr":  # how older protocols spell nested classes
            return "unknown"
        return "dangerous" if name.partition(".")[0] in _DANGEROUS_BUILTINS else "data"
    if top in _DANGEROUS_MODULES or path in _DANGEROUS_NAMES:
        return "dangerous"
    return "data" if module in _DATA_MODULES else "unknown"


def dangerous(names: Iterable[tuple[str, str]]) -> list[str]:
    """Those of the names that would run code of the author's choice."""
    return [f"{module}.{name}" for module, name in names if classify(module, name) == "dangerous"]
