"""What belongs to parameters and is in no section: it is named, and a plan that would leave it wrong is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import MigrationError
from optimstate.plan.language.plan import Plan

WEIGHTS = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3), "b.weight": torch.ones(2, 3)}
RENAME = Plan.from_options(rename=["{p**}=net.{p}"])
DROP = Plan.from_options(drop=["a.bias"])
ONLY = Plan.from_toml('[[rule]]\ndrop = "a.bias"\nonly = "model"\n')


def like_weights() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, 0.5) for name, value in WEIGHTS.items()}


def saved_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"state": {}, "param_groups": []}, file)
    return file.getvalue()


BY_NAME: dict[str, Any] = {
    "a mapping for each moment": {"adam_m": like_weights(), "adam_v": like_weights(), "step": 3},
    "one letter": {"m": like_weights(), "v": like_weights()},
    "velocity": {"velocity": like_weights()},
    "a mapping for each parameter": {"optimizer": {name: {"exp_avg": value} for name, value in like_weights().items()}},
}
BY_POSITION: dict[str, Any] = {
    "lists of moments": {"opt": {"m": [*like_weights().values()], "v": [*like_weights().values()]}},
    "lists beside": {"m": [*like_weights().values()], "v": [*like_weights().values()]},
    "no groups": {"optimizer": {"state": {n: {"exp_avg": v} for n, v in enumerate(like_weights().values())}}},
    "no state": {"optimizer": {"param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}},
    "bytes": {"optimizer": saved_bytes()},
    "bytes in a tensor": {"optimizer": torch.frombuffer(bytearray(saved_bytes()), dtype=torch.uint8)},
    "arrays": {"optimizer": {"m": [value.numpy() for value in like_weights().values()]}},
}
LISTS: dict[str, Any] = {
    "ema": {"ema": [*like_weights().values()]},
    "within": {"callbacks": {"EMA": {"shadow": tuple(like_weights().values()), "decay": 0.9}}},
    "numbered": {"average": dict(enumerate(like_weights().values()))},
}


def saved(folder: Path, beside: Any) -> Path:
    torch.save({"model": WEIGHTS, **beside}, folder / "a.pt")
    return folder / "a.pt"


@pytest.mark.parametrize("form", [*BY_NAME, *BY_POSITION])
def test_state_of_an_unknown_form_is_never_called_fine_and_never_left_wrong(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path, (BY_NAME | BY_POSITION)[form])
    assert optimstate.verify(path).verdict == "unknown"
    assert "of optimizer state" in " ".join(optimstate.inspect(path).resume)
    with pytest.raises(MigrationError, match="form that is not known"):
        optimstate.remap(path, None, DROP, dry_run=True)
    assert any("left as it is" in note for note in optimstate.remap(path, None, ONLY, dry_run=True).notes)
    if form in BY_NAME:
        with pytest.raises(MigrationError, match="renamed or dropped"):
            optimstate.remap(path, None, RENAME, dry_run=True)
    else:  # the order stays what it was
        assert any("left as it is" in note for note in optimstate.remap(path, None, RENAME, dry_run=True).notes)


@pytest.mark.parametrize("form", LISTS)
def test_lists_in_the_order_of_the_model_do_not_lose_their_order(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path, LISTS[form])
    with pytest.raises(MigrationError, match="order and shapes of model model"):
        optimstate.remap(path, None, DROP, dry_run=True)
    assert optimstate.remap(path, None, RENAME, dry_run=True).notes == ()
    assert optimstate.remap(path, None, ONLY, dry_run=True).dropped["model model"] == ("a.bias",)


@pytest.mark.parametrize("beside", [{"masks": dict.fromkeys(WEIGHTS, 1.0)}, {"param_names": list(WEIGHTS)}])
def test_names_that_are_left_elsewhere_are_said(beside: Any, tmp_path: Path) -> None:
    notes = optimstate.remap(saved(tmp_path, beside), None, RENAME, dry_run=True).notes
    assert any(next(iter(beside)) in note and "a.weight" in note for note in notes)
    assert optimstate.remap(saved(tmp_path, {"epoch": 1, "args": ["a"]}), None, RENAME, dry_run=True).notes == ()


def wrapped(state: Any) -> dict[str, Any]:
    """What a wrapper of an optimizer saves: its own state beside that of the optimizer."""
    groups = [{"lr": 0.1, "params": [0, 1, 2], "param_names": list(WEIGHTS)}]
    moments = {number: {"exp_avg": value} for number, value in enumerate(like_weights().values())}
    return {"optimizer": {"base_optimizer": {"state": moments, "param_groups": groups}, **state}}


@pytest.mark.parametrize("key", [lambda number: (0, number), lambda number: number], ids=["pairs", "numbers"])
@pytest.mark.parametrize("slow", [torch.ones(3), torch.tensor(1.0)], ids=["tensors", "single numbers"])
def test_the_state_of_a_wrapper_beside_its_optimizer_is_not_left_with_others(
    key: Any, slow: torch.Tensor, tmp_path: Path
) -> None:
    path = saved(tmp_path, wrapped({"lookahead_state": {key(n): {"slow_params": slow.clone()} for n in range(3)}}))
    assert optimstate.verify(path).verdict == "unknown"
    with pytest.raises(MigrationError, match="slow_params"):
        optimstate.remap(path, None, DROP, dry_run=True)
    scaler = {"loss_scaler": {"scale": torch.tensor(2.0)}, "fp32_from_fp16": [[*like_weights().values()]]}
    assert optimstate.verify(saved(tmp_path, wrapped(scaler))).verdict == "healthy"


def test_state_of_no_parameter_is_never_given_to_one(tmp_path: Path) -> None:
    tree = wrapped({})
    tree["optimizer"]["base_optimizer"]["state"][3] = {"exp_avg": torch.ones(7)}
    path = saved(tmp_path, tree)
    new = Plan.from_options(fresh=["new.weight"])
    with pytest.raises(MigrationError, match="state under '3' belongs to no parameter"):
        optimstate.remap(path, tmp_path / "b.pt", new)
    report = optimstate.remap(path, tmp_path / "b.pt", new.with_policy(unexpected="drop"))
    assert any("state under 3 belongs to no parameter: left out" in note for note in report.notes)
    assert set(torch.load(tmp_path / "b.pt")["optimizer"]["base_optimizer"]["state"]) == {0, 1, 2}
    report = optimstate.remap(path, None, DROP, dry_run=True)
    assert any("state under 3 belongs to no parameter: left as it is" in note for note in report.notes)


def test_a_checkpoint_without_names_is_told_what_it_has_instead(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(MigrationError) as error:
        optimstate.remap(tmp_path / "a.pt", None, RENAME, dry_run=True)
    told = "\n".join(map(str, error.value.problems))
    assert "model model: is a pickled torch.nn.modules.linear.Linear" in told
    assert "convert --section model" in told
    assert "optimizer optimizer: has no parameter names: give it names (optimstate name)" in told
