"""A sample of `python -m tests.faults`, which needs minutes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.__main__ import KINDS, run

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


def test_kills_and_faults_leave_old_or_new_and_nothing_else(tmp_path: Path) -> None:
    """Shards beside an index, where most can go wrong, by every kind of fault."""
    counts, wrong = run(tmp_path, ["remap-index"], list(KINDS), 2)
    assert wrong == []
    assert counts.keys() == {*KINDS}
