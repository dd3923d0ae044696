"""Sections, groups, parameters, slots and steps of every fixture, judged by what the live objects held."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

import optimstate
from optimstate.formats.registry import open_checkpoint
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import GlobalName, Opaque
from tests import corpus
from tests.corpus import Case
from tests.support import Walker, as_truth, optimizer_of, readable, tensor_digest, told

# Frameworks whose optimizer states are not arranged as torch arranges them; they are tested where they are read.
OTHER_LAYOUTS = ("deepspeed/", "fastai/")
TORCH = [case for case in readable(truth="state") if not case.name.startswith(OTHER_LAYOUTS)]
NOT_TORCH_OPTIMIZERS = ("bitsandbytes/", "lion_pytorch/")


# Where a program saves under other names than the live objects have.
OPTIMIZER_NAMES = {"torch/ddp_mixed_prefix_adamw": lambda name: name.removeprefix("module.")}
MODEL_NAMES = {
    "torch/argparse_numpy_container": lambda name: "module." + name,
    "transformers/peft_lora_llama": lambda name: name.replace(".default.", "."),
}


def truth_as_saved(case: Case) -> dict[str, Any]:
    """The truth under the names in the file."""
    truth = case.truth()
    respell = OPTIMIZER_NAMES.get(case.name, str)
    truth["groups"] = [{**g, "params": [respell(name) for name in g["params"]]} for g in truth.get("groups", [])]
    truth["state"] = {respell(name): slots for name, slots in truth.get("state", {}).items()}
    respell = MODEL_NAMES.get(case.name, str)
    truth["model"] = {respell(name): tensor for name, tensor in truth["model"].items()}
    return truth


def sections(case: Case, kind: str) -> list[Section]:
    return [section for section in find_sections(open_checkpoint(case.entry).tree) if section.kind == kind]


def check_state(state: OptimizerState, truth: Mapping[str, Any]) -> None:
    """Groups, order, options and slots equal the truth's; by position, and by name where the file has names."""
    assert [len(group.params) for group in state.groups] == [len(group["params"]) for group in truth["groups"]]
    for group, expected in zip(state.groups, truth["groups"], strict=True):
        if state.is_named:
            assert list(group.names or ()) == expected["params"]
        options = {key: value for key, value in expected.items() if key != "params"}
        assert plain(group.options) == plain(options)
    names = [name for group in truth["groups"] for name in group["params"]]
    for (_, _, slots), name in zip(state.parameters(), names, strict=True):
        expected = {slot: told(v) for slot, v in truth["state"].get(name, {}).items() if slot != "__param__"}
        found = dict(slots or {})
        found.update(found.pop("__bnb_optimizer_quant_state__", {}))  # its own load puts these among the slots
        assert {str(slot): as_truth(value) for slot, value in found.items()} == expected, name
    assert not state.orphans()


def plain(value: Any) -> Any:
    """An option as JSON holds it, tensors by digest."""
    if isinstance(value, LazyTensor):
        return as_truth(value)
    if isinstance(value, Mapping):
        if value.get("kind") == "tensor":
            return told(value)
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@pytest.mark.parametrize("case", TORCH, ids=str)
def test_groups_names_options_and_slots_are_those_of_the_live_optimizer(case: Case) -> None:
    (section,) = sections(case, "optimizer")
    check_state(section.optimizer(), truth_as_saved(case))


def test_several_optimizers_of_one_file_are_told_apart() -> None:
    case = corpus.case("torch/muon_plus_adamw_named")
    found = sections(case, "optimizer")
    truths = case.truth()["optimizers"]
    assert [section.label for section in found] == [f"optimizers[{name!r}]" for name in truths]
    for section, truth in zip(found, truths.values(), strict=True):
        check_state(section.optimizer(), truth)
    info = [s.algorithm for s in optimstate.inspect(case.entry).sections if s.kind == "optimizer"]
    assert info == ["Muon", "AdamW"]


@pytest.mark.parametrize("case", [c for c in TORCH if not c.name.startswith(NOT_TORCH_OPTIMIZERS)], ids=str)
def test_inspect_tells_the_algorithm_counts_sizes_and_steps(case: Case) -> None:
    truth = truth_as_saved(case)
    info = optimstate.inspect(case.entry, parameters=True)
    (optimizer,) = (section for section in info.sections if section.kind == "optimizer")
    assert optimizer.algorithm == optimizer_of(case)
    assert [group.parameters for group in optimizer.groups] == [len(group["params"]) for group in truth["groups"]]

    slots = [{k: v for k, v in found.items() if k != "__param__"} for found in truth["state"].values()]
    having = Counter(slot for found in slots for slot in found)
    assert {slot.name: slot.parameters for slot in optimizer.slots} == having
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "int64": 8, "complex64": 8}
    for slot in optimizer.slots:
        tensors = [found[slot.name] for found in slots if found.get(slot.name, {}).get("kind") == "tensor"]
        assert slot.nbytes == sum(t["numel"] * sizes[t["dtype"]] for t in tensors)
        if tensors:
            assert set(slot.dtypes) == {t["dtype"] for t in tensors}

    counters = [found["step"] for found in slots if "step" in found]
    steps = Counter(f"{step['sum'] if step['kind'] == 'tensor' else step['value']:g}" for step in counters)
    if steps:
        assert optimizer.steps == steps
    names = [name for group in truth["groups"] for name in group["params"]]
    assert optimizer.fresh == sum(not set(truth["state"].get(n, {})) - {"__param__"} for n in names)
    if optimizer.named:
        assert [parameter.name for parameter in optimizer.parameters] == names
    for parameter, name in zip(optimizer.parameters, names, strict=True):
        for slot, shown in parameter.slots.items():
            expected = truth["state"][name][slot]
            if expected["kind"] == "tensor" and expected["numel"] != 1:
                assert shown == f"{expected['dtype']}{expected['shape']}"


@pytest.mark.parametrize(
    "name",
    ["torch/adadelta_unnamed_wd", "torch/frozen_holes_unnamed", "transformers/gpt2_adamw", "torch/optimizer_alone"],
)
def test_an_optimizer_without_names_says_so(name: str) -> None:
    info = optimstate.inspect(corpus.case(name).entry, parameters=True)
    (optimizer,) = (section for section in info.sections if section.kind == "optimizer")
    assert not optimizer.named
    assert all(parameter.name is None for parameter in optimizer.parameters)


@pytest.mark.parametrize("case", [c for c in readable(truth="model") if c.name != "torch/wholeobject"], ids=str)
def test_models_have_the_tensors_of_the_live_model(case: Case) -> None:
    truth = truth_as_saved(case)
    found = [
        {name: (t.dtype, t.shape, tensor_digest(t)) for name, t in section.tensors().items()}
        for kind in ("model", "ema")
        for section in sections(case, kind)
    ]
    for live in filter(None, (truth["model"], truth.get("ema"))):
        wanted = {name: (t["dtype"], tuple(t["shape"]), t["sha256"]) for name, t in live.items()}
        likeness = [sum(wanted.get(name) == tensor for name, tensor in model.items()) for model in found]
        model = found[likeness.index(max(likeness))]
        assert max(likeness) == len(model)
        if case.name == "transformers/peft_lora_llama":  # its file has the adapters alone
            wanted = {name: tensor for name, tensor in wanted.items() if ".lora_" in name}
        # A file may leave out what is tied to another tensor: safetensors must.
        assert {tensor for name, tensor in wanted.items() if name not in model} <= set(model.values())


def test_a_pickled_module_lists_its_parameters() -> None:
    case = corpus.case("torch/wholeobject")
    (model,) = sections(case, "model")
    truth = case.truth()["model"]
    found = {name: (t.dtype, t.shape, tensor_digest(t)) for name, t in model.tensors().items()}
    assert found == {name: (t["dtype"], tuple(t["shape"]), t["sha256"]) for name, t in truth.items()}


TREES = readable(truth="tensors")


@pytest.mark.parametrize("case", TREES, ids=str)
def test_every_tensor_of_a_tree_is_where_it_was(case: Case) -> None:
    tree = open_checkpoint(case.entry).tree
    storages: dict[int, int] = {}
    for place, truth in case.truth()["tensors"].items():
        node = corpus.subscript(Walker(tree), place).node
        if truth["kind"] != "tensor" or not isinstance(node, LazyTensor):
            assert isinstance(node, Opaque), f"{place}: {truth['kind']}"
            continue
        assert list(node.shape) == truth["shape"], place
        assert node.dtype == truth["dtype"], place
        assert node.requires_grad == truth["requires_grad"], place
        assert node.is_parameter == (truth["type"] == "Parameter"), place
        assert list(node.stride) == truth["stride"], place
        assert node.offset == truth["offset"], place
        flags = {"conj": truth["conj"], "neg": truth["neg"]}
        assert {key: bool((node.metadata or {}).get(key)) for key in flags} == flags, place
        if not any(flags.values()):
            assert tensor_digest(node) == truth["sha256"], place
        if truth["storage_bytes"]:
            assert storages.setdefault(truth["storage"], id(node.storage)) == id(node.storage), place
    assert len(set(storages.values())) == len(storages)


@pytest.mark.parametrize("case", TREES, ids=str)
def test_every_other_value_of_a_tree_has_its_type_and_value(case: Case) -> None:
    tree = open_checkpoint(case.entry).tree
    for place, truth in case.truth()["values"].items():
        node = corpus.subscript(Walker(tree), place).node
        if "same_as" in truth:
            assert node is corpus.subscript(Walker(tree), truth["same_as"]).node, place
        elif isinstance(node, Opaque | GlobalName):
            path = node.type.path if isinstance(node, Opaque) else node.path
            assert truth["type"] not in {"dict", "list", "tuple", "int", "str", "float", "bool", "bytes"}, place
            assert path
        elif isinstance(node, LazyTensor):
            assert truth["type"] == "Parameter"
        else:
            assert type(node).__name__ == truth["type"], place
            if "repr" in truth:
                assert repr(node) == truth["repr"], place
            if "length" in truth:
                assert len(node) == truth["length"], place
            if "items" in truth:
                assert sorted(map(repr, node)) == truth["items"], place


INSPECT_ALL = """
import sys
import optimstate
for path in sys.argv[1:]:
    optimstate.inspect(path, parameters=True).to_json()
print(sorted({"torch", "numpy", "typer", "rich", "safetensors"} & set(sys.modules)))
"""


def test_inspecting_every_fixture_imports_neither_torch_nor_numpy() -> None:
    paths = [str(case.entry) for case in readable()] + [str(corpus.case("optimstate/hostile_zip").entry)]
    command = [sys.executable, "-c", INSPECT_ALL, *paths]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert not out.stderr


# What the command line loads of the package to inspect a small file: a module more is a tenth of a millisecond more at
# every start, and what only writers, plans or damaged files need is loaded by those who have them.
LOADED = """
optimstate: cli describe entry_points errors formats io problems record reporting state surgery tensors tree
optimstate.cli: __main__ app codes inspect interrupts render together words
optimstate.cli.render: terminal
optimstate.formats: byte_sources pickles protocol registry torch
optimstate.formats.pickles: checks foreign globals known opcodes sharing tensors unpickle
optimstate.formats.torch: script zip zip_directory zip_end zip_reader
optimstate.io: destination extents folders location places streams temporary
optimstate.state: algorithms arrays flattened judging loose names optimizer records sections tied unread
optimstate.state.algorithms: bitsandbytes libraries registry slots torch
optimstate.surgery: inspection leaves opening reports shown slot_counts text viewing
optimstate.surgery.inspection: inspecting kinds repeated report rest text
optimstate.tensors: dtypes lazy strided
optimstate.tree: comparison copies objects walking
"""


def test_the_inspect_command_loads_these_modules_and_neither_torch_nor_a_renderer() -> None:
    path = corpus.case("torch/adamw_named_layerwise_sequentiallr").entry
    command = [sys.executable, "-X", "importtime", "-m", "optimstate.cli", "inspect", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines() if line.startswith("import time:")}
    assert "optimstate.surgery.inspection.report" in imported
    # What takes long: `json` is for those who ask for it, `dataclasses` compiles a class at every start.
    heavy = {"torch", "numpy", "rich", "safetensors", "json", "dataclasses", "glob", "queue", "tarfile", "tomllib"}
    if "typer._adapters" in imported:  # typer 0.28 and later, which asks for pydantic
        heavy -= {"dataclasses", "json", "queue", "glob"}
    assert not {name for name in imported if name.split(".")[0] in heavy}
    rows = [line.split(": ") for line in LOADED.split("\n") if line]
    expected = {f"{package}.{name}" for package, names in rows for name in names.split()}
    assert {name for name in imported if name.startswith("optimstate.")} - expected == set()


def test_a_hostile_file_is_reported_and_not_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = corpus.case("optimstate/hostile_zip")
    monkeypatch.chdir(tmp_path)  # the file would leave a trace in the folder it is loaded in
    info = optimstate.inspect(case.entry)
    assert info.dangerous
    assert any("system" in name or "subprocess" in name for name in info.dangerous)
    assert not list(tmp_path.iterdir())
