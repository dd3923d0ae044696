"""Every container format passes the same tests; so does one that is only a file and an entry in the registry."""

from __future__ import annotations

import pytest

from optimstate.formats.registry import FORMATS
from tests.conformance import Conformance


class TestTorchZip(Conformance):
    name, suffix = "torch", ".pt"


class TestSafetensors(Conformance):
    name, suffix = "safetensors", ".safetensors"


class TestToy(Conformance):
    name, suffix = "toy", ".toy"

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FORMATS, "toy", "tests.formats.toy")
