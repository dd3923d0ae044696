"""The fixtures as tests see them: cases from the manifest, their paths and truths. Imports no torch."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures"
FILES = FIXTURES / "files"
MANIFEST = FIXTURES / "manifest.json"


@dataclass(frozen=True)
class Case:
    """One checkpoint of the manifest; every path is absolute."""

    name: str
    framework: str
    version: str
    optimizer: str | None
    covers: str
    entry: Path
    files: tuple[Path, ...]
    truth_path: Path | None
    generated_by: str | None

    def __str__(self) -> str:
        return self.name

    @property
    def is_hostile(self) -> bool:
        """Whether loading a file of it in full would run a command."""
        return self.name.startswith("optimstate/hostile_")

    def truth(self) -> dict[str, Any]:
        """What the live objects held; an error where the case has no truth file."""
        if self.truth_path is None:
            raise LookupError(f"{self.name} has no truth file")
        truth: dict[str, Any] = json.loads(self.truth_path.read_text(encoding="utf-8"))
        return truth


def _case(entry: dict[str, Any]) -> Case:
    truth = entry["truth"]
    return Case(
        name=entry["case"],
        framework=entry["framework"],
        version=entry["version"],
        optimizer=entry["optimizer"],
        covers=entry["covers"],
        entry=FILES / entry["case"] / entry["entry"],
        files=tuple(FILES / file["path"] for file in entry["files"]),
        truth_path=FILES / truth["path"] if truth else None,
        generated_by=entry["generated_by"],
    )


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in the manifest's order."""
    return tuple(_case(entry) for entry in json.loads(MANIFEST.read_text(encoding="utf-8"))["cases"])


def cases(*prefixes: str, truth: str | None = None) -> list[Case]:
    """The cases whose name starts with one of the prefixes; with `truth`, those whose truth has that part.

    The parts are `groups`, `state`, `model`, `ema`, `tensors`, `values`, `hostile`, `optimizers`.
    """
    found = [case for case in all_cases() if not prefixes or case.name.startswith(prefixes)]
    if not found:
        raise LookupError(f"no case of the manifest starts with {' or '.join(prefixes)}")
    return [case for case in found if truth is None or (case.truth_path and truth in case.truth())]


def case(name: str) -> Case:
    """The one case of that name."""
    for found in all_cases():
        if found.name == name:
            return found
    raise LookupError(f"no case {name!r} in the manifest")


def container_of(path: Path) -> str:
    """`torch_zip`, `torch_legacy`, `pickle`, `safetensors`, `distcp` or `other`, by a file's first bytes and name."""
    with path.open("rb") as file:
        head = file.read(16)
    if path.suffix == ".distcp":
        return "distcp"
    if head.startswith(b"PK\x03\x04"):
        return "torch_zip"
    if path.suffix == ".safetensors":
        return "safetensors"
    # The legacy container starts with its magic number, pickled as a ten-byte long.
    if head[:1] == b"\x80" and head[2:4] == b"\x8a\x0a":
        return "torch_legacy"
    return "pickle" if head[:1] == b"\x80" else "other"


def files_in(container: str, *prefixes: str) -> list[Path]:
    """Every fixture file in a container, hostile ones too, in the manifest's order."""
    return [path for found in cases(*prefixes) for path in found.files if container_of(path) == container]


def subscript(tree: Any, place: str) -> Any:
    """The object at a place of a truth's `tensors` or `values`, as `['state'][0]['step']`.

    Args:
        tree: The loaded checkpoint.
        place: A path written by the fixtures' generator; it names keys by their repr, so only literals occur.
    """
    # The text comes from a committed truth file, never from a checkpoint.
    return eval(f"tree{place}", {"__builtins__": {}}, {"tree": tree, "inf": float("inf"), "nan": float("nan")})
