"""A plan as a page: which old parameters feed which new ones, as a graph that one can fold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimstate.cli.render.page import document, escape, head, messages
from optimstate.surgery.text import collapsed, plural

if TYPE_CHECKING:
    from optimstate.plan.apply.explain import Row
    from optimstate.surgery.plans.showing import ShowReport

__all__ = ["lineage_page"]

OUTCOMES = ("exact", "approximate", "fresh", "dropped")
NEW, GONE = "(new)", "(dropped)"

_GRAPH = """<section class="panel" aria-labelledby="graph-title">
<h2 id="graph-title">Lineage</h2>
<div class="controls"><label>Name contains
<input id="filter" type="search" spellcheck="false" autocomplete="off"></label>
<span class="legend"><span class="mark exact">exact</span><span class="mark approximate">approximate</span>
<span class="mark fresh">fresh</span><span class="mark dropped">dropped</span></span></div>
<div id="detail" class="detail" role="status" aria-live="polite">
Choose a name to unfold its layers and list its outcomes.
</div>
<div id="graph" class="graph"><ul id="old" aria-label="Old parameters"></ul>
<svg id="links" aria-hidden="true" preserveAspectRatio="none"></svg><ul id="new" aria-label="New parameters"></ul></div>
<noscript>The graph is drawn by the script in this page.</noscript>
</section>"""


def lineage_page(name: str, report: ShowReport) -> str:
    """The page of a plan and, where it was shown with a checkpoint, of what it does to it."""
    rules = [rule for rules in report.passes for rule in rules]
    facts = [plural(len(rules), "rule"), f"digest {report.digest[:12]}"]
    lines = (
        [("warn", f"It cannot be undone: {report.irreversible}")]
        if report.irreversible
        else [("good", "It can be undone.")]
    )
    lines += [("warn", note) for note in report.notes]
    listed = "".join(f"<li><code><bdi>{escape(rule)}</bdi></code></li>" for rule in rules)
    panel = f'<section class="panel"><h2>Rules</h2><ol class="rules">{listed}</ol></section>'
    graph = _GRAPH if report.rows else '<p class="hint">Give a checkpoint to see what becomes of its parameters.</p>'
    data = {"links": _links(report.rows)}
    return document(
        name, head(name, report.checkpoint or name, facts), f"{messages(lines)}\n{graph}\n{panel}", data, "_lineage.js"
    )


def _links(rows: tuple[Row, ...]) -> list[list[Any]]:
    """Source and target, each with the name it is folded under, the worst outcome, how, and each slot's outcome."""
    found: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        found.setdefault((row.target, row.sources), []).append(row)
    made: list[list[Any]] = []
    for (target, sources), of in found.items():
        worst = max((row.outcome for row in of), key=OUTCOMES.index)
        how = next((row.how for row in of if row.how), "")
        slots = dict.fromkeys(f"{row.slot or 'value'} {row.outcome}" for row in of)
        for source in sources or (NEW,):
            ends = source, target or GONE
            made.append([collapsed(ends[0]), ends[0], collapsed(ends[1]), ends[1], worst, how, ", ".join(slots)])
    return made
