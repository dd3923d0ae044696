"""`diff` by name: each kind of difference once, and none between equal checkpoints of other containers."""

from __future__ import annotations

from pathlib import Path

import torch

from optimstate.plan.language.plan import Plan
from optimstate.surgery.comparing import diff
from optimstate.surgery.converting import convert
from optimstate.surgery.remapping import remap
from tests.surgery.test_verify import saved, trained


def test_equal_checkpoints_of_two_containers_differ_in_nothing(tmp_path: Path) -> None:
    path, other = saved(trained(), tmp_path), tmp_path / "other.safetensors"
    convert(path, other)
    report = diff(path, other)
    assert report.changes == ()
    assert report.equal == 6 + 12


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


def test_tying_is_a_difference(tmp_path: Path) -> None:
    left, right = tmp_path / "left.pt", tmp_path / "right.pt"
    weight = torch.randn(3, 3)
    torch.save({"model": {"a": weight, "b": weight}}, left)
    torch.save({"model": {"a": weight, "b": weight.clone()}}, right)
    (change,) = diff(left, right).changes
    assert (change.kind, change.name, change.left, change.right) == ("sharing", "a, b", "shared", "separate")
