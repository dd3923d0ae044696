"""Code of the user's own: what it does wrong is an error of ours with its place, what it changes is put back."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.derivation.derive import derive
from optimstate.errors import DerivationError, OptimStateError, StateMismatchError, UserCodeError
from optimstate.rehearsal import rehearse
from optimstate.user_code import running
from tests.cli.running import run

SCRIPT = """
import torch
from torch import nn

print("a script may print")

def old():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.named_parameters())

new = old
batch = torch.ones(4, 3)

def loss(model, batch):
    print("and so may its loss")
    return model(batch).square().sum()
"""


def rehearsed(folder: Path, change: str = "", *words: str) -> Any:
    (folder / "check.py").write_text(SCRIPT + change)
    return run("rehearse", "--script", str(folder / "check.py"), *words)


def test_what_a_script_prints_is_no_part_of_the_report(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "", "--json")
    assert found.code == 0
    assert found.out.startswith("{")
    assert "a script may print" in found.err


BROKEN = {
    "at the top": ("raise ValueError('no data')\n", r"check.py failed: ValueError: no data \(.*check.py, line 18\)"),
    "leaves": ("raise SystemExit(0)\n", "does not define old, new, batch, loss"),
    "leaves with a status": ("raise SystemExit(3)\n", r"check.py called sys.exit\(3\) \(.*check.py, line 18\)"),
    "the loss": ("def loss(model, batch):\n    return batch['x']\n", r"the loss failed: .*\(.*check.py, line 19\)"),
    "the loss leaves": ("def loss(model, batch):\n    exit(0)\n", r"the loss called sys.exit\(0\) .*check.py, line 19"),
    "what builds": ("def new():\n    return nn.Linear(3)\n", r"what builds the run failed: TypeError: .* line 19\)"),
    "a number": ("def loss(model, batch):\n    return 3.0\n", "the loss function returns float, not a scalar tensor"),
    "nothing": ("def loss(model, batch):\n    model(batch)\n", "the loss function returns NoneType"),
    "no scalar": ("def loss(model, batch):\n    return model(batch)\n", r"returns a tensor of shape \[4, 2\]"),
    "no gradient": ("def loss(model, batch):\n    return batch.sum()\n", "does not depend on the model's parameters"),
    "a step": (
        "def new():\n    model = nn.Linear(3, 2)\n    return model, torch.optim.LBFGS(model.parameters())\nold = new\n",
        "a step of LBFGS failed: TypeError",
    ),
    "what loads": ("def load(state, model, optimizer):\n    model.missing\n", "what loads the new run failed: .* 19"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_script_that_fails_is_bad_input_with_its_line(kind: str, tmp_path: Path) -> None:
    text, message = BROKEN[kind]
    found = rehearsed(tmp_path, text)
    assert found.code == (2 if kind == "leaves" else 3), found.err
    assert re.search(message, found.err), found.err


def test_neither_random_numbers_nor_settings_of_the_caller_are_changed() -> None:
    def function(state: dict[str, Any]) -> dict[str, Any]:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(True)
        os.chdir("/")
        sys.argv = ["changed"]
        os.environ["CHANGED"] = "yes"
        return {"b": state["a"].t(), "new": torch.randn(3)}

    before = torch.get_rng_state(), Path.cwd(), list(sys.argv), torch.get_default_dtype()
    assert derive(function, {"a": (3, 4)}).new == ("new",)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (Path.cwd(), list(sys.argv), torch.get_default_dtype()) == before[1:]
    assert "CHANGED" not in os.environ


def test_rehearsing_leaves_the_callers_random_numbers() -> None:
    def built() -> Any:
        model = nn.Linear(3, 2)
        return model, torch.optim.SGD(model.named_parameters(), lr=0.1)

    torch.manual_seed(3)
    given = built()
    before = torch.get_rng_state()
    rehearse(given, given, None, torch.ones(2, 3), lambda model, batch: model(batch).sum())
    assert torch.equal(torch.get_rng_state(), before)


WRONG = {
    "raises": (lambda state: state["c"], r"failed: KeyError: 'c' \(.*test_user_code.py, line \d+\)"),
    "ends": (lambda state: sys.exit(1), r"called sys.exit\(1\) \(.*test_user_code.py, line \d+\)"),
    "arrays": (lambda state: {"b": state["a"].numpy()}, "returned ndarray for 'b', not a tensor"),
    "sparse": (lambda state: {"b": state["a"].to_sparse()}, "a tensor of the layout torch.sparse_coo for 'b'"),
    "no data": (lambda state: {"b": state["a"].to("meta")}, "returned a tensor for 'b', which holds no values"),
    "a generator": (lambda state: (name for name in state), "returned generator, not a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_a_function_that_fails_or_gives_something_else(kind: str, scaled: bool) -> None:
    function, message = WRONG[kind]
    if scaled and kind in ("no data", "arrays", "sparse"):
        message = "shrunk|holds no values"
    with pytest.raises(DerivationError, match=message):
        derive(function, {"a": (64, 64)}, scaled=scaled)


def test_errors_of_this_library_stay_what_they_are() -> None:
    with pytest.raises(StateMismatchError, match="as it is"), running("a loss"):
        raise StateMismatchError("as it is")
    with pytest.raises(KeyboardInterrupt), running("a loss"):
        raise KeyboardInterrupt
    expected = pytest.raises(UserCodeError, match=r"a loss failed: ValueError \(.*test_user_code.py")
    with expected as caught, running("a loss"):
        raise ValueError
    assert isinstance(caught.value.__cause__, ValueError)
    assert isinstance(caught.value, OptimStateError)
