"""`convert --section`, `--dtype` and `--optimizer` on the command line: what they print, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests import corpus
from tests.cli.running import run

SOURCE = str(corpus.case("nanogpt/ckpt").entry)


def test_what_is_cast_and_lost_is_printed(tmp_path: Path) -> None:
    words = ["convert", SOURCE, str(tmp_path / "out.pt"), "--optimizer", "Adafactor", "--dtype", "model=bf16"]
    outcome = run(*words)
    assert (outcome.code, outcome.err) == (0, "")
    for mention in (
        "optimizer at optimizer: AdamW -> Adafactor",
        "exp_avg           dropped  Adafactor has no first moment",
        "model at model: float32 -> bfloat16, 29 tensors, 7,680 of 7,680 elements rounded",
        "options that it does not have, dropped: betas",
    ):
        assert mention in outcome.out
    document = json.loads(run(*words, "--force", "--json").out)
    assert document["casts"][0]["elements"] == document["casts"][0]["rounded"] == 7680
    change = document["optimizers"]["optimizer at optimizer"]
    assert {slot["slot"]: slot["outcome"] for slot in change["slots"]}["row_var, col_var"] == "exact"


def test_a_section_alone_is_named(tmp_path: Path) -> None:
    outcome = run("convert", SOURCE, str(tmp_path / "w.safetensors"), "--section", "model")
    assert (outcome.code, outcome.err) == (0, "")
    assert "torch -> safetensors: model at model, 29 tensors" in outcome.out


def test_what_cannot_be_done_is_said_in_two_lines(tmp_path: Path) -> None:
    for code, words in (
        (4, ["--section", "ema"]),
        (4, ["--dtype", "ema=bf16"]),
        (2, ["--section", "optimiser"]),
        (2, ["--dtype", "exp_avgs=bf16"]),
        (2, ["--dtype", "model=int8"]),
        (2, ["--dtype", "model"]),
        (2, ["--optimizer", "Lyon"]),
        (2, ["--to", "safetensor"]),
    ):
        outcome = run("convert", SOURCE, str(tmp_path / "out.pt"), *words)
        assert (outcome.code, outcome.out) == (code, "")
        first, second = outcome.err.splitlines()
        assert first.startswith("error: ")
        assert second.startswith("hint: ")
    assert not list(tmp_path.iterdir())
