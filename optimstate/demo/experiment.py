"""A run whose model is reordered and converted to experts, with and without its optimizer state."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as by_name

from optimstate import hooks, optim
from optimstate.demo.model import EXPERTS, LAYERS, Text, read_text
from optimstate.demo.training import TOKENS, Curve, Run
from optimstate.record import Record

__all__ = ["PLAN", "RENAME", "REWARM", "Arm", "Experiment", "became"]

EVERY_BEFORE, EVERY_AFTER = 20, 4  # steps between two measurements of the held-out loss
REWARM = 30  # steps of the second warm-up, in the run that has one

RENAME = "layers.{rest**}=blocks.{rest**}"
"""The new names of the layers in the reordered model."""

PLAN = f"""\
# Every MLP becomes {EXPERTS} experts: each has its weights and its optimizer state.
[[rule]]
from = "layers.{{i}}.mlp.{{fc=fc1|fc2}}.{{p}}"
to = "layers.{{i}}.mlp.experts.{{e=0..{EXPERTS - 1}}}.{{fc}}.{{p}}"

# The routers are new: their weights come from the new model, and they have no state yet.
[[rule]]
fresh = "layers.{{i=0..{LAYERS - 1}}}.mlp.router.weight"

[guard]
has = "layers.*.mlp.fc1.weight"
lacks = "layers.*.mlp.experts.**"
"""


class Arm(Record):
    """One way to continue the run.

    Attributes:
        key: A short name for tables and files.
        label: The name in charts.
        curve: The held-out loss from the switch on.
    """

    key: str
    label: str
    curve: Curve

    @property
    def worst(self) -> float:
        """The largest rise of the loss above its value at the switch."""
        return max(loss for _, loss in self.curve) - self.curve[0][1]

    @property
    def recovered(self) -> int | None:
        """Tokens until the loss stays below its value at the switch; None if it is not below it at the end."""
        above = [step for step, loss in self.curve[1:] if loss >= self.curve[0][1]]
        if above and above[-1] == self.curve[-1][0]:
            return None
        return next(step for step, _ in self.curve[1:] if not above or step > above[-1]) * TOKENS

    def apart(self, other: Arm) -> float:
        """The largest difference from the loss of another arm."""
        return max(abs(mine[1] - theirs[1]) for mine, theirs in zip(self.curve, other.curve, strict=True))

    @property
    def tokens(self) -> Curve:
        """The curve over tokens instead of steps."""
        return [(step * TOKENS, loss) for step, loss in self.curve]

    def at(self, step: int) -> float:
        """The loss after this many steps, or at the last measurement before."""
        return [loss for done, loss in self.curve if done <= step][-1]


def became(name: str) -> list[str]:
    """The new names of a parameter by the plan."""
    head, mlp, rest = name.partition(".mlp.")
    return [f"{head}.mlp.experts.{expert}.{rest}" for expert in range(EXPERTS)] if mlp else [name]


class Experiment:
    """Train, save, migrate by a plan, and resume in several ways.

    Args:
        folder: The folder of `old.pt`, `reordered.pt`, `plan.toml`, `new.pt` and `losses.csv`.
        seed: The seed of all random numbers.
        steps: Steps before the switch.
        after: Steps after it.
        advance: Called after every training step, with the number of steps.

    Attributes:
        before: The held-out loss until the switch.
        torch_by_name: A description of what torch's loading by name did.
    """

    WAYS = 8  # the number of continued runs

    def __init__(
        self, folder: Path, *, seed: int, steps: int, after: int, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        self.seed, self.steps, self.after, self.advance = seed, steps, after, advance
        self.old, self.plan, self.new = folder / "old.pt", folder / "plan.toml", folder / "new.pt"
        self.renamed = folder / "reordered.pt"
        self.losses = folder / "losses.csv"
        self.text: Text = read_text()
        self.dense = Run.start(self.text, seed)
        self.before: Curve = []
        self.torch_by_name = ""
        self._uninterrupted: Arm | None = None
        self._torch_state: dict[str, Any] = {}

    def train(self) -> None:
        """Train the dense run until the switch, and save it as `old.pt`."""
        self.before = self.dense.train(0, self.steps, every=EVERY_BEFORE, advance=self.advance)
        torch.save(self.dense.state_dict(), self.old)
        # Cloned, because the dense run continues and changes these tensors.
        self._torch_state = _cloned(by_name.get_optimizer_state_dict(self.dense.model, self.dense.optimizer))

    @property
    def uninterrupted(self) -> Arm:
        """The dense run, which continues unchanged."""
        if self._uninterrupted is None:
            self._uninterrupted = Arm("dense", "e  no experts, no change", self._continued(self.dense))
        return self._uninterrupted

    def reorder(self) -> list[Arm]:
        """The run that was not interrupted, and three ways to continue it with the reordered model.

        `optimstate remap old.pt reordered.pt --rename` with `RENAME` made `reordered.pt`.
        """
        return [
            self.uninterrupted._replace(key="uninterrupted", label="never interrupted"),
            Arm("swapped", "torch alone, by position", self._continued(self.by_position())),
            Arm("fresh", "fresh state", self._continued(self._reordered(hooks.match_names(), hooks.reset("all")))),
            Arm("named", "by name", self._continued(self._reordered(hooks.match_names()))),
        ]

    def by_position(self) -> Run:
        """A run with torch's own optimizer and its saved state: counts and shapes agree, so torch gives no error."""
        run, new = self._with_weights(self.renamed, torch.optim.AdamW, reordered=True)
        run.optimizer.load_state_dict(torch.load(self.old, weights_only=True)["optimizer"])
        run.scheduler.load_state_dict(new["scheduler"])
        return run

    def _reordered(self, *load_hooks: Any) -> Run:
        run, new = self._with_weights(self.renamed, reordered=True)
        return _loaded(run, new, load_hooks)

    def write_plan(self) -> None:
        """Write `plan.toml`, with which `optimstate remap old.pt new.pt --plan plan.toml` makes `new.pt`."""
        self.plan.write_text(PLAN, encoding="utf-8")

    def torch_refuses(self) -> str:
        """The error of torch's own optimizer on loading the old state."""
        model = Run.start(self.text, self.seed, experts=True).model
        optimizer = torch.optim.AdamW(model.named_parameters())
        try:
            optimizer.load_state_dict(torch.load(self.old, weights_only=True)["optimizer"])
        except ValueError as error:
            return f"ValueError: {error}"
        raise AssertionError("torch has loaded the state of other parameters")  # pragma: no cover

    def resume(self) -> list[Arm]:
        """Continue from the same weights with the same batches and learning rate, but different optimizer state.

        Torch's loading by name is left out if the installed release refuses it.
        """
        by_torch = self.torch_resumed(self._torch_state)
        arms = [
            Arm("fresh", "a  fresh optimizer state", self._continued(self.migrated(hooks.reset("all")))),
            *([Arm("torch", "b  torch by name, not strict", self._continued(by_torch))] if by_torch else []),
            Arm("migrated", "c  migrated by the plan", self._continued(self.migrated())),
            Arm(
                "rewarmed",
                "d  fresh, lr warmed up again",
                self._continued(self.migrated(hooks.reset("all")), warm_up=REWARM),
            ),
            self.uninterrupted,
        ]
        self._write(arms)
        return arms

    def _continued(self, run: Run, warm_up: int = 0) -> Curve:
        return run.train(self.steps, self.after, every=EVERY_AFTER, warm_up=warm_up, advance=self.advance)

    def migrated(self, *others: Any) -> Run:
        """A run with experts that continues from `new.pt`, with further load hooks."""
        run, new = self._with_weights(self.new, experts=True)
        return _loaded(run, new, (hooks.match_names(), *others))

    def torch_resumed(self, state: Any) -> Run | None:
        """The same with torch's own loading by name, which does not report parameters without state.

        None if torch refuses, as releases before 2.12 do.
        """
        run, new = self._with_weights(self.new, torch.optim.AdamW, experts=True)
        lenient = by_name.StateDictOptions(strict=False)
        try:
            by_name.set_optimizer_state_dict(run.model, run.optimizer, state, options=lenient)
        except KeyError as error:
            self.torch_by_name = f"KeyError: {error}"
            return None
        run.scheduler.load_state_dict(new["scheduler"])
        every = list(run.model.parameters())
        without = sum(not run.optimizer.state.get(p) for p in every)
        names = run.optimizer.param_groups[0].get("param_names", ())
        self.torch_by_name = (
            f"no error, no warning; {without} of {len(every)} parameters start without state, "
            f"param_names has {len(names)}"
        )
        return run

    def _with_weights(
        self, path: Path, optimizer: type[torch.optim.Optimizer] = optim.AdamW, **model: bool
    ) -> tuple[Run, dict[str, Any]]:
        run = Run.start(self.text, self.seed, optimizer=optimizer, **model)
        new = torch.load(path, weights_only=True)
        missing, unexpected = run.model.load_state_dict(new["model"], strict=False)
        if unexpected or any("router" not in name for name in missing):
            raise AssertionError(f"{missing} {unexpected}")  # pragma: no cover
        return run, new

    def _write(self, arms: list[Arm]) -> None:
        with self.losses.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "tokens", *(arm.key for arm in arms)])
            for step, loss in self.before:
                rows.writerow([step, step * TOKENS, *[f"{loss:.6f}" if arm.key == "dense" else "" for arm in arms]])
            for column in zip(*(arm.curve for arm in arms), strict=True):
                step = self.steps + column[0][0]
                rows.writerow([step, step * TOKENS, *(f"{loss:.6f}" for _, loss in column)])


def _loaded(run: Run, saved: dict[str, Any], load_hooks: Iterable[Any]) -> Run:
    for hook in load_hooks:
        run.optimizer.register_load_state_dict_pre_hook(hook)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    return run


def _cloned(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return node.clone()
    if isinstance(node, dict):
        return {key: _cloned(value) for key, value in node.items()}
    return [_cloned(value) for value in node] if isinstance(node, list) else node
