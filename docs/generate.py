"""The pages that are made from the code: `python -m docs.generate` writes them, a test compares them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

from optimstate.cli.app import COMMANDS
from optimstate.state.algorithms.registry import ALGORITHMS, Algorithm, Slot

__all__ = ["PAGES", "command_line", "slots"]

DOCS = Path(__file__).parent
MADE = "<!-- Made by `python -m docs.generate`: change the code, not this page. -->\n"


def command_line() -> str:
    """The help of every command."""
    parts = [
        f"# Options of every command\n\n{MADE}\nWhat `--help` prints. What the commands do, exit codes and the JSON "
        "forms: [command line](../command-line.md).\n"
    ]
    for command in COMMANDS:
        listed = _subcommands(command)
        found = [(command,), *((command, verb) for verb in listed)]
        parts += [f"\n## {' '.join(words)}\n\n```text\n{_help(*words)}\n```\n" for words in found]
    return "".join(parts)


def _help(*words: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "optimstate", *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def _subcommands(command: str) -> list[str]:
    """The verbs of a group of commands, as its help lists them."""
    text = _help(command)
    if "\nCommands:\n" not in text:
        return []
    lines = text.partition("\nCommands:\n")[2].partition("\n\n")[0].splitlines()
    return [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]


# --- slots ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, str, str, str, str]] = {
    # kind: what it is, cut and joined, transposed, new rows, copied
    "like_param": (
        "one number for each number of the parameter",
        "as the parameter, exactly",
        "as the parameter, exactly",
        "zeros; the mean of the old rows where the degree is 2",
        "copied",
    ),
    "weight": (
        "a copy of the parameter itself",
        "as the parameter, exactly",
        "as the parameter, exactly",
        "the parameter's own fill",
        "copied",
    ),
    "scalar": ("one number", "kept; numbers that become one must agree", "kept", "kept", "copied"),
    "row": (
        "means over the last dimension",
        "along dimension 0 exactly; along the last approximately",
        "becomes the column's",
        "the mean",
        "copied",
    ),
    "col": (
        "means over the dimension before the last",
        "joined by the weighted mean, exactly; cut approximately",
        "becomes the row's",
        "the mean",
        "copied",
    ),
    "flat": (
        "one vector over all parameters, in their order",
        "cut into the parameters and put together again",
        "as the parameter",
        "refused",
        "refused",
    ),
    "opaque": (
        "a form of its own: codes, preconditioners",
        "refused with the reason; 8-bit codes where the policy allows it",
        "refused",
        "refused",
        "copied",
    ),
}


def slots() -> str:
    """Every slot of every optimizer."""
    return "\n".join(_slot_lines()) + "\n"


def _slot_lines() -> Iterator[str]:
    yield f"# Every slot of every optimizer\n\n{MADE}"
    yield (
        "A *slot* is one named piece of state that an optimizer keeps for a parameter. Its **kind** says how it "
        "follows the parameter, its **degree** is the power of the gradient that it grows with: [why](moments.md).\n"
    )
    yield "## What an operation does to a kind\n"
    yield "| kind | what it is | split, concat, slice | transpose, permute | new rows | duplicate |"
    yield "|---|---|---|---|---|---|"
    used = {slot.kind for algorithm in ALGORITHMS for slot in algorithm.slots.values()}
    for kind, words in KINDS.items():
        if kind in used:
            yield f"| `{kind}` | {' | '.join(words)} |"
    yield ""
    yield _NOTES
    yield "## By optimizer\n"
    seen: dict[str, int] = {}
    for algorithm in ALGORITHMS:
        seen[algorithm.name] = seen.get(algorithm.name, 0) + 1
        again = f" (form {seen[algorithm.name]})" if seen[algorithm.name] > 1 else ""
        yield from _algorithm(algorithm, again)


_NOTES = """\
`rename` moves every kind exactly, `drop` and `fresh` leave every kind behind, `cast` changes floating-point slots.
`scale = { param = c, grad = g }` multiplies a slot as the last column of the tables below says.

So, for `exp_avg_sq` of AdamW: splitting QKV cuts it as the weight, exactly; scaling a weight by c while the function
stays the same divides it by c²; growing the vocabulary fills its new rows with the mean of the old ones.
"""


def _algorithm(algorithm: Algorithm, again: str) -> Iterator[str]:
    yield f"### {algorithm.name}{again}\n"
    if algorithm.whole:
        yield (
            "The update of an element depends on its whole tensor: split or joined parameters train differently from "
            "before, even though their state is moved exactly.\n"
        )
    yield "| slot | kind | degree | under `scale` |"
    yield "|---|---|---|---|"
    for name, slot in algorithm.slots.items():
        shown = f"{name}0, {name}1, ..." if name.endswith("_") and not name.startswith("__") else name
        yield f"| `{shown}` | `{slot.kind}` | {'unknown' if slot.degree is None else slot.degree} | {_scaled(slot)} |"
    yield ""


def _scaled(slot: Slot) -> str:
    if slot.kind == "opaque":
        return "refused"
    if slot.degree is None:
        return "refused: its degree is unknown"
    factors = [_power("c", slot.power), _power("g", slot.degree)]
    return " · ".join(filter(None, factors)) or "the same"


def _power(letter: str, power: int) -> str:
    return "" if not power else letter if power == 1 else f"{letter}{'²³⁴'[power - 2]}"


# --- screens --------------------------------------------------------------------------------------------------------

SCREENS = (
    ("inspect", "inspect checkpoint.pt"),
    ("inspect --params", "inspect checkpoint.pt --section optimizer --params"),
    ("diff", "diff checkpoint.pt experts.pt --name 'layers.0.**'"),
    ("remap", "remap checkpoint.pt --dry-run --fresh '**.norm.*' --set weight_decay=0.05"),
    ("verify", "verify checkpoint.pt"),
    ("scan", "scan hostile.pt"),
)


def screens() -> str:
    """What commands show on terminals of three widths, and piped."""
    from tests import corpus
    from tests.cli.place import furnish
    from tests.cli.test_manners import on_terminal

    parts = [
        f"# Screens\n\n{MADE}\nOn a terminal, reports are laid out to fit its width, with colours that carry meaning "
        "(not shown here), and go through `PAGER` when they are longer than the screen. `NO_COLOR` and `TERM=dumb` "
        f"turn colours and pager off. In a pipe, reports are plain text whose lines are never broken.\n\n{_PICTURES}"
    ]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        furnish(Path(folder))
        shutil.copy(corpus.case("optimstate/hostile_zip").entry, "hostile.pt")
        _run("remap", "checkpoint.pt", "experts.pt", "--duplicate", "layers.{i}.mlp.{p**}=layers.{i}.e.{e=0..1}.{p**}")
        for title, line in SCREENS:
            piped = _run(*shlex.split(line))
            parts.append(f"\n## {title}\n\n`optimstate {line}`\n")
            shown = {
                f"at {width} columns": on_terminal(*shlex.split(line), columns=width, code=None, NO_COLOR="1").rstrip()
                for width in (60, 80, 200)
            }
            alike: dict[str, list[str]] = {}
            for where, text in {**shown, "piped": piped}.items():
                alike.setdefault(text, []).append(where)
            for text, places in alike.items():
                parts.append(f"\n{_listed(places)}:\n\n```text\n{text}\n```\n")
    return "".join(parts)


def _listed(places: list[str]) -> str:
    *first, last = places
    listed = f"{', '.join(first)} and {last}" if first else last
    return listed[0].upper() + listed[1:]


def _run(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "optimstate", *words], capture_output=True, text=True, check=False, env=environment
    )
    return done.stdout.rstrip()


_PICTURES = """\
## Pages

`optimstate inspect --html`, in both modes and on a phone:

![The page of an inspection, light](images/inspect-light.png)
![The page of an inspection, dark](images/inspect-dark.png)
![The page of an inspection on a phone](images/inspect-phone.png)

`optimstate plan show plan.toml old.pt --html`:

![The lineage of a plan, light](images/lineage-light.png)
![The lineage of a plan, dark](images/lineage-dark.png)

`optimstate diff --html`:

![The page of a comparison](images/diff-light.png)
"""

# --- what inspect shows ---------------------------------------------------------------------------------------------


def checkpoints() -> str:
    """The page of checkpoints, with what `inspect` prints today of a script's, Lightning's and the Trainer's."""
    from tests import corpus

    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        _write_old_style(Path("model_best.pth.tar"))
        shutil.copy(corpus.case("lightning/adamw_onecycle").entry, "last.ckpt")
        (trainer,) = corpus.case("transformers/gpt2_adamw").entry.parent.glob("checkpoint-*")
        shutil.copytree(trainer, "checkpoint-4")
        return re.sub(
            r"(```\n\$ optimstate (inspect \S+)\n).*?\n```",
            lambda match: f"{match[1]}{_run(*match[2].split())}\n```",
            page,
            flags=re.DOTALL,
        )


def _write_old_style(path: Path) -> None:
    """What scripts have written since torch's example for ImageNet."""
    import argparse

    import torch

    torch.manual_seed(0)
    layers = torch.nn
    model = layers.Sequential(layers.Conv2d(3, 8, 3), layers.BatchNorm2d(8), layers.Flatten(), layers.Linear(8, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    model(torch.ones(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(arch="resnet50", lr=0.1, workers=4, dist_url="tcp://127.0.0.1:80", seed=None)
    run = {"epoch": 73, "arch": "resnet50", "state_dict": model.state_dict(), "best_acc1": torch.tensor(71.25)}
    torch.save({**run, "optimizer": optimizer.state_dict(), "args": args}, path)


PAGES: dict[str, Callable[[], str]] = {
    "checkpoints.md": checkpoints,
    "reference/cli.md": command_line,
    "explanation/slots.md": slots,
    "screens.md": screens,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
