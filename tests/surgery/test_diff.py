"""`diff` by name: each kind of difference once, and none between equal checkpoints of other containers."""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimstate.errors import UsageError
from optimstate.plan.language.plan import Plan
from optimstate.surgery.comparison.comparing import diff
from optimstate.surgery.inspection.inspecting import inspect
from optimstate.surgery.writing.converting import convert
from optimstate.surgery.writing.remapping import remap
from tests.corpus import Case, all_cases
from tests.surgery.equality import equal
from tests.surgery.test_verify import saved, trained


def test_equal_checkpoints_of_two_containers_differ_in_nothing(tmp_path: Path) -> None:
    path, other = saved(trained(), tmp_path), tmp_path / "other.safetensors"
    convert(path, other)
    report = diff(path, other)
    assert report.changes == ()
    assert report.equal == 6 + 18


def test_each_kind_of_difference(tmp_path: Path) -> None:
    left = saved(trained(), tmp_path)
    checkpoint = torch.load(left, weights_only=True)
    model = checkpoint["model"]
    model["new"] = torch.full((2,), 7.0)
    model["renamed.bias"] = model.pop("4.bias")
    model["0.weight"] = model["0.weight"] * 1.5
    model["2.weight"] = model["2.weight"].reshape(4, 16)
    model["2.bias"] = model["2.bias"].double()
    checkpoint["optimizer"]["param_groups"][0]["lr"] = 0.5
    checkpoint["optimizer"]["state"][0]["step"] += 1
    right = tmp_path / "right.pt"
    torch.save(checkpoint, right)
    found = {(change.kind, change.name): change for change in diff(left, right).changes}
    assert set(found) == {
        ("added", "new"),
        ("renamed", "4.bias"),
        ("changed", "0.weight"),
        ("reshaped", "2.weight"),
        ("retyped", "2.bias"),
        ("option", "group 0 lr"),
        ("option", "0.weight step"),
    }
    assert found["renamed", "4.bias"].right == "renamed.bias"
    assert found["retyped", "2.bias"].relative == 0
    relative = found["changed", "0.weight"].relative
    assert relative is not None
    assert abs(relative - 0.5) < 1e-6


def test_headers_alone_do_not_look_at_contents(tmp_path: Path) -> None:
    left, right = saved(trained(), tmp_path), tmp_path / "right.pt"
    checkpoint = torch.load(left, weights_only=True)
    checkpoint["model"]["0.weight"] += 1
    torch.save(checkpoint, right)
    assert diff(left, right, headers=True).changes == ()
    assert [change.kind for change in diff(left, right).changes] == ["changed"]


def test_renamed_parameters_are_recognised_by_content_in_model_and_optimizer(tmp_path: Path) -> None:
    left, right = saved(trained(), tmp_path), tmp_path / "right.pt"
    remap(left, right, Plan.from_options(rename=["{i}.{p}=layers.{i}.{p}"]))
    changes = diff(left, right).changes
    renamed = [change for change in changes if change.kind == "renamed"]
    assert len(renamed) == 6 + 12
    assert len(changes) == len(renamed)  # step, too, is compared with that of the same parameter


def test_content_that_several_have_makes_no_rename(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    for side, names in (("left", ("a.weight", "b.weight")), ("right", ("c.weight", "d.weight"))):
        torch.save({"model": {name: weight.clone() for name in names}}, tmp_path / f"{side}.pt")
    changes = diff(tmp_path / "left.pt", tmp_path / "right.pt").changes
    assert Counter(change.kind for change in changes) == {"removed": 2, "added": 2}


def test_tying_is_a_difference(tmp_path: Path) -> None:
    left, right = tmp_path / "left.pt", tmp_path / "right.pt"
    weight = torch.randn(3, 3)
    torch.save({"model": {"a": weight, "b": weight}}, left)
    torch.save({"model": {"a": weight, "b": weight.clone()}}, right)
    (change,) = diff(left, right).changes
    assert (change.kind, change.name, change.left, change.right) == ("sharing", "a, b", "shared", "separate")


# --- everything is compared -----------------------------------------------------------------------------------------


TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from([(), (1,), (2,), (2, 3), (0, 2)]),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.complex64]),
    st.sampled_from([0.0, 1.0, 2.0]),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.floats(width=16),
    st.sampled_from(["", "1", "True", "model", b"a", b"b", 1j, {1}, {1, 2}, torch.float16, torch.Size([1])]),
)
KEYS = st.sampled_from(
    [
        "a",
        "b.weight",
        "c.d.bias",
        "model",
        "state",
        "param_groups",
        "module.x",
        "last_epoch",
        "1",
        1,
        0,
        True,
        None,
        1.5,
    ]
)
TREES = st.recursive(
    st.one_of(PLAIN, TENSORS),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["l.0.weight", "l.0.bias", "l.1.weight"]), TENSORS, min_size=1),
    ),
    max_leaves=12,
)


@st.composite
def two_trees(draw: st.DrawFn) -> tuple[Any, Any]:
    """A tree, and the same, one with one place changed, or another."""
    tree = draw(TREES)
    if draw(st.integers(0, 4)) == 0:
        return tree, draw(TREES)
    return tree, changed(tree, draw(TREES), draw) if draw(st.booleans()) else tree


def changed(tree: Any, new: Any, draw: st.DrawFn) -> Any:
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(list(tree)))
        return {**tree, key: changed(tree[key], new, draw)}
    if isinstance(tree, list | tuple) and tree and type(tree) is not torch.Size and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(tree) - 1))
        return type(tree)([*tree[:place], changed(tree[place], new, draw), *tree[place + 1 :]])
    return new


def judge(folder: Path, trees: tuple[Any, Any]) -> None:
    """Save two trees: diff finds something exactly where torch loads others."""
    for name, tree in zip("ab", trees, strict=True):
        torch.save(tree, folder / f"{name}.pt")
    loaded = [torch.load(folder / f"{name}.pt", weights_only=True) for name in "ab"]
    report = diff(folder / "a.pt", folder / "b.pt")
    assert (report.changes == ()) == equal(*loaded), report


@settings(max_examples=150, deadline=None)
@given(two_trees())
def test_there_is_no_difference_exactly_where_the_trees_are_equal(
    tmp_path_factory: pytest.TempPathFactory, trees: tuple[Any, Any]
) -> None:
    judge(tmp_path_factory.mktemp("trees"), trees)


ODD_KEYS = st.sampled_from(["m", "a", "m.a", "m['a']", "['m']", "[1]", 1, "1", 0, None, 1.5, "(NoneType) None"])
SLOTS = st.dictionaries(
    ODD_KEYS,
    st.one_of(PLAIN, TENSORS, st.dictionaries(ODD_KEYS, st.one_of(PLAIN, TENSORS), min_size=1, max_size=2)),
    max_size=2,
)


@st.composite
def two_optimizers(draw: st.DrawFn) -> tuple[Any, Any]:
    """An optimizer's state with whatever programs put into one, and the same with another of its parts, or none."""
    parts = {"slots": SLOTS, "orphan": SLOTS, "options": SLOTS, "beside": SLOTS, "key": st.sampled_from([7, "7", 8])}
    parts["listing"] = st.sampled_from([list, tuple])
    one = {name: draw(strategy) for name, strategy in parts.items()}
    name = draw(st.sampled_from([*parts, ""]))
    other = {**one, name: draw(parts[name])} if name else one
    return optimizer_of(**one), optimizer_of(**other)


def optimizer_of(*, slots: Any, orphan: Any, options: Any, beside: Any, key: Any, listing: Any) -> Any:
    state = {0: {"exp_avg": torch.ones(2), **slots}, key: orphan}
    groups = [{"lr": 0.1, **options, "params": listing([0, 1])}]
    return {"model": {"a.weight": torch.ones(2)}, "optimizer": {"state": state, "param_groups": groups, **beside}}


@settings(max_examples=100, deadline=None)
@given(two_optimizers())
def test_optimizers_with_anything_in_them_differ_exactly_where_torch_sees_it(
    tmp_path_factory: pytest.TempPathFactory, trees: tuple[Any, Any]
) -> None:
    folder = tmp_path_factory.mktemp("optimizers")
    judge(folder, trees)
    inspect(folder / "a.pt", parameters=True)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_a_checkpoint_does_not_differ_from_itself(case: Case) -> None:
    report = diff(case.entry, case.entry)
    assert report.changes == ()


class Marked(torch.Tensor):
    pass


def marked(value: Any) -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.mark = value  # type: ignore[attr-defined]
    return tensor


def versioned(version: int) -> Any:
    state = OrderedDict({"a.weight": torch.ones(2, 2)})
    state._metadata = OrderedDict({"": {"version": version}})  # type: ignore[attr-defined]
    return state


def jagged(value: float) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.full((3,), value)], layout=torch.jagged)


def quantized(scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), scale, 0, torch.qint8)


def unlike() -> dict[str, tuple[Any, Any]]:
    return {
        "conjugated": (torch.tensor([1 + 1j]).conj(), torch.tensor([1 + 1j])),
        "negated": (torch.tensor([1j]).conj().imag, torch.tensor([1j]).imag),
        "attributes of tensors": (marked(1), marked(2)),
        "an attribute more": (marked(1), torch.ones(2)),
        "versions of modules": (versioned(1), versioned(2)),
        "tensors in sets": ({torch.ones(2)}, {torch.zeros(2)}),
        "sparse": (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
        "csr": (torch.eye(3).to_sparse_csr(), (2 * torch.eye(3)).to_sparse_csr()),
        "quantized": (quantized(0.5), quantized(0.25)),
        "nested": (torch.nested.nested_tensor([torch.ones(2)]), torch.nested.nested_tensor([torch.zeros(2)])),
        "jagged": (jagged(1.0), jagged(2.0)),
        "meta": (torch.ones(2, device="meta"), torch.ones(3, device="meta")),
        "subclasses": (torch.ones(2).as_subclass(Marked), torch.zeros(2).as_subclass(Marked)),
        "a subclass": (torch.ones(2).as_subclass(Marked), torch.ones(2)),
        "objects": (argparse.Namespace(a=1), argparse.Namespace(a=1, b=None)),
        "tensors in objects": (argparse.Namespace(a=torch.ones(2)), argparse.Namespace(a=torch.zeros(2))),
        "arrays": (np.ones(2), np.ones(2, dtype=np.float32)),
        "numbers of numpy": (np.float64(1), 1.0),
        "queues": (deque([torch.ones(2)]), deque([torch.zeros(2)])),
        "counters": (Counter(a=1), {"a": 1}),
        "storages": (torch.FloatStorage([1, 2]), torch.FloatStorage([1, 3])),
        "long keys": ({"x" * 9000 + "a": 1}, {"x" * 9000 + "b": 1}),
        "not a number": (float("nan"), 1.0),
        "numbers that are none": (torch.tensor([float("nan")]), torch.tensor([1.0])),
        "devices": (torch.device("cpu"), torch.device("cuda:0")),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_of_any_kind_differ_from_others_and_not_from_themselves(tmp_path: Path) -> None:
    for name, values in unlike().items():
        for side, value in zip("ab", values, strict=True):
            torch.save({"x": value, "y": [value]}, tmp_path / f"{side}.pt")
        assert diff(tmp_path / "a.pt", tmp_path / "b.pt").changes, name
        for side in "ab":
            assert not diff(tmp_path / f"{side}.pt", tmp_path / f"{side}.pt").changes, name


def test_a_template_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "a.pt")
    torch.save({"a.weight": torch.zeros(2, 2)}, tmp_path / "b.pt")
    assert diff(tmp_path / "a.pt", tmp_path / "b.pt", name="a.*").changes
    with pytest.raises(UsageError, match="no name on either side matches 'b"):
        diff(tmp_path / "a.pt", tmp_path / "b.pt", name="b.*")
    with pytest.raises(UsageError, match="no name matches"):
        inspect(tmp_path / "a.pt", name="b.*")


def test_statistics_say_what_they_leave_out(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2, 2), "n": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pt")
    assert any("1 int64" in note for note in inspect(tmp_path / "a.pt", statistics=True).notes)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_code_of_two_torchscript_archives_is_compared(tmp_path: Path) -> None:
    for name, made in {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)}.items():
        torch.jit.save(torch.jit.script(made), tmp_path / f"{name}.pt")
    assert diff(tmp_path / "a.pt", tmp_path / "a.pt").changes == ()
    changed = [change.name for change in diff(tmp_path / "a.pt", tmp_path / "b.pt").changes]
    assert any(name.startswith("code[") and name.endswith("linear.py']") for name in changed)
