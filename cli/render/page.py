"""Reports as one page each: no external resources, and nothing of a file's contents becomes markup or script.

Text is escaped, the numbers are a block of JSON that the script turns into text nodes alone, and a content security
policy admits only the page's own style and script, by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimstate import __version__
from optimstate.cli.render.rows import change_rows, inspection_rows, kind_of
from optimstate.describe import escaped
from optimstate.io.output import AtomicFile
from optimstate.surgery.comparison.differences import counted_kinds
from optimstate.surgery.inspection.report import ModelInfo, OptimizerInfo, SchedulerInfo
from optimstate.surgery.inspection.text import telling_options
from optimstate.surgery.text import plural, shown, size

if TYPE_CHECKING:
    from optimstate.surgery.comparison.comparing import DiffReport
    from optimstate.surgery.inspection.report import GroupInfo, Inspection
    from optimstate.surgery.inspection.updates import Update

__all__ = ["diff_page", "document", "escape", "head", "inspection_page", "messages", "write_page"]


def write_page(text: str, path: Path) -> None:
    """Write a page, all or nothing.

    Args:
        text: The page.
        path: The file; replaced where it exists.

    Raises:
        DestinationError: It cannot be written.
    """
    with AtomicFile(path) as out:
        out.write(text.encode("utf-8", "xmlcharrefreplace"))


def escape(text: str) -> str:
    """A text, such as a name in a file or of one, as it may stand in a page."""
    return html.escape(escaped(text, lines=True))


def inspection_page(found: Inspection, steps: Sequence[Update]) -> str:
    """The page of an inspection that has statistics.

    Args:
        found: The inspection.
        steps: The moments of every parameter and the steps they make.
    """
    sections = sorted(found.sections, key=lambda section: not isinstance(section, OptimizerInfo))
    cards = f'<div class="cards">{"".join(map(_section, sections))}{_opaque(found)}</div>'
    body = f"{_messages(found)}\n{cards}\n{_HISTOGRAMS}\n{_MAPS}\n{_TABLE}"
    return document(Path(found.path).name or found.path, _header(found), body, inspection_rows(found, steps))


def diff_page(report: DiffReport) -> str:
    """The page of a comparison."""
    names = [Path(path).name or path for path in (report.left, report.right)]
    facts = [f"{plural(report.equal, 'tensor')} {'equal' if report.compared_contents else 'alike'}"]
    facts += counted_kinds(report.changes)
    lines = [("good", "No differences.")] if not report.changes else []
    body = f"{messages(lines)}\n{_MAPS}\n{_TABLE}"
    title = " and ".join(names)
    return document(title, head(title, f"{report.left} and {report.right}", facts), body, change_rows(report))


def document(title: str, header: str, body: str, data: Any, script: str = "_page.js") -> str:
    """A whole page.

    Args:
        title: What it is about, as text.
        header: Markup.
        body: Markup.
        data: What the script draws, as JSON.
        script: The file of the script, beside this one.
    """
    folder = Path(__file__).parent
    style = (folder / "_page.css").read_text(encoding="utf-8")
    code = (folder / script).read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(code)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Inside a script element only "<" could end it; the others keep XML parsers and old engines from trouble.
    numbers = json.dumps(data, separators=(",", ":"), allow_nan=False)
    numbers = numbers.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - optimstate</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{header}\n<main>\n{body}\n"
        f"</main>\n<footer>optimstate {__version__}. Nothing in the file was executed.</footer>\n"
        f'<script type="application/json" id="data">{numbers}</script>\n<script>{code}</script>\n</body>\n</html>\n'
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- the text -------------------------------------------------------------------------------------------------------


def _header(found: Inspection) -> str:
    facts = [found.format, size(found.nbytes), plural(found.tensors, "tensor")]
    for section in found.sections:
        if isinstance(section, OptimizerInfo):
            step = next(iter(section.steps)) if len(section.steps) == 1 else "mixed" if section.steps else "none"
            facts.append(f"{section.algorithm or 'unrecognised optimizer'}, step {step}")
    return head(Path(found.path).name or found.path, found.path, facts)


def head(title: str, path: str, facts: Sequence[str]) -> str:
    """The head of a page: what it is about, where that is, and facts about it."""
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    where = f'<p class="path"><bdi>{escape(path)}</bdi></p>' if path != title else ""
    return f'<header><h1><bdi>{escape(title)}</bdi></h1>{where}<ul class="facts">{items}</ul></header>'


def _messages(found: Inspection) -> str:
    lines = [("bad", f"The file names {name}, which would run code if it were unpickled.") for name in found.dangerous]
    lines += [("warn", f"To resume: {line}.") for line in found.resume]
    lines += [("warn", note) for note in found.notes]
    if not found.resume and found.sections:
        lines.insert(0, ("good", "Names, sizes and steps show nothing missing for a resume."))
    return messages(lines)


def messages(lines: Sequence[tuple[str, str]]) -> str:
    """Findings, each `good`, `warn` or `bad`."""
    items = "".join(f'<li class="{kind}"><bdi>{escape(text)}</bdi></li>' for kind, text in lines)
    return f'<ul class="messages" aria-label="Findings">{items}</ul>' if items else ""


_HISTOGRAMS = """<section class="panel" aria-labelledby="histograms-title" id="histograms">
<h2 id="histograms-title">Magnitudes</h2>
<p class="hint">How many elements have each magnitude. The effective step is lr·m̂/(√v̂+ε), the step that follows from
the moments alone; step / weight is the ratio of its norm to the weight's, one number per parameter: about 1e-3 is
usual.</p>
<div class="controls"><label>Of <select id="histogram-kind"></select></label></div>
<div id="histogram-box" class="histograms"></div>
</section>"""


_MAPS = """<section class="panel" aria-labelledby="maps-title">
<h2 id="maps-title">Layers</h2>
<div class="controls"><label>Of <select id="map-series"></select></label>
<label>by <select id="map-measure"></select></label></div>
<div id="legend" class="legend"></div>
<p id="detail" class="detail" role="status" aria-live="polite">Point at a cell, or use the arrow keys.</p>
<div class="scroll" id="map-box" tabindex="0" role="region" aria-label="Heat map">
<table id="map" class="map" role="grid" aria-labelledby="maps-title"></table></div>
<noscript>The heat maps and the table of parameters are drawn by the script in this page.</noscript>
</section>"""

_TABLE = """<section class="panel" aria-labelledby="table-title">
<h2 id="table-title">Parameters</h2>
<div class="controls"><label>Name contains
<input id="filter" type="search" spellcheck="false" autocomplete="off"></label>
<label>Of <select id="table-series"></select></label>
<label><input id="odd" type="checkbox"> only unusual ones</label>
<span id="count" role="status" aria-live="polite"></span></div>
<div class="scroll" id="rows-box" tabindex="0" role="region" aria-label="Table of parameters">
<table id="rows" class="rows"><thead></thead><tbody></tbody></table></div>
<div class="controls">
<button id="before" type="button">Before</button><button id="next" type="button">Next</button></div>
</section>"""


def _section(section: OptimizerInfo | ModelInfo | SchedulerInfo) -> str:
    if isinstance(section, OptimizerInfo):
        return _optimizer(section)
    if isinstance(section, SchedulerInfo):
        facts = [("last epoch", section.last_epoch), ("last lr", shown(section.last_lr))]
        return _card(section.algorithm, section.path, _facts(facts))
    tied = [(f"{len(names)} names share memory", ", ".join(names)) for names in section.tied]
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in section.dtypes.items())
    facts = [
        ("tensors", f"{section.parameters:,}"),
        ("elements", f"{section.elements:,}"),
        ("size", size(section.nbytes)),
        ("dtypes", dtypes),
        *tied,
    ]
    kinds = ([name, f"{count:,}", example] for name, (count, example) in section.names.items())
    return _card(
        kind_of(section),
        section.path,
        _facts(facts) + _details("Names", _html_table(("name", "times", "first"), kinds)),
    )


def _optimizer(section: OptimizerInfo) -> str:
    count = sum(group.parameters for group in section.groups)
    steps = ", ".join(f"{step} (x{times})" for step, times in section.steps.items()) or "none"
    facts = [
        ("parameters", f"{count:,}, {'named' if section.named else 'by position, without names'}"),
        ("state", size(section.nbytes)),
        ("step", steps),
        ("without state", f"{section.fresh:,}"),
    ]
    slots = ([s.name, f"{s.parameters:,}", ", ".join(s.dtypes), size(s.nbytes)] for s in section.slots)
    groups = _html_table(*_group_table(section.groups))
    every = "".join(
        _details(f"Group {index}: all options", _facts([(key, shown(value)) for key, value in group.options.items()]))
        for index, group in enumerate(section.groups)
    )
    tables = _html_table(("slot", "parameters", "dtype", "size"), slots) + groups + every
    return _card(section.algorithm or "Unrecognised optimizer", section.path, _facts(facts) + tables)


def _group_table(groups: Sequence[GroupInfo]) -> tuple[list[str], list[list[str]]]:
    keys = list(dict.fromkeys(key for group in groups for key in telling_options(group.options)))
    rows = [
        [str(index), f"{group.parameters:,}", *(shown(group.options.get(key, "")) for key in keys)]
        for index, group in enumerate(groups)
    ]
    return ["group", "parameters", *keys], rows


def _opaque(found: Inspection) -> str:
    if not found.opaque:
        return ""
    rows = ([name, f"{count:,}"] for name, count in found.opaque.items())
    return _card("Objects kept as records, not loaded", "", _html_table(("class", "times"), rows))


def _card(title: str, where: str, inner: str) -> str:
    at = f" <small>at <bdi>{escape(where)}</bdi></small>" if where else ""
    return f'<section class="panel card"><h3>{escape(title)}{at}</h3>{inner}</section>'


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _facts(facts: Iterable[tuple[str, Any]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd><bdi>{escape(str(v))}</bdi></dd>" for k, v in facts) + "</dl>"


def _html_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join("<tr>" + "".join(f"<td><bdi>{escape(c)}</bdi></td>" for c in cells) + "</tr>" for cells in rows)
    table = f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'
