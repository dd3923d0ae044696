"""`inspect --html`: the page in a real browser, with hostile names and with many parameters."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.formats.registry import open_checkpoint
from optimstate.surgery.inspection.report import ModelInfo
from optimstate.surgery.inspection.updates import LEAST, PER_DECADE, updates
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
    names, kinds = data["names"], data["kinds"]
    data["rows"] = [[row[0], *names[row[1]], row[2], kinds[row[3]], *row[4:]] for row in data["rows"]]
    return data


# --- without a browser ----------------------------------------------------------------------------------------------


def test_the_page_has_no_control_characters_of_a_files_name(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\u202e.pt"
    torch.save(checkpoint(["w"]), path)
    for words in (["inspect", str(path)], ["diff", str(path), str(path)]):
        assert run(*words, "--html", str(tmp_path / "page.html"), "--force").code == 0
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert "a\\x1b[31m\\u202e.pt" in page
        assert not re.search("[\x1b\u202e]", page)


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
    assert data["series"] == ["exp_avg", "exp_avg_sq", "effective step", "step / weight", "weights: model"]
    assert data["squares"] == [1]
    norms = {row[1]: row[7] for row in data["rows"] if row[0] == 4}
    assert norms == pytest.approx({name: numbers.norm for name, numbers in model.statistics.items()}, rel=1e-6)


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


def opened(page: Path, folder: Path, *more: str) -> str:
    """The document after its script has run, as the browser has it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    words = [str(BROWSER), *flags, *more, "--dump-dom", page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


def texts(dom: str, pattern: str) -> list[str]:
    return [html.unescape(re.sub("<[^>]*>", "", found)) for found in re.findall(pattern, dom, re.DOTALL)]


@in_browser
def test_the_page_draws_maps_and_tables_and_runs_nothing_of_the_file(tmp_path: Path) -> None:
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("fc.weight", "fc.bias")] + HOSTILE
    tree = checkpoint(names)
    state = tree["optimizer"]["state"]
    state[names.index("layers.1.fc.bias")]["exp_avg"][0, 0] = float("nan")
    state[names.index("layers.2.fc.bias")]["exp_avg"].zero_()
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
    (count,) = texts(dom, '<span id="count"[^>]*>(.*?)</span>')
    assert count.startswith("1 to ")
    assert len(re.findall(r'<tr class="odd">', dom)) == 2  # the moment, and the step made of it
    options = texts(dom, r"<option value=\"\d+\">(.*?)</option>")
    assert options[:3] == ["exp_avg", "exp_avg_sq", "effective step"]
    figures = texts(dom, "<figcaption>(.*?)</figcaption>")
    assert figures == ["exp_avg", "exp_avg_sq", "effective step", "step / weight, of parameters"]


@in_browser
def test_five_thousand_parameters_open(tmp_path: Path) -> None:
    names = [f"layers.{layer}.experts.{e}.fc{n}.weight" for layer in range(50) for e in range(50) for n in (1, 2)]
    dom = opened(page_of(checkpoint(names), tmp_path), tmp_path)
    assert len(re.findall(r'<td [^>]*role="gridcell"', dom)) == 5000
    assert texts(dom, '<span id="count"[^>]*>(.*?)</span>') == ["1 to 100 of 25000"]


@in_browser
def test_a_diff_and_a_plan_have_pages(tmp_path: Path) -> None:
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("fc.weight", "fc.bias")] + HOSTILE[:3]
    left, right = checkpoint(names), checkpoint(names)
    right["model"]["layers.1.fc.weight"] += 1
    del right["model"]["layers.2.fc.bias"]
    for name, tree in (("left", left), ("right", right)):
        torch.save(tree, tmp_path / f"{name}.pt")
    words = ["diff", str(tmp_path / "left.pt"), str(tmp_path / "right.pt"), "--html", str(tmp_path / "diff.html")]
    outcome = run(*words)
    assert outcome.code == 1
    assert outcome.out.rstrip().endswith(f"wrote {tmp_path / 'diff.html'}")
    assert run(*words).code == 5
    dom = opened(tmp_path / "diff.html", tmp_path)
    assert len(re.findall(r'aria-label="layers\.1\.fc\.weight[^"]*relative difference', dom)) == 1
    assert "layers.2.fc.bias" in dom

    (tmp_path / "plan.toml").write_text('[[rule]]\nfrom = "layers.{i}.fc.{p}"\nto = "blocks.{i}.{e=a|b}.{p}"\n')
    words = ["plan", "show", str(tmp_path / "plan.toml"), str(tmp_path / "left.pt"), "--html", str(tmp_path / "p.html")]
    assert run(*words).code == 0
    dom = opened(tmp_path / "p.html", tmp_path)
    shown = texts(dom, r"<bdi>(.*?)</bdi>")
    assert {"layers.*.fc.weight", "blocks.*.a.weight", "blocks.*.b.bias"} <= set(shown)
    assert len(re.findall(r'class="link exact"', dom)) >= 4
    assert "owned" not in texts(dom, "<title>(.*?)</title>")[0]


def test_the_effective_step_is_adams(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 7))
    optimizer = torch.optim.Adam([("w", weight)], lr=3e-3, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(4):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    torch.save({"model": {"w": weight.detach()}, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    (found,) = updates(open_checkpoint(tmp_path / "a.pt"))
    state = {slot: value.double() for slot, value in optimizer.state[weight].items()}
    first, second = 1 - 0.8**4, 1 - 0.95**4
    step = 3e-3 * (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + 1e-6)
    assert found.step is not None
    assert found.step.norm == pytest.approx(float(step.norm()), rel=1e-12)
    assert found.ratio == pytest.approx(float(step.norm() / weight.detach().double().norm()), rel=1e-12)
    magnitudes = step.abs().log10().flatten()
    histogram = found.histograms["effective step"]
    for index, count in enumerate(histogram.counts):
        low = LEAST + index / PER_DECADE
        assert count == int(((magnitudes >= low) & (magnitudes < low + 1 / PER_DECADE)).sum())


AXE = next((p for p in (Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js")),) if p.is_file()), None)


@in_browser
@pytest.mark.skipif(AXE is None, reason="axe-core is not there (npm install axe-core, or AXE=path)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(dark: bool, tmp_path: Path) -> None:
    assert AXE is not None
    tree = checkpoint([f"layers.{layer}.{part}" for layer in range(3) for part in ("fc.weight", "fc.bias")])
    tree["model"]["layers.1.fc.bias"][0, 0] = float("nan")
    pages = [page_of(tree, tmp_path)]
    (tmp_path / "plan.toml").write_text('[[rule]]\nfrom = "layers.{i}.fc.{p}"\nto = "blocks.{i}.{p}"\n')
    torch.save(tree, tmp_path / "left.pt")
    run("plan", "show", str(tmp_path / "plan.toml"), str(tmp_path / "left.pt"), "--html", str(tmp_path / "plan.html"))
    pages.append(tmp_path / "plan.html")
    tree["model"]["layers.0.fc.bias"] = tree["model"]["layers.0.fc.bias"] + 1
    torch.save(tree, tmp_path / "right.pt")
    run("diff", str(tmp_path / "left.pt"), str(tmp_path / "right.pt"), "--html", str(tmp_path / "diff.html"))
    pages.append(tmp_path / "diff.html")
    for page in pages:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
        if dark:
            text = text.replace("(prefers-color-scheme: dark)", "all")
        said = "axe.run().then(r => { document.title = 'axe: ' + JSON.stringify(r.violations.filter(v => "
        said += "['serious', 'critical'].includes(v.impact)).map(v => [v.id, v.nodes.map(n => n.html)])); });"
        text = text.replace(
            "</body>", f"<script>{AXE.read_text(encoding='utf-8')}</script><script>{said}</script></body>"
        )
        (tmp_path / "axe.html").write_text(text, encoding="utf-8")
        title = texts(opened(tmp_path / "axe.html", tmp_path, "--virtual-time-budget=10000"), "<title>(.*?)</title>")[0]
        assert title == "axe: []"
