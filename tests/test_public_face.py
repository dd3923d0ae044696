"""The public names: listed, documented, reachable without torch, and typed for the scripts of users."""

from __future__ import annotations

import importlib.util
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import optimstate
from optimstate import surgery

VERBS = ("inspect", "diff", "remap", "convert", "name", "verify", "scan", "suggest")


def test_dir_and_help_have_every_public_name() -> None:
    assert dir(optimstate) == sorted(optimstate.__all__)
    assert dir(surgery) == sorted(surgery.__all__)
    shown = pydoc.render_doc(surgery, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    for verb in VERBS:
        assert f"    {verb}(" in shown
        assert getattr(optimstate, verb) is getattr(surgery, verb)
    for name in optimstate.__all__:
        assert getattr(optimstate, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        optimstate.nothing  # noqa: B018


def test_no_module_hides_a_function() -> None:
    """Importing a verb's module first must not put the module in the place of the function."""
    code = f"""
import sys, optimstate
from optimstate.surgery import plans
from optimstate.surgery.comparison import comparing
from optimstate.surgery.inspection import inspecting
from optimstate.surgery.writing import naming, remapping
import optimstate.surgery as surgery
dir(optimstate), dir(surgery)
assert not {{"torch", "numpy"}} & set(sys.modules), sorted(sys.modules)
for verb in {VERBS}:
    assert callable(getattr(surgery, verb)), verb
    assert callable(getattr(optimstate, verb)), verb
assert optimstate.distributed.load and optimstate.hooks.rename and optimstate.optim.AdamW
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


SCRIPT = """\
import optimstate
from optimstate import Plan, Rule, hooks, resume, surgery

plan = Plan((Rule.of("a.{p}", "b.{p}"),))
found: surgery.Inspection = optimstate.inspect("a.pt")
print(found.format, [section.path for section in found.sections])
report: surgery.RemapReport = optimstate.remap("a.pt", "b.pt", plan)
print(report.written, hooks.rename({"a": "b"}), resume, optimstate.Resumed)
"""
WRONG = {
    "optimiser": "import optimstate\noptimstate.resume('a', optimiser=3)\n",
    "stat": "import optimstate\noptimstate.inspect('a', stat=True)\n",
    "to_jsn": "import optimstate\noptimstate.scan('a').to_jsn()\n",
    "renam": "from optimstate import hooks\nhooks.renam({})\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_a_users_script_is_checked(checker: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "right.py").write_text(SCRIPT)
    for word, text in WRONG.items():
        (tmp_path / f"wrong_{word}.py").write_text(text)
    root = Path(optimstate.__file__).parent.parent
    if checker == "mypy":
        (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n")
        words = ["--cache-dir", str(tmp_path / "cache")]
    else:
        (tmp_path / "pyrightconfig.json").write_text(
            f'{{"typeCheckingMode": "standard", "extraPaths": ["{root}"], "reportMissingImports": "error"}}'
        )
        words = ["--pythonpath", sys.executable]
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", checker, *words, *files], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    errors = [line for line in done.stdout.splitlines() if "error" in line and ".py:" in line]
    assert not [line for line in errors if "right.py" in line], done.stdout
    for word in WRONG:
        assert any(f"wrong_{word}.py" in line for line in errors), f"{word} passes:\n{done.stdout}{done.stderr}"
