"""No option is without effect and without a message: empty values, and options that another makes pointless."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from optimstate.cli import app
from tests.cli.running import run


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, found in inner.items():
        yield from commands(found, (*path, name))


def options() -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Every option that takes a value, with its command and how many arguments that has."""
    app.register([])
    for path, command in commands(typer.main.get_command(app.app)):
        arguments = [found for found in command.params if found.param_type_name == "argument"]
        for found in command.params:
            if found.param_type_name == "option" and not found.is_flag and found.name != "help":
                yield path, found.opts[0], len([one for one in arguments if one.required])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, folder / "a.pt")
    (folder / "plan.toml").write_text('[[rule]]\nfrom = "weight"\nto = "kernel"\n')
    return folder


@pytest.mark.parametrize("value", ["", " ", "\t"], ids=repr)
@pytest.mark.parametrize(("path", "option", "count"), list(options()), ids=str)
def test_an_empty_value_is_wrong_usage(path: tuple[str, ...], option: str, count: int, value: str, saved: Path) -> None:
    given = [str(saved / "plan.toml" if path[0] == "plan" and path != ("plan", "suggest") else saved / "a.pt")]
    outcome = run(*path, *given * count, option, value)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert "is empty" in outcome.err or "not a valid" in outcome.err or "is not one of" in outcome.err


def test_an_empty_argument_is_too(saved: Path) -> None:
    for line in (["inspect", ""], ["plan", "check", ""], ["plan", "check", str(saved / "plan.toml"), ""]):
        outcome = run(*line)
        assert (outcome.code, "is empty" in outcome.err) == (2, True), line


VAIN = [
    ("diff A A --force", "--html"),
    ("inspect A --force", "--html"),
    ("plan show PLAN --force", "--html"),
    ("plan invert PLAN --force", "--output"),
    ("plan invert PLAN --force -o -", "--output"),
    ("plan suggest A A --force", "--output"),
    ("diff A A --json --stat", "--json"),
    ("diff A A --json --params", "--json"),
    ("inspect A --json --tree", "--json"),
    ("inspect A --json --groups", "--json"),
    ("plan show PLAN A --json --params", "--json"),
    ("inspect A --section model --groups", "--section"),
    ("convert A OUT --to dcp --copy", "distributed"),
]


@pytest.mark.parametrize(("line", "why"), VAIN, ids=str)
def test_what_would_have_no_effect_is_refused(line: str, why: str, saved: Path) -> None:
    places = {"A": "a.pt", "PLAN": "plan.toml", "OUT": "out"}
    outcome = run(*(str(saved / places[word]) if word in places else word for word in line.split()))
    assert outcome.code == 2
    assert why in outcome.err
    assert not (saved / "out").exists()
