"""From many moves with literal names to few rules with templates.

A template is used only if it was checked against all names: one that matches other names than intended is replaced by
an enumeration or by literal names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from optimstate.derivation.families import TOKENS, Moves, Pattern, family_rules, listed
from optimstate.derivation.renames import renamings
from optimstate.derivation.words import merged_words
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template

__all__ = ["drops", "generalised"]


def generalised(moves: Sequence[Moves], names: Iterable[str]) -> list[Rule]:
    """Rules that make exactly these moves among these names, as few as possible.

    Args:
        moves: The moves; no source is in two of them, and names that stay the same are not included.
        names: All names of the pass; those of no move must match no rule.
    """
    everything = list(names)
    arranged = [move for move in moves if not _is_rename(move)]
    renames = {move.sources[0]: move.targets[0] for move in moves if _is_rename(move)}
    rules = family_rules(arranged, everything)
    taken = {name for move in arranged for name in move.sources}
    left = [name for name in everything if name not in taken]
    return [*merged_words(rules, everything), *renamings(renames, left)]


def _is_rename(move: Moves) -> bool:
    return not move.operations and len(move.sources) == len(move.targets) == 1


def drops(dropped: Sequence[str], names: Iterable[str]) -> list[Rule]:
    """Rules that drop names, or whole modules if none of their names is kept."""
    kept = set(names) - set(dropped)
    prefixes = {".".join(name.split(".")[:count]) for name in kept for count in range(1, name.count(".") + 1)}
    made: dict[str, None] = {}
    for name in dropped:
        parts = name.split(".")
        heads = (".".join(parts[:count]) for count in range(1, len(parts)))
        head = next((head for head in heads if head not in prefixes), None)
        made[f"{head}.**" if head is not None else name] = None
    groups: dict[Pattern, list[str]] = defaultdict(list)
    for text in made:
        groups[tuple("#" if token.isdigit() else token for token in TOKENS.findall(text))].append(text)
    return [rule for texts in groups.values() for rule in _dropping(texts)]


def _dropping(texts: Sequence[str]) -> list[Rule]:
    """One rule if the texts differ in one integer, else one for each."""
    rows = [TOKENS.findall(text) for text in texts]
    varying = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    if len(varying) == 1:
        (at,) = varying
        values = sorted(int(row[at]) for row in rows)
        return [Rule((Template("".join((*rows[0][:at], f"{{i={listed(values)}}}", *rows[0][at + 1 :]))),))]
    return [Rule((Template.literal(text) if not text.endswith("**") else Template(text),)) for text in texts]
