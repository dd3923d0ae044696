"""torch's own database of optimizer options, as plain data.

It lives in torch's test suite, which changes global flags when imported and wants a package (`expecttest`) only for a
base class. So it is read in a process of its own: `python -m tests.optim.database` writes it to stdout.
"""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import types
import unittest
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """What the database knows of one optimizer.

    Args:
        implementations: Of "foreach", "fused" (only if it runs on CPU) and "differentiable".
        options: Constructor arguments, those meant for accelerators included.
        errors: (description, params or None, constructor arguments, "CONSTRUCTION_ERROR" or "STEP_ERROR").
    """

    implementations: tuple[str, ...]
    options: list[dict[str, Any]]
    errors: list[tuple[str, Any, dict[str, Any], str]]


@functools.cache
def load() -> dict[str, Entry]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.optim.database"]
    output = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    return {name: Entry(*fields) for name, fields in pickle.loads(output).items()}


def dump() -> bytes:
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    import torch
    from torch.testing._internal.common_optimizers import optim_db

    found = {}
    for info in optim_db:
        kinds = tuple(kind for kind in info.supported_impls if kind != "fused" or "cpu" in info.supports_fused_on)
        options = [given.kwargs for given in info.optim_inputs_func("cuda")]  # the CUDA ones include all CPU ones
        errors = [
            (
                bad.optimizer_error_input.desc,
                bad.optimizer_error_input.params,
                bad.optimizer_error_input.kwargs,
                bad.error_on.name,
            )
            for bad in info.optim_error_inputs_func("cpu", torch.float32)
        ]
        found[info.name] = (kinds, options, errors)
    return pickle.dumps(found)


if __name__ == "__main__":
    sys.stdout.buffer.write(dump())
