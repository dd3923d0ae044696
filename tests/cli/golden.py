"""What every command prints on terminals of 80 and 120 columns, and piped: `python -m tests.cli.golden` writes it anew.

Each file of `golden/` holds one command line with what it prints in the three places, and its exit code.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from optimstate.cli import app
from tests import corpus
from tests.cli.place import PLAN_VERBS, furnish

FOLDER = Path(__file__).parent / "golden"

# From typer 0.28 on, the help has an argument's type after its name, so that lines break and align otherwise, and lists
# of arguments have marks around them that older releases leave to the name.
TYPED = re.compile(r" <[\w\[\]]+>")
MARKS = {"}...": "}", "[[": "[", "]]...": "]"}


def same_help(printed: str, kept: str) -> bool:
    """Whether a help text is the one that was kept, but for what the installed typer adds."""
    if TYPED.search(printed):
        for mark, plain in MARKS.items():
            printed = printed.replace(mark, plain)
        printed, kept = ("".join(TYPED.sub("", text).split()) for text in (printed, kept))
    return printed == kept


VERBS = ("inspect", "diff", "remap", "plan", "convert", "name", "verify", "rehearse", "scan")
HELP = {f"help-{verb}": f"optimstate {verb} --help" for verb in VERBS}
HELP |= {f"help-plan-{verb}": f"optimstate plan {verb} --help" for verb in PLAN_VERBS}

CASES = HELP | {
    "help": "optimstate --help",
    "version": "optimstate --version",
    "inspect": "optimstate inspect checkpoint.pt",
    "inspect-params": "optimstate inspect old.pt --params --groups",
    "inspect-hostile": "optimstate inspect hostile.pt",
    "diff": "optimstate diff checkpoint.pt experts.pt",
    "diff-same": "optimstate diff checkpoint-1000/ checkpoint-2000/",
    "remap-rename": "optimstate remap old.pt new.pt --rename 'encoder.{i}.{p**}=blocks.{i}.{p**}'",
    "remap-dry": "optimstate remap old.pt --dry-run --plan plan.toml",
    "remap-outcomes": "optimstate remap checkpoint.pt --dry-run --plan experts.toml",
    "remap-set": "optimstate remap checkpoint.pt --dry-run --set '**.norm.*:weight_decay=0.05' --set '0:lr=0.1'",
    "remap-factored": "optimstate remap adafactor.pt out.pt --plan cut.toml",
    "remap-misfit": "optimstate remap checkpoint.pt out.pt --rename 'encoder.{p**}=blocks.{p}' --drop '**'",
    "plan-suggest": "optimstate plan suggest checkpoint.pt experts.pt",
    "plan-suggest-pipe": "optimstate plan suggest old.pt new-model.pt -o -",
    "plan-derive": "optimstate plan derive old.pt --function converter:renamed",
    "rehearse": "optimstate rehearse --script resume_check.py",
    "plan-check": "optimstate plan check plan.toml old.pt --target new-model.pt",
    "plan-check-misfit": "optimstate plan check wide.toml old.pt --target new-model.pt",
    "plan-check-syntax": "optimstate plan check wrong.toml",
    "plan-invert": "optimstate plan invert plan.toml",
    "plan-invert-lossy": "optimstate plan invert experts.toml",
    "plan-show": "optimstate plan show experts.toml checkpoint.pt",
    "plan-show-params": "optimstate plan show plan.toml old.pt --params",
    "convert": "optimstate convert checkpoint.pt out.safetensors",
    "convert-refused": "optimstate convert object.pt out.safetensors",
    "name": "optimstate name anonymous.pt --dry-run",
    "name-refused": "optimstate name checkpoint-1000/ --dry-run",
    "verify": "optimstate verify checkpoint.pt",
    "verify-faulty": "optimstate verify experts.pt --against checkpoint.pt --plan experts.toml",
    "scan": "optimstate scan hostile.pt",
    "usage": "optimstate remap old.pt",
    "missing": "optimstate inspect missing.pt",
}

EXPERTS = """
[[rule]]
from = "layers.{i}.mlp.fc1.{p}"
to = "layers.{i}.experts.{e=0..1}.fc1.{p}"

[[rule]]
from = "layers.{i}.mlp.fc2.weight"
to = "layers.{i}.mlp.fc2.weight"
resize = { dim = 0, size = 10 }

[[rule]]
fresh = "layers.{i}.mlp.norm.*"

[[rule]]
drop = "embed.weight"
"""
WIDE = """
[[rule]]
from = "head.weight"
to = "head.weight"
resize = { dim = 0, size = 4 }

[[rule]]
drop = "encoder.1.**"
"""
CUT = '[[rule]]\nfrom = "fc2.weight"\nto = "fc2.{x=a|b}.weight"\nsplit = 1\n'
FILES = {"experts.toml": EXPERTS, "cut.toml": CUT, "wide.toml": WIDE, "wrong.toml": '[[rule]]\nfrm = "a"\nto = "b"\n'}
CHECKPOINTS = {
    "experts.pt": "optimstate/moe_experts",
    "hostile.pt": "optimstate/hostile_zip",
    "adafactor.pt": "torch/adafactor_named_wd",
    "object.pt": "torch/wholeobject",
    "anonymous.pt": "torch/adam_unnamed_wd",
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(line: str, columns: int | None) -> str:
    """What a command line prints on a terminal of so many columns, or into a pipe, and its exit code.

    Standard error and the exit code stand below, so marked.
    """
    out, err = (io.StringIO() if columns is None else Terminal() for _ in range(2))
    environment = {"COLUMNS": str(columns or 80), "NO_COLOR": "1", "LINES": "24"}
    before = set(Path().iterdir())
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", shlex.split(line)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = app.run()
    for made in set(Path().iterdir()) - before:
        shutil.rmtree(made) if made.is_dir() else made.unlink()  # a program of the line's may leave compiled files
    said = out.getvalue() + "".join(f"stderr: {text}\n" for text in err.getvalue().splitlines())
    return said + (f"exit code {code}\n" if code else "")


def golden(line: str) -> str:
    """The text of a golden file; places where the same is printed stand together."""
    shown: dict[str, list[str]] = {}
    for columns, place in ((80, "80 columns"), (120, "120 columns"), (None, "piped")):
        shown.setdefault(printed(line, columns), []).append(place)
    return f"$ {line}\n" + "".join(f"--- {', '.join(places)}\n{text}" for text, places in shown.items())


def equip(folder: Path) -> None:
    """Fill a folder with what the cases name."""
    import shutil

    furnish(folder)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name, case in CHECKPOINTS.items():
        shutil.copy(corpus.case(case).entry, folder / name)


def main() -> Iterator[str]:
    """Write every golden file; the names of those that changed."""
    with tempfile.TemporaryDirectory() as folder:
        equip(Path(folder))
        with chdir(folder):
            for old in FOLDER.glob("*.txt"):
                if old.stem not in CASES:
                    old.unlink()
                    yield old.name
            for name, line in CASES.items():
                path, text = FOLDER / f"{name}.txt", golden(line)
                if not path.exists() or path.read_text(encoding="utf-8") != text:
                    path.write_text(text, encoding="utf-8")
                    yield path.name


if __name__ == "__main__":
    for changed in main():
        print(changed)
