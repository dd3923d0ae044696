"""The documentation: generated pages are those of today, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import generate
from tests.cli.golden import same_help
from tests.documents import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_link_leads_to_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not target.startswith(("http://", "https://", "#")):
            found = (page.parent / target.partition("#")[0]).resolve()
            assert found.is_file(), f"{page.name} links to {target}"
            assert DOCS in found.parents, f"{page.name} links out of docs: {target}"


def test_every_page_is_reached_from_the_start_within_two_links() -> None:
    reached = {DOCS / "index.md"}
    for _ in range(2):
        linked = (
            (page.parent / target.partition("#")[0]).resolve()
            for page in reached
            for target in LINK.findall(page.read_text(encoding="utf-8"))
        )
        reached |= {page for page in linked if page.suffix == ".md" and page.is_file()}
    assert set(PAGES) <= reached


def test_the_start_page_answers_ten_questions() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    questions = re.findall(r"^\d+\. \*\*(.*?)\*\*(.*?)(?=^\d+\. |\Z|^## )", text, re.MULTILINE | re.DOTALL)
    assert len(questions) == 10
    assert all(LINK.search(answer) for _, answer in questions)


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_those_of_today(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    made = generate.PAGES[name]()
    assert same_help(made, written) if name == "reference/cli.md" else made == written, "python -m docs.generate"


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]
