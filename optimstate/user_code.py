"""Running the user's code: its failures become errors with file and line, and its changes to the process are undone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from traceback import walk_tb
from typing import Any

from optimstate.describe import describe
from optimstate.errors import OptimStateError, UserCodeError

__all__ = ["guarded", "run_script", "running"]

_HERE = str(Path(__file__).parent)
_INSTALLED = ("site-packages", "dist-packages")


@contextmanager
def running(what: str, kind: type[OptimStateError] = UserCodeError) -> Iterator[None]:
    """Run the user's code: errors show its file and line, and its changes to the process are undone.

    Restored are the working folder, the arguments, the search path, the environment, the standard streams, torch's
    default dtype and device, and whether gradients are recorded. The state of random numbers is not.

    Args:
        what: The name of the code in messages.
        kind: The class of the error that is raised. Errors of this library, which the code may call, stay unchanged.

    Raises:
        OptimStateError: An error of that class, if the code raises an error or exits.
    """
    restore = _restorer()
    try:
        yield
    except OptimStateError:
        raise
    except SystemExit as error:
        raise kind(f"{what} called sys.exit({describe(error.code)}){_place(error)}") from error
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:300]
        text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        raise kind(f"{what} failed: {text}{_place(error)}") from error
    finally:
        restore()


def guarded(function: Callable[..., Any], what: str, kind: type[OptimStateError] = UserCodeError) -> Callable[..., Any]:
    """A function that calls the given one under `running`."""

    @wraps(function)
    def called(*arguments: Any) -> Any:
        with running(what, kind):
            return function(*arguments)

    return called


def run_script(
    path: Path, arguments: Sequence[str] = (), *, name: str = "__main__", kind: type[OptimStateError] = UserCodeError
) -> dict[str, Any]:
    """Run a script as `python path arguments` does.

    Args:
        path: The script.
        arguments: The arguments of its command line.
        name: Its `__name__`; with "__main__" it behaves as a program.
        kind: The class of the error that is raised.

    Returns:
        The names that the script defines; empty if it ends by `sys.exit(0)`.

    Raises:
        OptimStateError: The script raises an error, or exits with a status other than 0.
    """
    import runpy

    with running(str(path), kind):
        sys.argv = [str(path), *arguments]
        sys.path.insert(0, str(path.resolve().parent))
        try:
            return runpy.run_path(str(path), run_name=name)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            return {}


def _restorer() -> Callable[[], None]:
    """A function that restores the state of the process as it is now."""
    folder, arguments, places = Path.cwd(), sys.argv, list(sys.path)
    streams, environment = (sys.stdout, sys.stderr), dict(os.environ)
    torch: Any = sys.modules.get("torch")
    default = (
        None if torch is None else (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device())
    )

    def restore() -> None:
        sys.argv, sys.path[:] = arguments, places
        sys.stdout, sys.stderr = streams
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        if Path.cwd() != folder:
            os.chdir(folder)
        if default is not None:
            dtype, gradients, device = default
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)

    return restore


def _place(error: BaseException) -> str:
    """The last line of the user's code that an error passed through, as text; libraries that it calls do not count."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    others = [each for each in frames if not each[0].startswith((_HERE, "<frozen", _standard_library()))]
    own = [each for each in others if not any(part in Path(each[0]).parts for part in _INSTALLED)]
    found = own[-1:] or others[:1]
    return f" ({found[0][0]}, line {found[0][1]})" if found else ""


def _standard_library() -> str:
    return str(Path(os.__file__).parent)
