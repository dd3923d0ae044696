"""What picklescan and fickling say of the same files as `optimstate scan`.

`python -m tests.hostile.peers FOLDER --harmless FOLDER`: FOLDER holds a manifest.json of `tests.hostile.attacks`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from optimstate.surgery.scanning import scan

__all__ = ["JUDGES", "table"]


def _optimstate(path: Path) -> str:
    return "clean" if scan(path).clean else "flagged"


def _picklescan(path: Path) -> str:
    from picklescan.scanner import SafetyLevel, scan_file_path

    logging.getLogger("picklescan").setLevel(logging.CRITICAL)
    result = scan_file_path(str(path))
    # Its command line exits with 1 for an issue and with 2 for an error; suspicious names alone are exit 0.
    if result.issues_count or any(found.safety is SafetyLevel.Dangerous for found in result.globals):
        return "flagged"
    return "flagged" if result.scan_err else "clean"


def _fickling(path: Path) -> str:
    import fickling

    try:
        return "clean" if fickling.is_likely_safe(str(path)) else "flagged"
    except Exception:  # noqa: BLE001  # it ends with an error of its own, and the file is not loaded
        return "flagged"


JUDGES: dict[str, Callable[[Path], str]] = {
    "optimstate scan": _optimstate,
    "picklescan": _picklescan,
    "fickling": _fickling,
}


def table(attacks: Iterable[Path], harmless: Iterable[Path]) -> str:
    """How many attacks each calls clean, and how many harmless files each flags."""
    attacks, harmless = list(attacks), list(harmless)
    lines = [
        f"| | attacks called clean, of {len(attacks)} | harmless files flagged, of {len(harmless)} |",
        "|---|---|---|",
    ]
    for name, judge in JUDGES.items():
        missed = Counter(map(judge, attacks))["clean"]
        wrongly = Counter(map(judge, harmless))["flagged"]
        lines.append(f"| {name} | {missed} | {wrongly} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--harmless", type=Path)
    options = parser.parse_args()
    rows = json.loads((options.folder / "manifest.json").read_text())
    found = (Path(folder, name) for folder, _, names in os.walk(options.harmless or "") for name in names)
    pickled = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".zip", ".metadata"}
    honest = sorted(path for path in found if path.suffix in pickled or path.name == ".metadata")
    print(table([options.folder / row["file"] for row in rows if row["proven_to_run"]], honest))
