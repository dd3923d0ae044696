"""Names are concluded where one assignment fits and no other, and refused elsewhere: held against all assignments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimstate.state.grouping import excluded_places
from optimstate.state.matching import match
from optimstate.state.names import unwrapped
from optimstate.state.naming import Candidate, name_in_order, name_parameters
from optimstate.state.optimizer import OptimizerState
from tests.plan.lazy import lazy

Shape = tuple[int, ...]
SHAPES: list[Shape | None] = [(2,), (3,), (2, 2)]


def fitting(groups: Sequence[Sequence[Shape | None]], model: Sequence[Shape | None], in_order: bool) -> list[Any]:
    """Every assignment, by trying all."""
    flat = [shape for group in groups for shape in group]
    bounds = [0]
    for group in groups:
        bounds.append(bounds[-1] + len(group))
    return [
        places
        for places in permutations(range(len(model)), len(flat))
        if all(a is None or model[p] is None or a == model[p] for a, p in zip(flat, places, strict=True))
        and (not in_order or all(a < b for s, e in pairwise(bounds) for a, b in pairwise(places[s:e])))
    ]


models = st.lists(st.sampled_from(SHAPES), max_size=6)
optimizers = st.lists(st.lists(st.sampled_from([*SHAPES, None]), max_size=4), max_size=3).filter(
    lambda groups: sum(map(len, groups)) <= 6
)


@given(models, optimizers, st.booleans())
def test_a_matching_is_called_unique_exactly_where_one_assignment_fits(
    model: list[Shape | None], groups: list[list[Shape | None]], in_order: bool
) -> None:
    found, all_of_them = match(groups, model, in_order=in_order), fitting(groups, model, in_order)
    assert found.unique == (len(all_of_them) == 1)
    if found.unique:
        assert tuple(places[0] for places in found.domains) == all_of_them[0]
    assert found.fits == bool(all_of_them)
    for places in all_of_them:  # nothing that is possible is excluded
        assert all(place in domain for place, domain in zip(places, found.domains, strict=True))


def optimizer(groups: Sequence[Sequence[Shape]], **options: Any) -> OptimizerState:
    number = iter(range(100))
    made: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    for group in groups:
        keys = [next(number) for _ in group]
        made.append({"lr": 0.1, "momentum": 0.9, "dampening": 0, "nesterov": False, **options, "params": keys})
        state |= {key: {"momentum_buffer": lazy(torch.zeros(shape))} for key, shape in zip(keys, group, strict=True)}
    return OptimizerState.from_node({"state": state, "param_groups": made})


@st.composite
def trained(draw: st.DrawFn) -> tuple[list[Candidate], list[list[int]]]:
    """A model, and the places of the parameters that each group of its optimizer lists, in any order."""
    shapes = draw(st.lists(st.sampled_from([(2,), (3,), (2, 2)]), min_size=1, max_size=7))
    order = draw(st.permutations(range(len(shapes))))
    cuts = sorted(draw(st.lists(st.integers(0, len(shapes)), max_size=2)))
    groups = [list(order[a:b]) for a, b in pairwise([0, *cuts, len(order)])]
    if draw(st.booleans()):
        groups = [sorted(group) for group in groups]
    return [Candidate(f"p{i}", shape) for i, shape in enumerate(shapes)], groups


@given(trained(), st.booleans(), st.data())
def test_what_two_runs_would_save_alike_is_named_by_the_order_alone_or_refused(
    run: tuple[list[Candidate], list[list[int]]], ordered: bool, data: st.DataObject
) -> None:
    model, groups = run
    shapes = [[model[place].shape or () for place in group] for group in groups]
    found = name_parameters(optimizer(shapes), model, ordered=ordered)
    in_order = all(a < b for group in groups for a, b in pairwise(group))
    if found.complete and (in_order or not ordered):
        assert list(found.names) == [f"p{place}" for group in groups for place in group]
    flat = [place for group in groups for place in group]
    alike = [(a, b) for a in flat for b in flat if a < b and model[a].shape == model[b].shape]
    if not alike:
        return
    a, b = data.draw(st.sampled_from(alike))
    swapped = [[{a: b, b: a}.get(place, place) for place in group] for group in groups]
    both_keep_the_order = in_order and all(x < y for group in swapped for x, y in pairwise(group))
    if not ordered or both_keep_the_order:  # nothing in the file tells one from the other
        assert not found.complete
        assert all(name is None for name in found.names)


def test_an_order_that_one_group_contradicts_is_believed_of_none() -> None:
    model = [Candidate(n, s) for n, s in [("a", (2, 2)), ("b", (2,)), ("c", (2, 2)), ("d", (3,)), ("e", (3,))]]
    backwards = optimizer([[(2,), (2, 2), (2, 2)], [(3,), (3,)]])
    (first, second) = name_parameters(backwards, model, ordered=True).problems
    assert "parameters 1, 2 of shape [2, 2] can be a, c: the param groups do not list" in first
    assert "parameters 3, 4 of shape [3] can be d, e" in second


def test_a_groups_own_name_is_taken_unless_the_model_contradicts_it() -> None:
    state = optimizer([[(2,)], [(2,)]])
    groups = [g._replace(options={**g.options, "name": n}) for g, n in zip(state.groups, ["y", "x"], strict=True)]
    state = state._replace(groups=tuple(groups))
    assert name_parameters(state, [], ordered=True).names == ("y", "x")
    assert name_parameters(state, [Candidate("x", (2,)), Candidate("y", (2,))], ordered=True).names == ("y", "x")
    other = name_parameters(state, [Candidate("x", (2,)), Candidate("z", (2,))], ordered=True)
    assert not other.complete


def test_names_in_the_optimizers_order_are_checked() -> None:
    state = optimizer([[(2,), (3,)]])
    assert name_in_order(state, ["b", "a"], {}).names == ("b", "a")
    assert name_in_order(state, ["b", "a"], {"b": (2,), "a": (3,)}).complete
    assert name_in_order(state, ["b"], {}).problems == ("1 names are given for 2 parameters",)
    assert name_in_order(state, ["a", "b"], {"b": (2,), "a": (3,)}).problems == (
        "parameter 0 has shape [2], but 'a' has [3]",
        "parameter 1 has shape [3], but 'b' has [2]",
    )


def test_the_trainers_rule_tells_embeddings_from_norms() -> None:
    model = [Candidate("emb.weight", (2, 2)), Candidate("q_norm.weight", (2, 2)), Candidate("ln_1.weight", (2,))]
    state = optimizer([[(2, 2)], [(2, 2), (2,)]])
    assert not name_parameters(state, model, ordered=True).complete
    groups = (state.groups[0], state.groups[1]._replace(options={**state.groups[1].options, "weight_decay": 0.0}))
    state = state._replace(groups=groups)
    found = name_parameters(state, model, ordered=True, excluded=excluded_places("transformers", state, model))
    assert found.names == ("emb.weight", "q_norm.weight", "ln_1.weight")


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        ("m.q.lora_A.default.weight", "m.q.lora_A.weight"),
        ("m.emb.lora_embedding_A.default", "m.emb.lora_embedding_A"),
        ("m.head.modules_to_save.default.weight", "m.head.weight"),
        ("m.q.lora_A.weight", "m.q.lora_A.weight"),
        ("m.default.weight", "m.default.weight"),
    ],
)
def test_the_name_of_an_adapter_is_left_out(live: str, saved: str) -> None:
    assert unwrapped([live])(live) == saved


def test_of_two_adapters_neither_is_left_out() -> None:
    names = ["q.lora_A.one.weight", "q.lora_A.two.weight"]
    assert [unwrapped(names)(name) for name in names] == names


def _grouped(groups: Sequence[Sequence[Shape]], **columns: Sequence[Any]) -> OptimizerState:
    """An optimizer whose groups have these options, one value for each."""
    state = optimizer(groups)
    options = [{**g.options, **{k: v[i] for k, v in columns.items()}} for i, g in enumerate(state.groups)]
    return state._replace(groups=tuple(g._replace(options=o) for g, o in zip(state.groups, options, strict=True)))


def test_layer_decay_puts_layers_one_after_another_and_frozen_parameters_leave_it_open() -> None:
    model = [Candidate(f"blocks.{i}.{n}.weight", (2, 2)) for i in range(3) for n in "ab"]
    state = _grouped([[(2, 2)] * 2] * 3, lr_scale=[1.0, 0.5, 0.25], weight_decay=[0.1] * 3)
    found = name_parameters(state, model, ordered=True, excluded=excluded_places("timm", state, model))
    assert [name[7] for name in found.names if name] == list("221100")
    assert not excluded_places("timm", state, [*model, Candidate("blocks.3.a.weight", (2, 2))])
    straddling = _grouped([[(2, 2)] * 3, [(2, 2)] * 3], lr_scale=[0.5, 1.0], weight_decay=[0.1] * 2)
    assert not excluded_places("timm", straddling, model)
    assert not name_parameters(state, model, ordered=True).complete


def test_a_group_for_each_parameter_is_in_order_for_mmengine_alone() -> None:
    model = [Candidate("a", (2,)), Candidate("b", (2,))]
    state = optimizer([[(2,)], [(2,)]])
    assert not name_parameters(state, model, ordered=True).complete
    found = name_parameters(state, model, ordered=True, excluded=excluded_places("mmengine", state, model))
    assert found.names == ("a", "b")
