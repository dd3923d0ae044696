"""`plan derive` answered by a fork of the tests' own process, which has imported torch already.

The command starts a Python for every request, which takes seconds before it does anything. That it does is tested in
`tests/surgery/test_deriving.py`; other tests, of what comes of it, need not wait.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from optimstate.derivation import __main__ as derivation
from optimstate.surgery.plans import deriving


@contextmanager
def derived_by_fork() -> Iterator[None]:
    """Requests are answered by forks as long as it lasts."""
    with mock.patch.object(deriving, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": _run})):
        yield


def _run(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:  # noqa: A002 - as `run` has it
    assert command == [sys.executable, "-m", "optimstate.derivation"]
    if json.loads(input)["transformers"]:
        with suppress(ImportError):  # which the fork reports
            importlib.import_module("transformers")  # once for all forks
    with tempfile.TemporaryFile("w+") as errors, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has a thread of its own
        child = os.fork()
        if not child:
            _answer(input, errors.fileno())
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), stderr=errors.read())


def _answer(request: str, errors: int) -> NoReturn:
    """What `python -m optimstate.derivation` does, with streams and modules as a new process has them."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors, 2)
        sys.stdin = io.StringIO(request)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        warnings.resetwarnings()
        own = {path.stem for path in Path().iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]  # of another folder
        importlib.invalidate_caches()
        code = derivation.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
