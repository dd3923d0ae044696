"""An inspection as one page: no external resources, and nothing of a file's contents becomes markup or script.

Text is escaped, the numbers are a block of JSON that the script turns into text nodes alone, and a content security
policy admits only the page's own style and script, by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimstate import __version__
from optimstate.cli.render.inspect import is_step, telling_options
from optimstate.io.output import AtomicFile
from optimstate.state.algorithms.registry import ALGORITHMS
from optimstate.surgery.reports import ModelInfo, OptimizerInfo, SchedulerInfo
from optimstate.surgery.statistics import second_moments
from optimstate.surgery.text import plural, shown, size

if TYPE_CHECKING:
    from optimstate.surgery.reports import GroupInfo, Inspection, ParameterInfo
    from optimstate.surgery.statistics import Statistics

__all__ = ["page", "write_page"]

ANONYMOUS_PER_ROW = 32  # parameters without names in a row of the heat map


def write_page(found: Inspection, path: Path) -> None:
    """Write the page, all or nothing.

    Args:
        found: An inspection with statistics.
        path: The file; replaced where it exists.

    Raises:
        DestinationError: It cannot be written.
    """
    with AtomicFile(path) as out:
        out.write(page(found).encode("utf-8", "xmlcharrefreplace"))


def page(found: Inspection) -> str:
    """The page of an inspection that has statistics."""
    folder = Path(__file__).parent
    style = (folder / "_page.css").read_text(encoding="utf-8")
    script = (folder / "_page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Inside a script element only "<" could end it; the others keep XML parsers and old engines from trouble.
    data = json.dumps(_data(found), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    title = escape(Path(found.path).name or found.path)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} - optimstate</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{_header(found)}\n<main>\n{_messages(found)}\n"
        f'<div class="cards">{"".join(map(_section, found.sections))}{_opaque(found)}</div>\n{_MAPS}\n{_TABLE}\n'
        f"</main>\n<footer>optimstate {__version__}. Nothing in the file was executed.</footer>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- the numbers ----------------------------------------------------------------------------------------------------


def _data(found: Inspection) -> dict[str, Any]:
    """The series (weights, and each slot), which of them are averages of squares, and a row for every tensor."""
    series: list[str] = []
    squares: list[int] = []
    rows: list[list[Any]] = []
    several = sum(isinstance(section, OptimizerInfo) for section in found.sections) > 1
    for section in found.sections:
        if isinstance(section, ModelInfo):
            series.append(f"{_kind(section)}: {section.path}")
            for name, numbers in section.statistics.items():
                rows.append([len(series) - 1, name, *_place(name), "", section.tensors[name], *_numbers(numbers)])
        elif isinstance(section, OptimizerInfo):
            at = f" ({section.path})" if several else ""
            number: dict[str, int] = {}
            second = second_moments(next((a for a in ALGORITHMS if a.name == section.algorithm), None))
            for parameter, name, place in _parameters(section):
                for slot, numbers in parameter.statistics.items():
                    if is_step(slot):
                        continue
                    if slot not in number:
                        number[slot] = len(series)
                        squares += [len(series)] if slot in second else []
                        series.append(f"{slot}{at}")
                    described = parameter.slots.get(slot, "")
                    kind = described if isinstance(described, str) else "one number"
                    rows.append([number[slot], name, *place, str(parameter.group), kind, *_numbers(numbers)])
    return {"series": series, "squares": squares, "rows": rows}


def _parameters(section: OptimizerInfo) -> Iterator[tuple[ParameterInfo, str, tuple[str, str]]]:
    """Each parameter with its name and its place in the heat map: by layer, or in order where there are no names."""
    count: dict[int, int] = {}
    for parameter in section.parameters:
        if parameter.name is not None:
            yield parameter, parameter.name, _place(parameter.name)
            continue
        index = count[parameter.group] = count.get(parameter.group, -1) + 1
        first = index // ANONYMOUS_PER_ROW * ANONYMOUS_PER_ROW
        place = f"group {parameter.group}, from {first}", str(index - first)
        yield parameter, f"({parameter.key})", place


def _place(name: str) -> tuple[str, str]:
    """Row and column: the name without its first layer index, and that index."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None or len(parts[at]) > 6:
        return name, ""
    return ".".join([*parts[:at], "*", *parts[at + 1 :]]), str(int(parts[at]))


def _numbers(found: Statistics) -> list[Any]:
    numbers = [found.elements, found.norm, found.rms, found.minimum, found.maximum]
    return [*numbers, found.zeros, found.nan, found.inf, found.negative]


# --- the text -------------------------------------------------------------------------------------------------------


def _header(found: Inspection) -> str:
    path = Path(found.path)
    facts = [found.format, size(found.nbytes), plural(found.tensors, "tensor")]
    for section in found.sections:
        if isinstance(section, OptimizerInfo):
            step = next(iter(section.steps)) if len(section.steps) == 1 else "mixed" if section.steps else "none"
            facts.append(f"{section.algorithm or 'unrecognised optimizer'}, step {step}")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    where = f'<p class="path"><bdi>{escape(found.path)}</bdi></p>' if str(path) != path.name else ""
    return (
        f'<header><h1><bdi>{escape(path.name or found.path)}</bdi></h1>{where}<ul class="facts">{items}</ul></header>'
    )


def _messages(found: Inspection) -> str:
    lines = [("bad", f"The file names {name}, which would run code if it were unpickled.") for name in found.dangerous]
    lines += [("warn", f"To resume: {line}.") for line in found.resume]
    lines += [("warn", note) for note in found.notes]
    if not found.resume and found.sections:
        lines.insert(0, ("good", "To resume, nothing is missing that names, sizes and steps can show."))
    items = "".join(f'<li class="{kind}"><bdi>{escape(text)}</bdi></li>' for kind, text in lines)
    return f'<ul class="messages" aria-label="Findings">{items}</ul>'


_MAPS = """<section class="panel" aria-labelledby="maps-title">
<h2 id="maps-title">Layers</h2>
<div class="controls"><label>Of <select id="map-series"></select></label>
<label>by <select id="map-measure"></select></label></div>
<div id="legend" class="legend"></div>
<p id="detail" class="detail" role="status" aria-live="polite">Point at a cell, or use the arrow keys.</p>
<div class="scroll" id="map-box"><table id="map" class="map" role="grid" aria-labelledby="maps-title"></table></div>
<noscript>The heat maps and the table of parameters are drawn by the script in this page.</noscript>
</section>"""

_TABLE = """<section class="panel" aria-labelledby="table-title">
<h2 id="table-title">Parameters</h2>
<div class="controls"><label>Name has <input id="filter" type="search" spellcheck="false" autocomplete="off"></label>
<label>Of <select id="table-series"></select></label>
<label><input id="odd" type="checkbox"> only odd ones</label>
<span id="count" role="status" aria-live="polite"></span></div>
<div class="scroll" id="rows-box"><table id="rows" class="rows"><thead></thead><tbody></tbody></table></div>
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
        _kind(section), section.path, _facts(facts) + _details("Names", _html_table(("name", "times", "first"), kinds))
    )


def _kind(section: ModelInfo) -> str:
    return "averaged weights" if section.kind == "ema" else "weights"


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
    return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
