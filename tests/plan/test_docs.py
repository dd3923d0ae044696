"""The plans in the documentation are plans."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

import pytest

from optimstate.plan.language.operations import OPERATIONS
from optimstate.plan.language.plan import Plan

TEXT = (Path(__file__).parent.parent.parent / "docs" / "plan-language.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL))
def test_plans_of_the_documentation(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("to-live.toml", "to-hub.toml"):  # the ways that a view names
        (tmp_path / name).write_text('[[rule]]\nfrom = "a"\nto = "b"\n')
    monkeypatch.chdir(tmp_path)
    plan = Plan.from_toml(block)
    assert Plan.from_toml(plan.to_toml()) == plan


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_python_of_the_documentation(block: str) -> None:
    exec(compile(block, "plan-language.md", "exec"), {})


def test_every_operation_has_a_row_with_examples_that_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text("[3, 0]")
    monkeypatch.chdir(tmp_path)
    rows = [line for line in TEXT.splitlines() if line.startswith("| `") and " = " in line]
    examples = [text for row in rows for text in re.findall(r"`([a-z]+ = [^`]+)`", row.split("|")[1])]
    seen = set()
    for text in examples:
        key = text.split(" ")[0]
        assert key in OPERATIONS
        text = text.replace('"..."', f'"{sha256(b"3,0").hexdigest()}"')
        joined = '"{x=a|b}"' if key in ("concat", "stack", "mean", "average") else '"a"'
        assert Plan.from_toml(f'[[rule]]\nfrom = {joined}\nto = "c"\n{text}\n').rules[0].operations
        seen.add(key)
    assert seen == set(OPERATIONS)
