"""Optimizer state in its three forms, live and lazy, without loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optimstate.errors import CorruptCheckpointError, StateMismatchError
from optimstate.formats.registry import open_checkpoint
from optimstate.state.optimizer import Group, Member, OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tree import difference
from tests.corpus import all_cases, container_of


def node(*, names: bool = True, ids: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "params": list(ids[:2]), "betas": (0.9, 0.99)},
        {"lr": 0.2, "params": list(ids[2:]), "betas": (0.9, 0.99)},
    ]
    if names:
        groups[0]["param_names"], groups[1]["param_names"] = ["a.b.w", "a.w"], ["b"]
    state = {key: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2)} for key in ids[:2]}
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("ids", [(0, 1, 2), (2, 0, 1), (7, 3, 5)])
def test_the_index_form_is_written_back_as_it_was(names: bool, ids: tuple[int, ...]) -> None:
    tree = node(names=names, ids=ids)
    back = OptimizerState.from_node(tree).to_node()
    assert back == tree
    assert list(back["param_groups"][0]) == list(tree["param_groups"][0])
    assert back["state"][ids[0]]["exp_avg"] is tree["state"][ids[0]]["exp_avg"]


def test_every_optimizer_of_the_corpus_is_written_back_as_it_was() -> None:
    found = 0
    for case in all_cases():
        for path in case.files:
            if container_of(path) != "torch_zip" or "hostile" in case.name:
                continue
            for section in find_sections(open_checkpoint(path).tree):
                # fastai's lists by position are read as an optimizer, but have a form of their own.
                if section.kind == "optimizer" and isinstance(section.node, dict) and "param_groups" in section.node:
                    found += 1
                    assert difference(section.node, section.optimizer().to_node()) is None
    assert found > 30


def test_orphans_are_kept_and_reported() -> None:
    tree = node()
    tree["state"][9] = {"step": 1}
    state = OptimizerState.from_node(tree)
    assert state.orphans() == [9]
    assert state.to_node()["state"][9] == {"step": 1}
    moved = state.rebuilt([(group, [Member("z", None, None)]) for group in state.groups])
    assert moved.state[9] == {"step": 1}


def test_state_is_keyed_by_names() -> None:
    state = OptimizerState.from_node(node())
    named = state.by_name()
    assert named.to_node()["param_groups"][0] == {"lr": 0.1, "params": ["a.b.w", "a.w"], "betas": (0.9, 0.99)}
    assert list(named.state) == ["a.b.w", "a.w"]


def test_the_flattened_form() -> None:
    state = OptimizerState.from_node(node())
    flat = state.to_flat()
    assert flat["param_groups.b.lr"] == 0.2
    assert flat["state.a.b.w.exp_avg"] is state.state[0]["exp_avg"]
    back = OptimizerState.from_flat(flat)
    assert back.to_flat().keys() == flat.keys()
    assert [group.names for group in back.groups] == [("a.b.w", "a.w"), ("b",)]
    assert {name: set(slots or ()) for _, name, slots in back.parameters()} == {
        "a.b.w": {"step", "exp_avg"},
        "a.w": {"step", "exp_avg"},
        "b": set(),
    }
    with pytest.raises(CorruptCheckpointError, match="not an entry of a flattened"):
        OptimizerState.from_flat({"states.x.y": 1})


def test_naming() -> None:
    state = OptimizerState.from_node(node(names=False))
    assert not state.is_named
    named = state.named([["x", "y"], ["z"]])
    assert [group.names for group in named.groups] == [("x", "y"), ("z",)]
    assert named.to_node()["param_groups"][1]["param_names"] == ["z"]
    with pytest.raises(StateMismatchError, match="2 names for an optimizer of 3"):
        state.named(["x", "y"])
    with pytest.raises(StateMismatchError, match="'x'"):
        state.named(["x", "x", "y"])
    with pytest.raises(StateMismatchError, match="no names"):
        state.by_name()


def test_contradictions_are_errors() -> None:
    tree = node()
    tree["param_groups"][1]["params"] = [0]
    with pytest.raises(CorruptCheckpointError, match="0 is in two param groups"):
        OptimizerState.from_node(tree)
    with pytest.raises(CorruptCheckpointError, match="2 params, but param_names"):
        Group.from_node({"params": [0, 1], "param_names": ["a"]})
