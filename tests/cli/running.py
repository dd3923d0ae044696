"""Run the command line in this process, as its entry point does."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

from optimstate.cli import app


class Outcome(NamedTuple):
    """What a command leaves: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run(*arguments: str) -> Outcome:
    """`optimstate ARGUMENTS...`."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["optimstate", *arguments]), redirect_stdout(out), redirect_stderr(err):
        code = app.run()
    return Outcome(code, out.getvalue(), err.getvalue())
