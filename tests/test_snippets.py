"""Every page's commands, Python and plans are run, page after page in the order of the site.

Pages that need several processes, a framework or folders of their own have tests of their own, which are named here;
a page with something to run that is in neither list fails.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import hooks
from tests.cli import place
from tests.derivation.by_fork import derived_by_fork
from tests.documents import ROOT, blocks, console, follow

RUNNABLE = {"console", "python", "toml"}
DOCS = ROOT / "docs"
ELSEWHERE = {
    "docs/command-line.md": "tests/cli/test_docs.py",
    "docs/cookbook.md": "tests/test_cookbook.py",
    "docs/distributed.md": "tests/test_distributed.py",
    "docs/hooks.md": "tests/hooks/test_docs.py",
    "docs/remote.md": "tests/remote/test_docs.py",
    "docs/plan-language.md": "tests/plan/test_docs.py",
    "docs/trainers.md": "tests/integrations/test_examples.py",
}


def resumable(folder: Path) -> dict[str, Any]:
    """A run that stops and one that goes on."""
    model = place.Net("encoder")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {
        "hooks": hooks, "optimstate": optimstate, "torch": torch,
        "model": model, "optimizer": optimizer, "scheduler": scheduler,
    }  # fmt: skip


def grown(folder: Path) -> dict[str, Any]:
    """What README's lines are for: a checkpoint of fewer layers."""
    return resumable(folder)


def rehearsed(folder: Path) -> dict[str, Any]:
    """Two builders of one model, and a plan that does nothing to it."""
    scope: dict[str, Any] = {}
    exec(place.REHEARSAL, scope)
    (folder / "plan.toml").write_text("")
    return scope


def converted(folder: Path) -> dict[str, Any]:
    """A team's package with a conversion, and a folder that Trainer saved of a small mixture of experts."""
    transformers = pytest.importorskip("transformers")
    (folder / "plan.toml").unlink()
    package = folder / "mypkg"
    package.mkdir()
    (package / "__init__.py").touch()
    code = (
        "def hf_to_mine(state):\n    return {name.replace('encoder', 'blocks'): value for name, value in state.items()}"
    )
    (package / "convert.py").write_text(code)
    (package / "copying.py").write_text(COPYING)
    state = {"encoder.0.weight": torch.randn(4, 4), "encoder.0.bias": torch.randn(4)}
    from safetensors.torch import save_file

    save_file(state, folder / "old.safetensors")
    reading = place.CONVERT.replace('torch.load(options.source)["model"]', "load_file(options.source)")
    (folder / "convert.py").write_text(f"from safetensors.torch import load_file\n{reading}")
    old = nn.Sequential()
    old.add_module("encoder", nn.Sequential(nn.Linear(4, 4)))
    optimizer = torch.optim.AdamW(old.named_parameters())
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "checkpoint-3")
    scope: dict[str, Any] = {"state_dict": state}
    exec(code, scope)
    exec(COPYING, scope)
    scope |= {"old_model": scope["Old"](), "new_model": scope["New"]()}
    scope["new_optimizer"] = torch.optim.AdamW(scope["new_model"].named_parameters())
    return scope


COPYING = """
from torch import nn

def Old():
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(4, 4)))
    return model

def New():
    model = nn.Sequential()
    model.add_module("decoder", nn.Linear(4, 6))
    return model

def copy_weights(old, new):
    new.decoder.weight.data[:4].copy_(old.encoder[0].weight)
    new.decoder.bias.data[:4].copy_(old.encoder[0].bias)
"""


def nothing(folder: Path) -> dict[str, Any]:
    """Commands on the files of `place` are all there is."""
    return {}


FOLLOWED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": grown,
    "docs/tutorial/reorder.md": nothing,
    "docs/tutorial/upcycle.md": nothing,
    "docs/tutorial/vocabulary.md": nothing,
    "docs/derive.md": converted,
    "docs/rehearse.md": rehearsed,
    "docs/certificates.md": resumable,
    "docs/explanation/same-run.md": nothing,
    "docs/security.md": nothing,
    "docs/extending.md": nothing,
}


def pages() -> list[Path]:
    """README and the pages of the site in its order."""
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return [ROOT / "README.md", *(DOCS / name for name in listed)]


def test_what_pages_show_works_in_the_order_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in pages():
        name = str(page.relative_to(ROOT))
        if name not in FOLLOWED:
            continue
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        if "tutorial" not in name:
            place.furnish(folder)
        scope = FOLLOWED[name](folder)
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"```python\n[^`]*trainer\.train\([^`]*```", "", text)  # tests/hooks/test_hub.py runs Trainer
        with derived_by_fork():
            follow(text, folder, {"__name__": "page", **scope})
        for block in blocks(text):
            if block.language == "toml" and not block.text.startswith("# "):
                optimstate.Plan.from_toml(block.text)
        if (made := folder / "to-live.toml").exists():
            (shown,) = (block.text for block in blocks(text) if block.language == "toml")
            assert shown.strip() in made.read_text(encoding="utf-8")
        shutil.rmtree(folder)


def test_every_page_with_something_to_run_is_run() -> None:
    for page in pages():
        name = str(page.relative_to(ROOT))
        found = RUNNABLE & {block.language for block in blocks(page.read_text(encoding="utf-8"))}
        if found and name not in FOLLOWED:
            test = ROOT / ELSEWHERE[name]
            assert page.name in test.read_text(encoding="utf-8"), f"{name} is not read by {ELSEWHERE[name]}"


def test_a_wrong_line_of_a_page_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place.furnish(tmp_path)
    console("$ optimstate scan checkpoint.pt\n...\n", "here")
    with pytest.raises(AssertionError, match="not printed"):
        console("$ optimstate scan checkpoint.pt\n...\nsomething else\n", "here")
    with pytest.raises(AssertionError, match="no such"):
        console("$ optimstate scan missing.pt\n", "here")
    with pytest.raises(ZeroDivisionError):
        follow("```python\n1 / 0\n```\n", tmp_path)
