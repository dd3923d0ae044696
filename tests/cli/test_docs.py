"""Every command line of the documentation and of `--help` runs, and JSON documents have the form that is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from optimstate.cli import app
from tests import corpus
from tests.cli.place import PLAN_VERBS, check
from tests.cli.running import run
from tests.documents import follow

ROOT = corpus.FIXTURES.parent
MANUAL = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [[name] for name in app.COMMANDS] + [["plan", verb] for verb in PLAN_VERBS]
SLOW = {"demo"}
"""Run by tests of their own."""


def examples(text: str) -> list[str]:
    """The command lines of a help text, continued lines joined."""
    below = text.partition("Example")[2]
    joined = re.sub(r" \\\n\s+", " ", below)
    return re.findall(r"^(?: +|s?: )(optimstate .*)$", joined, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_examples_of_help_run(command: list[str], checkpoints: Path) -> None:
    lines = examples(run(*command, "--help").out)
    assert lines
    for line in lines:
        if not SLOW & set(command):
            check(line)


def test_the_examples_of_the_root_run(checkpoints: Path) -> None:
    lines = examples(run("--help").out)
    assert len(lines) >= 2
    for line in lines:
        check(line)


def console(text: str) -> list[str]:
    lines = re.findall(r"^\$ (optimstate .*)$", text, re.MULTILINE)
    quoted = [line for line in re.findall(r"`(optimstate [^`]+)`", text) if not re.search(r"\b[A-Z]+\b|\.\.\.", line)]
    return [line for line in lines + quoted if not SLOW & set(line.split()) and "completion" not in line]


@pytest.mark.parametrize("text", [README, MANUAL], ids=["README", "manual"])
def test_the_command_lines_of_documents_run(text: str, checkpoints: Path) -> None:
    lines = console(text)
    assert len(lines) >= 4
    for line in lines:
        if len(line.split()) > 2:  # others only mention a command
            check(line)
        else:
            assert line.split()[1] in (*app.COMMANDS, "--help", "--version"), line


def test_the_readme_shows_what_is_printed(checkpoints: Path) -> None:
    follow(README.partition("## In a training script")[0], checkpoints)


def test_the_readme_has_every_command() -> None:
    text = README.partition("\n## Five commands\n")[2].partition("\n## ")[0]
    shown = set(re.findall(r"^\$ optimstate (\w+)", text, re.MULTILINE))
    listed = set(re.findall(r"`([a-z ]+)`", "\n".join(line for line in text.splitlines() if line.startswith("| `"))))
    assert shown | listed == {" ".join(command) for command in COMMANDS} - {"plan"}


def test_the_manual_has_every_command() -> None:
    for command in COMMANDS:
        if command != ["plan"]:
            assert f"| `optimstate {' '.join(command)}" in MANUAL
            assert f"\n### {' '.join(command)}\n" in MANUAL or command[0] in SLOW
    for code in {code for _, code in app.EXIT_CODES} | {app.INTERRUPTED}:
        assert f"\n| {code} | " in MANUAL


# --- the form of JSON documents -------------------------------------------------------------------------------------

TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "any": (str, int, float, bool, type(None), list, dict),
}


def documented(command: str) -> dict[str, list[str]]:
    """The paths of a command's table with their types."""
    section = MANUAL.partition(f"\n### {command}\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z, ]+) \|", section, re.MULTILINE)
    return {"schema": ["integer"], "command": ["text"], **{path: types.split(", ") for path, types in rows}}


def leaves(value: Any, path: str, known: dict[str, list[str]]) -> list[tuple[str, Any]]:
    """Every leaf with its path; maps whose keys are no words of the form are written `{}`."""
    if isinstance(value, list) and any(other.startswith(path + "[]") for other in known):
        return [leaf for item in value for leaf in leaves(item, path + "[]", known)]
    if isinstance(value, dict) and any(other.startswith(path + "{}") for other in known):
        return [leaf for item in value.values() for leaf in leaves(item, path + "{}", known)]
    if isinstance(value, dict) and (path == "" or any(other.startswith(path + ".") for other in known)):
        prefix = f"{path}." if path else ""
        return [leaf for key, item in value.items() for leaf in leaves(item, prefix + key, known)]
    return [(path, value)]


ANY = corpus.FILES
NEW = ["--new-model", "converter:New"]
FAILING = [
    ["remap", "checkpoint.pt", "--dry-run", "--drop", "nowhere.**"],
    ["remap", "checkpoint.pt", "--dry-run", "--rename", "embed.weight=fc.{p}"],
    ["remap", "checkpoint.pt", "--dry-run", "--rename", "layers.{i}.norm.{p}=same.norm.{p}"],
    ["remap", "checkpoint.pt", "--dry-run", "--rename", "layers.{i}.mlp.fc1.{p}=layers.{i}.mlp.norm.{p}"],
    ["inspect", "no-such-file.pt"],
    ["inspect", "--no-such-option"],
]
"""Commands that fail, whose errors are documents of one form."""
INVOCATIONS = {
    "error": FAILING,
    "inspect": [
        ["inspect", "checkpoint.pt", "--params"],
        ["inspect", "checkpoint.pt", "--params", "--stats"],
        ["inspect", str(ANY / "torch/tied_adam_named/checkpoint.pt")],
        ["inspect", str(ANY / "optimstate/hostile_zip")],
        ["inspect", str(ANY / "torch/wholeobject/checkpoint.pt")],
        ["inspect", str(ANY / "optimstate/objects_containers/checkpoint.pt"), "--stats"],
        ["inspect", str(ANY / "mmengine/sgd_paramwise")],
        ["inspect", str(ANY / "fsdp1/raw_flatparam_per_rank")],
        ["inspect", str(ANY / "torch/adam_unnamed_wd"), "--params"],
    ],
    "diff": [
        ["diff", "checkpoint.pt", str(ANY / "optimstate/moe_experts/checkpoint.pt")],
        ["diff", str(ANY / "torch/adam_unnamed_wd"), str(ANY / "torch/adam_unnamed_wd")],
    ],
    "remap": [
        ["remap", "checkpoint.pt", "--dry-run", "--set", "initial_lr=0.5"],
        ["remap", "checkpoint.pt", "--dry-run", "--drop", "**.norm.*", "--set", "lr=0.1", "--fresh", "**.fc1.*"],
        ["remap", "checkpoint.pt", "--dry-run", "--rename", "embed.{p}=wte.{p}"],
    ],
    "plan suggest": [
        ["plan", "suggest", "fused.pt", "cut.pt", "--headers"],
        ["plan", "suggest", "old.pt", "new-model.pt"],
        ["plan", "suggest", "checkpoint.pt", "new-model.pt"],
        ["plan", "suggest", str(ANY / "torch/adam_unnamed_wd/checkpoint.pt"), "less.pt"],
        ["plan", "suggest", *(str(ANY / f"torch/adamw_{name}") for name in ("amsgrad_named_wd", "sched_lambdalr"))],
    ],
    "plan check": [
        ["plan", "check", "plan.toml"],
        ["plan", "check", "plan.toml", "old.pt", "--target", "new-model.pt"],
        ["plan", "check", "plan.toml", "checkpoint.pt"],
        ["plan", "check", "copies.toml", "checkpoint.pt"],
    ],
    "plan invert": [["plan", "invert", "plan.toml", "old.pt"]],
    "plan show": [["plan", "show", "copies.toml", "checkpoint.pt"]],
    "convert": [
        ["convert", "checkpoint.pt", "less2.pt", "--without", "optimizer"],
        ["convert", "torn.pt", "whole.pt", "--salvage"],
        ["convert", str(ANY / "transformers/gpt2_adamw/checkpoint-4"), "whole.pt", "--dry-run"],
        ["convert", "checkpoint.pt", "cast.pt", "--section", "optimizer", "--dtype", "exp_avg=bf16"],
        ["convert", "checkpoint.pt", "lion.pt", "--dry-run", "--optimizer", "Lion", "--dtype", "model=bf16"],
    ],
    "name": [["name", str(ANY / "torch/adam_unnamed_wd"), "--dry-run"]],
    "verify": [["verify", "checkpoint.pt", "--no-numbers"], ["verify", "faulty.pt", "--no-numbers"]],
    "scan": [
        ["scan", "checkpoint.pt"],
        ["scan", str(ANY / "optimstate/hostile_zip")],
        ["scan", "cut.pkl"],
        ["scan", "left"],
    ],
    "plan derive": [
        ["plan", "derive", "checkpoint.pt", "--function", "converter:upgraded", "--allow-drop"],
        ["plan", "derive", "old.pt", "--function", "converter:grown", "--old-model", "converter:Old", *NEW],
    ],
    "log": [["log", "certified.pt"]],
    "rehearse": [
        ["rehearse", "--script", "resume_check.py"],
        ["rehearse", "--script", "lost_check.py"],
        ["rehearse", "--script", "copies_check.py"],
    ],
}

COPIES = """
[guard]
has = "layers.**"

[policy]
unused = "ignore"

[[rule]]
from = "layers.{i}.mlp.fc1.{p}"
to = "layers.{i}.experts.{e=0..1}.{p}"

[[group]]
match = "**"
set = { weight_decay = 0.1 }
"""


@pytest.mark.parametrize("command", INVOCATIONS)
def test_json_has_the_documented_form(command: str, checkpoints: Path) -> None:
    import torch

    Path("copies.toml").write_text(COPIES)
    script = Path("resume_check.py").read_text()
    Path("lost_check.py").write_text(
        script + "\ndef old():\n    model, optimizer = build('encoder')\n    loss(model, batch).backward()\n"
        "    optimizer.step()\n    return model, optimizer\n"
        "def load(state, model, optimizer):\n    model.load_state_dict(state['model'])\n"
    )
    Path("copies_check.py").write_text(
        script + "\nnew = lambda: build('a', 'b')\n"
        "from optimstate import Plan\nplan = Plan.from_options(duplicate=['encoder.{p}=a.{p},b.{p}'])\n"
    )
    Path("torn.pt").write_bytes(Path("checkpoint.pt").read_bytes()[:-9000])
    Path("cut.pkl").write_bytes(b"\x80\x02(cos\nsystem\n")
    Path("left").mkdir()
    Path("left/.new.pt.0123456789ab.part").touch()
    whole = torch.load("checkpoint.pt")
    torch.save({"model": {"embed.weight": torch.zeros(12, 7)}}, "less.pt")
    whole["optimizer"]["param_groups"][0]["lr"] = 1.0
    next(iter(whole["optimizer"]["state"].values()))["step"] += 1
    torch.save({**whole, "moments": {"exp_avg": {"w": torch.ones(2)}}}, "faulty.pt")
    turned = torch.optim.AdamW([(name, torch.nn.Parameter(torch.ones(4, 4))) for name in ("b", "a")])
    torch.save(
        {
            "model": {"a": torch.ones(4, 4), "b": torch.ones(4, 4), "m.qk.weight": torch.ones(4, 4)},
            "optimizer": turned.state_dict(),
        },
        "fused.pt",
    )
    torch.save(
        {
            "model": {
                "a": torch.ones(4, 4),
                "b": torch.ones(4, 4),
                "m.q.weight": torch.ones(2, 4),
                "m.k.weight": torch.ones(2, 4),
            }
        },
        "cut.pt",
    )
    known = documented(command)
    assert len(known) > 3
    seen: set[str] = set()
    for words in INVOCATIONS[command]:
        outcome = run(*words, "--json")
        assert outcome.out, outcome
        document = json.loads(outcome.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
        assert (document["schema"], document["command"]) == (1, command)
        for path, value in leaves(document, "", known):
            seen.add(path)
            if value in ([], {}) and any(other.startswith(path) for other in known):
                continue
            assert path in known, f"{path} is not documented"
            types = tuple(kind for name in known[path] for kind in TYPES[name])
            fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
            assert fits, f"{path} is {value!r}, documented as {known[path]}"
    assert set(known) - seen == set(), "documented, but never there"


def test_every_command_is_among_those_whose_form_is_tested() -> None:
    without = {"plan", "demo"} | SLOW
    assert set(INVOCATIONS) - {"error"} == {" ".join(command) for command in COMMANDS} - without


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_the_page_that_explains_it(command: list[str]) -> None:
    if command in (["plan"], ["demo"]):
        return
    (page,) = re.findall(r"More: (docs/[\w/-]+\.md)", run(*command, "--help").out)
    assert (ROOT / page).is_file()
    assert f"optimstate {' '.join(command)}" in (ROOT / page).read_text(encoding="utf-8")
