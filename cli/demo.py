"""`optimstate demo`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimstate.cli.app import Force, Json, app, epilog, register

if TYPE_CHECKING:
    from optimstate.demo.experiment import Arm, Experiment

FILES = ("old.pt", "reordered.pt", "reorder.svg", "plan.toml", "new.pt", "losses.csv", "losses.svg")
COLOURS = (("red", "#d62728"), ("yellow", "#e69f00"), ("green", "#2ca02c"), ("magenta", "#9467bd"), ("blue", "#1f77b4"))
"""Of the ways to go on, in a terminal and in the SVG."""


@app.command(
    short_help="Train, change the model, resume with and without the state.",
    epilog=epilog("optimstate demo", "optimstate demo --out there --seed 1 --steps 1000"),
)
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to put the files.")] = Path("optimstate-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the order of the text.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the switch.")] = 500,
    after: Annotated[int, typer.Option(min=4, help="Training steps after it, for each variant.")] = 80,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a small transformer, change its model, and continue with and without the optimizer's state.

    First its layers are reordered and renamed: torch alone, fresh, and by name. Then its MLPs become experts by a plan.
    Takes about half a minute on one core. The model learns the help topics of Python's pydoc, character by character.
    Writes the checkpoints, the plan, the losses as CSV, and plots of them as SVG.
    """
    import tempfile
    from contextlib import chdir

    from optimstate.errors import DestinationExistsError

    for name in FILES if not force else ():
        if (out / name).exists():
            raise DestinationExistsError(f"{out / name}: exists already", hint="Give --force to replace it.")
    with tempfile.TemporaryDirectory(prefix="optimstate-demo-") as temporary:
        with chdir(temporary):
            _run(seed, steps, after, as_json)
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.move(Path(temporary) / name, out / name)
    if not as_json:
        typer.echo("\nwrote\n" + "\n".join(f"  {out / name}" for name in FILES))


def _run(seed: int, steps: int, after: int, as_json: bool) -> None:
    """The whole demonstration, in the working directory."""
    from optimstate.demo.experiment import Experiment
    from optimstate.installed_torch import torch

    say: Callable[..., Any] = (lambda *_, **__: None) if as_json else typer.secho
    # One thread, so that the numbers do not depend on how many cores there are.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _counter(steps + Experiment.WAYS * after) as advance:
            experiment = Experiment(Path(), seed=seed, steps=steps, after=after, advance=advance)
            _report_start(experiment, say)
            experiment.train()
            say(f"trained {steps} steps: held-out loss {experiment.before[0][1]:.3f} -> {experiment.before[-1][1]:.3f}")
            reordered = _reorder(experiment, say, quiet=as_json)
            _migrate(experiment, say, quiet=as_json)
            refusal = experiment.torch_refuses()
            arms = experiment.resume()
    finally:
        torch.set_num_threads(threads)
    _draw(experiment, arms)
    _draw_reordered(experiment, reordered)
    if as_json:
        typer.echo(_json(experiment, reordered, arms, refusal))
    else:
        _report(experiment, arms, refusal)


def _report_start(experiment: Experiment, say: Callable[..., Any]) -> None:
    size = sum(p.numel() for p in experiment.dense.model.parameters())
    version = ".".join(map(str, sys.version_info[:3]))
    say(f"text: pydoc's help topics in Python {version}, {experiment.text.size:,} characters, a tenth held out")
    say(f"model: a transformer of {size:,} parameters, seed {experiment.seed}")
    say("optimizer and schedule: AdamW and LinearLR of optimstate.optim\n")


def _reorder(experiment: Experiment, say: Callable[..., Any], *, quiet: bool) -> list[Arm]:
    """The first story: the same function, whose layers are declared in another order under another name."""
    from optimstate.demo.experiment import RENAME
    from optimstate.surgery.text import table

    say("\n1. The layers are reordered, and renamed to blocks\n", bold=True)
    words = ("remap", "old.pt", "reordered.pt", "--rename", RENAME)
    say(f"$ optimstate remap old.pt reordered.pt \\\n    --rename '{RENAME}'")
    _command((*words, "--quiet"), quiet=quiet)
    arms = experiment.reorder()
    if quiet:
        return arms
    whole, *ways = arms
    say("\nheld-out loss after the same batches: same weights, only the state differs\n")
    looks = _looks(experiment)
    rows = [[arm.label, *(f"{arm.at(step):.4f}" for step in looks), _apart(arm, whole)] for arm in arms]
    say(table(["", *(f"+{look}" for look in looks), "largest difference"], rows))
    say("")
    say(_plot(arms[1:], [COLOURS[0], COLOURS[1], COLOURS[2]]))
    said = (
        "By name, the run continues bit for bit as if it was never interrupted." if ways[-1].apart(whole) == 0 else ""
    )
    say("\ntorch alone silently gave every layer the moments of another one.")
    say(f"{said}\n")
    return arms


def _apart(arm: Arm, whole: Arm) -> str:
    return "" if arm is whole else "0.0" if arm.apart(whole) == 0 else f"{arm.apart(whole):.4f}"


def _looks(experiment: Experiment) -> list[int]:
    return sorted({min(look, experiment.after) for look in (16, 32, experiment.after)})


def _migrate(experiment: Experiment, say: Callable[..., Any], *, quiet: bool) -> None:
    """`new.pt` from `old.pt` by the plan, with the program's own commands, and the proof that torch gives."""
    from optimstate.demo.experiment import became
    from optimstate.demo.proof import prove

    say("\n2. Every MLP becomes four experts", bold=True)
    experiment.write_plan()
    for words in (
        ("remap", "old.pt", "new.pt", "--plan", "plan.toml"),
        ("verify", "new.pt", "--against", "old.pt", "--plan", "plan.toml"),
    ):
        say("\n$ optimstate " + " ".join(words), bold=True)
        _command(words, quiet=quiet)
    compared = prove(experiment.old, experiment.new, became)
    say(
        f"checked with torch.load: every expert has its MLP's weights and moments, bit\nfor bit ({compared} tensors)\n",
        fg=typer.colors.GREEN,
    )


def _command(words: Sequence[str], *, quiet: bool) -> None:
    """Run one command of this program."""
    from contextlib import nullcontext, redirect_stdout
    from io import StringIO

    register([])
    with redirect_stdout(StringIO()) if quiet else nullcontext():
        app(list(words), standalone_mode=False)


def _report(experiment: Experiment, arms: Sequence[Arm], refusal: str) -> None:
    from optimstate.demo.experiment import REWARM
    from optimstate.surgery.text import table

    typer.echo("torch.optim.AdamW.load_state_dict with the old state:")
    typer.echo(f"  {refusal}")
    typer.echo("torch.distributed.checkpoint's set_optimizer_state_dict with strict=False:")
    typer.echo(f"  {experiment.torch_by_name}\n")
    typer.echo("held-out loss in nats per character: weights, batches and learning rate are the")
    typer.echo("same, only the optimizer's state differs (and in d the learning rate, which")
    typer.echo(f"warms up again over {REWARM} steps). worst: the largest rise above the loss at the")
    typer.echo("switch; below after: tokens until the loss stays below it\n")
    looks = _looks(experiment)
    rows = []
    for arm in arms:
        back = "not yet" if arm.recovered is None else f"{arm.recovered:,}"
        losses = [f"{arm.at(step):.3f}" for step in (0, *looks)]
        rows.append([arm.label, *losses, f"{arm.worst:+.3f}", back])
    typer.echo(table(["", "switch", *(f"+{look}" for look in looks), "worst", "below after"], rows))
    typer.echo()
    typer.echo(_on_warming_up(arms))


def _on_warming_up(arms: Sequence[Arm]) -> str:
    """What warming up again bought, and what it cannot buy."""
    ways = {arm.key: arm for arm in arms}
    fresh, warmed, moved = (ways[key] for key in ("fresh", "rewarmed", "migrated"))
    avoided = "avoids" if warmed.worst < fresh.worst / 2 else "does not avoid"
    last = warmed.curve[-1][1] - moved.curve[-1][1]
    compared = f"{abs(last):.3f} {'above' if last > 0 else 'below'} the migrated run"
    return (
        f"Warming up again (d) {avoided} the rise of a fresh state, because it\n"
        f"trains at a lower learning rate meanwhile; at the end it is\n"
        f"{compared}. It cannot bring the state back: from the switch on it is\n"
        "another run, which has to learn again what the moments knew. Copying the state\n"
        "(c) is a choice too: an expert sees only part of the tokens, so its gradients\n"
        "are smaller than the copied moments."
    )


def _plot(arms: Sequence[Arm], colours: Sequence[tuple[str, str]]) -> str:
    """Coloured dots where the terminal has both, else letters."""
    from optimstate.demo.chart import text_plot

    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"

    def paint(text: str, number: int) -> str:
        return typer.style(text, fg=shown[number][1][0])

    shown = list(zip(arms, colours, strict=True))
    lines = [(arm.label, colour[1], arm.tokens) for arm, colour in shown]
    columns = min(max(shutil.get_terminal_size((80, 24)).columns - 10, 40), 100)
    colour = not plain and encoding == "utf8"
    drawn = text_plot(lines, columns=columns, rows=16, paint=paint if colour else None)
    legend = "\n      ".join(paint(arm.label, n) if colour else arm.label for n, (arm, _) in enumerate(shown))
    last = f"{arms[0].tokens[-1][0]:,} tokens after the switch"
    return f"{drawn}\n      0{last:>{columns - 1}}\n      {legend}"


def _draw(experiment: Experiment, arms: Sequence[Arm]) -> None:
    from optimstate.demo.chart import svg

    notes = (
        f"AdamW, seed {experiment.seed}, switch at step {experiment.steps}. In a, b and c only the optimizer's state",
        "differs; weights, batches and learning rate are the same. e is the run that stayed dense.",
    )
    # Torch may have refused one of the ways.
    drawing = svg(
        [(arm.label, colour[1], arm.tokens) for arm, colour in zip(arms, COLOURS, strict=False)],
        title="MLPs become experts: with and without the optimizer's state",
        notes=notes,
        across="tokens after the switch",
        up="held-out loss, nats a character",
    )
    Path("losses.svg").write_text(drawing, encoding="utf-8")


def _draw_reordered(experiment: Experiment, arms: Sequence[Arm]) -> None:
    from optimstate.demo.chart import svg

    notes = (
        f"AdamW, seed {experiment.seed}, switch at step {experiment.steps}: layers reordered and renamed.",
        "Weights, batches and learning rate are the same. By name lies on the run that was never interrupted.",
    )
    colours = ("#999999", COLOURS[0][1], COLOURS[1][1], COLOURS[2][1])
    drawing = svg(
        [(arm.label, colour, arm.tokens) for arm, colour in zip(arms, colours, strict=True)],
        title="Two layers change places: torch alone, fresh, by name",
        notes=notes,
        across="tokens after the switch",
        up="held-out loss, nats a character",
    )
    Path("reorder.svg").write_text(drawing, encoding="utf-8")


def _json(experiment: Experiment, reordered: Sequence[Arm], arms: Sequence[Arm], refusal: str) -> str:
    from dataclasses import asdict

    from optimstate.reporting import to_json

    rows = [{**asdict(arm), "worst": arm.worst, "tokens_until_below": arm.recovered} for arm in arms]
    fields = {
        "seed": experiment.seed,
        "steps": experiment.steps,
        "after": experiment.after,
        "before": experiment.before,
    }
    fields["reorder"] = [{**asdict(arm), "apart": arm.apart(reordered[0])} for arm in reordered]
    return to_json("demo", {**fields, "torch": [refusal, experiment.torch_by_name], "arms": rows})


@contextmanager
def _counter(total: int) -> Iterator[Callable[[int], None]]:
    """Counts training steps on stderr, where that is a terminal."""
    done = 0

    def advance(by: int) -> None:
        nonlocal done
        done += by
        if done % 10 == 0:
            typer.echo(f"\r{done}/{total} training steps", nl=False, err=True)

    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        yield advance
    finally:
        typer.echo("\r\x1b[K", nl=False, err=True)
