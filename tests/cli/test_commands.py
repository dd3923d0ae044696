"""The commands: JSON, dry runs, help whose examples run, exit codes, and how the process ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate import __version__
from optimstate.cli import app
from optimstate.cli.convert import parse_size
from tests import corpus
from tests.cli.running import run
from tests.support import digest

COMMANDS = ["inspect", "remap", "convert"]
SOURCE = corpus.case("optimstate/ema_averaged_model").entry
ROOT = corpus.FIXTURES.parent


def arguments(command: str, folder: Path) -> list[str]:
    return {
        "inspect": ["inspect", str(SOURCE)],
        "remap": ["remap", str(SOURCE), str(folder / "out.pt"), "--rename", "head.{p}=lm_head.{p}"],
        "convert": ["convert", str(SOURCE), str(folder / "out.safetensors")],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_names_its_form_and_its_command(command: str, tmp_path: Path) -> None:
    outcome = run(*arguments(command, tmp_path), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    document = json.loads(outcome.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert document["schema"] == 1
    assert document["command"] == command


def test_json_of_inspect_holds_what_it_shows() -> None:
    document = json.loads(run("inspect", str(SOURCE), "--json", "--params").out)
    kinds = {section["kind"]: section for section in document["sections"]}
    assert list(kinds) == ["model", "ema", "optimizer"]
    assert kinds["optimizer"]["algorithm"] == "SGD"
    assert kinds["optimizer"]["named"] is True
    assert [group["parameters"] for group in kinds["optimizer"]["groups"]] == [5, 7]
    names = [parameter["name"] for parameter in kinds["optimizer"]["parameters"]]
    assert names[-1] == "blocks.1.fc1.bias"
    assert kinds["model"]["tensors"]["head.weight"].startswith("float32[")


@pytest.mark.parametrize("case", corpus.all_cases(), ids=str)
def test_inspect_shows_every_fixture_or_says_why_not(case: corpus.Case) -> None:
    path = case.entry
    plain, as_json = run("inspect", str(path), "--params", "--groups"), run("inspect", str(path), "--json", "--params")
    assert plain.code == as_json.code in (0, 3)
    assert "Traceback" not in plain.err + as_json.err
    if plain.code == 0:
        json.loads(as_json.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
        assert plain.out.startswith(str(path))
        assert plain.err == as_json.err == ""
    else:
        assert plain.out == as_json.out == ""


def test_inspect_prints_names_groups_slots_and_steps() -> None:
    out = run("inspect", str(corpus.case("torch/adamw_named_layerwise_sequentiallr").entry), "--params").out
    for mention in ("optimizer at optimizer: AdamW, 4 groups, named parameters", "step 5", "exp_avg_sq", "fc1.weight"):
        assert mention in out
    assert "scheduler at scheduler: SequentialLR" in out


def test_inspect_warns_of_what_would_run() -> None:
    outcome = run("inspect", str(corpus.case("optimstate/hostile_zip").entry))
    assert outcome.code == 0
    assert re.search(r"warning: the file names \S*system, which would run code", outcome.out)


@pytest.mark.parametrize("command", ["remap", "convert"])
def test_a_dry_run_writes_nothing(command: str, tmp_path: Path) -> None:
    before = digest(SOURCE)
    outcome = run(*arguments(command, tmp_path), "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "nothing was written" in outcome.out
    assert not list(tmp_path.iterdir())
    document = json.loads(run(*arguments(command, tmp_path), "--dry-run", "--json").out)
    assert document["written"] is False
    assert not list(tmp_path.iterdir())
    assert digest(SOURCE) == before


def test_remap_reads_plan_files_and_options_together(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[rule]]\nfrom = "head.{p}"\nto = "lm_head.{p}"\n\n[[rule]]\nfrom = "embed.**"\ndrop = true\n')
    assert tomllib.loads(plan.read_text())
    out = tmp_path / "out.pt"
    options = ["--plan", str(plan), "--rename", "blocks.{i}.{p**}=layers.{i}.{p**}", "--no-sync"]
    assert run("remap", str(SOURCE), str(out), *options).code == 0
    names = set(torch.load(out)["model"])
    assert {"lm_head.weight", "layers.0.fc1.weight"} <= names
    assert not any(name.startswith(("head", "embed", "blocks")) for name in names)


def test_convert_writes_shards_and_back(tmp_path: Path) -> None:
    shards, back = tmp_path / "shards", tmp_path / "back.pt"
    assert run("convert", str(SOURCE), str(shards), "--shard-size", "4KB").code == 0
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert run("convert", str(shards / "model.safetensors.index.json"), str(back), "--no-checksums").code == 0
    assert list(torch.load(back)) == list(torch.load(SOURCE))


def test_convert_verifies_checksums_unless_told_not_to(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt"
    data = bytearray(SOURCE.read_bytes())
    from optimstate.formats.registry import open_checkpoint
    from optimstate.tree import tensors

    _, tensor = max(tensors(open_checkpoint(SOURCE).tree), key=lambda found: found[1].nbytes)
    data[tensor.storage.pieces[0].offset] ^= 1
    damaged.write_bytes(data)
    assert run("convert", str(damaged), str(tmp_path / "blind.safetensors"), "--no-verify").code == 0
    outcome = run("convert", str(damaged), str(tmp_path / "careful.safetensors"))
    assert outcome.code == 3
    assert "checksum" in outcome.err
    assert not (tmp_path / "careful.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "nbytes"), [("500MB", 500_000_000), ("2GiB", 2 << 30), ("1000000", 1_000_000), ("1.5 kB", 1500)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


# --- help -----------------------------------------------------------------------------------------------------------


def help_of(*command: str) -> str:
    outcome = run(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in app.COMMANDS), *(["plan", verb] for verb in ("suggest", "check", "invert", "show"))],
    ids=lambda command: " ".join(command) or "root",
)
def test_help_fits_80_columns(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = help_of(*command)
    assert max(map(len, text.splitlines())) <= 80
    assert "Usage:" in text


def test_the_root_help_lists_the_commands_and_exit_codes() -> None:
    text = " ".join(help_of().split())
    places = [text.index(f" {command} ", text.index("Commands:")) for command in app.COMMANDS]
    assert places == sorted(places)
    for code in {code for _, code in app.EXIT_CODES} | {app.INTERRUPTED}:
        assert f"{code} " in text[text.index("Exit codes") :]


# --- the process ----------------------------------------------------------------------------------------------------


def start(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimstate.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def test_the_process_exits_as_run_says(tmp_path: Path) -> None:
    good = start("inspect", str(SOURCE))
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == run("inspect", str(SOURCE)).out
    bad = start("inspect", str(tmp_path / "missing.pt"))
    assert (bad.returncode, bad.stdout) == (3, "")
    assert bad.stderr.startswith("error: ")


def test_a_reader_that_goes_away_is_no_error() -> None:
    listing = subprocess.Popen(
        [sys.executable, "-m", "optimstate.cli", "inspect", "--params", "--json", str(SOURCE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.close()
    assert b"Traceback" not in listing.stderr.read()
    listing.stderr.close()
    assert listing.wait(60) == 0


def test_an_interrupted_command_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimstate.io.output import AtomicFile

    def interrupted(*_: object, **__: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    monkeypatch.setattr(AtomicFile, "copy", interrupted)
    # A shell starts its background jobs with the signal ignored, and Python then leaves it so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = run(*arguments("convert", tmp_path))
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert outcome.code == app.INTERRUPTED
    assert outcome.out == ""
    assert "interrupted" in outcome.err
    assert not list(tmp_path.iterdir())


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").out.strip() == f"optimstate {__version__}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__


def test_reports_are_values_too() -> None:
    assert optimstate.inspect(SOURCE) == optimstate.inspect(SOURCE)


def test_a_model_in_the_current_folder_names_an_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_model.py").write_text("from torch import nn\n\n\ndef build():\n    return nn.Linear(3, 2)\n")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "anonymous.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    outcome = run("name", "anonymous.pt", "named.pt", "--model", "my_own_model:build")
    assert outcome.code == 0, outcome
    (group,) = torch.load("named.pt")["optimizer"]["param_groups"]
    assert group["param_names"] == ["weight", "bias"]
