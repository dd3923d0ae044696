"""`inspect --html`: the page in a real browser, with hostile names and with many parameters."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.surgery.reports import ModelInfo
from tests import corpus
from tests.cli.running import run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in (apt-get install chromium)")

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>.weight",
    "<img src=x onerror=\"document.title='owned'\">",
    "'\"><svg/onload=document.title='owned'>",
    "layers.0.<!--<script>",
    "</script x='y'",
    "&lt;b&gt; &amp; \u2028 \u202egnp.exe \x00 ${1}`",
]


def checkpoint(names: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = {name: torch.randn(4, 4) for name in names}
    state = {
        key: {"step": torch.tensor(9.0), "exp_avg": tensor * 1e-3, "exp_avg_sq": (tensor * 1e-3) ** 2}
        for key, tensor in enumerate(model.values())
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "note": names[0]}
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [{**group, "params": list(state), "param_names": names}]},
    }


def page_of(tree: Any, folder: Path) -> Path:
    torch.save(tree, folder / "a<b>'&.pt")
    outcome = run("inspect", str(folder / "a<b>'&.pt"), "--html", str(folder / "page.html"))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.rstrip().endswith(f"wrote {folder / 'page.html'}")
    return folder / "page.html"


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


# --- without a browser ----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_of_a_file_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(checkpoint(HOSTILE), tmp_path).read_text(encoding="utf-8")
    elements = Elements(page).found
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 2
    assert not {"img", "svg", "iframe", "link", "object", "base", "form", "b"} & set(tags)
    for _, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "url(" not in page
    assert "@import" not in page
    names = {row[1] for row in data_of(page)["rows"]}
    assert set(HOSTILE) <= names


def test_names_that_are_no_text_are_written_too(tmp_path: Path) -> None:
    page = page_of(checkpoint(["half \ud800 of a pair", "whole \U0001f600"]), tmp_path).read_bytes().decode("utf-8")
    assert {row[1] for row in data_of(page)["rows"]} == {"half \ud800 of a pair", "whole \U0001f600"}


def test_the_page_holds_the_numbers_of_the_inspection(tmp_path: Path) -> None:
    source = corpus.case("torch/adamw_named_layerwise_sequentiallr").entry
    assert run("inspect", str(source), "--html", str(tmp_path / "page.html")).code == 0
    data = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    found = optimstate.inspect(source, statistics=True)
    model = next(section for section in found.sections if isinstance(section, ModelInfo))
    assert data["series"] == ["weights: model", "exp_avg", "exp_avg_sq"]
    assert data["squares"] == [2]
    norms = {row[1]: row[7] for row in data["rows"] if row[0] == 0}
    assert norms == {name: numbers.norm for name, numbers in model.statistics.items()}


@pytest.mark.parametrize("case", corpus.all_cases(), ids=str)
def test_every_fixture_has_a_page_or_says_why_not(case: corpus.Case, tmp_path: Path) -> None:
    outcome = run("inspect", str(case.entry), "--html", str(tmp_path / "page.html"))
    assert outcome.code in (0, 3)
    assert (tmp_path / "page.html").exists() == (outcome.code == 0)
    if outcome.code == 0:
        data_of((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_an_existing_page_is_kept_without_force(tmp_path: Path) -> None:
    source = str(corpus.case("torch/adam_named_wd").entry)
    (tmp_path / "page.html").write_text("precious")
    outcome = run("inspect", source, "--html", str(tmp_path / "page.html"))
    assert (outcome.code, outcome.out) == (5, "")
    assert "exists already" in outcome.err
    assert (tmp_path / "page.html").read_text() == "precious"
    assert run("inspect", source, "--html", str(tmp_path / "page.html"), "--force").code == 0
    assert run("inspect", source, "--html", source, "--force").code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


# --- in a browser ---------------------------------------------------------------------------------------------------


def opened(page: Path, folder: Path) -> str:
    """The document after its script has run, as the browser has it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    words = [str(BROWSER), *flags, "--dump-dom", page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


def texts(dom: str, pattern: str) -> list[str]:
    return [html.unescape(re.sub("<[^>]*>", "", found)) for found in re.findall(pattern, dom, re.DOTALL)]


@in_browser
def test_the_page_draws_maps_and_tables_and_runs_nothing_of_the_file(tmp_path: Path) -> None:
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("fc.weight", "fc.bias")] + HOSTILE
    tree = checkpoint(names)
    tree["model"]["layers.1.fc.bias"][0, 0] = float("nan")
    tree["model"]["layers.2.fc.bias"].zero_()
    dom = opened(page_of(tree, tmp_path), tmp_path)
    assert texts(dom, "<title>(.*?)</title>") == ["a<b>'&.pt - optimstate"]
    heads = texts(dom, '<th scope="row"[^>]*>(.*?)</th>')
    assert heads[:2] == ["layers.*.fc.weight", "layers.*.fc.bias"]
    shown = [name.replace("\x00", "\ufffd") for name in HOSTILE]  # what a browser makes of NUL in markup
    assert [head.replace("\x00", "\ufffd") for head in heads[2:]] == [
        n.replace("layers.0.", "layers.*.") for n in shown
    ]
    assert len(re.findall(r'<td [^>]*role="gridcell"', dom)) == len(names)
    assert len(re.findall(r'<td aria-label="layers\.1\.fc\.bias[^"]*1 NaN[^"]*"[^>]*class="broken"', dom)) == 1
    assert len(re.findall(r'<td aria-label="layers\.2\.fc\.bias[^"]*100% zeros"[^>]*class="zero"', dom)) == 1
    assert texts(dom, '<span id="count"[^>]*>(.*?)</span>') == [f"1 to {3 * len(names)} of {3 * len(names)}"]
    assert len(re.findall(r'<tr class="odd">', dom)) == 1
    assert texts(dom, r"<option value=\"\d+\">(.*?)</option>")[:3] == ["weights: model", "exp_avg", "exp_avg_sq"]


@in_browser
def test_five_thousand_parameters_open(tmp_path: Path) -> None:
    names = [f"layers.{layer}.experts.{e}.fc{n}.weight" for layer in range(50) for e in range(50) for n in (1, 2)]
    dom = opened(page_of(checkpoint(names), tmp_path), tmp_path)
    assert len(re.findall(r'<td [^>]*role="gridcell"', dom)) == 5000
    assert texts(dom, '<span id="count"[^>]*>(.*?)</span>') == ["1 to 100 of 15000"]
