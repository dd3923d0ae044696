"""Plans proposed from names, shapes and contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optimstate.plan.apply.execute import execute_model
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_model
from optimstate.plan.solve.resolve import Resolver
from optimstate.plan.solve.suggest import Suggestion, suggest

Shapes = dict[str, tuple[int, ...]]


def layers(pattern: str, shape: tuple[int, ...], count: int = 3) -> Shapes:
    return {pattern.format(i=i): shape for i in range(count)}


def block(prefix: str, shift: int = 0) -> Shapes:
    made: Shapes = {}
    for i in range(3):
        made |= {f"{prefix}.{i + shift}.up.weight": (16, 8), f"{prefix}.{i + shift}.up.bias": (16,)}
        made |= {f"{prefix}.{i + shift}.down.weight": (8, 16), f"{prefix}.{i + shift}.down.bias": (8,)}
    return made


def applied(found: Suggestion, old: Shapes) -> Shapes:
    problems: list[str] = []
    resolved = Resolver(found.plan.passes, "", [0] * len(found.rules), problems).resolve(old)
    assert not problems
    return {name: item.expression.shape or () for name, item in resolved.made.items()}


def test_nothing_is_proposed_where_nothing_changed() -> None:
    assert suggest(block("layers"), block("layers")) == Suggestion((), (), ())


def test_a_renamed_stack_is_two_rules() -> None:
    old, new = block("encoder.layers"), block("blocks")
    found = suggest(old, new)
    assert {str(item.rule) for item in found.rules} == {
        "encoder.layers.{i}.up.{p} -> blocks.{i}.up.{p}",
        "encoder.layers.{i}.down.{p} -> blocks.{i}.down.{p}",
    }
    assert applied(found, old) == new
    assert all(item.confidence > 0.7 for item in found.rules)


def test_shifted_layers() -> None:
    old = layers("h.{i}.w", (4, 4))
    new = {f"h.{i + 2}.v": (4, 4) for i in range(3)}
    found = suggest(old, new)
    assert [str(item.rule) for item in found.rules] == ["h.{i:int}.w -> h.{i+2}.v"]
    assert "moves by 2" in found.rules[0].reason


def test_fused_and_cut() -> None:
    separate = {
        **layers("h.{i}.q.weight", (8, 8)),
        **layers("h.{i}.k.weight", (2, 8)),
        **layers("h.{i}.v.weight", (2, 8)),
    }
    fused = layers("h.{i}.qkv.weight", (12, 8))
    join = suggest(separate, fused)
    assert applied(join, separate) == fused
    assert "concat = 0" in str(join.rules[0].rule)
    cut = suggest(fused, separate)
    assert applied(cut, fused) == separate
    assert "sizes = [8, 2, 2]" in str(cut.rules[0].rule)
    assert join.rules[0].confidence < 1


def test_experts_resized_and_transposed() -> None:
    old = {**layers("h.{i}.mlp.weight", (8, 8)), "embed.weight": (11, 8), "proj.weight": (8, 3)}
    new = {f"h.{i}.experts.{e}.weight": (8, 8) for i in range(3) for e in range(2)}
    new |= {"embed.weight": (16, 8), "proj.weight": (3, 8)}
    found = suggest(old, new)
    assert applied(found, old) == new
    assert {str(item.rule) for item in found.rules} == {
        "h.{i}.mlp.weight -> h.{i}.experts.{j=0..1}.weight",
        "embed.weight -> embed.weight, resize = { dim = 0, size = 16 }",
        "proj.weight -> proj.weight, transpose = true",
    }


def test_contents_decide_where_shapes_cannot() -> None:
    names = {"a": (2, 2), "b": (2, 2)}
    swapped = suggest(names, names, old_contents={"a": "1", "b": "2"}, new_contents={"a": "2", "b": "1"})
    assert {(str(item.rule), item.confidence) for item in swapped.rules} == {("a -> b", 1.0), ("b -> a", 1.0)}
    renamed = suggest(
        {"x": (2,), "y": (2,)},
        {"p": (2,), "q": (2,)},
        old_contents={"x": "1", "y": "2"},
        new_contents={"p": "2", "q": "1"},
    )
    assert {str(item.rule) for item in renamed.rules} == {"x -> q", "y -> p"}


def test_what_nothing_explains_is_said() -> None:
    found = suggest({"old.weight": (3, 5)}, {"new.weight": (7, 2)})
    assert found == Suggestion((), ("new.weight",), ("old.weight",))


def test_equal_shapes_are_never_guessed() -> None:
    found = suggest({"a.x": (4,), "a.y": (4,)}, {"b.u": (4,), "b.v": (4,)})
    assert (found.rules, found.missing, found.unused) == ((), ("b.u", "b.v"), ("a.x", "a.y"))
    (decision,) = found.decisions
    assert not decision.proposed
    assert {frozenset(map(str, choice.rules)) for choice in decision.choices} == {
        frozenset({"a.x -> b.u", "a.y -> b.v"}),
        frozenset({"a.x -> b.v", "a.y -> b.u"}),
    }
    one_more = suggest({"a.x": (4,), "a.y": (4,)}, {"b.u": (4,)})
    assert (one_more.rules, one_more.missing) == ((), ("b.u",))
    one_less = suggest({"a.x": (4,)}, {"b.u": (4,), "b.v": (4,)})
    assert (one_less.rules, one_less.unused) == ((), ("a.x",))


@pytest.mark.parametrize("side", ["old", "new"])
def test_contents_that_several_names_have_decide_nothing(side: str) -> None:
    many, one = {"a": "1", "b": "1"}, {"p": "1", "q": "2"}
    if side == "old":
        found = suggest(dict.fromkeys(many, (2,)), dict.fromkeys(one, (2,)), old_contents=many, new_contents=one)
    else:
        found = suggest(dict.fromkeys(one, (2,)), dict.fromkeys(many, (2,)), old_contents=one, new_contents=many)
    assert found.rules == ()


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_several_names_have_decide_nothing(side: int) -> None:
    many, one = ("a", "b"), ("p", "q")
    rows = {"a": b"12", "b": b"12", "p": b"12", "q": b"34"}
    old, new = (dict.fromkeys(names, (2,)) for names in ((many, one), (one, many))[side])
    found = suggest(old, new, rows=lambda _, name, __: [rows[name][:1], rows[name][1:]])
    assert found.rules == ()


def test_the_same_elements_in_another_shape() -> None:
    old, new = layers("h.{i}.proj.weight", (8, 3, 2, 2)), layers("h.{i}.proj.weight", (8, 12))
    found = suggest(old, new)
    assert [str(item.rule) for item in found.rules] == ["h.{i}.proj.weight -> h.{i}.proj.weight, reshape = [8, 12]"]
    assert applied(found, old) == new
    assert suggest({"w": (4, 6)}, {"w": (5, 5)}).rules == ()


def test_equal_contents_decide_between_a_transpose_and_a_reshape_and_find_a_rename() -> None:
    def rule(same: bool, target: str = "w") -> str:
        contents = [{"w": "x"}, {target: "x"}] if same else [{}, {}]
        found = suggest({"w": (4, 6)}, {target: (6, 4)}, old_contents=contents[0], new_contents=contents[1])
        return str(found.rules[0].rule)

    assert "transpose" in rule(same=False)
    assert "reshape = [6, 4]" in rule(same=True)
    assert rule(same=True, target="v") == "w -> v, reshape = [6, 4]"


def rows_of(*sides: dict[str, str]) -> Any:
    """Rows that are letters."""
    return lambda side, name, dim: (
        [letter.encode() for letter in sides[side][name]] if name in sides[side] and not dim else None
    )


def test_chosen_rows_are_found_by_their_contents() -> None:
    old, new = {"embed.weight": (6, 2)}, {"embed.weight": (3, 2)}
    found = suggest(old, new, rows=rows_of({"embed.weight": "abcdef"}, {"embed.weight": "eac"}))
    assert [(str(item.rule).partition(", ")[2], item.confidence) for item in found.rules] == [
        ("select = { dim = 0, index = [4, 0, 2] }", 1.0)
    ]
    unsure = suggest(old, new, rows=rows_of({"embed.weight": "abcdee"}, {"embed.weight": "eac"}))
    assert "resize" in str(unsure.rules[0].rule)


PARTS = {"a.q.weight": "abcd", "a.k.weight": "efgh", "a.v.weight": "ijkl"}


@pytest.mark.parametrize(
    ("whole", "steps"),
    [
        ("abcdefghijkl", {"cut": "split = 0", "join": "concat = 0"}),
        ("aeibfjcgkdhl", {"cut": "interleaved", "join": "interleaved"}),
        ("abefijcdghkl", {"cut": "interleaved", "join": "interleaved"}),
    ],
    ids=["blocks", "row by row", "head by head"],
)
def test_rows_decide_how_a_tensor_is_cut_and_joined(whole: str, steps: dict[str, str]) -> None:
    parts: Shapes = dict.fromkeys(PARTS, (4, 2))
    fused: Shapes = {"a.qkv.weight": (12, 2)}
    for name, old, new, rows in (
        ("cut", fused, parts, rows_of({"a.qkv.weight": whole}, PARTS)),
        ("join", parts, fused, rows_of(PARTS, {"a.qkv.weight": whole})),
    ):
        found = suggest(old, new, rows=rows)
        (item,) = found.rules
        assert item.confidence == 1.0
        assert steps[name] in f"{item.rule} {item.reason}"
        assert found.options == ()
        assert applied(found, old) == new


def test_without_contents_the_ways_to_cut_are_named_and_what_decides() -> None:
    found = suggest({"a.qkv.weight": (12, 2)}, dict.fromkeys(PARTS, (4, 2)))
    assert found.rules[0].confidence < 1
    (option,) = found.options
    assert "a.qkv.weight may hold a.q.weight and a.k.weight and a.v.weight in blocks" in option
    assert "would decide" in option
    (decision,) = found.decisions
    assert decision.proposed
    assert decision.choices[0].rules == (found.rules[0].rule,)
    fused = torch.arange(24.0).reshape(12, 2)
    made = []
    for choice in decision.choices:
        plan = Plan(choice.rules)
        parts = execute_model(plan_model(plan, {"a.qkv.weight": fused}).sections["model"], {"a.qkv.weight": fused})
        made.append(torch.stack([parts[f"a.{part}.weight"] for part in "qkv"]))
    for groups in (1, 2, 4):  # in blocks, head by head, row by row
        wanted = fused.reshape(groups, 3, 4 // groups, 2).transpose(0, 1).reshape(3, 4, 2)
        assert any(torch.equal(each, wanted) for each in made)


def told(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> Suggestion:
    def rows(side: int, name: str, dim: int) -> list[bytes] | None:
        tensor = (old, new)[side].get(name)
        return None if tensor is None else [bytes(row.contiguous().numpy().tobytes()) for row in tensor.unbind(dim)]

    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (old, new)]
    return suggest(*shapes, rows=rows)


A = torch.arange(24.0).reshape(4, 6)
SQUARE = torch.arange(16.0).reshape(4, 4)
ARRANGED: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "transposed under another name": (A, lambda x: x.t(), "b"),
    "a square one transposed": (SQUARE, lambda x: x.t(), "a"),
    "a square one transposed under another name": (SQUARE, lambda x: x.t(), "b"),
    "rows in another order": (SQUARE, lambda x: x[[2, 0, 3, 1]], "a"),
    "columns in another order": (SQUARE, lambda x: x[:, [2, 0, 3, 1]], "a"),
    "columns chosen": (A, lambda x: x[:, [5, 0, 2]], "a"),
    "channels chosen": (A.reshape(2, 6, 2), lambda x: x[:, [5, 0, 2]], "a"),
    "rows chosen under another name": (A, lambda x: x[[3, 1]], "b"),
    "rows added behind": (A, lambda x: torch.cat([x, -x[:2] - 1]), "a"),
    "rows added before": (A, lambda x: torch.cat([-x[:2] - 1, x]), "a"),
    "columns added between": (A, lambda x: torch.cat([x[:, :2], -x[:, :1] - 1, x[:, 2:]], 1), "a"),
}


@pytest.mark.parametrize("case", ARRANGED)
@pytest.mark.parametrize("count", [1, 3])
def test_contents_tell_how_elements_are_arranged(case: str, count: int) -> None:
    tensor, change, name = ARRANGED[case]
    layers = {number: tensor + 100 * number for number in range(count)}
    old = {f"{number}.a.weight": value for number, value in layers.items()}
    new = {f"{number}.{name}.weight": change(value) for number, value in layers.items()}
    found = told(old, new)
    assert (found.missing, found.unused) == ((), ())
    assert {item.confidence for item in found.rules} == {1.0}
    made = execute_model(plan_model(found.plan, old).sections["model"], old)
    for key, wanted in new.items():
        known = wanted >= 0
        assert torch.equal(made[key][known], wanted[known]), key


def test_a_rename_with_a_change_of_shape_needs_no_contents() -> None:
    for had, wanted, operation in (
        ((4, 6), (6, 4), "transpose = true"),
        ((8, 3, 2, 2, 2), (8, 24), "reshape = [8, 24]"),
        ((8, 24), (8, 3, 2, 2, 2), "reshape = [8, 3, 2, 2, 2]"),
        ((8, 24), (10, 24), "resize = { dim = 0, size = 10 }"),
    ):
        found = suggest({"patch.weight": had, "z.b": (3,)}, {"embed.weight": wanted, "z.b": (3,)})
        assert [str(item.rule) for item in found.rules] == [f"patch.weight -> embed.weight, {operation}"]
        assert found.rules[0].confidence < 0.75


def test_what_shapes_leave_open_is_said() -> None:
    found = suggest({"a.weight": (4, 6), "s.weight": (4, 4)}, {"a.weight": (6, 4), "s.weight": (4, 4)})
    assert any("s.weight is square" in option for option in found.options)
    found = suggest({"a.weight": (9, 6)}, {"a.weight": (4, 6)})
    assert any("may keep other rows" in option for option in found.options)


def test_a_square_matrix_beside_transposed_ones_has_two_possibilities() -> None:
    for name in ("s.weight", "t.s.weight"):
        found = suggest({"a.weight": (4, 6), "s.weight": (4, 4)}, {"a.weight": (6, 4), name: (4, 4)})
        decision = next(each for each in found.decisions if "square" in each.about)
        assert decision.proposed
        assert [
            "transpose" in str(choice.rules) or "Transpose" in str(choice.rules) for choice in decision.choices
        ] == [
            False,
            True,
        ]


def test_other_modules_of_the_same_shape_do_not_take_each_others_place() -> None:
    old = {"h.0.attn.proj.weight": (4, 4), "h.0.mlp.out.weight": (4, 4)}
    new = {"h.0.mlp.proj.weight": (4, 4), "h.0.attn.o.weight": (4, 4)}
    assert {str(item.rule) for item in suggest(old, new).rules} == {
        "h.{i}.attn.proj.weight -> h.{i}.attn.o.weight",
        "h.{i}.mlp.out.weight -> h.{i}.mlp.proj.weight",
    }
    old = {"h.0.one.proj.weight": (4, 4), "h.0.two.out.weight": (4, 4)}
    new = {"h.0.two.proj.weight": (4, 4), "h.0.one.other.weight": (4, 4)}
    assert suggest(old, new).rules == ()


@pytest.mark.parametrize(("had", "wanted"), [(4, 3), (3, 4)])
def test_fewer_and_more_layers_under_another_name(had: int, wanted: int) -> None:
    old = {name: (4, 4) for i in range(had) for name in (f"layers.{i}.q.weight", f"layers.{i}.k.weight")}
    new = {name: (4, 4) for i in range(wanted) for name in (f"blocks.{i}.q.weight", f"blocks.{i}.k.weight")}
    found = suggest(old, new)
    assert len(found.missing) == max(0, wanted - had) * 2
    assert len(found.unused) == max(0, had - wanted) * 2
    made = applied(found, old)
    assert made.items() >= {n: s for n, s in new.items() if n not in found.missing}.items()
    assert any("do not tell which were" in option for option in found.options)
