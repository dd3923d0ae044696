"""Pages of the documentation, followed from top to bottom as a reader follows them.

`toml` blocks become files, `console` lines run through the command line, `python` blocks in one scope, and what they
print has to be the `text` block that follows. A shown line must be in the output, in order; `...` stands for lines left
out, and numbers of bytes are compared as they are written.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from tests.cli.running import run

__all__ = ["Block", "blocks", "compare", "follow"]

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page on which it begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    for match in _BLOCK.finditer(page):
        yield Block(match[1], match[2], page.count("\n", 0, match.start()) + 1)


def follow(page: str, folder: Path, scope: dict[str, Any] | None = None) -> dict[str, Any]:
    """Do all that a page says, in the current folder.

    Args:
        page: Its text.
        folder: The current folder, where plans are written.
        scope: What earlier Python has left.

    Returns:
        What the page's Python has left.
    """
    scope = {"__name__": "page"} if scope is None else scope
    printed = ""
    for language, text, line in blocks(page):
        where = f"line {line}"
        if language == "toml":
            name = re.match(r"# (\S+\.toml)\n", text)
            if name and name[1] != "pyproject.toml":
                (folder / name[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(text, where, "exec"), scope)
            printed = out.getvalue()
        elif language == "text" and printed:
            compare(text.splitlines(), printed.splitlines(), where)
        elif language == "console":
            console(text, where)
    return scope


def console(text: str, where: str) -> None:
    """Run the commands of a block and compare what they print; `diff` finds differences, which is its exit code 1."""
    for session in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = re.sub(r" \\\n\s*", " ", session).splitlines()
        shown = shown[:-1] if shown and not shown[-1] else shown  # a blank line between two commands
        words = shlex.split(command)
        assert words[0] == "optimstate", f"{where}: {command}"
        outcome = run(*words[1:])
        assert outcome.code == (1 if words[1] == "diff" else 0), f"{where}: {command}: {outcome.err or outcome.out}"
        assert outcome.err == "", f"{where}: {command}: {outcome.err}"
        if shown:
            compare(shown, outcome.out.splitlines(), f"{where}: {command}")


def compare(shown: list[str], printed: list[str], where: str) -> None:
    """Lines in order; what `...` stands for is skipped, and nothing else is."""
    at, skipping = 0, False
    for line in shown:
        if line == "...":
            skipping = True
            continue
        while skipping and at < len(printed) and printed[at] != line:
            at += 1
        assert at < len(printed), f"{where}: not printed: {line}\n" + "\n".join(printed)
        assert printed[at] == line, f"{where}: printed {printed[at]!r}, shown {line!r}"
        at, skipping = at + 1, False
    assert skipping or at == len(printed), f"{where}: not shown: {printed[at:]}"
