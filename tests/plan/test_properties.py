"""Random parameters and plans: inverses, lazy against live, memory, and nothing lost in silence."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.inverse import inverse
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.lazy import LazyTensor
from tests.plan.lazy import lazy, lazy_tree, same

Family = tuple[dict[str, tuple[int, ...]], str]
sizes = st.integers(1, 4)


@st.composite
def bijective(draw: Any, number: int) -> Family:
    """Some parameters, and a rule that moves them without loss."""
    a, b, n = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    words = ["q", "k", "v"][:n]
    choices = "|".join(words)
    dim = draw(st.integers(0, 1))
    head = f"f{number}"
    layers = range(draw(st.integers(1, 2)))
    kind = draw(
        st.sampled_from(["rename", "shift", "fuse", "uneven", "stack", "split", "unstack", "turn", "heads", "scale"])
    )
    one = {f"{head}.{i}.w": (a, b) for i in layers}
    if kind == "rename":
        return one, f'from = "{head}.{{r**}}"\nto = "g{number}.deep.{{r}}"'
    if kind == "shift":
        return one, f'from = "{head}.{{i:int}}.w"\nto = "{head}.{{2*i+1}}.w"'
    if kind in ("fuse", "stack"):
        operation = f"concat = {dim}" if kind == "fuse" else f"stack = {draw(st.integers(-1, 2))}"
        many = {f"{head}.{i}.{x}.w": (a, b) for i in layers for x in words}
        return many, f'from = "{head}.{{i}}.{{x={choices}}}.w"\nto = "{head}.{{i}}.all.w"\n{operation}'
    if kind == "uneven":
        many = {f"{head}.{x}": (draw(sizes), b) if dim == 0 else (b, draw(sizes)) for x in words}
        return many, f'from = "{head}.{{x={choices}}}"\nto = "{head}.all"\nconcat = {dim}'
    if kind in ("split", "unstack"):
        shape = (n * a, b) if dim == 0 else (b, n * a)
        shape = shape if kind == "split" else ((n, a, b) if dim == 0 else (a, n, b))
        whole = {f"{head}.{i}.w": shape for i in layers}
        return whole, f'from = "{head}.{{i}}.w"\nto = "{head}.{{i}}.{{x={choices}}}"\n{kind} = {dim}'
    if kind == "turn":
        return (
            one,
            f'from = "{head}.{{i}}.w"\nto = "{head}.{{i}}.t"\nops = [{{ transpose = true }}, {{ reshape = [-1] }}]',
        )
    if kind == "heads":
        whole = {f"{head}.{i}.w": (2 * n * a, b) for i in layers}
        return whole, (
            f'from = "{head}.{{i}}.w"\nto = "{head}.{{i}}.{{x={choices}}}"\nops = ['
            f"{{ reshape = {{ dim = 0, to = [2, {n}, {a}] }} }}, {{ permute = [1, 0, 2] }}, "
            f"{{ reshape = {{ dim = 0, from = [{n}, 2, {a}], to = [{2 * n * a}] }} }}, {{ split = 0 }}]"
        )
    return one, f'from = "{head}.{{i}}.w"\nto = "{head}.{{i}}.s"\nscale = {{ param = 0.5, grad = 4.0 }}'


@st.composite
def lossy(draw: Any, number: int) -> Family:
    """Some parameters, and a rule that drops, copies, cuts, grows or rounds."""
    a, b = draw(sizes), draw(sizes)
    head, dim = f"f{number}", draw(st.integers(0, 1))
    one = {f"{head}.{i}.w": (a, b) for i in range(draw(st.integers(1, 2)))}
    fill = draw(st.sampled_from(["", ', fill = "mean"', ', fill = "wrap"', ', fill = "zeros"', ", fill = 0.5"]))
    operation = draw(
        st.sampled_from(
            [
                f"slice = {{ dim = {dim}, stop = {1} }}",
                f"resize = {{ dim = {dim}, size = {draw(st.integers(1, 7))}{fill} }}",
                f"repeat = {{ dim = {dim}, times = {draw(sizes)}, each = {draw(st.sampled_from(['true', 'false']))} }}",
                'cast = { param = "bfloat16", slots = "float16" }',
                "scale = { param = 0.3, grad = 1.7 }",
            ]
        )
    )
    target = draw(st.sampled_from([f'"{head}.{{i}}.x"', f'["{head}.{{i}}.x", "g{number}.{{i}}.{{e=0..1}}"]']))
    rules = [f'drop = "{head}.**"', f'fresh = "{head}.**"', f'from = "{head}.{{i}}.w"\nto = {target}']
    rules += [f'from = "{head}.{{i}}.w"\nto = {target}\n{operation}'] * 3
    return one, draw(st.sampled_from(rules))


@st.composite
def cases(draw: Any, family: Any) -> tuple[dict[str, tuple[int, ...]], Plan]:
    names: dict[str, tuple[int, ...]] = {"kept.weight": (2, 3), "kept.bias": (3,)}
    rules = []
    for number in range(draw(st.integers(1, 3))):
        made, rule = draw(family(number))
        names.update(made)
        rules.append(f"[[rule]]\n{rule}\n")
    return names, Plan.from_toml("".join(rules))


def checkpoint(names: dict[str, tuple[int, ...]], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, some of them stored in another order, and the state dict of an AdamW."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, ...], turned: bool = False) -> torch.Tensor:
        if turned:
            return torch.randn(shape[::-1], generator=generator).permute(*reversed(range(len(shape))))
        return torch.randn(shape, generator=generator)

    weights = {name: tensor(shape, turned=index % 2 == 1) for index, (name, shape) in enumerate(names.items())}
    state = {
        index: {"step": torch.tensor(7.0), "exp_avg": tensor(shape), "exp_avg_sq": tensor(shape, index % 3 == 1).abs()}
        for index, shape in enumerate(names.values())
    }
    order = list(range(len(names)))
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "fused": None}
    options |= {"decoupled_weight_decay": True}
    groups = [{**options, "params": order, "param_names": list(names)}]
    return weights, {"state": state, "param_groups": groups}


def run(plan: Plan, weights: dict[str, Any], state: OptimizerState) -> tuple[dict[str, Any], OptimizerState, Any, Any]:
    model, optimizer = plan_model(plan, weights), plan_optimizer(plan, state)
    moved = execute_model(model.sections["model"], weights)
    return moved, execute_optimizer(optimizer.sections["optimizer"], state), model, optimizer


def by_name(state: OptimizerState) -> dict[str, Any]:
    return {str(name): slots for _, name, slots in state.parameters()}


common = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@common
@given(cases(bijective), st.integers(0, 99))
def test_a_plan_and_its_inverse_change_nothing(case: tuple[dict[str, Any], Plan], seed: int) -> None:
    names, plan = case
    weights, node = checkpoint(names, seed)
    back = inverse(plan, names)
    for model, tree in ((weights, node), (lazy_tree(weights), lazy_tree(node))):
        state = OptimizerState.from_node(tree)
        moved, new, _, _ = run(plan, model, state)
        again, old, _, _ = run(back, moved, new)
        assert again.keys() == weights.keys()
        assert all(same(again[name], weights[name]) for name in weights)
        for name, slots in by_name(OptimizerState.from_node(node)).items():
            assert by_name(old)[name].keys() == slots.keys()
            assert all(same(by_name(old)[name][slot], value) for slot, value in slots.items())


@common
@given(cases(lambda n: st.one_of(bijective(n), lossy(n))), st.integers(0, 99))
def test_lazy_and_live_agree_bit_for_bit(case: tuple[dict[str, Any], Plan], seed: int) -> None:
    names, plan = case
    weights, node = checkpoint(names, seed)
    live, live_state, _, _ = run(plan, weights, OptimizerState.from_node(node))
    late, late_state, _, _ = run(plan, lazy_tree(weights), OptimizerState.from_node(lazy_tree(node)))
    assert list(live) == list(late)
    assert all(same(live[name], late[name]) for name in live)
    assert [g.to_node() for g in live_state.groups] == [g.to_node() for g in late_state.groups]
    assert live_state.state.keys() == late_state.state.keys()
    for key, slots in live_state.state.items():
        assert slots.keys() == late_state.state[key].keys()
        assert all(same(value, late_state.state[key][slot]) for slot, value in slots.items())


@common
@given(cases(lambda n: st.one_of(bijective(n), lossy(n))), st.integers(0, 99))
def test_no_two_tensors_share_memory_and_none_is_lost_in_silence(case: tuple[dict[str, Any], Plan], seed: int) -> None:
    names, plan = case
    weights, node = checkpoint(names, seed)
    copy = {name: value.clone() for name, value in weights.items()}
    moved, state, model, optimizer = run(plan, weights, OptimizerState.from_node(node))
    storages = [t.untyped_storage().data_ptr() for t in moved.values() if t.numel()]
    storages += [t.untyped_storage().data_ptr() for slots in state.state.values() for t in slots.values() if t.numel()]
    assert len(storages) == len(set(storages))
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in moved.values())
    late = execute_model(model.sections["model"], {name: lazy(value) for name, value in weights.items()})
    assert len({id(t.storage) for t in late.values() if isinstance(t, LazyTensor)}) == len(late)
    # The source is as it was, and every name of it is either the source of something or said to be dropped.
    assert all(torch.equal(copy[name], weights[name]) for name in weights)
    for found in (model.sections["model"], optimizer.sections["optimizer"]):
        used = {source for move in found.moves for source in move.sources}
        dropped = {name for name, _ in found.dropped}
        assert used | dropped == set(names)
        assert not used & dropped
    told = {
        move.target: {p[-1] for p, f in move.slots.items() if f.level in ("exact", "approximate")}
        for move in optimizer.sections["optimizer"].moves
    }
    assert {name: set(slots or ()) for name, slots in by_name(state).items()} == told
