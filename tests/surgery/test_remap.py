"""Renaming, duplicating and dropping on real files, judged by what torch loads from the result."""

from __future__ import annotations

import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import optimstate
from optimstate.errors import DestinationError, MigrationError, PlanSyntaxError
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.language.plan import Plan
from optimstate.state.sections import find_sections
from optimstate.surgery.writing.remapping import RemapReport
from optimstate.tree import OpaqueFile, difference
from tests import corpus
from tests.corpus import Case
from tests.support import digest, load_torch, readable, unlike

THERE = Plan.from_options(rename=["{p**}=renamed.{p**}"])
BACK = Plan.from_options(rename=["renamed.{p**}={p**}"])
WRAPPERS = ("module.", "_orig_mod.")


def remap(source: Path, destination: Path, **options: list[str]) -> RemapReport:
    return optimstate.remap(source, destination, Plan.from_options(**options), sync=False)


def has_names(case: Case) -> bool:
    """Whether a rename has anything to do: a model, or an optimizer with names, that is no pickled object."""
    sections = find_sections(open_checkpoint(case.entry).tree)
    return any(
        hasattr(s.node, "items") and (s.kind in ("model", "ema") or (s.kind == "optimizer" and s.optimizer().is_named))
        for s in sections
        if isinstance(s.node, dict)
    )


NAMED = [case for case in readable() if has_names(case)]


def unlike_trees(a: Any, b: Any) -> str | None:
    """`difference`, but files of a folder that are no checkpoints are compared by their bytes."""
    if isinstance(a, OpaqueFile):
        return None if digest(Path(a.path)) == digest(Path(b.path)) else f"{a.path} differs"
    if isinstance(a, dict) and any(isinstance(value, OpaqueFile) for value in a.values()):
        if list(a) != list(b):
            return f"{list(a)} != {list(b)}"
        return next((found for key in a if (found := unlike_trees(a[key], b[key]))), None)
    return difference(a, b)


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_renaming_and_back_is_the_identity(case: Case, tmp_path: Path) -> None:
    before = digest(case.entry)
    there, back = tmp_path / f"there{case.entry.suffix}", tmp_path / f"back{case.entry.suffix}"
    report = optimstate.remap(case.entry, there, THERE, sync=False)
    assert any(report.moves.values())
    assert unlike_trees(open_checkpoint(case.entry).tree, open_checkpoint(there).tree) is not None
    optimstate.remap(there, back, BACK, sync=False)
    assert unlike_trees(open_checkpoint(case.entry).tree, open_checkpoint(back).tree) is None
    assert digest(case.entry) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([there.name, back.name])


def renamed(name: str) -> str:
    """What `{p**}=renamed.{p**}` makes of a parameter's name; wrappers stay outermost."""
    prefix = ""
    while name.startswith(WRAPPERS):
        wrapper = next(w for w in WRAPPERS if name.startswith(w))
        prefix, name = prefix + wrapper, name.removeprefix(wrapper)
    return f"{prefix}renamed.{name}"


def respelled(node: Any, respell: Callable[[str], str]) -> Any:
    """A loaded checkpoint with every parameter name respelled, written without the code under test."""
    if isinstance(node, dict):
        if all(isinstance(key, str) for key in node) and is_model(node):
            made = {key if key == "n_averaged" else respell(key): value for key, value in node.items()}
            if isinstance(node, OrderedDict):
                result = OrderedDict(made)
                vars(result).update(vars(node))
                if "_metadata" in vars(node):
                    result._metadata = respelled_metadata(node._metadata, list(node), respell)  # type: ignore[attr-defined]
                return result
            return made
        if type(node) not in (dict, OrderedDict):
            return node
        if "param_groups" in node:  # slots look like models
            inner = {"param_groups": [respelled(group, respell) for group in node["param_groups"]]}
            return type(node)({**node, **inner})
        made = {key: respelled(value, respell) for key, value in node.items()}
        if "param_names" in node:
            made["param_names"] = [respell(name) for name in node["param_names"]]
        return type(node)(made)
    if type(node) in (list, tuple):
        return type(node)(respelled(item, respell) for item in node)
    return node


def is_model(node: dict[str, Any]) -> bool:
    tensors = [value for value in node.values() if isinstance(value, torch.Tensor)]
    return len(tensors) == len(node) > 0 and any(t.is_floating_point() or t.is_complex() for t in tensors)


def respelled_metadata(metadata: Any, names: list[str], respell: Callable[[str], str]) -> Any:
    """A module is called what its parameters' names begin with; the outermost has no name, and what it was gets one.

    Modules without parameters are left out: what they are called after a renaming of parameters is anybody's guess.
    """
    holders = {m: v for m, v in metadata.items() if not m or any(name.startswith(f"{m}.") for name in names)}
    inner = respell("x").removesuffix("x").removesuffix(".")
    made: OrderedDict[str, Any] = OrderedDict()
    for module, version in holders.items():
        made[module and respell(f"{module}.x").removesuffix(".x")] = version
        if not module and inner and not any(name.startswith(WRAPPERS) for name in names):
            made[inner] = version
    return made


LOADED = [
    case
    for case in NAMED
    if (case.truth_path is None or "model" in case.truth())
    # Files of ranks become one, which has a test of its own.
    and not case.name.startswith(("deepspeed/", "fastai/", "optimstate/ranks_"))
]


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_torch_loads_the_same_tensors_under_the_new_names(case: Case, tmp_path: Path) -> None:
    result = tmp_path / f"result{case.entry.suffix}"
    optimstate.remap(case.entry, result, THERE, sync=False)
    for file in case.files:
        twin = result / file.relative_to(case.entry) if case.entry.is_dir() else result
        kind = corpus.container_of(file)
        if kind == "torch_zip" and file.name != "training_args.bin":
            found = unlike(respelled(load_torch(twin), str), respelled(load_torch(file), renamed), file.name)
        elif kind == "safetensors":
            found = unlike(load_file(twin), dict(sorted(respelled(load_file(file), renamed).items())), file.name)
        elif file.name.endswith(".index.json"):
            continue  # the sharded folder has a test of its own
        else:
            found = None if twin.read_bytes() == file.read_bytes() else f"{file.name} differs"
        assert found is None


@pytest.mark.parametrize(
    "name",
    ["torch/adamw_named_layerwise_sequentiallr", "optimstate/ema_averaged_model", "lightning/adamw_named_groups"],
)
def test_in_place_gives_what_a_new_file_gives_and_overwrites_nothing(name: str, tmp_path: Path) -> None:
    entry = corpus.case(name).entry
    anew, inside = tmp_path / "anew.ckpt", tmp_path / "inside.ckpt"
    shutil.copy(entry, inside)
    optimstate.remap(entry, anew, THERE)
    optimstate.remap(inside, None, THERE, in_place=True)
    assert difference(open_checkpoint(anew).tree, open_checkpoint(inside).tree) is None
    old = entry.read_bytes()
    assert inside.read_bytes()[: len(old)] == old
    optimstate.remap(inside, None, BACK, in_place=True)
    assert difference(open_checkpoint(entry).tree, open_checkpoint(inside).tree) is None
    assert unlike(load_torch(inside), load_torch(entry)) is None


def test_in_place_refuses_what_changes_tensors(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    shutil.copy(corpus.case("optimstate/moe_before_experts").entry, file)
    before = digest(file)
    for options in ({"drop": ["layers.1.**"]}, {"duplicate": ["embed.{p}=a.{p},b.{p}"]}):
        with pytest.raises(DestinationError, match="in place"):
            optimstate.remap(file, None, Plan.from_options(**options), in_place=True)
    assert digest(file) == before


# --- duplicate ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8, bias=False)


def experts_model(experts: int, layers: int = 2) -> nn.Module:
    """The dense fixture's model with its blocks replaced by experts."""
    model = nn.Module()
    model.embed = nn.Embedding(12, 8)
    model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.experts = nn.ModuleList(Block() for _ in range(experts))
        model.layers.append(layer)
    return model


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    decay = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


EXPERTS = ["layers.{i}.mlp.{p**}=layers.{i}.experts.{e=0..2}.{p**}"]


def test_duplicates_fit_the_model_they_are_made_for_and_share_nothing(tmp_path: Path) -> None:
    source = corpus.case("optimstate/moe_before_experts").entry
    result = tmp_path / "experts.pt"
    remap(source, result, duplicate=EXPERTS)
    dense, sparse = torch.load(source), torch.load(result)

    everything = list(sparse["model"].values())
    everything += [t for slots in sparse["optimizer"]["state"].values() for t in slots.values()]
    assert len({t.untyped_storage().data_ptr() for t in everything}) == len(everything)

    model = experts_model(3)
    assert list(sparse["model"]) == list(model.state_dict())
    holders = {name.rpartition(".")[0] for name in model.state_dict()}
    assert holders <= sparse["model"]._metadata.keys() <= model.state_dict()._metadata.keys()
    for name, tensor in sparse["model"].items():
        parts = name.split(".")
        origin = name if "experts" not in parts else ".".join([*parts[:2], "mlp", *parts[4:]])
        assert torch.equal(tensor, dense["model"][origin])
    model.load_state_dict(sparse["model"])
    optimizer = torch.optim.AdamW(two_groups(model))
    assert [g["param_names"] for g in optimizer.param_groups] == [
        g["param_names"] for g in sparse["optimizer"]["param_groups"]
    ]
    optimizer.load_state_dict(sparse["optimizer"])

    # One step that touches the first expert alone leaves every other one as it was.
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".experts.0." in name:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = ".experts.0." in name
        for slot, value in optimizer.state[parameter].items():
            assert torch.equal(value, before[name][slot]) is not moved, (name, slot)
        assert optimizer.state[parameter]["step"] == before[name]["step"] + moved
    assert sparse["scheduler"] == dense["scheduler"]


def test_duplicating_by_a_list_of_names(tmp_path: Path) -> None:
    source = corpus.case("torch/adam_named_wd").entry
    result = tmp_path / "two.pt"
    report = remap(source, result, duplicate=["fc1.{p}=fc1.{p},copy.{p}"])
    before, after = torch.load(source), torch.load(result)
    for leaf in ("weight", "bias"):
        assert torch.equal(after["model"][f"copy.{leaf}"], before["model"][f"fc1.{leaf}"])
        assert torch.equal(after["model"][f"fc1.{leaf}"], before["model"][f"fc1.{leaf}"])
    names = [name for group in after["optimizer"]["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(after["model"])
    keys = [key for group in after["optimizer"]["param_groups"] for key in group["params"]]
    assert keys == list(range(len(names)))
    assert len(after["optimizer"]["state"]) == len(names)
    assert any(("fc1.weight", "copy.weight") in moves for moves in report.moves.values())


# --- drop, swap, shift ----------------------------------------------------------------------------------------------


def test_drop_takes_weights_slots_names_and_averages_together(tmp_path: Path) -> None:
    source = corpus.case("optimstate/ema_averaged_model").entry
    result = tmp_path / "headless.pt"
    report = remap(source, result, drop=["head.**"])
    before, after = torch.load(source), torch.load(result)
    assert list(after["model"]) == [name for name in before["model"] if not name.startswith("head.")]
    assert list(after["ema"]) == [name for name in before["ema"] if not name.startswith("module.head.")]
    assert torch.equal(after["ema"]["n_averaged"], before["ema"]["n_averaged"])
    assert "head" not in after["model"]._metadata
    assert "module.head" not in after["ema"]._metadata

    names = [name for group in after["optimizer"]["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(after["model"])
    old = {name: slots for name, slots in by_name(before["optimizer"]).items() if not name.startswith("head.")}
    assert unlike(by_name(after["optimizer"]), old) is None
    assert [len(dropped) for dropped in report.dropped.values()] == [1, 1, 1]

    with zipfile.ZipFile(result) as archive:  # and their bytes are gone from the file
        storages = [name for name in archive.namelist() if "/data/" in name]
    kept = [*after["model"].values(), *after["ema"].values()]
    kept += [value for slots in after["optimizer"]["state"].values() for value in slots.values()]
    assert len(storages) == len(kept)


def by_name(optimizer: dict[str, Any]) -> dict[str, Any]:
    pairs = [pair for g in optimizer["param_groups"] for pair in zip(g["param_names"], g["params"], strict=True)]
    return {name: optimizer["state"][key] for name, key in pairs if key in optimizer["state"]}


def test_swapping_two_modules_needs_no_intermediate_name(tmp_path: Path) -> None:
    source = corpus.case("torch/sgd_named_wd").entry
    result = tmp_path / "swapped.pt"
    remap(source, result, rename=["fc1.{p}=fc2.{p}", "fc2.{p}=fc1.{p}"])
    before, after = torch.load(source), torch.load(result)
    old, new = by_name(before["optimizer"]), by_name(after["optimizer"])
    for one, other in (("fc1", "fc2"), ("fc2", "fc1")):
        for leaf in ("weight", "bias"):
            assert torch.equal(after["model"][f"{one}.{leaf}"], before["model"][f"{other}.{leaf}"])
            slots = [state[f"{name}.{leaf}"]["momentum_buffer"] for state, name in ((new, one), (old, other))]
            assert torch.equal(*slots)


def test_layers_shift_by_an_affine_index(tmp_path: Path) -> None:
    source = corpus.case("optimstate/ema_averaged_model").entry
    result = tmp_path / "shifted.pt"
    remap(source, result, rename=["blocks.{i:int}.{p**}=layers.{2*i+1}.{p**}"])
    before, after = torch.load(source), torch.load(result)
    for i, j in ((0, 1), (1, 3)):
        for leaf in ("norm.weight", "fc1.bias", "fc2.weight"):
            assert torch.equal(after["model"][f"layers.{j}.{leaf}"], before["model"][f"blocks.{i}.{leaf}"])
            assert torch.equal(after["ema"][f"module.layers.{j}.{leaf}"], before["ema"][f"module.blocks.{i}.{leaf}"])
    metadata = after["model"]._metadata
    assert {"layers.1", "layers.1.norm", "layers.3.fc2"} <= metadata.keys()
    assert not any(module.startswith("blocks.") for module in metadata)


def test_wrapper_prefixes_are_taken_off_by_naming_them(tmp_path: Path) -> None:
    for name, prefix in (("torch/ddp_prefixed_adamw", "module."), ("torch/compile_prefixed_adamw", "_orig_mod.")):
        source = corpus.case(name).entry
        result = tmp_path / f"{prefix}pt"
        remap(source, result, rename=[f"{prefix}{{p**}}={{p**}}"])
        before, after = torch.load(source), torch.load(result)
        assert list(after["model"]) == [key.removeprefix(prefix) for key in before["model"]]
        names = [name for group in after["optimizer"]["param_groups"] for name in group["param_names"]]
        assert sorted(names) == sorted(after["model"])


def test_rules_see_through_wrapper_prefixes(tmp_path: Path) -> None:
    source = corpus.case("torch/ddp_mixed_prefix_adamw").entry
    result = tmp_path / "result.pt"
    remap(source, result, rename=["fc1.{p}=head.{p}"])
    after = torch.load(result)
    names = [name for group in after["optimizer"]["param_groups"] for name in group["param_names"]]
    assert [name for name in after["model"] if "head" in name] == ["module.head.weight", "module.head.bias"]
    assert [name for name in names if "head" in name] == ["head.weight", "head.bias"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rename": ["nowhere.{p}=somewhere.{p}"]}, ["nowhere.{p}"]),
        ({"drop": ["fc3.**"]}, ["fc3.**"]),
        ({"rename": ["fc1.{p}=fc2.{p}"]}, ["fc1.weight", "fc2.weight"]),
        ({"rename": ["fc1.weight=x.w", "fc2.weight=x.w"]}, ["fc1.weight", "fc2.weight", "x.w"]),
        ({"duplicate": ["fc1.{p}=a.{p},a.{p}"]}, ["a.weight"]),
    ],
    ids=["matches nothing", "drops nothing", "target is there", "two producers", "twice the same"],
)
def test_a_plan_that_does_not_fit_names_the_parameters(
    options: dict[str, list[str]], named: list[str], tmp_path: Path
) -> None:
    source = corpus.case("torch/adamw_named_layerwise_sequentiallr").entry
    with pytest.raises(MigrationError) as caught:
        remap(source, tmp_path / "never.pt", **options)
    for name in named:
        assert name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"rename": ["a.{i}=b"]}, {"rename": ["a=b=c"]}, {"rename": ["a.{i=b.{i}"]}, {"rename": ["a=b,c"]}],
    ids=["loses a capture", "two equal signs", "open brace", "renames to two"],
)
def test_a_rule_that_cannot_be_parsed_is_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(PlanSyntaxError):
        Plan.from_options(**options)


def test_an_optimizer_without_names_follows_renames_and_refuses_other_parameters(tmp_path: Path) -> None:
    source = corpus.case("torch/adam_unnamed_wd").entry
    result = tmp_path / "renamed.pt"
    report = remap(source, result, rename=["fc1.{p}=first.{p}"])
    before, after = torch.load(source), torch.load(result)
    assert any("no parameter names" in note for note in report.notes)
    assert unlike(after["optimizer"], before["optimizer"]) is None
    assert "first.weight" in after["model"]
    for options in ({"drop": ["fc1.**"]}, {"duplicate": ["fc1.{p}=a.{p},b.{p}"]}):
        with pytest.raises(MigrationError, match="optimizer"):
            remap(source, tmp_path / "never.pt", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["renamed.pt"]


def test_a_pickled_model_has_no_names_to_move(tmp_path: Path) -> None:
    torch.save({"model": nn.Sequential(nn.Linear(2, 2))}, tmp_path / "module.pt")
    with pytest.raises(MigrationError):
        remap(tmp_path / "module.pt", tmp_path / "never.pt", rename=["{p**}=x.{p**}"])
    assert [path.name for path in tmp_path.iterdir()] == ["module.pt"]


# --- tied parameters, folders ---------------------------------------------------------------------------------------


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    source = corpus.case("torch/tied_adam_named").entry
    result = tmp_path / "result.pt"
    optimstate.remap(source, result, THERE, sync=False)

    def ties(path: Path) -> list[list[str]]:
        users: dict[int, list[str]] = {}
        for name, tensor in torch.load(path)["model"].items():
            users.setdefault(tensor.untyped_storage().data_ptr(), []).append(name.removeprefix("renamed."))
        return [names for names in users.values() if len(names) > 1]

    assert ties(result) == ties(source) != []


def test_a_sharded_folder_keeps_its_files_and_moves_its_names(tmp_path: Path) -> None:
    source = corpus.case("transformers/llama_tied_sharded").entry
    result = tmp_path / "checkpoint-4"
    optimstate.remap(source, result, Plan.from_options(rename=["model.layers.{i}.{p**}=blocks.{i}.{p**}"]), sync=False)
    assert sorted(p.name for p in result.iterdir()) == sorted(p.name for p in source.iterdir())

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        return {name: t for f in sorted(folder.glob("*.safetensors")) for name, t in load_file(f).items()}

    before, after = tensors(source), tensors(result)
    assert len(before) == len(after)
    for name, tensor in before.items():
        assert torch.equal(after[name.replace("model.layers.", "blocks.")], tensor)

    import json

    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.name for file in sorted(result.glob("*.safetensors")) for name in load_file(file)
    }
    old = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"]
    for name in ("config.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"):
        assert (result / name).read_bytes() == (source / name).read_bytes(), name


def test_a_dry_run_reports_what_it_would_do_and_writes_nothing(tmp_path: Path) -> None:
    source = corpus.case("torch/adam_named_wd").entry
    plan = Plan.from_options(rename=["fc1.{p}=first.{p}"], drop=["norm.bias"])
    wet = optimstate.remap(source, tmp_path / "wet.pt", plan, sync=False)
    dry = optimstate.remap(source, None, plan, dry_run=True)
    assert (dry.rules, dry.moves, dry.dropped, dry.kept) == (wet.rules, wet.moves, wet.dropped, wet.kept)
    assert not dry.written
    assert [path.name for path in tmp_path.iterdir()] == ["wet.pt"]


def test_what_another_optimizer_makes_of_slots_is_counted_once() -> None:
    source = corpus.case("optimstate/moe_before_experts").entry
    report = optimstate.remap(source, None, Plan.from_toml('optimizer = "Lion"'), dry_run=True)
    found = {(row.slot, row.outcome, row.parameters) for row in report.outcomes["optimizer optimizer"]}
    assert found == {("exp_avg", "approximate", 11), ("exp_avg_sq", "dropped", 11), ("step", "dropped", 11)}
    report = optimstate.remap(source, None, Plan.from_toml('optimizer = "Adafactor"'), dry_run=True)
    found = {(row.slot, row.outcome, row.parameters) for row in report.outcomes["optimizer optimizer"]}
    state = open_checkpoint(source).tree["optimizer"]["state"].values()
    matrices = sum(len(slots["exp_avg"].shape) >= 2 for slots in state)
    assert found == {
        ("step", "exact", 11),
        ("row_var", "exact", matrices),
        ("col_var", "exact", matrices),
        ("variance", "exact", 11 - matrices),
        ("exp_avg", "dropped", 11),
        ("exp_avg_sq", "dropped", 11),
    }
    assert 0 < matrices < 11


def test_a_long_list_of_moves_is_cut_in_text_and_whole_in_json(tmp_path: Path) -> None:
    names = [f"layer.{a}{b}" for a in "abcdefg" for b in "abcdefghij"]  # layers with numbers would be shown together
    torch.save({name: torch.ones(1, 1) for name in names}, tmp_path / "a.pt")
    plan = Plan.from_options(rename=["layer.{p}=block.{p}"])
    report = optimstate.remap(tmp_path / "a.pt", None, plan, dry_run=True)
    assert str(report).count("\n  layer.") == 50
    assert "... and 20 more kinds (--json lists all)" in str(report)
    assert sum(map(len, report.moves.values())) == 70
