"""How many anonymous optimizers get their names: `python -m tests.naming FOLDER [--hf]`.

FOLDER has checkpoints. What the live run called its parameters is known from a `NAME.truth.json` beside a checkpoint
`NAME` (`groups`, each with `params`), or from the `rows` of a `manifest.json` (`path`, with the names in
`optimizer_param_names_in_order`); for all others, from the names that the optimizer has itself, which are taken out
first. Prints the optimizers whose names are wrong, then those that are refused with the fact that is missing, then the
counts; the exit code is 1 where a name is wrong.

With `--hf` a checkpoint with a `config.json` is tried with the model of transformers that it names, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from optimstate.errors import MigrationError, OptimStateError
from optimstate.formats.registry import open_checkpoint
from optimstate.state.names import unwrapped
from optimstate.state.sections import find_sections
from optimstate.surgery.writing.naming import concluded_names, name
from optimstate.tree import replaced

Outcome = Literal["right", "wrong", "refused", "no optimizer"]


class Judged(NamedTuple):
    """What became of one optimizer."""

    path: Path
    outcome: Outcome
    why: str = ""


def judged(path: Path, expected: Sequence[str], *, hf: bool = False) -> Judged:
    """Name the optimizer of a checkpoint, and hold that against what the live run called its parameters."""
    configs = (path / "config.json", *path.glob("checkpoint-*/config.json"))
    config = next((file for file in configs if file.is_file()), None)
    try:
        report = name(path, None, dry_run=True)
    except MigrationError as error:
        if not hf or config is None:
            return Judged(path, "refused", error.problems[0].message)
        try:
            report = name(path, None, dry_run=True, hf=config.parent)
        except MigrationError as again:
            return Judged(path, "refused", again.problems[0].message)
    except OptimStateError as error:
        return Judged(path, "no optimizer", str(error).splitlines()[0])
    each = [_compared(path, [given for given, _ in found], expected) for found in report.optimizers.values()]
    return next((judgement for judgement in each if judgement.outcome == "wrong"), each[0])


def without_names(path: Path) -> Iterator[Judged]:
    """Take the names out of a checkpoint's optimizers and conclude them."""
    document = open_checkpoint(path)
    known = {}
    groups = {}
    for section in find_sections(document.tree):
        if section.kind != "optimizer" or not isinstance(section.node, dict):
            continue
        lists = section.node.get("param_groups")
        if isinstance(lists, list) and all(isinstance(g, dict) and "param_names" in g for g in lists):
            known[section.label] = [str(name) for group in lists for name in group["param_names"]]
            groups.update({id(g): {k: v for k, v in g.items() if k != "param_names"} for g in lists})
    if not known:
        return
    tree = replaced(document.tree, groups)
    for label, found in concluded_names(document, find_sections(tree)).items():
        if isinstance(found, str):
            yield Judged(path, "refused", found)
        elif label in known:
            yield _compared(path, found, known[label])


def _compared(path: Path, found: Sequence[str], expected: Sequence[str]) -> Judged:
    own, live = ([rename(each) for each in names] for names in (found, expected) for rename in [unwrapped(names)])
    # Weights beside an optimizer leave out the name of an adapter, which the live run has.
    live = [each.replace(".default.", ".") if each not in own else each for each in live]
    if own == live:
        return Judged(path, "right")
    first = next((f"{a} is {b}" for a, b in zip(own, live, strict=False) if a != b), f"{len(own)} of {len(live)}")
    return Judged(path, "wrong", first)


def known_names(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Checkpoints of a folder with the names that their live optimizers had."""
    manifest = folder / "manifest.json"
    rows = json.loads(manifest.read_text(encoding="utf-8")).get("rows", []) if manifest.is_file() else []
    by_path = {folder / row["path"]: row["optimizer_param_names_in_order"] for row in rows if _names_of(row)}
    yield from by_path.items()
    for truth in sorted(folder.rglob("*.truth.json")):
        path = next((p for p in _beside(truth) if p.exists()), None)
        groups = json.loads(truth.read_text(encoding="utf-8")).get("groups")
        if path is not None and path not in by_path and isinstance(groups, list):
            yield path, [parameter for group in groups for parameter in group["params"]]


def _names_of(row: dict[str, Any]) -> Any:
    return row.get("optimizer_param_names_in_order")


def _beside(truth: Path) -> Iterator[Path]:
    stem = truth.name.removesuffix(".truth.json")
    yield truth.with_name(stem)
    yield from (path for path in truth.parent.glob(f"{stem}.*") if path != truth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hf", action="store_true", help="build the models that a config.json names")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = [judged(path, expected, hf=options.hf) for path, expected in known_names(options.folder)]
    known = {each.path for each in found}
    for path in sorted(options.folder.iterdir()):
        if path not in known and not any(path in other.parents for other in known):
            try:
                found += without_names(path)
            except OptimStateError:
                continue
    for each in sorted(found, key=lambda each: (each.outcome != "wrong", each.path)):
        if each.outcome not in ("right", "no optimizer"):
            print(f"{each.outcome}: {each.path.relative_to(options.folder)}: {each.why}")
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(j.outcome for j in found).items())))
    return int(any(each.outcome == "wrong" for each in found))


if __name__ == "__main__":
    sys.exit(main())
