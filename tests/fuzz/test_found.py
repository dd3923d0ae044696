"""Inputs that fuzzing found, and a sample of new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.inputs import understood
from tests.fuzz.targets import FOUND, read_anything, run_verbs


@pytest.mark.parametrize("path", sorted(FOUND.iterdir()), ids=lambda path: path.name)
def test_what_was_found_is_found_no_more(path: Path) -> None:
    data = path.read_bytes()
    if path.name.startswith("verbs-"):
        run_verbs(int(data))
    else:
        read_anything(understood(data))


@pytest.mark.parametrize("seed", range(8))
def test_verbs_raise_errors_of_their_own_alone(seed: int) -> None:
    run_verbs(seed)
