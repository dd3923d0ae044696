"""Derive: the plan that does what a function, or the installed transformers, does to the weights of a checkpoint.

The function runs in a process of its own, which gets names, shapes and dtypes and nothing else of the checkpoint, and
is ended where it takes too long.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from optimstate.errors import CheckpointError, DerivationError, UsageError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.surgery.comparison.comparing import model_tensors
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport

__all__ = ["TIMEOUT", "DeriveReport", "derive_plan"]

TIMEOUT = 600.0


class DeriveReport(VerbReport):
    """A plan that was read off code.

    Attributes:
        source: The checkpoint whose names and shapes were used.
        code: The function, the script, or the configuration whose converters were run.
        rules: In order, as text.
        dropped: Names that the function leaves out.
        new: Names that it makes of nothing: they start without state.
        untouched: Those of `new` that a script leaves as the new model has them.
        notes: What deserves attention though nothing is wrong.
        calls: How often the function was called.
        plan: The plan as a file.
    """

    source: str
    code: str
    rules: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    untouched: tuple[str, ...]
    notes: tuple[str, ...]
    calls: int
    plan: str

    VERB = "plan derive"

    def __str__(self) -> str:
        lines = list(self.rules) or ["the function changes nothing: the plan is empty"]
        made = tuple(name for name in self.new if name not in self.untouched)
        for names, what in (
            (self.dropped, "left out"),
            (made, "made of nothing, without state"),
            (self.untouched, "left as the new model has it, without state"),
        ):
            lines += [f"{what}: {name}" for name in names[:10]]
            if len(names) > 10:
                lines.append(f"{what}: {len(names) - 10} more")
        rules = f"{len(self.rules)} rule{'s' * (len(self.rules) != 1)}"
        return "\n".join([*lines, *self.notes, f"{rules}, compared with the function after {self.calls} calls"])


def derive_plan(
    like: Place,
    *,
    function: str = "",
    models: tuple[str, str] | None = None,
    script: str | Path = "",
    writes: str | Path = "",
    arguments: Sequence[str] = (),
    transformers: str | Path = "",
    to: Literal["live", "hub"] = "live",
    allow_drop: bool = False,
    python: str | Path = sys.executable,
    timeout: float = TIMEOUT,
) -> DeriveReport:
    """Derive the plan for checkpoints like this one.

    Args:
        like: A checkpoint with the names, shapes and dtypes that the function is given; no tensor of it is read.
        function: `package.module:name`, from a state dict to a state dict, in the current folder or installed.
        models: Two callables, given likewise, that make the old and the new module: the function copies weights from
            one into the other, in place.
        script: In place of it a script that reads this checkpoint and writes another. It is run on copies, in a folder
            that shows what the working folder holds; a script with absolute paths of its own works on those.
        writes: What the script writes: a file or a folder.
        arguments: Of the script's command line, with the names of the two as they are here.
        transformers: In place of it a folder or file with a `config.json`: the installed library's own converters.
        to: With `transformers`, the layout that the plan leads to.
        allow_drop: Whether the function may leave tensors out.
        python: The interpreter that runs the function.
        timeout: The seconds that its process may take, all calls of the function and the search together.

    Raises:
        CheckpointError: The checkpoint cannot be read or holds no weights.
        DerivationError: No plan says what the function does, it failed, did not end in time, or is not there.
        UsageError: The timeout is no number above 0.
    """
    if not timeout > 0:
        raise UsageError(f"timeout is {timeout}, it must be a number of seconds above 0")
    if sum(map(bool, (function, script, transformers))) != 1:
        raise DerivationError("give either a function, a script or a transformers configuration")
    if bool(script) != bool(writes) or (arguments and not script):
        raise DerivationError("a script needs the name of what it writes, and arguments need a script")
    if script and not Path(script).is_file():
        raise DerivationError(f"{script} is not a file")
    if script and not isinstance(located(like), Path):
        raise DerivationError(f"{like} is in a store", hint="A script reads a file: copy the checkpoint here first.")
    if models and not function:
        raise DerivationError("give the function that copies from the old model into the new one")
    code = str(function or script or transformers)
    with opening(like):
        tensors = model_tensors(open_checkpoint(like).tree)
        sources = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if not sources:
        raise CheckpointError("no weights in it", path=like, hint="Give a checkpoint that holds the model.")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "answer.json")
        request = {
            "sources": sources,
            "function": function,
            "models": list(models or ()),
            "script": str(script),
            "reads": str(like),
            "writes": str(writes),
            "arguments": list(arguments),
            "scratch": str(Path(folder, "scratch")),
            "transformers": str(transformers),
            "to": to,
            "allow_drop": allow_drop,
            "answer": str(place),
        }
        command = [str(python), "-m", "optimstate.derivation"]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                text=True,
                stdout=subprocess.DEVNULL,  # what the function prints is no part of the plan
                stderr=subprocess.PIPE,
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise DerivationError(
                f"{code} did not end within {timeout:g} s",
                hint="If it needs longer, allow it: timeout=SECONDS, or --timeout SECONDS.",
            ) from None
        except OSError as error:
            raise DerivationError(f"{python} cannot be run: {error.strerror}") from None
        if not place.exists():
            last = done.stderr.strip().splitlines()[-1:] if done.returncode == 1 else []
            last = last or [f"it ended the process with exit status {done.returncode}"]
            raise DerivationError(f"{code} failed: {last[0]}")
        answer = json.loads(place.read_text(encoding="utf-8"))
    if "error" in answer:
        raise DerivationError(answer["error"], hint=answer["hint"])
    listed = {key: tuple(answer[key]) for key in ("rules", "dropped", "new", "untouched", "notes")}
    return DeriveReport(source=str(like), code=code, calls=answer["calls"], plan=answer["plan"], **listed)
