"""Comparing two runs step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optimstate.plan.language.plan import Plan
from optimstate.rehearsal.expected import Expected
from optimstate.rehearsal.report import Deviation, Rehearsal, Verdict, What, earliest
from optimstate.rehearsal.runs import Pass, Run
from optimstate.rehearsal.tensors import difference, leaves, overlap
from optimstate.resuming import resume
from optimstate.state.names import unwrapped
from optimstate.user_code import running

__all__ = ["Comparison"]

_ZERO = 1e-6
"""Values smaller than the largest of their kind by this factor are rounding of zero, as the gradient of a bias before a
norm."""

Load = Callable[[Mapping[str, Any], Any, Any], object]
Loss = Callable[[Any, Any], Any]


class Comparison:
    """An old run and its continuation."""

    def __init__(self, old: Run, new: Run, plan: Plan, batch: Any, loss: Loss, tolerance: float) -> None:
        self.old, self.new, self.plan, self.batch, self.loss = old, new, plan, batch, loss
        self.tolerance = tolerance
        self.deviations: list[Deviation] = []
        self.notes: list[str] = []

    def run(self, steps: int, load: Load | None) -> Rehearsal:
        """Load the new run and compare both over some steps."""
        self._remove_randomness()
        state = self.old.state()
        if load is None:
            resume(state, **self.new.parts(), plan=self.plan)
        else:
            optimizers = self.new.optimizers
            with running("what loads the new run"):
                load(state, self.new.model, optimizers[0] if len(optimizers) == 1 else optimizers)
        expected = Expected(self.plan, self.old)
        self.announced, self.scaled = expected.approximate()
        self.notes += expected.notes
        losses = []
        self._compare(expected, 0)
        for step in range(steps + 1):
            one, other = self.old.passed(self.loss, self.batch), self.new.passed(self.loss, self.batch)
            losses.append((float(one.loss), float(other.loss)))
            if not step:
                self._function(expected, one, other)
            if step < steps:
                if not step:
                    self._gradients(expected)
                self.old.step()
                self.new.step()
                self._compare(Expected(self.plan, self.old), step + 1)
        notes = tuple(dict.fromkeys(self.notes))
        return Rehearsal(self._verdict(), tuple(losses), tuple(self.deviations), self.tolerance, notes)

    def _remove_randomness(self) -> None:
        """Switch both models to evaluation mode if the loss of one depends on random numbers."""
        if any(run.is_random(self.loss, self.batch) for run in (self.old, self.new)):
            for run in (self.old, self.new):
                run.model.eval()
            self.notes.append("the models use random numbers while they train: they were compared in evaluation mode")
            if any(run.is_random(self.loss, self.batch) for run in (self.old, self.new)):
                self.notes.append("the loss depends on random numbers in evaluation too: its differences are theirs")

    # --- the function -------------------------------------------------------------------------------------------------

    def _function(self, expected: Expected, one: Pass, other: Pass) -> None:
        mine, theirs = leaves(other.outputs), leaves(one.outputs)
        for which, names in (("old", theirs.keys() - mine.keys()), ("new", mine.keys() - theirs.keys())):
            if names:
                self.notes.append(f"only the {which} model has the outputs {', '.join(sorted(names))}: not compared")
        common = [(mine[name], theirs[name]) for name in mine if name in theirs]
        grown = [(a, b) for a, b in common if a.shape != b.shape]
        for a, b in grown:
            sizes = f"{list(b.shape)} in the old model and {list(a.shape)} in the new one"
            self.notes.append(f"an output has the shape {sizes}: the part that both have is compared")
        worst = max((difference(*overlap(a, b)) for a, b in common), default=0.0)
        if worst <= self.tolerance and grown:
            # The loss is over more or fewer elements, as follows from the plan.
            if difference(other.loss, one.loss) > self.tolerance:
                self.deviations += [
                    Deviation("output", name, "", 0, worst, True) for name in sorted(self._resized(expected))
                ]
            return
        worst = max(worst, difference(other.loss, one.loss))
        if worst > self.tolerance:
            for name in self._suspects(expected, one.modules, other.modules):
                self.deviations.append(Deviation("output", name, "", 0, worst, name in self.announced))

    def _resized(self, expected: Expected) -> set[str]:
        return {move.target for move in expected.weights.moves if not move.is_moved_whole} & self.announced

    def _suspects(self, expected: Expected, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """Parameters of the first module whose output differs, and of earlier ones that may be the cause."""
        origin: dict[str, set[str]] = {}
        whole: dict[str, bool] = {}
        for move in expected.weights.moves:
            home = move.target.rpartition(".")[0]
            origin.setdefault(home, set()).update(name.rpartition(".")[0] for name in move.sources)
            whole[home] = whole.get(home, True) and move.is_moved_whole
        pending: list[str] = []
        renamed: list[str] = []
        parameters = self._named(self.new.model.named_parameters())
        old = {self.old.plain_name(f"{name}.").rstrip("."): value for name, value in old.items()}
        new = {self.new.plain_name(f"{name}.").rstrip("."): value for name, value in new.items()}
        for module, value in new.items():
            mine = [name for name in parameters if name.rpartition(".")[0] == module]
            if not mine:
                continue
            sources = origin.get(module, set())
            if len(sources) != 1 or not whole.get(module) or next(iter(sources)) not in old:
                pending += mine
            elif difference(value, old[next(iter(sources))]) > self.tolerance:
                return pending or [*renamed, *mine]
            else:
                pending = []
                if next(iter(sources)).rpartition(".")[2] != module.rpartition(".")[2]:
                    renamed += mine  # equal by the plan, which may confuse two modules
        return pending or renamed or ["(the model)"]

    # --- the state ----------------------------------------------------------------------------------------------------

    def _gradients(self, expected: Expected) -> None:
        """Compare the new gradients with the old ones, which are moved as a first moment would be."""
        carried = expected.gradients()
        least = _rounding(carried.values())
        for name, parameter in self._named(self.new.model.named_parameters()).items():
            if name in carried and parameter.grad is not None:
                self._record("gradient", name, "", 0, parameter.grad, carried[name], least)

    def _compare(self, expected: Expected, step: int) -> None:
        """Compare parameters, buffers and slots of the new run with those of the old one, moved by the plan."""
        tensors = self._plain(expected.tensors())
        parameters = self._named(self.new.model.named_parameters())
        buffers = self._named(self.new.model.named_buffers())
        for name, value in {**parameters, **buffers}.items():
            if name in tensors:
                self._record("parameter" if name in parameters else "buffer", name, "", step, value, tensors[name])
        if not step:
            declared, unknown = expected.new_among(parameters)
            self.announced |= declared | (unknown if self.plan.policy.missing == "fresh" else set())
            for name in (name for name in parameters if name in unknown - self.announced):
                self._record("parameter", name, "", step, None, None)
        found: dict[str, Any] = {}
        for state in self.new.optimizer_states():
            names = [self.new.plain_name(name) for group in state["param_groups"] for name in group["param_names"]]
            keys = [key for group in state["param_groups"] for key in group["params"]]
            found.update({name: state["state"].get(key, {}) for name, key in zip(names, keys, strict=True)})
        rows = [
            (name, f"{slot}.{path}".strip("."), leaves(found[name].get(slot)).get(path), wanted)
            for name, slots in self._plain(expected.slots()).items()
            for slot, value in (slots.items() if name in found else ())
            for path, wanted in leaves(value).items()
        ]
        least = {slot: _rounding(wanted for _, own, _, wanted in rows if own == slot) for _, slot, _, _ in rows}
        for name, slot, mine, wanted in rows:
            self._record("slot", name, slot, step, mine, wanted, least[slot] if step else 0.0)

    def _named(self, tensors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {self.new.plain_name(name): value for name, value in tensors}

    def _plain(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Results of the plan by names without wrapper prefixes."""
        rename = unwrapped(made)
        return {rename(name): value for name, value in made.items()}

    def _record(
        self, what: What, name: str, slot: str, step: int, mine: Any, expected: Any, least: float = 0.0
    ) -> None:
        size = difference(mine, expected, max(least, 1e-300))
        if size > self.tolerance:
            # Loaded values must be exactly those that the plan makes, even where these are approximate.
            loaded = step == 0 and (what in ("slot", "parameter", "buffer") or name in self.scaled)
            self.deviations.append(Deviation(what, name, slot, step, size, name in self.announced and not loaded))

    def _verdict(self) -> Verdict:
        """The verdict by the first deviations; later ones follow from them."""
        if not self.deviations:
            return "exact"
        early = earliest(self.deviations)
        surprising = [deviation for deviation in early if not deviation.announced]
        if not surprising:
            return "approximate"
        if any(deviation.what == "output" for deviation in surprising):
            return "another function"
        changed = any(deviation.what == "output" for deviation in early)
        only_gradients = all(deviation.what == "gradient" for deviation in surprising)
        return "approximate" if changed and only_gradients else "wrong state"


def _rounding(tensors: Iterable[Any]) -> float:
    """The magnitude below which values are rounding of zero."""
    return _ZERO * max((float(value.detach().abs().max()) for value in tensors if value.numel()), default=0.0)
