"""Classifying the classes and functions that a pickle names by what calling them could do; nothing is called here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from optimstate.formats.pickles.known import DATA, INSTANCES

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
"""Calls that only make data: safetensors files store their records, and refuse all others."""

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
    __import__ apply breakpoint bltns compile delattr eval exec execfile exit file globals help input locals memoryview
    open quit setattr type vars
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


def classify(module: str, name: str, *, called: bool = True) -> Verdict:
    """Whether `module.name` only builds data, could run code of the file's author, or is unknown.

    Args:
        module: The module as written in the pickle.
        name: The name as written in the pickle; may be a path of attributes.
        called: Whether the pickle calls it; if not, it is only mentioned, or instances are made without a call.
    """
    path = f"{module}.{name}"
    if path in DATA or (path in INSTANCES and not called):
        return "data"
    tops = {module.partition(".")[0], *name.split(".")[:-1]}  # a name may be a path of attributes through modules
    last = name.rpartition(".")[2]
    builtin = "builtins" in tops or "__builtin__" in tops
    if tops & _DANGEROUS_MODULES or path in _DANGEROUS_NAMES or (builtin and last in _DANGEROUS_BUILTINS):
        return "dangerous"
    if "." in name and (last in _DANGEROUS_BUILTINS or "__" in name or "modules" in tops):
        return "dangerous"
    return "unknown"


def dangerous(names: Iterable[tuple[str, str]]) -> list[str]:
    """The names, of the given `(module, name)` pairs, that could run code chosen by the file's author."""
    return [f"{module}.{name}" for module, name in names if classify(module, name) == "dangerous"]
