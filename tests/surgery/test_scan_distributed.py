"""`scan` of a distributed checkpoint: by its metadata if this names every byte of a data file, else byte by byte."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimstate.formats.dcp.columns import Item, Metadata
from optimstate.formats.dcp.dump import dump_metadata
from optimstate.surgery.scanning import ScanReport, scan
from tests.corpus import FILES

FOLDERS = sorted(path.parent for path in FILES.rglob(".metadata"))
FILE = "__0_0.distcp"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("false",)


def archive(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


ARCHIVES = [archive(torch.ones(3)), archive(Evil()), archive(torch.zeros(20_000)), archive({"epoch": 3})]
STARTS = [sum(map(len, ARCHIVES[:number])) for number in range(len(ARCHIVES) + 1)]
WHOLE = list(zip(STARTS, map(len, ARCHIVES), strict=False))


def written(folder: Path, places: list[tuple[int, int]]) -> Path:
    """A folder whose data file has all the archives and whose metadata names these places."""
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(b"".join(ARCHIVES))
    metadata = Metadata()
    for number, (start, size) in enumerate(places):
        metadata.add_object(f"item{number}", Item(FILE, start, size))
    (folder / ".metadata").write_bytes(dump_metadata(metadata))
    return folder


def of_data(report: ScanReport) -> list[tuple[str, str, int, str]]:
    return [
        (each.file, each.record, each.offset, each.name) for each in report.findings if each.file.endswith(".distcp")
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_with_and_without_metadata_the_same_is_found(folder: Path, tmp_path: Path) -> None:
    report = scan(folder)
    assert not report.unreadable
    for file in folder.glob("*.distcp"):
        shutil.copy(file, tmp_path)
    alone = scan(tmp_path)
    assert of_data(report) == of_data(alone)
    assert not alone.unreadable


@given(
    st.lists(
        st.one_of(
            st.sampled_from(WHOLE),
            st.tuples(st.sampled_from(STARTS), st.sampled_from(STARTS)).map(
                lambda ends: (min(ends), abs(ends[1] - ends[0]))
            ),
            st.tuples(st.integers(0, STARTS[-1]), st.integers(0, STARTS[-1])),
        ),
        max_size=6,
    )
)
def test_no_metadata_hides_an_attack(tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]) -> None:
    report = scan(written(tmp_path_factory.getbasetemp() / "hidden", places))
    assert not report.clean


@pytest.mark.parametrize("gone", [None, 0, 1, 2, 3])
def test_the_attack_is_named_whether_metadata_names_it_or_not(tmp_path: Path, gone: int | None) -> None:
    places = [place for number, place in enumerate(WHOLE) if number != gone]
    found = [each for each in of_data(scan(written(tmp_path / "a", places))) if each[3].endswith("system")]
    assert [(each[0], each[1].partition("/")[0]) for each in found] == [(FILE, f"byte {STARTS[1]}")]
