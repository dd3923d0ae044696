"""The demonstration, small: what it claims is so, and what it draws is there."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from optimstate.demo.chart import BRAILLE, _ticks, svg, text_plot
from optimstate.demo.experiment import RENAME, Arm, Experiment, became
from optimstate.demo.model import EXPERTS, Text, Transformer
from optimstate.demo.proof import prove, tensors_by_name
from optimstate.demo.training import TOKENS, Run
from optimstate.errors import MigrationError
from optimstate.plan.language.plan import Plan
from optimstate.surgery.writing.remapping import remap
from tests import corpus
from tests.cli.running import run

FILES = {"old.pt", "reordered.pt", "reorder.svg", "plan.toml", "new.pt", "losses.csv", "losses.svg"}
SMALL = ("--steps", "4", "--after", "4")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    made = Experiment(tmp_path_factory.mktemp("demo"), seed=3, steps=6, after=4)
    made.train()
    made.write_plan()
    remap(made.old, made.new, Plan.from_file(made.plan))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that the command has filled, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    outcome = run("demo", "--out", str(out), *SMALL)
    assert (outcome.code, outcome.err) == (0, "")
    return out, outcome.out


def test_the_command_leaves_what_it_names(made: tuple[Path, str]) -> None:
    out, said = made
    assert {path.name for path in out.iterdir()} == FILES
    assert all(str(out / name) in said for name in FILES)
    assert "doesn't match the size of optimizer's group" in said
    assert said.isascii()
    assert prove(out / "old.pt", out / "new.pt", became) > 200
    paths = [str(out / name) for name in ("new.pt", "old.pt", "plan.toml")]
    assert run("verify", paths[0], "--against", paths[1], "--plan", paths[2]).code == 0
    rows = [line.split(",") for line in (out / "losses.csv").read_text().splitlines()]
    ways = ["fresh", *(["torch"] if "KeyError" not in said else []), "migrated", "rewarmed", "dense"]
    assert rows[0] == ["step", "tokens", *ways]
    assert [row[0] for row in rows[1:]] == ["0", "4", "4", "8"]
    assert all(int(row[1]) == int(row[0]) * TOKENS for row in rows[1:])


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path, made: tuple[Path, str]) -> None:
    outcome = run("demo", "--out", str(tmp_path / "again"), *SMALL, "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert document["command"] == "demo"
    assert (tmp_path / "again" / "losses.csv").read_bytes() == (made[0] / "losses.csv").read_bytes()
    rows = [line.split(",") for line in (made[0] / "losses.csv").read_text().splitlines()]
    for arm in document["arms"]:
        column = rows[0].index(arm["key"])
        assert [f"{loss:.6f}" for _, loss in arm["curve"]] == [row[column] for row in rows[3:]]
    assert len({str(arm["curve"]) for arm in document["arms"]}) == len(document["arms"]) >= 4, "two ways did the same"


def test_another_seed_is_another_run() -> None:
    text = Text("the quick brown fox jumps over the lazy dog; " * 200)
    curves = [Run.start(text, seed).train(0, 2, every=2) for seed in (0, 1)]
    assert curves[0] != curves[1]
    assert not torch.equal(text.batch(0, seed=0, size=4)[0], text.batch(0, seed=1, size=4)[0])
    assert not torch.equal(text.batch(0, seed=0, size=4)[0], text.batch(1, seed=0, size=4)[0])


def test_files_of_an_earlier_run_are_kept_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("mine")
    outcome = run("demo", "--out", str(tmp_path), *SMALL)
    assert outcome.code == 5
    assert "plan.toml: exists already" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]
    assert (tmp_path / "plan.toml").read_text() == "mine"


def test_each_way_has_the_state_that_it_says(experiment: Experiment) -> None:
    torch.manual_seed(0)
    old = experiment.dense.optimizer.state
    slots = {name: old[p] for name, p in experiment.dense.model.named_parameters()}
    origin = {target: name for name in slots for target in became(name)}

    def names(found: Run) -> set[str]:
        return {name for name, p in found.model.named_parameters() if found.optimizer.state.get(p)}

    migrated = experiment.migrated()
    assert names(migrated) == set(origin)
    for name, p in migrated.model.named_parameters():
        for slot, value in slots[origin[name]].items() if name in origin else ():
            assert torch.equal(migrated.optimizer.state[p][slot], value)
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    by_name = experiment.torch_resumed(get_optimizer_state_dict(experiment.dense.model, experiment.dense.optimizer))
    if by_name is None:  # what torch before 2.12 does
        assert "experts.0.fc1.weight" in experiment.torch_by_name
        return
    assert names(by_name) == set(origin) & set(slots)
    assert experiment.torch_by_name.startswith("no error, no warning; 34 of 56 parameters start without state")
    runs = [migrated, by_name, experiment.dense]
    assert len({found.optimizer.param_groups[0]["lr"] for found in runs}) == 1
    assert len({found.scheduler.last_epoch for found in runs}) == 1
    losses = [found.held_out_loss() for found in runs]
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-5), "the experts are another function"


def test_by_name_is_the_run_that_was_never_interrupted(experiment: Experiment) -> None:
    moved = run("remap", str(experiment.old), str(experiment.renamed), "--rename", RENAME)
    assert (moved.code, moved.err) == (0, "")
    whole, swapped, fresh, named = experiment.reorder()
    assert named.curve == whole.curve
    assert named.apart(whole) == 0
    assert swapped.apart(whole) > 0
    assert fresh.apart(whole) > 0
    # Torch alone has given each layer the moments of the other.
    old = experiment.by_position()
    saved = torch.load(experiment.old)["optimizer"]
    by_name = dict(zip(saved["param_groups"][0]["param_names"], saved["state"].values(), strict=True))
    for name, parameter in old.model.named_parameters():
        was = name.replace("blocks.0", "layers.1").replace("blocks.1", "layers.0")
        assert torch.equal(old.optimizer.state[parameter]["exp_avg"], by_name[was]["exp_avg"])


def test_training_in_two_parts_is_training_in_one() -> None:
    text = Text("the quick brown fox jumps over the lazy dog; " * 200)
    whole, parts = Run.start(text, 1), Run.start(text, 1)
    curve = whole.train(0, 6, every=2)
    first = parts.train(0, 4, every=2)
    second = parts.train(4, 2, every=2)
    assert curve == [*first, (6, second[-1][1])]
    assert curve[-1][1] < curve[0][1]


def test_warming_up_again_gives_the_learning_rate_back() -> None:
    text = Text("the quick brown fox jumps over the lazy dog; " * 200)
    warmed, plain = Run.start(text, 1), Run.start(text, 1)
    warmed.train(0, 4, every=4, warm_up=4)
    plain.train(0, 4, every=4)
    assert warmed.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    a, b = next(warmed.model.parameters()), next(plain.model.parameters())
    assert not torch.equal(a, b)


def test_recovery_is_when_the_loss_stays_below() -> None:
    def recovered(*losses: float) -> int | None:
        return Arm("a", "a", list(enumerate(losses))).recovered

    assert recovered(2.0, 1.9, 1.8) == TOKENS
    assert recovered(2.0, 2.2, 1.9, 2.1, 1.9, 1.8) == 4 * TOKENS
    assert recovered(2.0, 1.9, 2.0) is None


def test_experts_that_are_equal_are_the_dense_layer() -> None:
    torch.manual_seed(0)
    dense, experts = Transformer(20), Transformer(20, experts=True)
    weights = {target: value for name, value in dense.state_dict().items() for target in became(name)}
    assert experts.load_state_dict(weights, strict=False).unexpected_keys == []
    codes = torch.randint(20, (3, 64))
    torch.testing.assert_close(experts(codes), dense(codes), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        experts.layers[0].mlp.experts[1].fc2.bias[0] += 9.0  # type: ignore[union-attr, index, operator]
    assert not torch.allclose(experts(codes), dense(codes), atol=1e-3)


# What the commands do to a checkpoint that a training run without this library saved.
DENSE = corpus.case("optimstate/moe_before_experts").entry
MLP = "layers.{i}.mlp.{fc=fc1|fc2}.{p}"


def test_every_tensor_stands_under_its_new_name(tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.pt"
    assert run("remap", str(DENSE), str(renamed), "--rename", "layers.{i}.{p**}=blocks.{i}.{p**}").code == 0
    assert prove(DENSE, renamed, lambda name: [re.sub("^layers", "blocks", name)]) == len(tensors_by_name(DENSE))


def test_experts_have_weights_and_moments_in_every_container(tmp_path: Path) -> None:
    upcycled, container, returned = (tmp_path / name for name in ("up.pt", "up.safetensors", "back.pt"))
    experts = f"layers.{{i}}.mlp.experts.{{e=0..{EXPERTS - 1}}}.{{fc}}.{{p}}"
    assert run("remap", str(DENSE), str(upcycled), "--duplicate", f"{MLP}={experts}").code == 0
    assert prove(DENSE, upcycled, lambda name: became(name) if "mlp.fc" in name else [name]) > len(
        tensors_by_name(DENSE)
    )
    assert run("convert", str(upcycled), str(container)).code == 0
    assert run("convert", str(container), str(returned)).code == 0
    assert prove(upcycled, returned, lambda name: [name]) == len(tensors_by_name(upcycled))


@pytest.mark.parametrize("change", ["bit", "missing", "extra", "dtype"])
def test_the_proof_can_fail(change: str, tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = torch.load(DENSE, weights_only=True)
    slots = checkpoint["optimizer"]["state"][0]
    if change == "bit":
        slots["exp_avg"].view(torch.uint8).view(-1)[5] ^= 1
    elif change == "missing":
        del slots["exp_avg"]
    elif change == "extra":
        slots["more"] = torch.zeros(2)
    else:
        slots["exp_avg"] = slots["exp_avg"].double()
    torch.save(checkpoint, tmp_path / "changed.pt")
    with pytest.raises(MigrationError):
        prove(DENSE, tmp_path / "changed.pt", lambda name: [name])


LINES = [("a  rising", "#f00", [(0, 1.0), (10, 2.0)]), ("b  <flat & low>", "green", [(0.0, 1.0), (10.0, 1.0)])]


def test_the_plot_in_letters_has_the_points_where_they_belong() -> None:
    drawn = text_plot(LINES, columns=20, rows=5).splitlines()
    assert drawn[0] == "2.00 |" + " " * 17 + "aaa"
    assert drawn[4] == "1.00 |" + "b" * 20
    assert drawn[2].startswith("1.50 |")
    assert all(line.isascii() for line in drawn)


def test_the_plot_in_dots_is_finer_and_coloured() -> None:
    drawn = text_plot(LINES[:1], columns=20, rows=5, paint=lambda text, number: text).splitlines()
    dots = [sum((ord(cell) - BRAILLE).bit_count() for cell in line if ord(cell) >= BRAILLE) for line in drawn[:5]]
    assert sum(dots) == 40, "one dot in each of the two columns of a cell"
    assert drawn[4].split("|")[1].rstrip()
    painted = text_plot(LINES, columns=20, rows=5, paint=lambda text, number: f"<{number}>")
    assert "<0>" in painted
    assert "<1>" in painted


def test_the_drawing_is_a_document_of_its_own() -> None:
    root = ET.fromstring(svg(LINES, title="T & U", notes=["n"], across="x", up="y"))
    ns = "{http://www.w3.org/2000/svg}"
    drawn = root.findall(f"{ns}polyline")
    assert [line.get("stroke") for line in drawn] == ["#f00", "green"]
    rising = [tuple(map(float, pair.split(","))) for pair in (drawn[0].get("points") or "").split()]
    assert rising[0][0] < rising[1][0]
    assert rising[0][1] > rising[1][1], "upwards is downwards in SVG"
    texts = [text.text for text in root.iter(f"{ns}text")]
    assert {"T & U", "a  rising", "b  <flat & low>", "n", "x", "y"} <= set(texts)
    attributes = {key for element in root.iter() for key in element.attrib}
    assert not any("href" in key or "src" in key or key.startswith("on") for key in attributes)
    assert {element.tag for element in root.iter()} == {ns + tag for tag in ("svg", "rect", "text", "path", "polyline")}


@pytest.mark.parametrize(("low", "high"), [(1.82, 1.97), (0, 51200), (0, 1), (2, 2), (1e-5, 7e-5), (0, 6144)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = _ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    if low < high:
        assert len(found) >= 4
        step = found[1] - found[0]
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
