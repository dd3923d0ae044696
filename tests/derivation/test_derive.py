"""Derived plans do what their functions do, to weights and moments, bit for bit; no layout, no plan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, reject, settings
from hypothesis import strategies as st

from optimstate import Plan
from optimstate.derivation.derive import derive
from optimstate.errors import DerivationError, MigrationError, PlanError
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.solve.inverse import inverse
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.surgery.plans.files import save_plan
from tests.derivation.functions import FUNCTIONS

RULES = {
    "llama_to_meta": 6, "gqa_fuse": 3, "gqa_unfuse": 2, "neox": 2, "conv1d": 3, "conv1d_cut": 4, "gqa_to_mha": 1,
    "vit": 5, "mixtral": 3, "mixtral_back": 3, "gpt_oss": 3, "halves": 4, "many": 2, "vocab": 1, "tied": 2, "bf16": 1,
    "gammabeta": 2, "everysecond": 2, "shifted": 3, "stacked": 1, "mla": 1, "mamba": 1, "dense37": 1,
    "mean4": 1, "flip": 1, "plus1": 1, "grouped_with_gate": 1, "depthwise": 1, "vocab_padding_cut": 2,
    "scan": 2, "two_sets_of_experts": 2,
}  # fmt: skip
REFUSED = {
    "lora": "'w' is not a layout",
    "wholemean": "'b'",
}
SCALED = {"tied", "plus1"}
ROUNDED = {"bf16"}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_every_function_on_the_list_is_tested() -> None:
    assert FUNCTIONS.keys() == RULES.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", RULES)
def test_the_plan_does_what_the_function_does(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    derived = derive(function, shapes, allow_drop=True)
    assert len(list(derived.plan.all_rules())) <= RULES[name]
    weights = drawn(shapes, 1)
    expected = {key: value for key, value in function(dict(weights)).items() if key not in derived.new}
    made = execute_model(plan_model(derived.plan, weights).sections["model"], weights)
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(made[key], value), key


@pytest.mark.parametrize("name", sorted(RULES.keys() - SCALED - ROUNDED))
def test_the_plan_moves_moments_as_the_function_moves_weights(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    plan = derive(function, shapes, allow_drop=True).plan
    names = list(shapes)
    slots = {slot: drawn(shapes, seed) for seed, slot in enumerate(("exp_avg", "exp_avg_sq"), 2)}
    state = {
        number: {"step": torch.tensor(3.0), **{slot: values[key] for slot, values in slots.items()}}
        for number, key in enumerate(names)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    named = OptimizerState.from_node(
        {"state": state, "param_groups": [{**group, "params": list(range(len(names))), "param_names": names}]}
    )
    moved = execute_optimizer(plan_optimizer(plan, named, shapes=shapes).sections["optimizer"], named)
    made = {key: slots for _, key, slots in moved.parameters() if slots}
    for slot, values in slots.items():
        if name == "vocab" and slot == "exp_avg_sq":
            continue  # new rows of second moments hold the mean of the old ones, unless the plan says otherwise
        for key, value in function(dict(values)).items():
            if key in made:
                assert torch.equal(made[key][slot], value), (slot, key)
    assert made


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plan_says_is_refused_with_the_output(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    with pytest.raises(DerivationError, match=REFUSED[name]):
        derive(function, shapes)


def test_a_dropped_source_must_be_allowed() -> None:
    def forgetful(state: dict[str, Any]) -> dict[str, Any]:
        return {"b": state["a"]}

    shapes = {"a": (2, 2), "lost": (3,)}
    with pytest.raises(DerivationError, match="no output takes 'lost'"):
        derive(forgetful, shapes)
    assert derive(forgetful, shapes, allow_drop=True).dropped == ("lost",)


def test_a_random_output_is_new_and_not_called_arithmetic() -> None:
    derived = derive(lambda state: {"a": state["a"].t(), "head": torch.randn(3, 3)}, {"a": (2, 3)})
    assert derived.new == ("head",)


def test_a_function_that_changes_its_argument_gives_the_same_plan() -> None:
    def rude(state: dict[str, Any]) -> dict[str, Any]:
        value = state.pop("a")
        value.t_()
        state["b"] = value
        return state

    assert "transpose" in str(derive(rude, {"a": (2, 3)}))


def test_names_that_contain_another_are_told_apart() -> None:
    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        return {re.sub(r"^layers\.1\.", "first.", name): value for name, value in state.items()}

    shapes = {f"layers.{i}.w": (2, 2) for i in (0, 1, 10, 11)} | {"enc.layers.1.w": (2, 2)}
    derived = derive(renamed, shapes)
    made = execute_model(plan_model(derived.plan, drawn(shapes, 0)).sections["model"], drawn(shapes, 0))
    assert set(made) == {"layers.0.w", "first.w", "layers.10.w", "layers.11.w", "enc.layers.1.w"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_more_elements_than_a_dtype_can_count(dtype: torch.dtype) -> None:
    derived = derive(lambda state: {"a": state["a"].to(dtype).float().t()}, {"a": (300, 200)})
    assert [str(rule) for rule in derived.plan.rules] == ["a -> a, transpose = true"]
    assert bool(derived.notes) == (dtype is not torch.float32)  # the plan keeps what the function rounds off


STEPS = {
    "transpose": lambda value: value.transpose(-1, -2),
    "flatten": lambda value: value.reshape(-1, value.shape[-1]),
    "cut": lambda value: value.reshape(2, -1, *value.shape[1:]),
    "swap": lambda value: value.transpose(0, 1),
    "half": lambda value: value[: value.shape[0] // 2],
    "repeat": lambda value: value.repeat_interleave(2, 0),
}


@given(steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=4), parts=st.integers(1, 3))
def test_whatever_is_composed_of_layouts_is_derived_or_refused_never_wrong(steps: list[str], parts: int) -> None:
    def composed(state: dict[str, Any]) -> dict[str, Any]:
        value = state["w"]
        for step in steps:
            value = STEPS[step](value)
        return {f"out.{number}": part for number, part in enumerate(value.tensor_split(parts))}

    shapes = {"w": (8, 12)}
    try:
        assume(all(value.numel() for value in composed({"w": torch.zeros(8, 12)}).values()))
    except RuntimeError:  # the steps do not fit each other
        reject()
    try:
        derived = derive(composed, shapes, allow_drop=True)
    except DerivationError as error:
        refused = "no operations of the plan language" in str(error)
    else:
        weights = drawn(shapes, 5)
        made = execute_model(plan_model(derived.plan, weights).sections["model"], weights)
        refused = False
        for name, value in composed(dict(weights)).items():
            assert torch.equal(made[name], value)
    event("refused" if refused else "derived")


OPERATIONS = [
    "transpose = true", "transpose = [0, 1]", "reshape = [4, -1]", "reshape = [2, 3, -1]",
    "reshape = { dim = 0, to = [2, -1] }",
    "permute = [1, 0]", "flip = 0", "slice = { dim = 0, stop = 2 }", "resize = { dim = 0, size = 16 }",
    "repeat = { dim = 0, times = 2 }", "select = { dim = 0, index = [1, 0] }", "scale = { param = 0.5, grad = 2.0 }",
]  # fmt: skip


@settings(max_examples=40)
@given(steps=st.lists(st.sampled_from(OPERATIONS), max_size=4), joined=st.booleans(), parts=st.sampled_from([1, 2, 3]),
    last=st.sampled_from(["split = 0", "unstack = 0"]))  # fmt: skip
def test_a_plan_of_random_operations_is_derived_again_and_so_is_its_inverse(
    steps: list[str], joined: bool, parts: int, last: str
) -> None:
    shapes = {f"w.{number}": (6, 4) for number in range(1 + joined)}
    operations = [*(["concat = 0"] if joined else []), *steps, *([last] if parts > 1 else [])]
    source = "{a=0|1}" if joined else "0"
    target = {1: "0", 2: "{b=0|1}", 3: "{b=0|1|2}"}[parts]
    ops = ", ".join(f"{{ {operation} }}" for operation in operations)
    plan = Plan.from_toml(
        f'[[rule]]\nfrom = "w.{source}"\nto = "v.{target}"\n' + (f"ops = [{ops}]\n" if operations else "")
    )

    def function(state: dict[str, Any]) -> dict[str, Any]:
        return execute_model(plan_model(plan, state).sections["model"], state)

    weights = drawn(shapes, 6)
    try:
        expected = function(dict(weights))
    except MigrationError:  # the operations do not fit each other
        reject()
    try:
        found = derive(function, shapes, allow_drop=True)
    except DerivationError as error:
        if "no operations of the plan language" not in str(error):
            raise
        event("refused")
        return
    derived = found.plan
    expected = {name: value for name, value in expected.items() if name not in found.new}  # nothing but filling
    made = execute_model(plan_model(derived, weights).sections["model"], weights)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    try:
        undone = inverse(derived, shapes)
    except PlanError:  # something is lost; or what was cut in reverse order was written as copies
        event("derived, and not to be undone")
        return
    back = execute_model(plan_model(undone, made).sections["model"], made)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    event("derived, and undone")


def test_a_plan_derives_itself() -> None:
    derived = Plan.derive(lambda state: {"b": state["a"].t()}, {"a": (2, 3)})
    assert derived.plan == derive(lambda state: {"b": state["a"].t()}, {"a": (2, 3)}).plan


BIG = {f"layers.{i}.{x}.weight": (4096, 1024) if x != "o" else (1024, 4096) for i in range(3) for x in ("q", "k", "o")}


def heads_turned(state: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for i in range(3):
        q, k, o = (state[f"layers.{i}.{x}.weight"] for x in "qko")
        made[f"h.{i}.qk"] = torch.cat([q, k]).t()
        made[f"h.{i}.o"] = o.unflatten(1, (4, -1)).transpose(1, 2).flatten(1)
    return made


def test_equal_and_unequal_dimensions_are_carried_to_their_real_sizes() -> None:
    small = {name: tuple(size // 128 for size in shape) for name, shape in BIG.items()}
    derived = derive(heads_turned, BIG, scaled=True)
    assert len(list(derived.plan.all_rules())) == 2
    whole = derive(heads_turned, small).plan
    assert len(list(whole.all_rules())) == 2
    given = {name: torch.empty(shape, device="meta") for name, shape in BIG.items()}
    moves = plan_model(derived.plan, given).sections["model"].moves
    assert {tuple(move.expression.shape or ()) for move in moves if move.expression} == {(1024, 8192), (1024, 4096)}


def test_a_function_that_knows_the_sizes_is_refused_at_shrunk_ones() -> None:
    with pytest.raises(DerivationError, match="shrunk dimensions"):
        derive(lambda state: {"a": state["a"].reshape(1000, 64)}, {"a": (64000,)}, scaled=True)


def test_a_permutation_without_a_pattern_is_a_list_of_rows() -> None:
    order = [3, 0, 4, 1, 2]
    derived = derive(lambda state: {"b": state["a"][:, order]}, {"a": (2, 5)})
    assert [str(rule) for rule in derived.plan.rules] == ["a -> b, select = { dim = 1, index = [3, 0, 4, 1, 2] }"]


SUMS: dict[str, tuple[Any, dict[str, tuple[int, ...]], str]] = {
    "average": (lambda s: {"c": s["a"] * 0.75 + s["b"] * 0.25}, {"a": (2, 2), "b": (2, 2)}, "average = [0.75, 0.25]"),
    "delta": (lambda s: {"c": s["a"] - s["b"]}, {"a": (2, 2), "b": (2, 2)}, "average = [1.0, -1.0]"),
    "turned": (lambda s: {"c": (s["a"] * 0.3 + s["b"] * 0.7).t() + 2}, {"a": (2, 3), "b": (2, 3)},
        "average = [0.3, 0.7], transpose = true, shift = { param = 2.0 }"),
    "zero-centred": (lambda s: {"n": s["n"] - 1}, {"n": (5,)}, "shift = { param = -1.0 }"),
    "affine": (lambda s: {"n": s["n"] * 2 + 1}, {"n": (5,)}, "scale = { param = 2.0, grad = 0.5 }, shift"),
    "flip": (lambda s: {"a": s["a"].flip(1)}, {"a": (3, 9)}, "flip = 1"),
    "half": (lambda s: {"c": ((s["a"] + s["b"]) / 2).bfloat16()}, {"a": (4, 4), "b": (4, 4)}, "mean = 0, cast"),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_shifts_and_flips_become_operations(name: str) -> None:
    function, shapes, text = SUMS[name]
    derived = derive(function, shapes)
    (rule,) = derived.plan.all_rules()
    assert text in str(rule)
    weights = drawn(shapes, 1)
    made = execute_model(plan_model(derived.plan, weights).sections["model"], weights)
    for key, value in function(dict(weights)).items():
        torch.testing.assert_close(made[key], value, rtol=1e-2 if name == "half" else 1e-5, atol=1e-5)


def test_sums_of_different_layouts_are_refused() -> None:
    with pytest.raises(DerivationError, match="'c' is a sum of 2 tensors that are laid out in different ways"):
        derive(lambda state: {"c": state["a"] + state["b"].t()}, {"a": (3, 3), "b": (3, 3)})


def test_a_long_permutation_is_an_index_file_beside_the_plan(tmp_path: Path) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).tolist()
    shapes = {"a": (100,), "b": (100, 2)}
    plan = derive(lambda state: {name: value[order] for name, value in state.items()}, shapes).plan
    save_plan(plan.to_toml(), tmp_path / "plan.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.rows-1.json", "plan.toml"]
    found = Plan.from_file(tmp_path / "plan.toml")
    assert len((tmp_path / "plan.toml").read_text()) < 500
    weights = drawn(shapes, 2)
    made = execute_model(plan_model(found, weights).sections["model"], weights)
    assert torch.equal(made["b"], weights["b"][order])


def unfused(state: dict[str, Any]) -> dict[str, Any]:
    """Experts one by one: how many outputs there are is a size of the sources."""
    return {
        name.replace("experts", f"experts.{number}"): part
        for name, value in state.items()
        for number, part in enumerate(value.unbind())
    }


def test_more_experts_than_a_dimension_that_is_kept() -> None:
    shapes = {f"layers.{i}.experts.w": (64, 4096, 1024) for i in range(12)}
    derived = derive(unfused, shapes, scaled=True)
    assert [str(rule) for rule in derived.plan.all_rules()] == [
        "layers.{i:int}.experts.w -> layers.{i}.experts.{b0=0..63}.w, unstack = 0"
    ]
    back = {f"layers.{i}.experts.{e}.w": (4096, 1024) for i in range(12) for e in range(64)}

    def fused(state: dict[str, Any]) -> dict[str, Any]:
        names = [
            [f"layers.{i}.experts.{e}.w" for e in range(64)] for i in range(12) if f"layers.{i}.experts.0.w" in state
        ]
        return {many[0].replace("experts.0", "experts"): torch.stack([state[name] for name in many]) for many in names}

    assert len(list(derive(fused, back, scaled=True).plan.all_rules())) == 1


@pytest.mark.parametrize("turn", [lambda i: 11 - i, lambda i: (i + 1) % 12, lambda i: {4: 5, 5: 4}.get(i, i)])
def test_layers_that_look_alike_and_are_moved_differently(turn: Any) -> None:
    shapes = {f"layers.{i}.w": (4096, 1024) for i in range(12)}

    def turned(state: dict[str, Any]) -> dict[str, Any]:
        return {f"layers.{turn(int(name.split('.')[1]))}.w": value for name, value in state.items()}

    plan = derive(turned, shapes, scaled=True).plan
    small = drawn(dict.fromkeys(shapes, (2, 3)), 1)
    made = execute_model(plan_model(plan, small).sections["model"], small)
    expected = turned(dict(small))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def test_only_dimensions_that_heads_divide_are_left_larger() -> None:
    shapes = {"q": (2048,), "v": (1000, 1600, 2000, 4000)}

    def turned(state: dict[str, Any]) -> dict[str, Any]:
        q = state["q"].view(16, 2, len(state["q"]) // 32).transpose(1, 2)
        return {"q": q.reshape(-1), "w": state["v"]}

    plan = derive(turned, shapes, scaled=True).plan  # with sizes that 32 divides there would be 10**8 elements
    small = {"q": torch.arange(2048), "v": torch.zeros(1, 1, 1, 1)}
    made = execute_model(plan_model(plan, small).sections["model"], small)
    assert torch.equal(made["q"], turned(small)["q"])
    assert made.keys() == {"q", "w"}


def test_small_tensors_are_derived_with_one_thread_and_the_callers_number_comes_back() -> None:
    seen = set()

    def function(state: dict[str, Any]) -> dict[str, Any]:
        seen.add(torch.get_num_threads())
        return {"b": state["a"]}

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        derive(function, {"a": (2, 2)})
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)
