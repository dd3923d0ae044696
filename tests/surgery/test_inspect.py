"""`inspect`: its statistics against the truths of real files and against torch, and what it says of resuming."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.surgery.inspection.report import ModelInfo, OptimizerInfo, ParameterInfo
from optimstate.surgery.statistics import Statistics, statistics
from optimstate.tree import tensors
from tests.cli.running import run
from tests.corpus import Case, all_cases, case
from tests.surgery.test_verify import saved, slots, trained


def optimizers(path: Path, **options: Any) -> list[OptimizerInfo]:
    found = optimstate.inspect(path, statistics=True, **options).sections
    return [section for section in found if isinstance(section, OptimizerInfo)]


def by_name(path: Path) -> dict[str, ParameterInfo]:
    return {str(parameter.name): parameter for parameter in optimizers(path)[0].parameters}


# --- against what the live optimizers held --------------------------------------------------------------------------


def told() -> list[Case]:
    """The real files of one named optimizer whose truth has sums of squares."""
    found = []
    for entry in all_cases():
        truth = entry.truth() if entry.truth_path and not entry.is_hostile else {}
        if "state" in truth and not entry.name.startswith(("bitsandbytes/", "torchao/", "heavyball/")):
            found.append(entry)
    return found


def test_norms_are_those_that_live_optimizers_had() -> None:
    compared = 0
    for entry in told():
        found = optimizers(entry.entry)
        if len(found) != 1 or not found[0].named:
            continue
        parameters = {str(parameter.name): parameter.statistics for parameter in found[0].parameters}
        for name, truth in entry.truth()["state"].items():
            for slot, value in truth.items():
                if slot in parameters.get(name, {}) and isinstance(value, dict) and "l2" in value:
                    norm = parameters[name][slot].norm
                    assert norm == pytest.approx(value["l2"], rel=1e-5, abs=1e-30), (entry.name, name, slot)
                    compared += 1
    assert compared > 200


# --- against torch --------------------------------------------------------------------------------------------------


def expected(tensor: torch.Tensor) -> Statistics:
    """The same by torch's plain means over the whole tensor at once."""
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    finite = wide[wide.isfinite()]
    real = finite.real if finite.is_complex() else finite
    part = wide.real if wide.is_complex() else wide
    nan = int(wide.isnan().sum())
    return Statistics(
        tensor.numel(),
        nan,
        int((~wide.isfinite()).sum()) - nan,
        int((wide == 0).sum()),
        int((part < 0).sum()),
        float(torch.linalg.vector_norm(finite)) if finite.numel() else 0.0,
        float(real.min()) if finite.numel() else None,
        float(real.max()) if finite.numel() else None,
    )


def planted(tensor: torch.Tensor) -> torch.Tensor:
    """With zeros of both signs, and infinities and NaN where the dtype has them, far apart and in one block."""
    flat = tensor.reshape(-1)
    flat[3:9] = 0.0
    if not tensor.is_complex():
        flat[5] = -0.0
    if tensor.dtype != torch.float8_e4m3fn:
        flat[11] = float("inf")
        flat[-1] = float("-inf")
    flat[70_000:70_003] = float("nan")
    return tensor


KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
MAKERS: dict[str, Callable[[], torch.Tensor]] = {
    **{str(dtype): lambda dtype=dtype: planted(torch.randn(300, 301).to(dtype)) for dtype in KINDS},  # type: ignore[misc]
    **{str(dtype): lambda dtype=dtype: planted(torch.randn(300, 301)).to(dtype) for dtype in NARROW},  # type: ignore[misc]
    "finite": lambda: torch.randn(300, 301),
    "positive": lambda: torch.rand(300, 301) + 1,
    "transposed": lambda: torch.randn(300, 301).t(),
    "every other": lambda: torch.randn(300, 602)[:, ::2],
    "no finite": lambda: torch.full((70_000,), math.nan),
    "only -inf": lambda: torch.full((70_000,), -math.inf),
    "zeros": lambda: torch.zeros(70_000),
    "one": lambda: torch.tensor(-2.5),
    "squares beyond a double": lambda: torch.tensor([3e200, 4e200], dtype=torch.float64),
    "squares below a double": lambda: torch.tensor([3e-200, 4e-200], dtype=torch.float64),
}


@pytest.mark.parametrize("name", MAKERS)
def test_statistics_are_torchs(name: str, tmp_path: Path) -> None:
    from optimstate.formats.registry import open_checkpoint

    torch.manual_seed(1)
    tensor = MAKERS[name]()
    torch.save({"w": tensor}, tmp_path / "one.pt")
    document = open_checkpoint(tmp_path / "one.pt")
    [(_, lazy)] = tensors(document.tree)
    found, truth = statistics(lazy), expected(tensor.float() if tensor.dtype in NARROW else tensor)
    if "beyond" in name or "below" in name:  # torch's own norm leaves the range of a double
        assert found.norm == pytest.approx(5e200 if "beyond" in name else 5e-200, rel=1e-12)
        return
    assert found.norm == pytest.approx(truth.norm, rel=1e-12)
    for count in ("elements", "nan", "inf", "zeros", "negative", "minimum", "maximum"):
        assert getattr(found, count) == getattr(truth, count), count


def test_parts_add_up_to_the_whole() -> None:
    parts = [Statistics(2, 1, 0, 0, 1, 3.0, -3.0, -3.0), Statistics(), Statistics(3, 0, 1, 1, 0, 4.0, 0.0, 4.0)]
    assert sum(parts, Statistics()) == Statistics(5, 1, 1, 1, 1, 5.0, -3.0, 4.0)
    assert sum(parts, Statistics()).rms == pytest.approx(5 / math.sqrt(3))


def test_a_norm_beyond_a_double_is_none_and_the_json_holds_it(tmp_path: Path) -> None:
    torch.save({"w": torch.full((4,), 1.7e308, dtype=torch.float64)}, tmp_path / "one.pt")
    text = optimstate.inspect(tmp_path / "one.pt", statistics=True).to_json()
    found = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert found["sections"][0]["statistics"]["w"]["norm"] is None
    assert found["sections"][0]["statistics"]["w"]["maximum"] == 1.7e308


PROBE = """
import resource, sys
from pathlib import Path
import torch
import optimstate
torch.randn(4).double().dot(torch.ones(4).double())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = optimstate.inspect(sys.argv[1], statistics=True)
assert found.sections[0].statistics["w"].elements == 1 << 25
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1 << 25)}, tmp_path / "large.pt")  # 128 MiB
    out = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "large.pt")], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) < 40_000  # kilobytes


# --- what it says ---------------------------------------------------------------------------------------------------


def test_without_statistics_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; import optimstate; found = optimstate.inspect(sys.argv[1], parameters=True); "
        "assert found.sections; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    path = str(case("torch/adamw_named_layerwise_sequentiallr").entry)
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_oddities_of_numbers_are_notes_that_name_the_parameter(tmp_path: Path) -> None:
    checkpoint = trained()
    slots(checkpoint, 0)["exp_avg"][0, 0] = math.nan
    slots(checkpoint, 1)["exp_avg_sq"][0, 0] = -1.0
    slots(checkpoint, 2)["exp_avg"].zero_()
    slots(checkpoint, 2)["exp_avg_sq"].zero_()
    checkpoint["model"]["0.bias"][1] = math.inf
    notes = optimstate.inspect(saved(checkpoint, tmp_path), statistics=True).notes
    names = [str(parameter.name) for parameter in optimizers(tmp_path / "checkpoint.pt")[0].parameters]
    for name, words in (
        (names[0], "exp_avg: 1 of 48 are NaN or inf"),
        (names[1], "exp_avg_sq has negative values: 1, down to -1"),
        (names[2], "exp_avg, exp_avg_sq are all zero at step 5"),
        ("model at model", "0.bias: 1 of 8 are NaN or inf"),
    ):
        assert any(name in note and words in note for note in notes), (name, notes)
    assert len(notes) == 4


def test_no_more_oddities_than_people_read(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.tensor([math.nan, 1.0]) for i in range(50)}, tmp_path / "bad.pt")
    notes = optimstate.inspect(tmp_path / "bad.pt", statistics=True).notes
    assert len(notes) == 21
    assert notes[-1].startswith("30 more")


def test_a_whole_run_misses_nothing(tmp_path: Path) -> None:
    assert optimstate.inspect(saved(trained(), tmp_path)).resume == ()


def drop_model(c: dict[str, Any]) -> None:
    del c["model"]


def drop_optimizer(c: dict[str, Any]) -> None:
    del c["optimizer"]


def forget_one(c: dict[str, Any]) -> None:
    del c["optimizer"]["state"][0]


def forget_all(c: dict[str, Any]) -> None:
    c["optimizer"]["state"].clear()


def step_back(c: dict[str, Any]) -> None:
    slots(c)["step"].fill_(3.0)


def unname(c: dict[str, Any]) -> None:
    for group in c["optimizer"]["param_groups"]:
        del group["param_names"]


def orphan(c: dict[str, Any]) -> None:
    c["optimizer"]["state"][99] = slots(c)


def fewer_rates(c: dict[str, Any]) -> None:
    c["scheduler"]["_last_lr"] = [1e-3]


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (drop_model, "no weights"),
        (drop_optimizer, "no optimizer"),
        (forget_one, "1 of 6 parameters have no state"),
        (forget_all, "no parameter has state"),
        (step_back, "different steps: 3 (x1), 5 (x5)"),
        (unname, "same order"),
        (orphan, "1 keys"),
        (fewer_rates, "learning rates for 1 groups, the optimizer has 2"),
    ],
)
def test_what_a_resumed_run_would_miss(change: Callable[[dict[str, Any]], None], mention: str, tmp_path: Path) -> None:
    checkpoint = trained()
    change(checkpoint)
    found = optimstate.inspect(saved(checkpoint, tmp_path)).resume
    assert any(mention in line for line in found), found


def test_an_optimizer_alone_shows_the_names_of_its_layers(tmp_path: Path) -> None:
    checkpoint = trained()
    with_model = optimstate.inspect(saved(checkpoint, tmp_path)).sections
    del checkpoint["model"]
    [alone, _] = optimstate.inspect(saved(checkpoint, tmp_path)).sections
    assert isinstance(alone, OptimizerInfo)
    more = " and other shapes"
    assert alone.names == {"*.weight": (3, f"[8, 6]{more}"), "*.bias": (3, f"[8]{more}")}
    assert isinstance(with_model[0], ModelInfo)
    assert isinstance(with_model[1], OptimizerInfo)
    assert not with_model[1].names
    assert with_model[0].names["*.weight"] == (3, f"float32[8, 6]{more}")


def test_masters_and_nested_slots_do_not_hide_the_algorithm() -> None:
    assert optimizers(case("deepspeed/bf16opt_ws2_z1_universal").entry)[0].algorithm == "AdamW"
    assert optimizers(case("bitsandbytes/adamw8bit").entry)[0].algorithm == "bitsandbytes"


# --- everything that is there ---------------------------------------------------------------------------------------


def run_of(folder: Path, **more: Any) -> Path:
    tree = {**trained(), "epoch": 73, "best_acc1": 71.25, "config": {"layers": 2, "activation": "gelu"}, **more}
    return saved(tree, folder)


def test_what_is_in_no_section_is_listed(tmp_path: Path) -> None:
    args = argparse.Namespace(arch="resnet50", lr=0.1)
    path = run_of(tmp_path, args=args, rng_state=torch.get_rng_state(), note="x" * 5000, history=[0.5] * 4000)
    found = optimstate.inspect(path)
    values = {entry.path: entry.value for entry in found.entries}
    assert values["epoch"] == 73
    assert values["config['activation']"] == "gelu"
    assert values["args['arch']"] == "resnet50"
    assert values["rng_state"].startswith("uint8[")
    assert len(values["note"]) < 300
    assert values["history"] == "list of 4000: 0.5, 0.5, 0.5, ..."
    text = str(found)
    assert all(word in text for word in ("epoch 73", "best_acc1 71.25", "layers 2", "arch resnet50", "list of 4000"))
    assert len(text.splitlines()) < 40


def test_statistics_are_of_every_tensor(tmp_path: Path) -> None:
    queue = torch.arange(6.0)
    found = optimstate.inspect(run_of(tmp_path, buffers=[queue, torch.ones(2)]), statistics=True)
    assert found.statistics == {"buffers[0]": expected(queue), "buffers[1]": expected(torch.ones(2))}
    assert "tensors in no section" in str(found)


def test_long_containers_are_cut_and_all_lists_them(tmp_path: Path) -> None:
    path = run_of(tmp_path, options={f"key{i}": i for i in range(500)})
    found = optimstate.inspect(path)
    assert len(found.entries) < 60
    assert found.hidden >= 480
    every = optimstate.inspect(path, everything=True)
    assert every.hidden == 0
    assert {entry.value for entry in every.entries} >= set(range(500))


@pytest.mark.parametrize(
    "name", ["lightning/adamw_onecycle", "transformers/gpt2_adamw", "torch/argparse_numpy_container"]
)
def test_a_checkpoint_of_a_framework_is_about_one_screen(name: str) -> None:
    text = str(optimstate.inspect(case(name).entry))
    assert len(text.splitlines()) < 85
    if name.startswith("lightning"):
        assert all(word in text for word in ("epoch 1", "global_step 8", "loops: ", "ModelCheckpoint", "hidden 12"))


def test_what_only_looks_like_a_model_is_shown_with_the_reason(tmp_path: Path) -> None:
    path = run_of(tmp_path, callbacks={"best_k_models": {"/home/u/a.ckpt": torch.tensor(0.5)}})
    found = optimstate.inspect(path)
    assert found.others == {"callbacks['best_k_models']": "below 'callbacks'"}
    assert "below 'callbacks'" in str(found)


def test_containers_that_hold_themselves_end(tmp_path: Path) -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    found = optimstate.inspect(run_of(tmp_path, endless=endless), everything=True)
    assert any(entry.path.startswith("endless") for entry in found.entries)


# --- ways of looking ------------------------------------------------------------------------------------------------


def model_of(path: Path, **options: Any) -> ModelInfo:
    return next(found for found in optimstate.inspect(path, **options).sections if isinstance(found, ModelInfo))


def test_names_sections_order_and_number(tmp_path: Path) -> None:
    path = run_of(tmp_path)
    assert list(model_of(path, parameters=True, name="0.*").tensors) == ["0.weight", "0.bias"]
    every = torch.load(path, weights_only=True)["model"]
    largest = sorted(every, key=lambda name: -every[name].numel())
    assert list(model_of(path, sort="size").tensors) == largest
    assert list(model_of(path, sort="size", top=2).tensors) == largest[:2]
    assert list(model_of(path, sort="name").tensors) == sorted(every)
    norms = sorted(every, key=lambda name: -float(every[name].norm()))
    assert list(model_of(path, sort="norm", top=3).tensors) == norms[:3]
    only = optimstate.inspect(path, section="optimizer", name="2.*", parameters=True)
    assert [section.kind for section in only.sections] == ["optimizer"]
    assert {parameter.name for parameter in optimizers(path, name="2.*")[0].parameters} == {"2.weight", "2.bias"}


def test_several_checkpoints_are_a_table(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        paths.append(str(run_of(tmp_path / f"{number}", global_step=number)))
    shown = run("inspect", *paths)
    assert shown.code == 0
    rows = shown.out.splitlines()
    assert len(rows) == 1 + 3 + 1
    assert all(word in rows[0] for word in ("checkpoint", "size", "step", "lr", "epoch", "global_step"))
    assert run("inspect", str(tmp_path / "*" / "checkpoint.pt")).out == shown.out
    document = json.loads(run("inspect", "--json", *paths).out)
    assert [found["path"] for found in document["checkpoints"]] == paths


def test_wrong_words_are_wrong_usage(tmp_path: Path) -> None:
    path = str(run_of(tmp_path))
    for words in (["--sort", "colour"], ["--section", "nothing"], ["--top", "0"]):
        outcome = run("inspect", path, *words)
        assert (outcome.code, outcome.out) == (2, "")
