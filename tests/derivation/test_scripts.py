"""Plans from scripts that read one weight file and write another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import optimstate
from optimstate.derivation.derived import Derived, source_of
from optimstate.derivation.scripts import derive_script
from optimstate.errors import CheckpointError, DerivationError
from tests.cli.running import run

HEAD = """
import argparse, json, os, sys
import torch
from safetensors.torch import load_file, save_file
parser = argparse.ArgumentParser()
parser.add_argument("--in", dest="source")
parser.add_argument("--out")
options = parser.parse_args()
"""
FUSING = (
    HEAD
    + """
with open("config.json") as config:
    assert json.load(config) == {"layers": 2}
checkpoint = torch.load(options.source)
state, made = checkpoint["model"], {}
for i in range(2):
    made[f"layers.{i}.qkv.weight"] = torch.cat([state.pop(f"l.{i}.{x}.weight") for x in "qkv"])
made.update({name: value.t().contiguous() for name, value in state.items()})
print("converted", len(made))
if __name__ == "__main__":
    torch.save({"model": made, "epoch": checkpoint["epoch"]}, options.out)
    sys.exit(0)
"""
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a checkpoint, one that must not be touched, and what a script reads beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = [*(f"l.{i}.{x}.weight" for i in range(2) for x in "qkv"), "head.weight"]
    weights = {name: torch.nn.Parameter(torch.randn(6, 6) if "l." in name else torch.randn(10, 6)) for name in names}
    optimizer = torch.optim.AdamW(weights.items())
    for value in weights.values():
        value.grad = torch.randn_like(value)
    optimizer.step()
    model = {name: value.detach() for name, value in weights.items()}
    torch.save({"model": model, "optimizer": optimizer.state_dict(), "epoch": 3}, "old.pt")
    Path("new.pt").write_bytes(b"of another run")
    Path("config.json").write_text('{"layers": 2}')
    Path("convert.py").write_text(FUSING)
    return tmp_path


def derived(
    folder: Path, text: str, state: dict[str, Any], *, writes: str = "out.safetensors", **options: Any
) -> Derived:
    """A plan from a script that is run on a safetensors file."""
    (folder / "given.py").write_text(text)
    save_file(state, folder / "in.safetensors")
    sources = {name: source_of(value) for name, value in state.items()}
    words = options.pop("arguments", ["--in", "in.safetensors", "--out", writes])
    scratch = folder / "scratch"
    return derive_script(
        Path("given.py"), Path("in.safetensors"), Path(writes), words, sources, scratch=scratch, **options
    )


@pytest.mark.parametrize("absolute", [False, True])
def test_the_command_gives_a_plan_that_moves_the_state_too(folder: Path, absolute: bool) -> None:
    old, new = (str(folder / name) if absolute else name for name in ("old.pt", "new.pt"))
    before = (folder / "old.pt").read_bytes()
    found = run(
        "plan", "derive", old, "--script", "convert.py", "--writes", new, "-o", "plan.toml",
        "--", "--in", old, f"--out={new}",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert (folder / "old.pt").read_bytes() == before
    assert (folder / "new.pt").read_bytes() == b"of another run"

    subprocess.run([sys.executable, "convert.py", "--in", "old.pt", "--out", "theirs.pt"], check=True)
    optimstate.remap("old.pt", "ours.pt", optimstate.Plan.from_file(Path("plan.toml")))
    ours, theirs, old_run = (torch.load(name) for name in ("ours.pt", "theirs.pt", "old.pt"))
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    names = ours["optimizer"]["param_groups"][0]["param_names"]
    moments = [slots["exp_avg"] for slots in old_run["optimizer"]["state"].values()]
    made = {name: ours["optimizer"]["state"][number]["exp_avg"] for number, name in enumerate(names)}
    assert torch.equal(made["layers.1.qkv.weight"], torch.cat(moments[3:6]))
    assert torch.equal(made["head.weight"], moments[6].t())


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_more_elements_than_the_written_dtype_can_count(folder: Path, cast: str) -> None:
    text = HEAD + (
        "state = load_file(options.source)\n"
        f"save_file({{'stacked': torch.stack([state[n].{cast}() for n in sorted(state)])}}, options.out)\n"
    )
    state = {f"w.{i}": torch.randn(300, 20) for i in range(3)}
    found = derived(folder, text, state)
    (rule,) = found.plan.all_rules()
    dtype = {"half": "float16", "bfloat16": "bfloat16"}[cast]
    assert str(rule) == f'w.{{a0=0..2}} -> stacked, stack = 0, cast = "{dtype}"'


def test_a_script_that_writes_a_folder_by_names_of_its_own(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    text = (
        "import os, torch\nfrom safetensors.torch import load_file, save_file\n"
        "state = load_file('in.safetensors')\nos.makedirs('out/model', exist_ok=True)\n"
        "assert sorted(os.listdir('out')) == ['model', 'notes.txt']\n"
        "torch.set_default_dtype(torch.bfloat16)\nos.chdir('out')\nos.environ['HERE'] = 'there'\n"
        "save_file({'b': state['a'].flip(0)}, 'model/model.safetensors')\n"
    )
    found = derived(folder, text, {"a": torch.randn(4, 3)}, writes="out/model", arguments=[])
    assert [str(rule) for rule in found.plan.all_rules()] == ["a -> b, flip = 0"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["notes.txt"]
    assert torch.get_default_dtype() == torch.float32


def test_a_folder_of_shards_is_read(folder: Path) -> None:
    hub = folder / "hub"
    hub.mkdir()
    state = {f"model.layers.{i}.w.weight": torch.randn(4, 3) for i in range(4)}
    place = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(place.values()):
        save_file({name: value for name, value in state.items() if place[name] == file}, hub / file)
    index = {"metadata": {"total_size": 192}, "weight_map": place}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "given.py").write_text(
        "import glob, sys\nfrom safetensors.torch import load_file, save_file\nstate = {}\n"
        "for file in glob.glob(sys.argv[1] + '/*.safetensors'): state.update(load_file(file))\n"
        "save_file({n.removeprefix('model.'): v for n, v in state.items()}, sys.argv[2])\n"
    )
    sources = {name: source_of(value) for name, value in state.items()}
    words = [str(hub), "out.safetensors"]
    found = derive_script(Path("given.py"), hub, Path("out.safetensors"), words, sources, scratch=folder / "scratch")
    assert [str(rule) for rule in found.plan.all_rules()] == ["model.{p**} -> {p**}"]


REFUSED = {
    "computes": (
        "state = load_file(options.source)\nsave_file({'w': state['a.w'] @ state['b.w']}, options.out)\n",
        r"'w' is not a layout of the sources: it is not linear \(it depends on 'a.w', 'b.w'\)",
    ),
    "drops": (
        "state = load_file(options.source)\nsave_file({'w': state['a.w'].clone()}, options.out)\n",
        "no output takes 'b.w'",
    ),
    "raises": (
        "state = load_file(options.source)\ndef found():\n    return state['c.w']\nfound()\n",
        r"given.py failed: KeyError: 'c.w' \(.*given.py, line 11\)",
    ),
    "leaves": ("sys.exit('no such model')\n", r"given.py called sys.exit\('no such model'\) \(.*given.py, line 9\)"),
    "misspelt": ("state = = 3\n", r"given.py failed: SyntaxError: .* \(.*given.py, line 9\)"),
    "forgets": ("load_file(options.source)\n", "given.py did not write out.safetensors"),
    "empty": ("torch.save({'epoch': 3}, options.out)\n", "there are no weights in what given.py wrote"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_plan_says_is_refused_by_name(folder: Path, kind: str) -> None:
    text, message = REFUSED[kind]
    with pytest.raises(DerivationError, match=message):
        derived(folder, HEAD + text, {"a.w": torch.randn(4, 4), "b.w": torch.randn(4, 4)})


def test_what_is_written_beside_the_weights_is_told(folder: Path) -> None:
    text = HEAD + (
        "state = load_file(options.source)\n"
        "torch.save({'model': state, 'callbacks': {'best': torch.zeros(3)}}, options.out)\n"
    )
    found = derived(folder, text, {"a.w": torch.randn(4, 4), "b.w": torch.randn(4, 4)}, writes="out.pt")
    assert found.notes == ("what given.py writes beside the weights is in no plan: 'callbacks.best'",)


def test_what_cannot_be_read_is_an_error_of_its_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"out\.pt: .*known format"):
        derived(
            folder, HEAD + "os.symlink('/etc/hostname', options.out)\n", {"a.w": torch.randn(4, 4)}, writes="out.pt"
        )


@pytest.mark.parametrize(
    "words",
    [
        ("--script", "convert.py"),
        ("--writes", "new.pt", "--function", "a:b"),
        ("--function", "a:b", "--", "--in"),
        ("--script", "convert.py", "--writes", "new.pt", "--function", "a:b"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, words: tuple[str, ...]) -> None:
    assert run("plan", "derive", "old.pt", *words).code == 2


def test_a_script_that_is_not_there(folder: Path) -> None:
    found = run("plan", "derive", "old.pt", "--script", "nowhere.py", "--writes", "new.pt")
    assert (found.code, found.err.splitlines()[0]) == (4, "error: nowhere.py is not a file")
