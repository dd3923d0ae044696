"""`inspect --stats` as text: layers together, or with --params each parameter by itself."""

from __future__ import annotations

import json

import pytest
import torch

from tests import corpus
from tests.cli.running import run
from tests.support import load_torch

SOURCE = corpus.case("nanogpt/ckpt").entry


def lines_of(*words: str) -> dict[str, list[str]]:
    """The lines of the tables by their first word."""
    outcome = run("inspect", str(SOURCE), "--stats", *words)
    assert (outcome.code, outcome.err) == (0, "")
    return {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.startswith("  ")}


def test_layers_are_shown_together() -> None:
    model = load_torch(SOURCE)["model"]
    both = torch.cat([model[f"transformer.h.{layer}.ln_1.weight"] for layer in range(2)]).double()
    _, times, norm, rms, low, high, zeros = lines_of()["transformer.h.*.ln_1.weight"]
    assert (times, zeros) == ("2", "0%")
    for shown, truth in (
        (norm, both.norm()),
        (rms, both.square().mean().sqrt()),
        (low, both.min()),
        (high, both.max()),
    ):
        assert float(shown) == pytest.approx(float(truth), rel=1e-3)


def test_each_parameter_by_itself() -> None:
    model = load_torch(SOURCE)["model"]
    document = json.loads(run("inspect", str(SOURCE), "--stats", "--json").out)
    found = document["sections"][0]["statistics"]
    assert {name: numbers["norm"] for name, numbers in found.items()} == pytest.approx(
        {name: float(tensor.double().norm()) for name, tensor in model.items()}
    )
    assert "transformer.h.1.ln_1.weight" in lines_of("--params")
