"""The limits that SECURITY.md states are those of the code."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).parents[2] / "SECURITY.md"
ROW = re.compile(r"^\| [^|]+ \| ([\d,]+) \| `([\w.]+)\.(MAX_\w+)` \|$", re.MULTILINE)


def test_every_limit_of_the_page_is_that_of_the_code() -> None:
    rows = ROW.findall(PAGE.read_text())
    assert len(rows) >= 10
    assert len(rows) == PAGE.read_text().count("| `optimstate.")
    for number, module, name in rows:
        assert getattr(import_module(module), name) == int(number.replace(",", "")), name
