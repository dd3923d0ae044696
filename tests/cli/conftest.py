"""The folder in which documented command lines are run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from optimstate.surgery.plans import deriving
from tests.cli.place import furnish


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def derived_once() -> Iterator[None]:
    """`plan derive` asks a process that imports torch, for seconds: here the same question is asked once a session."""
    answers: dict[str, str] = {}

    def asked(command: list[str], *, input: str, **options: Any) -> Any:  # noqa: A002 - as `subprocess.run` has it
        request = json.loads(input)
        place = Path(request.pop("answer"))
        code = [file.read_text(encoding="utf-8") for file in sorted(Path().glob("*.py"))]
        key = json.dumps([command, request, code])
        if key in answers:
            place.write_text(answers[key], encoding="utf-8")
            return subprocess.CompletedProcess(command, 0, stderr="")
        done = subprocess.run(command, input=input, **options)
        if place.exists():
            answers[key] = place.read_text(encoding="utf-8")
        return done

    stand_in = SimpleNamespace(**vars(subprocess) | {"run": asked})
    with mock.patch.object(deriving, "subprocess", stand_in):
        yield


@pytest.fixture
def checkpoints(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with everything in it that the documentation names."""
    folder = tmp_path / "place"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder
