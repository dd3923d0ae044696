"""What a checkpoint consists of, judged on the whole tree: what is a model, what only looks like one, what was lost."""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optimstate
from optimstate.errors import MigrationError, UsageError
from optimstate.formats.registry import open_checkpoint
from optimstate.state.sections import find_sections, judged, section_called
from optimstate.tree import format_path
from tests import corpus


def net() -> dict[str, Any]:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)).state_dict()


def saved(tree: Any, path: Path) -> Any:
    torch.save(tree, path)
    return open_checkpoint(path).tree


def kinds(tree: Any) -> dict[str, str]:
    return {section.label: section.kind for section in find_sections(tree)}


BESIDE_A_MODEL = {
    "best files": {"/home/u/run/epoch=3.ckpt": torch.tensor(0.5), "last.ckpt": torch.tensor(0.7)},
    "metrics": {"acc": torch.tensor(0.5), "loss": torch.tensor(0.7)},
    "a normalizer": {"mean": torch.ones(3), "std": torch.ones(3)},
    "a nested normalizer": {"obs.mean": torch.ones(3), "obs.std": torch.ones(3)},
    "class prototypes": {"cat": torch.ones(3), "dog": torch.ones(3)},
}


@pytest.mark.parametrize("what", BESIDE_A_MODEL)
@pytest.mark.parametrize("below", ["extra", "callbacks", "loops", "hyper_parameters"])
def test_one_model_where_one_is(what: str, below: str, tmp_path: Path) -> None:
    tree = saved({"state_dict": net(), below: {"key": BESIDE_A_MODEL[what]}, "epoch": 3}, tmp_path / "a.pt")
    found = judged(tree)
    assert [(section.kind, section.path) for section in found.sections] == [("model", ("state_dict",))]
    (reason,) = found.others.values()
    assert reason
    section = section_called(f"{below}.key", tree, found.sections)  # and still it can be asked for
    assert set(section.tensors()) == set(BESIDE_A_MODEL[what])


@pytest.mark.parametrize(
    "names", [("actor", "critic"), ("foo", "bar"), ("generator", "discriminator"), ("state_dict", "state_dict_ema")]
)
def test_several_networks_are_all_models(names: tuple[str, str], tmp_path: Path) -> None:
    one, other = net(), torch.nn.Linear(2, 2).state_dict()
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    tree = {names[0]: one, names[1]: other, "optimizer": optimizer.state_dict()}
    found = kinds(saved(tree, tmp_path / "a.pt"))
    assert [found[name] for name in names] == ["model", "model"]


def test_a_copy_of_the_model_in_a_callback_follows_it(tmp_path: Path) -> None:
    tree = {"state_dict": net(), "callbacks": {"WeightAveraging": {"average": net()}}}
    assert list(kinds(saved(tree, tmp_path / "a.pt")).values()) == ["model", "ema"]
    optimstate.remap(
        tmp_path / "a.pt",
        tmp_path / "b.pt",
        optimstate.Plan((optimstate.Rule.of("0.{p}", "first.{p}"),)),
    )
    made = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(made["state_dict"]) == list(made["callbacks"]["WeightAveraging"]["average"])
    assert "first.weight" in made["state_dict"]


MIXED = {
    "a number": {"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2), "scale": 0.5},
    "values of modules": OrderedDict(
        {"a.weight": torch.ones(2), "b.weight": torch.ones(3), "b.version": "2", "b.shape": (1, 2), "b.flags": [1]}
    ),
    "packed weights": {
        "0.weight": torch.ones(4, 3),
        "1.scale": torch.tensor(0.1),
        "1._packed_params.dtype": torch.qint8,
        "1._packed_params._packed_params": (torch.ones(2, 2), None),
    },
    "extra state": {"a.weight": torch.ones(2), "a._extra_state": {"amax": torch.ones(3)}},
}


@pytest.mark.parametrize("what", MIXED)
def test_a_few_other_values_are_carried_along(what: str, tmp_path: Path) -> None:
    assert list(kinds(saved({"epoch": 1, "weights": MIXED[what]}, tmp_path / "a.pt")).values()) == ["model"]
    assert list(kinds(saved(MIXED[what], tmp_path / "b.pt")).values()) == ["model"]


OTHERS = {
    "options": {"lr": 0.1, "best": torch.tensor(0.5), "epoch": 3, "name": "x", "args": {"a": 1}},
    "random state": {"cpu": torch.get_rng_state(), "cuda": torch.get_rng_state()},
    "parts": {"model": net(), "queue": torch.ones(3), "best": torch.tensor(0.5)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_hardly_has_tensors_is_not_a_model(what: str, tmp_path: Path) -> None:
    assert "(root)" not in kinds(saved(OTHERS[what], tmp_path / "a.pt"))


def test_an_optimizer_of_unknown_form_is_not_taken_apart(tmp_path: Path) -> None:
    slots = {"exp_avg.weight": torch.ones(2, 2), "exp_avg.bias": torch.ones(2)}
    tree = saved({"optimizer": {"state": {"fc": slots}, "param_groups": [{"lr": 0.1}]}}, tmp_path / "a.pt")
    found = judged(tree)
    assert found.sections == ()
    assert "do not list their parameters" in found.others[("optimizer",)]


# --- flattened optimizer state --------------------------------------------------------------------------------------


def flat(names: list[str], slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> dict[str, Any]:
    return {f"state.{name}.{slot}": torch.randn(2) for name in names for slot in slots}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True), min_size=1, unique=True))
def test_flattened_state_is_an_optimizer_that_follows_its_names(tmp_path_factory: Any, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("flat")
    tree = {**{name: torch.randn(2) for name in names}, **flat(names)}
    torch.save(tree, folder / "a.pt")
    model, optimizer = find_sections(open_checkpoint(folder / "a.pt").tree)
    assert (model.kind, optimizer.kind) == ("model", "optimizer")
    assert list(model.tensors()) == names
    assert [name for _, name, _ in optimizer.optimizer().parameters()] == names
    plan = optimstate.Plan((optimstate.Rule.of("{p**}", "net.{p}"),))
    optimstate.remap(folder / "a.pt", folder / "b.pt", plan)
    made = torch.load(folder / "b.pt", weights_only=True)
    moved = {f"net.{name}": name for name in names}
    moved |= {key.replace("state.", "state.net.", 1): key for key in flat(names)}
    assert made.keys() == moved.keys()
    assert all(torch.equal(made[new], tree[old]) for new, old in moved.items())


def test_a_module_called_state_is_no_optimizer(tmp_path: Path) -> None:
    tree = {"state.proj.weight": torch.ones(2, 2), "state.proj.bias": torch.ones(2), "head.weight": torch.ones(2, 2)}
    assert list(kinds(saved(tree, tmp_path / "a.pt")).values()) == ["model"]


def test_flattened_state_with_options(tmp_path: Path) -> None:
    tree = {**flat(["a", "b"]), "param_groups.a.lr": 0.1, "param_groups.b.lr": 0.2}
    (section,) = find_sections(saved({"optim": tree}, tmp_path / "a.pt"))
    assert [(group.names, group.options) for group in section.optimizer().groups] == [
        (("a",), {"lr": 0.1}),
        (("b",), {"lr": 0.2}),
    ]


# --- asking for one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", corpus.cases("lightning/", "transformers/", "composer/"), ids=str)
def test_a_section_is_found_by_its_path(case: corpus.Case) -> None:
    tree = open_checkpoint(case.entry).tree
    sections = find_sections(tree)
    for section in sections:
        for name in (format_path(section.path), ".".join(map(str, section.path))):
            assert section_called(name, tree, sections) is section


def test_a_path_where_nothing_is(tmp_path: Path) -> None:
    tree = saved({"model": net(), "epoch": 3}, tmp_path / "a.pt")
    for name in ("epoch", "nothing", "optimizer"):
        kind = MigrationError if name == "optimizer" else UsageError  # a kind that is not there, or no word at all
        with pytest.raises(kind, match=f"no section is called '{name}'"):
            section_called(name, tree, find_sections(tree))


def test_the_parts_of_one_mapping_are_written_and_left_out_by_themselves(tmp_path: Path) -> None:
    names = ["a.weight", "b.weight"]
    weights = {name: torch.randn(2) for name in names}
    torch.save({"epoch": 1, "all": {**weights, **flat(names)}}, tmp_path / "a.pt")
    optimstate.surgery.convert(tmp_path / "a.pt", tmp_path / "model.pt", section="model")
    assert list(torch.load(tmp_path / "model.pt", weights_only=True)) == names
    optimstate.surgery.convert(tmp_path / "a.pt", tmp_path / "optimizer.pt", section="optimizer")
    assert list(torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]) == names
    optimstate.surgery.convert(tmp_path / "a.pt", tmp_path / "rest.pt", without=["optimizer"])
    rest = torch.load(tmp_path / "rest.pt", weights_only=True)
    assert list(rest) == ["epoch", "all"]
    assert list(rest["all"]) == names


# --- what stands beside weights, and what only looks like them --------------------------------------------------------


WEIGHTS = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3)}


@pytest.mark.parametrize(
    "beside",
    [{"config": {"hidden": 3}}, {"log": [{"loss": 0.5}]}, {"args": argparse.Namespace(lr=0.1)}, {"epoch": 3, "a": "b"}],
    ids=str,
)
def test_a_configuration_among_weights_does_not_hide_them(beside: Any, tmp_path: Path) -> None:
    torch.save({**WEIGHTS, **beside}, tmp_path / "a.pt")
    (section,) = find_sections(open_checkpoint(tmp_path / "a.pt").tree)
    assert (section.kind, list(section.tensors())) == ("model", list(WEIGHTS))


@pytest.mark.parametrize(
    "tree",
    [
        {"model": WEIGHTS, "optimizer": {"moments": {name: {"m": t, "v": t} for name, t in WEIGHTS.items()}}},
        {"params": WEIGHTS, "opt_state": {"mu": dict(WEIGHTS), "nu": dict(WEIGHTS)}},
        {"model": WEIGHTS, "exp_avg": dict(WEIGHTS), "exp_avg_sq": dict(WEIGHTS)},
        {"model": WEIGHTS, "optimizer": {"states": {0: {"exp_avg": torch.ones(3, 2)}}, "groups": [{"lr": 0.1}]}},
    ],
    ids=["by parameter", "by slot", "by slot, outside", "renamed"],
)
def test_what_is_called_an_optimizer_is_no_model_and_is_not_called_healthy(tree: Any, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / "a.pt")
    models = [section for section in find_sections(open_checkpoint(tmp_path / "a.pt").tree) if section.kind == "model"]
    assert [section.label for section in models] == [next(iter(tree))]
    report = optimstate.verify(tmp_path / "a.pt")
    assert report.verdict == "unknown"
    assert "of optimizer state" in report.unread[0]


def test_measures_are_no_model(tmp_path: Path) -> None:
    torch.save({"loss.train": torch.tensor(0.5), "loss.test": torch.tensor(0.25)}, tmp_path / "a.pt")
    judgement = judged(open_checkpoint(tmp_path / "a.pt").tree)
    assert judgement.sections == ()
    assert judgement.others == {(): "its tensors are single numbers"}
    assert optimstate.verify(tmp_path / "a.pt").verdict == "unknown"


def test_weights_beside_an_optimizer_are_told_of_and_checked(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    broken = {name: torch.full_like(value, math.nan) for name, value in model.state_dict().items()}
    torch.save({**broken, "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "a.pt")
    judgement = judged(open_checkpoint(tmp_path / "a.pt").tree)
    assert judgement.others == {(): "weights beside an optimizer: plans move them with it"}
    report = optimstate.verify(tmp_path / "a.pt")
    assert report.verdict == "faulty"
    assert "weights beside the optimizer, weight" in str(report)
