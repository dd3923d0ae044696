"""Verify: can a run resume from this checkpoint?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError
from optimstate.formats.protocol import Document
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Progress
from optimstate.plan.language.plan import Plan
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.names import wrapper_prefix
from optimstate.state.optimizer import OptimizerState
from optimstate.state.records import is_tensor
from optimstate.state.sections import Section, judged
from optimstate.surgery.converting import verify_checksums
from optimstate.surgery.inspecting import algorithm_of, form_of, plain
from optimstate.surgery.layouts import stored_in_another_layout
from optimstate.surgery.reports import opening, to_json
from optimstate.surgery.text import plural, readable
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, OpaqueFile, difference, format_path, nodes, walk

__all__ = ["Finding", "VerifyReport", "verify", "verify_against"]

Level = Literal["fault", "note"]
FINDINGS_SHOWN = 20  # of one check
Verdict = Literal["healthy", "faulty", "unknown"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (`fault`) or worth knowing (`note`).

    Attributes:
        check: Which check found it.
        where: The section and the parameter or group.
        message: Both sides of what disagrees.
    """

    level: Level
    check: str
    where: str
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """The findings, and what was looked at.

    Attributes:
        checked: What was compared, in words.
        blind: What no check can see from the file alone, and what was not looked at.
        recognised: Whether there is anything whose meaning is known; where there is not, nothing can be healthy.
    """

    path: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    blind: tuple[str, ...]
    recognised: bool = True

    @property
    def healthy(self) -> bool:
        """Whether something was checked and has no fault."""
        return self.verdict == "healthy"

    @property
    def verdict(self) -> Verdict:
        """`faulty`, `healthy`, or `unknown` where nothing was recognised that could be checked."""
        if any(finding.level == "fault" for finding in self.findings):
            return "faulty"
        return "healthy" if self.recognised else "unknown"

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("verify", {**asdict(self), "healthy": self.healthy, "verdict": self.verdict})

    def __str__(self) -> str:
        return "\n".join(readable(self)._lines())

    def _lines(self) -> Iterator[str]:
        for level in ("fault", "note"):
            counts: Counter[str] = Counter()
            for finding in self.findings:
                if finding.level == level:
                    counts[finding.check] += 1
                    if counts[finding.check] <= FINDINGS_SHOWN:
                        yield f"{level}: {finding.where}: {finding.message} [{finding.check}]"
            for check, count in counts.items():
                if count > FINDINGS_SHOWN:
                    yield f"{level}: and {count - FINDINGS_SHOWN} more [{check}] (--json lists all)"
        for line in self.blind:
            yield f"not visible: {line}"
        faults = sum(finding.level == "fault" for finding in self.findings)
        words = {
            "faulty": plural(faults, "fault"),
            "healthy": "healthy",
            "unknown": "nothing was recognised, so whether a run can resume from it is unknown",
        }
        yield f"{self.path}: {words[self.verdict]}; checked {', '.join(self.checked)}"


BLIND = (
    "moments swapped between parameters of equal shape: nothing in a file says whose they were "
    "(give --against and --plan to compare with the checkpoint it was made from)",
)


def verify(path: str | Path, *, numbers: bool = True, progress: Progress | None = None) -> VerifyReport:
    """Look for whatever would make a resumed run differ from the one that was saved.

    Args:
        path: A checkpoint file or folder.
        numbers: Look into the tensors, which imports torch: NaN, infinities, empty moments, negative second moments.
        progress: Called with the bytes read since the last call.

    Raises:
        CheckpointError: It cannot be read at all.
    """
    with opening(path):
        document = open_checkpoint(path)
        judgement = judged(document.tree)
        sections = judgement.sections
        checked = [plural(len(sections), "section")]
        findings = [*_damaged(document, checked, progress)]
        models = [section for section in sections if section.kind == "model"]
        schedulers = [section for section in sections if section.kind == "scheduler"]
        optimizers = [section for section in sections if section.kind == "optimizer"]
        for section in optimizers:
            findings += _check_optimizer(section, models, numbers, progress)
        findings += _check_schedulers(optimizers, schedulers)
        checked.append(f"{plural(len(optimizers), 'optimizer')}, {plural(len(schedulers), 'scheduler')}")
        rest = _Rest(document, sections)
        if numbers:
            findings += rest.check(progress)
        checked.append(plural(rest.tensors, "tensor") + ("" if numbers else " by name, dtype and shape"))
        blind = [*(BLIND if optimizers else ()), *rest.unseen(numbers=numbers)]
        blind += [f"{format_path(path)} was not taken for a section: {why}" for path, why in judgement.others.items()]
        return VerifyReport(str(path), tuple(findings), tuple(checked), tuple(blind), bool(sections))


def verify_against(path: str | Path, source: str | Path, plan: Plan | str | PathLike[str]) -> VerifyReport:
    """Prove that a checkpoint is what a plan makes of another: every tensor byte, value, name and its order.

    Raises:
        CheckpointError: One of them cannot be read.
        MigrationError: The plan does not fit the source.
    """
    from optimstate.plan.apply.checkpoint import apply_plan

    plan = Plan.of(plan)
    with opening(path):
        actual, origin = open_checkpoint(path), open_checkpoint(source)
        expected, _, _ = apply_plan(plan, origin.tree)
        found = difference(expected, actual.tree)
        findings = (
            (Finding("fault", "against", str(path), f"not what the plan makes of {source}: {found}"),) if found else ()
        )
        tensors = [node for node in nodes(actual.tree) if isinstance(node, LazyTensor)]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return VerifyReport(str(path), findings, (f"{len(tensors)} tensors, {nbytes} bytes against {source}",), ())


# --- the file -------------------------------------------------------------------------------------------------------


def _damaged(document: Document, checked: list[str], progress: Progress | None) -> Iterator[Finding]:
    parts = list(_documents(document))
    compared = 0
    for part in parts:
        try:
            compared += verify_checksums(part, progress)
        except CorruptCheckpointError as error:
            yield Finding("fault", "checksum", part.path.name, error.message)
    checked.append(f"{compared} checksums")
    for part in parts:
        for note in part.notes:
            yield Finding("note", "container", part.path.name, note)


def _documents(document: Document) -> Iterator[Document]:
    if not document.parts:
        yield document
    for part in document.parts.values():
        yield from _documents(part)


class _Rest:
    """Everything but the state of optimizers, which has checks of its own: weights, random state, what a run keeps."""

    def __init__(self, document: Document, sections: Sequence[Section]) -> None:
        self.found = list(nodes(document.tree))
        unique = {id(node): node for node in self.found if isinstance(node, LazyTensor)}
        self.tensors = len(unique)
        self._weights: dict[int, str] = {}
        state: set[int] = set()
        for section in sections:
            if section.kind == "optimizer":
                inside = (node for slots in section.optimizer().state.values() for node in nodes(slots))
                state.update(id(node) for node in inside)
            elif section.kind != "scheduler":
                where = f"{section.kind} at {section.label}"
                self._weights.update((id(value), f"{where}, {name}") for name, value in section.tensors().items())
        self._others = [tensor for key, tensor in unique.items() if key not in state and key not in self._weights]
        self._of_models = [tensor for key, tensor in unique.items() if key in self._weights]
        self._tree = document.tree

    def check(self, progress: Progress | None) -> Iterator[Finding]:
        """Numbers that are not finite: NaN spreads from weights into everything; elsewhere it may be meant."""
        from optimstate.surgery.statistics import is_measurable, statistics

        for tensor in self._of_models:
            numbers = statistics(tensor, progress) if is_measurable(tensor) else None
            if numbers is not None and numbers.nonfinite:
                level: Level = "fault" if numbers.nan else "note"
                message = f"{numbers.nonfinite} of {numbers.elements} are NaN or inf"
                yield Finding(level, "numbers", self._weights[id(tensor)], message)
        odd: dict[int, str] = {}
        for tensor in self._others:
            numbers = statistics(tensor, progress) if is_measurable(tensor) else None
            if numbers is not None and numbers.nonfinite:
                odd[id(tensor)] = f"{numbers.nonfinite} of {numbers.elements} are NaN or inf"
        for path, node in walk(self._tree) if odd else ():
            if id(node) in odd:
                yield Finding("note", "numbers", format_path(path), odd.pop(id(node)))

    def unseen(self, *, numbers: bool) -> Iterator[str]:
        """What no check looked into."""
        if not numbers and self.tensors:
            yield f"the contents of {plural(self.tensors, 'tensor')}: they were not read (--no-numbers)"
        records = Counter(node.type.qualname for node in self.found if is_tensor(node) and isinstance(node, Opaque))
        for name, count in records.items():
            yield f"{count} of class {name}: only dtypes and shapes are known"
        files = [node for node in self.found if isinstance(node, OpaqueFile)]
        if files:
            yield f"{plural(len(files), 'file')} of other kinds, such as {Path(files[0].path).name}"


# --- optimizers -----------------------------------------------------------------------------------------------------


def _check_optimizer(
    section: Section, models: list[Section], numbers: bool, progress: Progress | None
) -> Iterator[Finding]:
    state = section.optimizer()
    where = f"optimizer at {section.label}"
    algorithm = algorithm_of({slot for found in state.state.values() for slot in found}, state)
    if any(group.params for group in state.groups) and not state.state:
        yield Finding("note", "coverage", where, "no parameter has state: the run would start fresh")
    yield from _coverage(where, state)
    yield from _steps(where, state)
    yield from _dtypes(where, state, models)
    yield from _aliases(where, state)
    yield from _names(where, state, models)
    yield from _shapes(where, state, algorithm, models)
    if numbers:
        yield from _numbers(where, state, algorithm, progress)


def _labelled(state: OptimizerState) -> list[tuple[str, Mapping[str, Any] | None]]:
    return [
        (f"parameter {position}" if name is None else name, slots)
        for position, (_, name, slots) in enumerate(state.parameters())
    ]


def _tensor_slots(slots: Mapping[str, Any]) -> frozenset[str]:
    """The slots that hold tensors; others are flags that a parameter may or may not have."""
    return frozenset(str(slot) for slot, value in slots.items() if isinstance(value, LazyTensor | Opaque))


def _coverage(where: str, state: OptimizerState) -> Iterator[Finding]:
    tensors = {label: _tensor_slots(slots) for label, slots in _labelled(state) if slots}
    kinds = Counter(tensors.values())
    full = [kind for kind, _ in kinds.most_common()]
    for label, slots in _labelled(state):
        place = f"{where}, {label}"
        if not slots:
            if kinds:
                yield Finding("note", "coverage", place, "no state: it starts fresh beside the others")
            continue
        # Some algorithms keep other slots for matrices than for vectors: only a proper part of another's is suspicious.
        mine = tensors[label]
        larger = next((kind for kind in full if kind > mine and kinds[kind] >= kinds[mine]), None)
        if larger is not None:
            missing = ", ".join(sorted(larger - mine))
            yield Finding("fault", "coverage", place, f"has no {missing}, which {kinds[larger]} others have")
    for key in state.orphans():
        yield Finding("fault", "coverage", where, f"state for {describe(key)}, which is in no param group")


def _steps(where: str, state: OptimizerState) -> Iterator[Finding]:
    steps: dict[str, list[str]] = {}
    for label, slots in _labelled(state):
        if slots and "step" in slots:
            steps.setdefault(str(plain(slots["step"])), []).append(label)
    if len(steps) > 1:
        usual = max(steps, key=lambda step: len(steps[step]))
        for step, labels in steps.items():
            if step != usual:
                shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
                yield Finding(
                    "note",
                    "steps",
                    f"{where}, {shown}",
                    f"step {step}, but {len(steps[usual])} others have {usual}: right if it was frozen for a while",
                )


def _dtypes(where: str, state: OptimizerState, models: list[Section]) -> Iterator[Finding]:
    """Weights of one dtype have state of one dtype; where the weights are not known, differences are only noted."""
    weights = {name: tensor for model in _model_tensors(models) for name, tensor in model.items()}
    prefix = wrapper_prefix([name for _, name, _ in state.parameters() if name is not None])
    kinds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for label, slots in _labelled(state):
        weight = weights.get(label.removeprefix(prefix))
        of = weight.dtype if isinstance(weight, LazyTensor) else ""
        for slot, value in (slots or {}).items():
            if isinstance(value, LazyTensor):
                kinds.setdefault((slot, of), {}).setdefault(value.dtype, []).append(label)
    for (slot, of), dtypes in kinds.items():
        usual = max(dtypes, key=lambda dtype: len(dtypes[dtype]))
        for dtype, labels in dtypes.items():
            if dtype != usual:
                others = f"{len(dtypes[usual])} others{f' of {of} weights' if of else ''} are {usual}"
                level: Level = "fault" if of else "note"
                yield Finding(level, "dtypes", f"{where}, {labels[0]}", f"{slot} is {dtype}, {others}")


def _aliases(where: str, state: OptimizerState) -> Iterator[Finding]:
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for label, slots in _labelled(state):
        for slot, value in (slots or {}).items():
            if isinstance(value, LazyTensor) and value.nbytes:
                spans.setdefault(id(value.storage), []).append((*value.span(), f"{label} {slot}"))
    for members in spans.values():
        members.sort()
        for (_, stop, first), (start, _, second) in pairwise(members):
            if start < stop:
                yield Finding(
                    "fault", "aliasing", where, f"{first} and {second} share memory: both would be updated twice"
                )


def _model_tensors(models: Iterable[Section]) -> Iterator[dict[str, Any]]:
    for section in models:
        found = section.tensors()
        prefix = wrapper_prefix(found)
        yield {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _names(where: str, state: OptimizerState, models: list[Section]) -> Iterator[Finding]:
    names = [name for _, name, _ in state.parameters() if name is not None]
    if not state.is_named or not models:
        return
    prefix = wrapper_prefix(names)
    plain = [name.removeprefix(prefix) for name in names]
    best = max(_model_tensors(models), key=lambda model: len(model.keys() & set(plain)))
    unknown = [name for name in plain if name not in best]
    if unknown and len(unknown) < len(names):
        known = {name: getattr(tensor, "shape", None) for name, tensor in best.items()}
        elsewhere = stored_in_another_layout(unknown, known, _parameter_shapes(state, prefix))
        if elsewhere:
            yield Finding(
                "note",
                "names",
                where,
                f"the model is stored in another layout than the optimizer's, for {plural(len(elsewhere), 'parameter')}"
                f" such as {min(elsewhere)}",
            )
        unknown = [name for name in unknown if name not in elsewhere]
    if unknown and len(unknown) < len(names):
        shown = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        yield Finding("fault", "names", where, f"{len(unknown)} parameters are not in the model of this file: {shown}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    for name in twice:
        yield Finding("fault", "names", where, f"{name} is named twice")


def _parameter_shapes(state: OptimizerState, prefix: str) -> dict[str, tuple[int, ...] | None]:
    """By name the shape of the first slot that is not a single number."""
    return {
        str(name).removeprefix(prefix): next(
            (value.shape for value in (slots or {}).values() if isinstance(value, LazyTensor) and value.numel > 1), None
        )
        for _, name, slots in state.parameters()
    }


def _shapes(where: str, state: OptimizerState, algorithm: Algorithm | None, models: list[Section]) -> Iterator[Finding]:
    """Slots of one parameter must agree with one another, and with the weight of its name where there is one."""
    weights: dict[str, Any] = {}
    for model in _model_tensors(models):
        weights.update(model)
    prefix = wrapper_prefix([name for _, name, _ in state.parameters() if name is not None])
    like = {slot for slot, kind in algorithm.slots.items() if kind.is_elementwise} if algorithm else set()
    for label, slots in _labelled(state):
        shapes = {
            slot: value.shape for slot, value in (slots or {}).items() if slot in like and isinstance(value, LazyTensor)
        }
        weight = weights.get(label.removeprefix(prefix))
        if isinstance(weight, LazyTensor):
            shapes = {"the weight": weight.shape, **shapes}
        if len(set(shapes.values())) > 1:
            shown = ", ".join(f"{slot} {list(shape)}" for slot, shape in shapes.items())
            yield Finding("fault", "shapes", f"{where}, {label}", f"shapes disagree: {shown}")


def _numbers(
    where: str, state: OptimizerState, algorithm: Algorithm | None, progress: Progress | None
) -> Iterator[Finding]:
    from optimstate.surgery.statistics import measured, oddities, second_moments

    second = second_moments(algorithm)
    for label, slots in _labelled(state):
        slots = slots or {}
        found = measured(slots.items(), progress)
        for check, message in oddities(found, plain(slots.get("step")), second):
            yield Finding("fault", check, f"{where}, {label}", message)
        yield from _equal_moments(f"{where}, {label}", slots, found)


def _equal_moments(where: str, slots: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Finding]:
    first, second = slots.get("exp_avg"), slots.get("exp_avg_sq")
    if not isinstance(first, LazyTensor) or not isinstance(second, LazyTensor) or first.numel < 2:
        return
    alike = first.dtype == second.dtype and first.shape == second.shape and "exp_avg" in found and found["exp_avg"].norm
    if alike and first.tobytes() == second.tobytes():
        yield Finding("fault", "moments", where, f"exp_avg and exp_avg_sq are equal bit for bit: {form_of(first)}")


# --- schedulers -----------------------------------------------------------------------------------------------------


def _check_schedulers(optimizers: list[Section], schedulers: list[Section]) -> Iterator[Finding]:
    """Learning rates of the groups against the ones a scheduler says it set last."""
    rates = [[plain(group.options.get("lr")) for group in section.optimizer().groups] for section in optimizers]
    for section in schedulers:
        fields = section.node if isinstance(section.node, Mapping) else section.node.state
        last = plain(fields.get("_last_lr"))
        where = f"scheduler at {section.label}"
        if not isinstance(last, list) or not rates:
            continue
        if not any(len(last) == len(found) for found in rates):
            counts = ", ".join(str(len(found)) for found in rates)
            yield Finding(
                "fault", "groups", where, f"learning rates for {len(last)} groups, the optimizers have {counts}"
            )
        elif not any(_equal_rates(last, found) for found in rates):
            shown = ", ".join(map(str, rates))
            yield Finding("fault", "learning rate", where, f"set {last} last, but the optimizers have {shown}")


def _equal_rates(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x == y
        or (isinstance(x, int | float) and isinstance(y, int | float) and abs(x - y) <= 1e-6 * max(abs(x), abs(y)))
        for x, y in zip(a, b, strict=True)
    )
