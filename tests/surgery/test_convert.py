"""`convert` to other dtypes, of one section, and to another optimizer: bit for bit what torch's own `.to` gives."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from optimstate.errors import CorruptCheckpointError, MigrationError, RepresentationError, UsageError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import get_format
from optimstate.surgery.inspection.inspecting import inspect
from optimstate.surgery.writing.casting import Cast, parse_dtypes
from optimstate.surgery.writing.converting import ConvertReport, convert
from tests.corpus import case
from tests.releases import adam_tells_its_decay
from tests.support import load_torch, unlike
from tests.surgery.test_verify import saved, trained


def converted(source: Path, folder: Path, **options: Any) -> tuple[Any, ConvertReport]:
    report = convert(source, folder / "converted.pt", force=True, **options)
    return load_torch(folder / "converted.pt"), report


def by_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(tensors.items()))


# --- dtypes ---------------------------------------------------------------------------------------------------------

HARD = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-40,
    6e-8,
    65504.0,
    65520.0,
    1e5,
    3.4e38,
    -3.4e38,
    1 + 2**-9,
]


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    """Random ones of all magnitudes, halves to round, and everything that a cast treats apart; more than one block."""
    torch.manual_seed(2)
    spread = torch.randn(700_001, dtype=torch.float64) * 10.0 ** torch.empty(700_001).uniform_(-12, 6)
    spread[::50_000] = float("nan")
    halves = torch.arange(4096, dtype=torch.float64) / 1024
    return torch.cat([spread, halves, torch.tensor(HARD, dtype=torch.float64)]).to(dtype)


PAIRS = [
    (torch.float32, "bfloat16"),
    (torch.float32, "float16"),
    (torch.float32, "float64"),
    (torch.float32, "float8_e4m3fn"),
    (torch.float32, "float8_e5m2"),
    (torch.float64, "float32"),
    (torch.float64, "bfloat16"),
    (torch.float16, "bfloat16"),
    (torch.bfloat16, "float16"),
    (torch.bfloat16, "float32"),
    (torch.float8_e4m3fn, "bfloat16"),
    (torch.float8_e4m3fn, "float8_e5m2"),
    (torch.float8_e5m2, "float32"),
    (torch.float8_e5m2, "float8_e4m3fn"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_a_cast_is_torchs_bit_for_bit_and_counted(source: torch.dtype, target: str, tmp_path: Path) -> None:
    values = hard_values(source)
    torch.save({"model": {"w": values}}, tmp_path / "a.pt")
    made, report = converted(tmp_path / "a.pt", tmp_path, dtypes={"model": target})
    truth = values.to(getattr(torch, target))
    assert made["model"]["w"].dtype == truth.dtype
    # Which NaN a cast gives depends on its place in a vector register, in torch itself too.
    number = ~truth.float().isnan()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[truth.element_size()]
    assert torch.equal(made["model"]["w"].view(width)[number], truth.view(width)[number])
    assert torch.equal(made["model"]["w"].float().isnan(), ~number)
    back, finite = truth.to(source), values.float().isfinite()
    if values.itemsize == 1:  # torch compares none of eight bits
        back, values = back.float(), values.float()
    assert report.casts == (
        Cast(
            "model at model",
            str(source).removeprefix("torch."),
            target,
            1,
            values.numel(),
            int((back[finite] != values[finite]).sum()),
            int((~back[finite].isfinite()).sum()),
            int(((back == 0) & (values != 0)).sum()),
        ),
    )


def test_shapes_strides_flags_and_order_stay(tmp_path: Path) -> None:
    model = OrderedDict(
        conv=torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        turned=torch.randn(6, 7).t(),
        column=torch.randn(6, 7)[:, 2],
        parameter=nn.Parameter(torch.randn(3)),
        scalar=torch.tensor(2.3),
        empty=torch.empty(0, 3),
        count=torch.tensor(7),
        mask=torch.tensor([True, False]),
        wave=torch.randn(3, dtype=torch.complex64),
    )
    torch.save(model, tmp_path / "a.pt")
    made, report = converted(tmp_path / "a.pt", tmp_path, dtypes={"model": "bfloat16"})
    assert list(made) == list(model)
    for name, old in model.items():
        truth = old.to(torch.bfloat16) if old.is_floating_point() else old
        assert (made[name].dtype, made[name].shape) == (truth.dtype, truth.shape)
        assert made[name].stride() == old.stride()
        assert isinstance(made[name], nn.Parameter) == isinstance(old, nn.Parameter)
        assert torch.equal(made[name], truth)
    assert report.casts[0].tensors == 6


def test_what_shares_memory_goes_on_sharing_it(tmp_path: Path) -> None:
    flat = torch.randn(40)
    model = {"a": flat[:12].view(3, 4), "b": flat[12:20], "whole": flat, "tied": flat[:12].view(3, 4)}
    model["turned"] = model["a"].t()
    torch.save({"model": model, "kept": flat[:5]}, tmp_path / "a.pt")
    made, report = converted(tmp_path / "a.pt", tmp_path, dtypes={"model": "float16"})
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in made["model"].items()}
    assert len(set(places.values())) == 1
    for name, tensor in model.items():
        assert torch.equal(made["model"][name], tensor.half())
    assert torch.equal(made["kept"], flat[:5])
    assert any("no longer shared" in note for note in report.notes)
    assert report.casts[0].elements == 40


def test_slots_by_name_and_sections_without_counts(tmp_path: Path) -> None:
    source = saved(trained(), tmp_path)
    old = load_torch(source)
    made, report = converted(source, tmp_path, dtypes={"optimizer": "bfloat16", "exp_avg_sq": "float64"})
    for key, slots in old["optimizer"]["state"].items():
        truth = {
            "step": slots["step"],
            "exp_avg": slots["exp_avg"].bfloat16(),
            "exp_avg_sq": slots["exp_avg_sq"].double(),
        }
        assert unlike(made["optimizer"]["state"][key], truth) is None
    assert unlike(made["model"], old["model"]) is None
    assert unlike(made["optimizer"]["param_groups"], old["optimizer"]["param_groups"]) is None
    assert {(cast.what.rpartition(" ")[2], cast.target, cast.rounded == 0) for cast in report.casts} == {
        ("exp_avg", "bfloat16", False),
        ("exp_avg_sq", "float64", True),
    }
    assert any("step" in note and "not cast" in note for note in report.notes)


def test_masters_are_cast_only_when_they_are_named(tmp_path: Path) -> None:
    source = case("deepspeed/bf16opt_ws2_z1_universal").entry
    made, report = converted(source, tmp_path, section="global_step4['optimizer']", dtypes={"optimizer": "bfloat16"})
    assert {t.dtype for slots in made["state"].values() for s, t in slots.items() if s == "fp32_param"} == {
        torch.float32
    }
    assert {t.dtype for slots in made["state"].values() for s, t in slots.items() if s == "exp_avg"} == {torch.bfloat16}
    assert any("fp32_param (fp32 masters)" in note for note in report.notes)
    made, report = converted(source, tmp_path, section="global_step4['optimizer']", dtypes={"fp32_param": "bfloat16"})
    assert {t.dtype for slots in made["state"].values() for s, t in slots.items() if s == "fp32_param"} == {
        torch.bfloat16
    }
    assert any("masters" in note for note in report.notes)


def test_second_moments_that_become_zero_are_said(tmp_path: Path) -> None:
    checkpoint = trained()
    checkpoint["optimizer"]["state"][0]["exp_avg_sq"].fill_(1e-12)
    _, report = converted(saved(checkpoint, tmp_path), tmp_path, dtypes={"exp_avg_sq": "float16"})
    [cast] = report.casts
    assert cast.flushed is not None
    assert cast.flushed >= 48
    assert any("became zero" in note and "epsilon" in note for note in report.notes)


@pytest.mark.parametrize(
    ("dtypes", "mention"),
    [
        ({"step": "bfloat16"}, "step: cannot be cast"),
        ({"exp_avgs": "bfloat16"}, "no section or slot has this name"),
        ({"ema": "bfloat16"}, "ema=bfloat16"),
    ],
)
def test_what_cannot_be_cast_is_refused(dtypes: dict[str, str], mention: str, tmp_path: Path) -> None:
    with pytest.raises((MigrationError, UsageError), match=mention):
        convert(saved(trained(), tmp_path), tmp_path / "out.pt", dtypes=dtypes)
    assert not (tmp_path / "out.pt").exists()


def test_quantized_state_is_refused_by_name_and_kept_with_its_section(tmp_path: Path) -> None:
    source = case("bitsandbytes/adamw8bit").entry
    with pytest.raises(MigrationError, match="__bnb_optimizer_quant_state__: cannot be cast"):
        convert(source, tmp_path / "out.pt", dtypes={"__bnb_optimizer_quant_state__": "bfloat16"})
    made, report = converted(source, tmp_path, dtypes={"optimizer": "bfloat16"})
    assert unlike(made, load_torch(source)) is None
    assert any("no tensors of floats" in note for note in report.notes)


def test_a_pickled_module_is_refused_and_converted_alone(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    torch.save({"net": module}, tmp_path / "a.pt")
    with pytest.raises(MigrationError, match="pickled object"):
        convert(tmp_path / "a.pt", tmp_path / "out.pt", dtypes={"model": "bfloat16"})
    convert(tmp_path / "a.pt", tmp_path / "out.safetensors", section="net", dtypes={"model": "bfloat16"})
    truth = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    assert unlike(by_name(load_file(tmp_path / "out.safetensors")), by_name(truth)) is None


def test_dtypes_as_text() -> None:
    assert parse_dtypes(["model=bf16", "a=b=fp32", "exp_avg=float8_e5m2"]) == {
        "model": "bfloat16",
        "a=b": "float32",
        "exp_avg": "float8_e5m2",
    }
    for wrong in (["model"], ["=bf16"], ["model="], ["model=int8"], ["model=bf16", "model=fp16"]):
        with pytest.raises(UsageError):
            parse_dtypes(wrong)


def test_a_dry_run_counts_nothing_and_writes_nothing(tmp_path: Path) -> None:
    report = convert(saved(trained(), tmp_path), tmp_path / "out.pt", dtypes={"model": "bfloat16"}, dry_run=True)
    assert report.casts == (Cast("model at model", "float32", "bfloat16", 6),)
    assert not (tmp_path / "out.pt").exists()


PROBE = """
import resource, sys
import torch
import optimstate
torch.ones(8).to(torch.bfloat16).to(torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
optimstate.convert(sys.argv[1], sys.argv[2], dtypes={"model": "bfloat16"})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_cast_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    # Mapped pages of the source count too, so that the source's storage is many tensors.
    torch.save({"model": {f"w{i}": torch.ones(1 << 22) for i in range(8)}}, tmp_path / "large.pt")  # 128 MiB
    words = [sys.executable, "-c", PROBE, str(tmp_path / "large.pt"), str(tmp_path / "out.pt")]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert int(out) < 50_000  # kilobytes


# --- one section ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["model", "optimizer", "scheduler"])
def test_a_section_alone_is_what_it_was(section: str, tmp_path: Path) -> None:
    source = saved(trained(), tmp_path)
    made, report = converted(source, tmp_path, section=section)
    assert unlike(made, load_torch(source)[section]) is None
    assert report.section == f"{section} at {section}"
    assert (tmp_path / "converted.pt").stat().st_size < source.stat().st_size


def test_weights_are_plain_safetensors(tmp_path: Path) -> None:
    checkpoint = trained()
    convert(saved(checkpoint, tmp_path), tmp_path / "w.safetensors", section="model")
    found = load_file(tmp_path / "w.safetensors")
    assert set(found) == set(checkpoint["model"])
    assert all(torch.equal(found[name], tensor) for name, tensor in checkpoint["model"].items())


def test_shared_weights_are_stored_once_and_said_or_each(tmp_path: Path) -> None:
    source = case("nanogpt/ckpt").entry
    old = load_torch(source)["model"]
    report = convert(source, tmp_path / "once.safetensors", section="model")
    assert set(old) - set(load_file(tmp_path / "once.safetensors")) == {"lm_head.weight"}
    assert any("lm_head.weight" in note and "--clone-views" in note for note in report.notes)
    convert(source, tmp_path / "each.safetensors", section="model", options=WriteOptions(clone_views=True))
    assert unlike(by_name(load_file(tmp_path / "each.safetensors")), by_name(old)) is None


def test_shards_of_weights_load_one_by_one(tmp_path: Path) -> None:
    checkpoint = trained()
    convert(saved(checkpoint, tmp_path), tmp_path / "shards", section="model", options=WriteOptions(shard_size=300))
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert unlike(by_name(found), by_name(checkpoint["model"])) is None


def test_an_unknown_or_ambiguous_section_is_refused(tmp_path: Path) -> None:
    torch.save({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}, tmp_path / "two.pt")
    with pytest.raises(MigrationError, match="2 sections are called 'model': model at a, model at b"):
        convert(tmp_path / "two.pt", tmp_path / "out.pt", section="model")
    with pytest.raises(UsageError, match="no section is called 'c'") as caught:
        convert(tmp_path / "two.pt", tmp_path / "out.pt", section="c")
    assert "a, b" in caught.value.hint
    with pytest.raises(MigrationError, match="no section is called 'ema'"):
        convert(tmp_path / "two.pt", tmp_path / "out.pt", section="ema")
    assert set(converted(tmp_path / "two.pt", tmp_path, section="b")[0]) == {"w"}


# --- another optimizer ----------------------------------------------------------------------------------------------


@adam_tells_its_decay
def test_the_state_of_another_optimizer_loads_into_it(tmp_path: Path) -> None:
    checkpoint = trained()
    made, report = converted(saved(checkpoint, tmp_path), tmp_path, optimizer="NAdam")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    named = list(model.named_parameters())
    groups = [{"params": [p for p in named if (p[1].ndim > 1) is matrix]} for matrix in (True, False)]
    optimizer = torch.optim.NAdam(groups)
    optimizer.load_state_dict(made["optimizer"])
    for key, slots in checkpoint["optimizer"]["state"].items():
        assert torch.equal(made["optimizer"]["state"][key]["exp_avg"], slots["exp_avg"])
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    change = report.optimizers["optimizer at optimizer"]
    assert (change.source, change.target) == ("AdamW", "NAdam")
    outcomes = {line.slot: line.outcome for line in change.slots}
    assert outcomes == {"step": "exact", "exp_avg": "exact", "exp_avg_sq": "exact", "mu_product": "exact"}
    assert any("momentum_decay" in note for note in report.notes)
    assert any("amsgrad" in note and "dropped" in note for note in report.notes)


def test_an_anonymous_optimizer_gets_no_names(tmp_path: Path) -> None:
    source = case("nanogpt/ckpt").entry
    made, report = converted(source, tmp_path, optimizer="Lion", dtypes={"exp_avg": "bfloat16"})
    old = load_torch(source)["optimizer"]["state"]
    assert {key: list(slots) for key, slots in made["optimizer"]["state"].items()} == {key: ["exp_avg"] for key in old}
    assert all(torch.equal(made["optimizer"]["state"][k]["exp_avg"], old[k]["exp_avg"].bfloat16()) for k in old)
    assert not any("param_names" in group for group in made["optimizer"]["param_groups"])
    outcomes = {line.slot: line.outcome for line in report.optimizers["optimizer at optimizer"].slots}
    assert outcomes == {"exp_avg": "approximate", "exp_avg_sq": "dropped", "step": "dropped"}


def test_every_slot_that_is_lost_is_in_the_report(tmp_path: Path) -> None:
    checkpoint = trained()
    for slots in checkpoint["optimizer"]["state"].values():
        slots["max_exp_avg_sq"] = slots["exp_avg_sq"].clone()
    _, report = converted(saved(checkpoint, tmp_path), tmp_path, optimizer="Lion")
    outcomes = {line.slot: line.outcome for line in report.optimizers["optimizer at optimizer"].slots}
    assert outcomes["max_exp_avg_sq"] == "dropped"


def test_masters_stay_with_another_optimizer(tmp_path: Path) -> None:
    source = case("deepspeed/bf16opt_ws2_z1_universal").entry
    old, _ = converted(source, tmp_path, section="global_step4['optimizer']")
    made, report = converted(source, tmp_path, section="global_step4['optimizer']", optimizer="Lion")
    for name, slots in old["state"].items():
        assert torch.equal(made["state"][name]["fp32_param"], slots["fp32_param"])
    assert {line.slot: line.outcome for line in report.optimizers["optimizer at global_step4['optimizer']"].slots} == {
        "exp_avg": "approximate",
        "exp_avg_sq": "dropped",
        "step": "dropped",
        "fp32_param": "exact",
    }


def lacks_a_slot(c: dict[str, Any]) -> None:
    del c["optimizer"]["state"][2]["exp_avg_sq"]


def has_a_string(c: dict[str, Any]) -> None:
    c["optimizer"]["state"][2]["exp_avg_sq"] = "gone"


@pytest.mark.parametrize(("change", "mention"), [(lacks_a_slot, "has no exp_avg_sq"), (has_a_string, "'gone'")])
def test_state_that_cannot_be_converted_is_refused_by_parameter(change: Any, mention: str, tmp_path: Path) -> None:
    checkpoint = trained()
    change(checkpoint)
    name = checkpoint["optimizer"]["param_groups"][0]["param_names"][2]
    with pytest.raises(MigrationError, match=mention) as caught:
        convert(saved(checkpoint, tmp_path), tmp_path / "out.pt", optimizer="Adafactor")
    assert name in str(caught.value)


@adam_tells_its_decay
def test_what_has_no_meaning_or_is_that_already(tmp_path: Path) -> None:
    source = saved(trained(), tmp_path)
    with pytest.raises(MigrationError, match="no meaning in SGD"):
        convert(source, tmp_path / "out.pt", optimizer="SGD")
    with pytest.raises(UsageError, match="Did you mean 'Adam'"):
        convert(source, tmp_path / "out.pt", optimizer="Adamm")
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(MigrationError, match="there is no optimizer"):
        convert(tmp_path / "weights.pt", tmp_path / "out.pt", optimizer="Lion")
    made, report = converted(source, tmp_path, optimizer="AdamW")
    assert unlike(made, load_torch(source)) is None
    assert any("already" in note for note in report.notes)


# --- checksums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out-dcp", "shards"])
def test_a_wrong_checksum_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    source, destination = saved(trained(), tmp_path), tmp_path / name
    to = "dcp" if name == "out-dcp" else "safetensors" if name == "shards" else None
    options = WriteOptions(sync=False, shard_size=1000 if name == "shards" else None)
    convert(source, destination, to=to, verify=True, options=options)
    files = sorted(destination.rglob("*")) if destination.is_dir() else [destination]
    before = {file: file.read_bytes() for file in files}
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size if "/data/" in entry.filename else 0)
        content = archive.read(largest)
    data = source.read_bytes()
    assert data.count(content) == 1
    source.write_bytes(data.replace(content, content[:-1] + bytes([content[-1] ^ 1])))
    with pytest.raises(CorruptCheckpointError, match="do not match their checksum"):
        convert(source, destination, to=to, force=True, options=options)  # without being asked to
    with pytest.raises(CorruptCheckpointError, match="do not match their checksum"):
        convert(source, tmp_path / "other.pt", verify=True, dry_run=True)
    assert {file: file.read_bytes() for file in files} == before
    assert sorted(tmp_path.iterdir()) == sorted([source, destination])


def test_a_conversion_that_fails_stops_comparing_checksums(tmp_path: Path) -> None:
    source = saved(trained() | {"schedule": Fraction(1, 3)}, tmp_path)
    with pytest.raises(RepresentationError, match="Fraction"):
        convert(source, tmp_path / "out.safetensors", verify=True)
    assert not [thread for thread in threading.enumerate() if thread.name == "optimstate-helper"]


# --- several sections, and all but some -----------------------------------------------------------------------------


def test_several_sections_stand_where_they_stood_and_nothing_else(tmp_path: Path) -> None:
    source = saved({**trained(), "epoch": 3}, tmp_path)
    made, report = converted(source, tmp_path, section=["optimizer", "model"])
    old = load_torch(source)
    assert unlike(made, {key: old[key] for key in old if key in ("model", "optimizer")}) is None
    assert report.section == "model at model, optimizer at optimizer"


@pytest.mark.parametrize("names", [["optimizer"], ["scheduler", "optimizer"], ["model"], ["optimizer", "optimizer"]])
def test_what_is_left_out_is_gone_and_nothing_else(names: list[str], tmp_path: Path) -> None:
    source = saved({**trained(), "epoch": 3, "rng": torch.get_rng_state()}, tmp_path)
    made, report = converted(source, tmp_path, without=names)
    old = load_torch(source)
    assert unlike(made, {key: value for key, value in old.items() if key not in names}) is None
    assert sorted(report.without) == sorted(f"{name} at {name}" for name in set(names))
    assert report.notes == ()


def test_one_of_two_names_for_the_same_optimizer_is_left_out(tmp_path: Path) -> None:
    state = trained()["optimizer"]
    torch.save({"opt": {"a": state, "b": state}, "list": [state, "x"]}, tmp_path / "a.pt")
    made, _ = converted(tmp_path / "a.pt", tmp_path, without=["opt['b']"])
    assert made["opt"].keys() == {"a"}
    assert len(made["list"]) == 2
    made, report = converted(tmp_path / "a.pt", tmp_path, without=["optimizer"])
    assert made == {"opt": {}, "list": ["x"]}
    assert len(report.notes) == 1
    assert "move up by one" in report.notes[0]


def test_a_folder_loses_the_file_of_a_section_and_keeps_the_others(tmp_path: Path) -> None:
    checkpoint, folder = trained(), tmp_path / "ck"
    folder.mkdir()
    save_file(checkpoint["model"], folder / "model.safetensors")
    torch.save(checkpoint["optimizer"], folder / "optimizer.pt")
    (folder / "config.json").write_text("{}")
    report = convert(folder, tmp_path / "new", without=["optimizer"])
    assert report.format == "folder"
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    for file in (tmp_path / "new").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_what_cannot_be_left_out_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = saved(trained(), tmp_path)
    torch.save(trained()["model"], tmp_path / "bare.pt")
    for file, name, said in (
        (source, "ema", "no section is called 'ema'"),
        (tmp_path / "bare.pt", "model", "the model is the whole checkpoint"),
    ):
        with pytest.raises(MigrationError, match=said):
            convert(file, tmp_path / "out.pt", without=[name])
    with pytest.raises(ValueError, match="exclude each other"):
        convert(source, tmp_path / "out.pt", section="model", without=["optimizer"])
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numpy_become_the_tensors_of_a_model_where_their_place_is_named(
    protocol: int, tmp_path: Path
) -> None:
    live = {
        "fc.weight": numpy.arange(6, dtype="f4").reshape(2, 3),
        "fc.turned": numpy.arange(6, dtype="i8").reshape(2, 3).T,
        "fc.bias": numpy.zeros(0, dtype="f2"),
    }
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps({"model": live, "author": "x"}, protocol=protocol))
    report = inspect(path)
    assert (report.tensors, report.sections) == (0, ())
    assert "`optimstate convert --section model`" in report.others["model"]
    assert convert(path, tmp_path / "a.safetensors", section="model").tensors == 3
    found = load_file(tmp_path / "a.safetensors")
    for name, array in live.items():
        assert (found[name].numpy() == array).all()
        assert found[name].numpy().dtype == array.dtype


@pytest.mark.parametrize("target", ["torch", "safetensors", "dcp", "torch-checkpointing"])
@pytest.mark.parametrize(
    "option", [{"shard_size": 40}, {"digest": "sha256"}, {"clone_views": True}, {"checksums": False}]
)
def test_an_option_of_writing_has_an_effect_or_is_refused(target: str, option: Any, tmp_path: Path) -> None:
    shared = torch.ones(8)
    torch.save({"model": {"a.weight": shared, "b.weight": shared, "c.weight": torch.ones(2, 8)}}, tmp_path / "a.pt")
    source = tmp_path / "a.pt"
    if "checksums" in option:  # those that are known are kept
        source = tmp_path / "a.safetensors"
        convert(tmp_path / "a.pt", source)

    def written(folder: str, options: WriteOptions) -> list[tuple[str, bytes]]:
        path = tmp_path / folder / "b.out"
        path.parent.mkdir()
        convert(source, path, to=target, options=options)
        files = [path] if path.is_file() else sorted(path.rglob("*.*"))
        return [(file.name, file.read_bytes()) for file in files if file.is_file()]

    asked = WriteOptions(sync=False, **option)
    if set(option) <= set(getattr(get_format(target), "OPTIONS", ())):
        assert written("asked", asked) != written("plain", WriteOptions(sync=False))
    else:
        with pytest.raises(UsageError, match=target):
            written("asked", asked)
