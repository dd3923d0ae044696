"""The properties of `tests.sweep` and `tests.pairs` hold for the fixtures."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests import corpus, pairs, sweep

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of old and of odd tensors


def test_what_is_seen_of_every_file_is_what_torch_loads() -> None:
    loaded = 0
    for path in sweep.checkpoints([corpus.FILES]):
        found, is_loaded = sweep.failures(path)
        assert found == [], path
        loaded += is_loaded
    assert loaded > 160


@pytest.mark.parametrize("case", [case for case in corpus.all_cases() if case.entry.is_dir()], ids=str)
def test_what_is_seen_of_every_folder_is_what_is_there(case: corpus.Case) -> None:
    assert sweep.failures_of_folder(case.entry) == []


def test_pairs_of_files_differ_exactly_where_torch_loads_other_trees() -> None:
    """A sample; `python -m tests.pairs fixtures` compares all pairs."""
    files = list(pairs.loaded_files([corpus.FILES]))
    assert len(files) > 160
    chosen = itertools.islice(itertools.combinations(files, 2), 0, None, 23)
    assert [line for line in pairs.disagreements(chosen) if line] == []


def test_a_fault_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "b.pt")
    assert sweep.main([str(tmp_path)]) == 0
    assert pairs.main([str(tmp_path)]) == 0
    monkeypatch.setattr(sweep, "tensors_in", lambda _: 3)
    monkeypatch.setattr(pairs, "equal", lambda *_: True)
    assert sweep.main([str(tmp_path)]) == 1
    assert pairs.main([str(tmp_path)]) == 1
