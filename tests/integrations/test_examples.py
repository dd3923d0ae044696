"""Every script of `examples/` runs, is short, and ends with what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "accelerate_load_state": "accelerate",
    "composer_load_path": "composer",
    "dcp_load": "torch",
    "deepspeed_load_checkpoint": "deepspeed",
    "fastai_resume": "fastai",
    "lightning_ckpt_path": "pytorch_lightning",
    "stable_baselines3_resume": "stable_baselines3",
    "timm_resume_checkpoint": "timm",
    "torchtitan_load": "torchtitan",
    "trainer_transformers": "transformers",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", sorted(NEEDS.keys() - {"deepspeed_load_checkpoint"}))  # that one by test_deepspeed
def test_an_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    script = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert "the same losses" in capsys.readouterr().out


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


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
