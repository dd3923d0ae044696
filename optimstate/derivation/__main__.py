"""Derivation in a separate process, which reads a request as JSON from standard input and writes the result to a file.

The process runs the user's function; from a checkpoint it gets only names, shapes and dtypes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from optimstate.derivation.derive import Derived, derive
from optimstate.derivation.origins import Source
from optimstate.describe import describe
from optimstate.errors import DerivationError, OptimStateError
from optimstate.user_code import running


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = _answer(_derived(request))
    except OptimStateError as error:
        answer = {"error": error.message, "hint": error.hint}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


def _derived(request: dict[str, Any]) -> Derived:
    sources = {name: Source(tuple(shape), dtype) for name, (shape, dtype) in request["sources"].items()}
    if request["transformers"]:
        from optimstate.derivation.transformers import derive_transformers

        return derive_transformers(request["transformers"], to=request["to"], shapes=sources)
    if request["script"]:
        from optimstate.derivation.scripts import derive_script

        script, reads, writes, scratch = (Path(request[key]) for key in ("script", "reads", "writes", "scratch"))
        words, allow = request["arguments"], request["allow_drop"]
        return derive_script(script, reads, writes, words, sources, scratch=scratch, allow_drop=allow)
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    function, allow_drop = _function(request["function"]), request["allow_drop"]
    if request["models"]:
        old, new = map(_model, request["models"])
        _compare(old, request["models"][0], sources)
        return derive(function, old, into=new, allow_drop=allow_drop)
    return derive(function, sources, allow_drop=allow_drop)


def _model(place: str) -> Any:
    """The module that a callable returns."""
    build = _function(place)
    with running(place, DerivationError):
        made = build()
    if not hasattr(made, "state_dict"):
        raise DerivationError(f"{place} makes {type(made).__name__}, not a module")
    return made


def _compare(model: Any, place: str, sources: Mapping[str, Source]) -> None:
    """Check that the old model has the checkpoint's names and shapes."""
    has = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in dict.fromkeys([*sources, *has]):
        theirs = sources[name].shape if name in sources else None
        if has.get(name) != theirs:
            mine = "does not have it" if name not in has else f"has shape {list(has[name])}"
            other = "does not have it" if theirs is None else f"has shape {list(theirs)}"
            raise DerivationError(
                f"{describe(name)}: the model of {place} {mine}, the checkpoint {other}",
                hint="Build the model as it was when the checkpoint was saved.",
            )


def _function(place: str) -> Any:
    """The function at `package.module:name`; the current folder is searched as with `python -m`."""
    module, _, name = place.partition(":")
    if not module or not name:
        raise DerivationError(f"{describe(place)} does not name a function", hint="Write package.module:function.")
    try:
        with running(module, DerivationError):
            found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise DerivationError(f"{place}: {error}") from None
    if not callable(found):
        raise DerivationError(f"{place} is not a function")
    return found


def _answer(derived: Derived) -> dict[str, Any]:
    return {
        "plan": derived.plan.to_toml(),
        "rules": [str(rule) for rule in derived.plan.all_rules()],
        "dropped": list(derived.dropped),
        "new": list(derived.new),
        "untouched": list(derived.untouched),
        "notes": list(derived.notes),
        "calls": derived.calls,
    }


if __name__ == "__main__":
    sys.exit(main())
