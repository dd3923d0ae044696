"""Every example of docs/hooks.md runs, in order, and every public hook is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optimstate import hooks

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "hooks.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    scope: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(block, scope)


def test_every_public_hook_is_described() -> None:
    behind = {"LoadHook", "ModelHook", "Report", "SaveHook", "resume_problems"}
    missing = [name for name in hooks.__all__ if name not in behind and name not in GUIDE]
    assert missing == []
    assert hooks.__all__ == sorted(hooks.__all__)
