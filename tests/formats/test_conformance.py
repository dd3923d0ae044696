"""Every container format that is written passes the same tests; so does one that another package adds."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import optimstate
from optimstate.errors import RepresentationError, UnrecognizedFormatError
from optimstate.formats import registry
from optimstate.formats.protocol import Claim
from optimstate.formats.registry import FORMATS, Registration, detect, get_format, open_checkpoint
from optimstate.io.extents import Extent
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import difference
from tests import corpus
from tests.conformance import PLAIN, Conformance, live_tree
from tests.formats import toy


class TestTorchZip(Conformance):
    name, suffix = "torch", ".pt"


class TestSafetensors(Conformance):
    name, suffix = "safetensors", ".safetensors"


class TestToy(Conformance):
    name, suffix = "toy", ".toy"

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FORMATS, "toy", Registration("tests.formats.toy", toy.SUFFIXES, (b"TOY1",)))


def named_optimizer() -> dict[str, Any]:
    slots = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "params": ["w", "b"]}
    return {"state": {"w": slots, "b": {"step": torch.tensor(3.0)}}, "param_groups": [group]}


def with_text_keys(tree: Any) -> Any:
    """Plain dicts with keys of text, none of which has the path of another."""
    if isinstance(tree, dict):
        return {f"key{number}": with_text_keys(value) for number, value in enumerate(tree.values())}
    return [with_text_keys(item) for item in tree] if isinstance(tree, list) else tree


class TestDcp(Conformance):
    """Names are paths of text, and every tensor stands alone, as torch's own writer has it."""

    name, suffix, writes_folders = "dcp", ".dcp", True
    cannot_hold = frozenset({"model", "optimizer", "aliases", "strides", "kinds", "containers", "keys", 0})
    strides = aliases = False
    plain = st.dictionaries(st.text("abc", min_size=1, max_size=3), PLAIN.map(with_text_keys))
    roots = (dict,)

    def live(self) -> dict[Any, Any]:
        live = live_tree()
        optimizer = {
            "state": {
                name: {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(live["model"][name])} for name in "wb"
            },
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": ["w", "b"]}],
        }
        return {**super().live(), "model": dict(live["model"]), "optimizer": optimizer}


def zeros(*shape: int) -> LazyTensor:
    nbytes = 4 * prod(shape)
    return LazyTensor(Storage((Extent(None, 0, nbytes),), nbytes, "FloatStorage"), "float32", shape)


class TestDeepSpeedUniversal(Conformance):
    """A model and its optimizer in DeepSpeed's layout; what else is there stands beside them as it is."""

    name, suffix, writes_folders = "deepspeed-universal", "_universal", True
    roots = ()

    plain = PLAIN.map(
        lambda more: {
            "model": {"w": zeros(2)},
            "optimizer": {"state": {"w": {"fp32_param": zeros(2)}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]},
            "more": more,
        }
    )

    def live(self) -> dict[Any, Any]:
        return {**super().live(), "optimizer": named_optimizer()}

    def small_tree(self) -> Any:
        return {**super().small_tree(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}}

    def expected(self, tree: Any) -> Any:
        """Each parameter has its master beside its slots, in the order of the files."""
        state, weights = tree["optimizer"]["state"], tree["model"]
        made = {name: dict(sorted({**state[name], "fp32_param": weights[name].clone()}.items())) for name in state}
        return {**tree, "optimizer": {"state": made, "param_groups": tree["optimizer"]["param_groups"]}}

    def differ(self, left: Any, right: Any) -> str | None:
        """DeepSpeed's counters stand beside what was written."""
        ours = {"model", "optimizer", "more", *live_tree()}
        kept = [{key: value for key, value in tree.items() if key in ours} for tree in (left, right)]
        for each in kept:
            each["optimizer"] = {key: each["optimizer"][key] for key in ("state", "param_groups")}
        return super().differ(*kept)


class TestTorchCheckpointing(Conformance):
    """A folder of items; groups name their parameters, and are numbered anew when they are read."""

    name, suffix, writes_folders = "torch-checkpointing", "_items", True
    cannot_hold = frozenset({0})
    plain = st.dictionaries(st.text("abc", min_size=1, max_size=3), PLAIN)
    roots = (dict,)

    def live(self) -> dict[Any, Any]:
        live = super().live()
        (group,) = live["optimizer"]["param_groups"]
        group["params"] = group.pop("params")
        return live

    def differ(self, left: Any, right: Any) -> str | None:
        """Items are in the order of their files."""
        return super().differ(*(dict(sorted(tree.items())) for tree in (left, right)))


# --- which format a file is of ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", corpus.cases(), ids=lambda case: case.name)
def test_the_answer_does_not_depend_on_the_order(case: corpus.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [case.entry, *(file for file in case.files if file.is_file())]
    found = [detect(path) for path in paths]
    monkeypatch.setattr(registry, "FORMATS", dict(reversed(FORMATS.items())))
    assert [detect(path) for path in paths] == found


def test_every_suffix_is_that_of_one_format() -> None:
    every = [suffix for row in FORMATS.values() for suffix in row.suffixes]
    assert len(set(every)) == len(every)
    for name, row in FORMATS.items():
        assert row.suffixes == get_format(name).SUFFIXES


class Claimant:
    """A format that claims every file as surely as it is told."""

    SUFFIXES: tuple[str, ...] = ()

    def __init__(self, name: str, claim: Any) -> None:
        self.NAME, self.claim = name, claim

    def sniff(self, path: Path, head: bytes) -> Claim:
        return self.claim  # type: ignore[no-any-return]

    def read(self, path: Path) -> Any:
        raise AssertionError

    write = read


def outside(monkeypatch: pytest.MonkeyPatch, *formats: Any) -> None:
    monkeypatch.setattr(registry, "_outside", lambda: {each.NAME: each for each in formats})


def test_the_surer_format_reads_and_a_tie_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    likely, certain = Claimant("likely", Claim.LIKELY), Claimant("certain", Claim.CERTAIN)
    outside(monkeypatch, Claimant("no", Claim.NO))
    assert detect(path) is None
    outside(monkeypatch, Claimant("fallback", Claim.FALLBACK), likely)
    assert detect(path) is likely
    outside(monkeypatch, certain, likely)
    assert detect(path) is certain
    outside(monkeypatch, certain, Claimant("other", Claim.CERTAIN))
    with pytest.raises(UnrecognizedFormatError, match="'certain' and 'other' both claim it"):
        detect(path)
    outside(monkeypatch, Claimant("bool", True))
    with pytest.raises(TypeError, match="'bool' must return a Claim"):
        detect(path)


def test_a_format_of_another_package_is_registered_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site"
    about = package / "toy_format-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[optimstate.formats]\ntoy = toy_format\n")
    (package / "toy_format.py").write_text(Path(str(toy.__file__)).read_text())
    monkeypatch.syspath_prepend(package)
    registry._outside.cache_clear()
    try:
        source = corpus.case("torch/adam_named_wd").files[0]
        optimstate.convert(source, tmp_path / "there.toy")
        assert optimstate.inspect(tmp_path / "there.toy").format == "toy"
        optimstate.convert(tmp_path / "there.toy", tmp_path / "back.pt")
        trees = [open_checkpoint(path).tree for path in (source, tmp_path / "back.pt")]
        assert difference(*trees) is None
        (about / "entry_points.txt").write_text("[optimstate.formats]\ntorch = toy_format\n")
        registry._outside.cache_clear()
        with pytest.raises(RepresentationError, match="calls itself 'toy'"):
            get_format("toy")
    finally:
        registry._outside.cache_clear()
        sys.modules.pop("toy_format", None)
