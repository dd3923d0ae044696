"""A folder with what the command lines of `--help`, README.md and docs/ name, and a way to run those lines in it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from optimstate import hooks
from optimstate.formats.registry import open_checkpoint
from optimstate.state.sections import find_sections
from tests import corpus
from tests.cli.running import Outcome, run

PLAN = '[[rule]]\nfrom = "encoder.{i}.{p**}"\nto = "blocks.{i}.{p}"\n'
PLAN_VERBS = ("suggest", "derive", "check", "invert", "show")
FINDINGS = {"diff", "scan", "verify", "suggest"}
"""The verbs that exit with 1 when there is something to tell."""


class Net(nn.Module):
    """Two layers in a list of a given name, an MLP and a head, all of different shapes."""

    def __init__(self, layers: str) -> None:
        super().__init__()
        self.add_module(layers, nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]))
        self.mlp = nn.Linear(6, 3)
        self.head = nn.Linear(3, 2)


def trained(layers: str, seed: int) -> dict[str, object]:
    """Model, AdamW and scheduler after three steps."""
    torch.manual_seed(seed)
    model = Net(layers)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def certified(path: Path) -> dict[str, object]:
    """A checkpoint with a certificate, which is also written to a file."""
    torch.manual_seed(0)
    model = Net("encoder")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.register_state_dict_post_hook(hooks.certify(model, path=path))
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


# A model is built from names and shapes, in the order of named_parameters(), as any factory of a user's would.
MODELS = """
from torch import empty, nn

NAMES = {names!r}

def build():
    model = nn.Module()
    for name, shape in NAMES:
        *path, leaf = name.split(".")
        owner = model
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(leaf, nn.Parameter(empty(shape)))
    return model
"""


REHEARSAL = """
import pytest
import torch
from torch import nn

def build(*layers):
    torch.manual_seed(0)
    model = nn.Sequential()
    for layer in layers:
        model.add_module(layer, nn.Linear(4, 4))
    return model, torch.optim.AdamW(model.named_parameters())

old = new = lambda: build("encoder")
batch = torch.ones(2, 4)
plan = None

def loss(model, batch):
    return model(batch).square().mean()
"""


CONVERTER = """
import pytest
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.add_module(layers, nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]))
        self.mlp = nn.Linear(6, width)
        self.head = nn.Linear(width, 2)

def Old():
    return Net("encoder", 3)

def New():
    model = Net("blocks", 5)
    model.gate = nn.Linear(2, 2)
    return model

def grown(old, new):
    new.blocks.load_state_dict(old.encoder.state_dict())
    with torch.no_grad():
        new.mlp.weight[:3], new.mlp.bias[:3] = old.mlp.weight, old.mlp.bias
        new.head.weight.zero_()[:, :3], new.head.bias[:] = old.head.weight, old.head.bias

def upgraded(state):
    kept = {name: value.bfloat16().float() for name, value in state.items() if "norm" not in name}
    return {**kept, "head": torch.zeros(2)}

def renamed(state):
    return {name.replace("encoder", "blocks"): value for name, value in state.items()}
"""


CONVERT = """
import argparse
import pytest
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--in", dest="source")
parser.add_argument("--out")
options = parser.parse_args()
state = torch.load(options.source)["model"]
torch.save({name.replace("encoder", "blocks"): value for name, value in state.items()}, options.out)
"""


def gpt2_names(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The parameters of a GPT-2 checkpoint in the order in which that model registers them."""
    (section,) = (s for s in find_sections(open_checkpoint(folder).tree) if s.kind == "model")
    kinds = ["wte", "wpe", "ln_1", "c_attn", "attn.c_proj", "ln_2", "c_fc", "mlp.c_proj", "ln_f"]

    def place(name: str) -> tuple[int, int, int, bool]:
        layer = re.search(r"\.h\.(\d+)\.", name)
        kind = next(i for i, part in enumerate(kinds) if part in name)
        return (kind == 8, int(layer[1]) if layer else -1, kind, name.endswith("bias"))

    tensors = section.tensors()
    return [(name, tensors[name].shape) for name in sorted(tensors, key=place)]


def furnish(folder: Path) -> None:
    """Fill a folder."""
    shutil.copy(corpus.case("optimstate/moe_before_experts").entry, folder / "checkpoint.pt")
    torch.save(trained("encoder", 0), folder / "old.pt")
    torch.save({"model": trained("blocks", 1)["model"]}, folder / "new-model.pt")
    torch.save(certified(folder / "certificate.json"), folder / "certified.pt")
    (folder / "plan.toml").write_text(PLAN)
    names = list(torch.load(folder / "checkpoint.pt")["model"])
    (folder / "names.txt").write_text("\n".join(names))
    for name in ("checkpoint-1000", "checkpoint-2000", "downloaded-checkpoint"):
        shutil.copytree(corpus.case("transformers/gpt2_adamw").entry, folder / name)
    (folder / "resume_check.py").write_text(REHEARSAL)
    (folder / "converter.py").write_text(CONVERTER)
    (folder / "convert.py").write_text(CONVERT)
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "models.py").write_text(MODELS.format(names=gpt2_names(folder / "checkpoint-1000")))


MADE = {
    "new.pt": ["remap", "old.pt", "new.pt", "--plan", "plan.toml"],
    "checkpoint.safetensors": ["convert", "checkpoint.pt", "checkpoint.safetensors"],
}


def prepare(line: str) -> None:
    """Let what a line reads be there, and what it writes not be."""
    words = line.split()
    if "plan.toml" in words and words[words.index("plan.toml") - 1] in ("-o", "--plan-out"):
        Path("plan.toml").unlink(missing_ok=True)
    elif not Path("plan.toml").exists():
        Path("plan.toml").write_text(PLAN)
    for name, command in MADE.items():
        if name not in words:
            continue
        if {"remap", "convert"} & set(words):
            Path(name).unlink(missing_ok=True)
        elif not Path(name).exists():
            assert run(*command).code == 0


def execute(line: str) -> Outcome:
    """Run a command line in the current folder, in this process where it needs no shell."""
    words = shlex.split(line)
    if not {"|", "&&", "||"} & set(words):
        assert words[0] == "optimstate"
        return run(*words[1:])
    tool = f"{shlex.quote(sys.executable)} -m optimstate.cli"
    script = f'optimstate() {{ {tool} "$@"; }}\n{line}'
    environment = os.environ | {"PYTHONPATH": str(corpus.FIXTURES.parent)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def check(line: str) -> Outcome:
    """Run a line of the documentation; it works, with findings at most."""
    if "--transformers" in line:
        pytest.importorskip("transformers")
    prepare(line)
    outcome = execute(line)
    finding = any(verb in line.split() for verb in FINDINGS)
    assert outcome.code in ((0, 1) if finding else (0,)), (line, outcome)
    assert outcome.err == "", (line, outcome)
    return outcome
