"""Every script of `examples/` runs, is short, and ends with what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_load_state": "accelerate",
    "dcp_load": "torch",
    "deepspeed_load_checkpoint": "deepspeed",
    "lightning_ckpt_path": "pytorch_lightning",
    "stable_baselines3_resume": "stable_baselines3",
    "timm_resume_checkpoint": "timm",
    "trainer_transformers": "transformers",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example(name: str, tmp_path: Path) -> None:
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    paths = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same" in done.stdout


def test_the_guide_shows_what_the_examples_run() -> None:
    text = (EXAMPLES.parent / "docs" / "trainers.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    scripts = {name: (EXAMPLES / f"{name}.py").read_text(encoding="utf-8") for name in NEEDS}
    shown: set[str] = set()
    for _, body in sections:
        for block in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
            lines = [line for line in block.splitlines() if line]
            homes = [name for name, script in scripts.items() if all(line in script for line in lines)]
            shown |= set(homes)
            assert homes or "optimstate.resume(" in block, block
    assert shown == set(NEEDS)
