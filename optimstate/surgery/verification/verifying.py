"""Verify: can a run resume from this checkpoint?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path as FilePath

from optimstate.formats.checksums import damaged
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.formats.protocol import Document
from optimstate.io.extents import Progress
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.language.plan import Plan
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.loose import loose_weights
from optimstate.state.records import is_tensor
from optimstate.state.schedules import schedule_of
from optimstate.state.sections import Section, judged
from optimstate.state.unread import unread_state
from optimstate.surgery.inspection.repeated import repeated
from optimstate.surgery.opening import open_to_read, opening
from optimstate.surgery.slot_counts import algorithm_of
from optimstate.surgery.text import plural
from optimstate.surgery.verification.certifying import certificates_in, differences
from optimstate.surgery.verification.expected import empty, unrecognised
from optimstate.surgery.verification.findings import Finding, VerifyReport, fault, note
from optimstate.surgery.verification.resume_checks import check_optimizer
from optimstate.surgery.verification.scheduler_checks import check_schedulers, fields_of
from optimstate.surgery.verification.unusable import check_values
from optimstate.surgery.viewing import viewed
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, OpaqueFile, difference, format_path, nodes, walk

__all__ = ["verify", "verify_against"]


BLIND = (
    "moments swapped between parameters of equal shape: nothing in a file says whose they were "
    "(give --against and --plan to compare with the checkpoint it was made from)",
)


def verify(
    path: Place,
    *,
    numbers: bool = True,
    progress: Progress | None = None,
    certificate: Place | None = None,
    view: Plan | str | PathLike[str] | None = None,
) -> VerifyReport:
    """Look for whatever would make a resumed run differ from the one that was saved.

    Args:
        path: A checkpoint file or folder.
        numbers: Look into the tensors, which imports torch: NaN, infinities, empty moments, negative second moments.
        progress: Called with the bytes read since the last call.
        certificate: What the checkpoint has to be: a JSON file that `hooks.certify()` wrote, or a checkpoint that has
            one.
        view: The plan from the layout in which the weights are stored to that of the optimizer.

    Raises:
        CheckpointError: It, or the certificate, cannot be read at all.
        MigrationError: The view does not fit.
    """
    path = located(path)
    certificates = certificates_in(certificate) if certificate is not None else []
    with opening(path):
        stored = open_to_read(path)
        document = viewed(stored, view)
        judgement = judged(document.tree)
        sections = judgement.sections
        checked = [plural(len(sections), "section")]
        findings = [*_damaged(stored, checked, progress)]
        models = [section for section in sections if section.kind == "model"]
        schedulers = [section for section in sections if section.kind == "scheduler"]
        optimizers = [section for section in sections if section.kind == "optimizer"]
        findings += [note("section", where, message) for where, message in repeated(document, sections)]
        for section in optimizers:
            findings += check_optimizer(section, models, numbers, progress)
        findings += check_schedulers(optimizers, schedulers)
        findings += check_values(sections)
        checked.append(f"{plural(len(optimizers), 'optimizer')}, {plural(len(schedulers), 'scheduler')}")
        findings += empty(document.tree)
        rest = _Rest(document, sections)
        if numbers:
            findings += rest.check(progress)
        checked.append(plural(rest.tensors, "tensor") + ("" if numbers else " by name, dtype and shape"))
        blind = [*(BLIND if optimizers and not certificates else ()), *rest.unseen(numbers=numbers)]
        if certificates:
            wrong, unseen = differences(sections, certificates)
            findings += [fault("certificate", where, str(problem)) for where, problem in wrong]
            blind += unseen
            checked.append(plural(len(certificates), "certificate"))
        blind += [
            f"scheduler at {section.label}: not one of torch's: what its next step reads was not checked"
            for section in schedulers
            if _is_unknown(section)
        ]
        blind += [
            f"optimizer at {section.label}: its algorithm is not recognised: what its next step reads was not checked"
            for section in optimizers
            if _algorithm(section) is None
        ]
        blind += unrecognised(document.tree, judgement)
        blind += [f"{format_path(path)} was not taken for a section: {why}" for path, why in judgement.others.items()]
        unread = unread_state(document.tree, judgement)
        return VerifyReport(
            str(path), tuple(findings), tuple(checked), tuple(blind), bool(sections), (str(unread),) if unread else ()
        )


def verify_against(path: Place, source: Place, plan: Plan | str | PathLike[str]) -> VerifyReport:
    """Prove that a checkpoint is what a plan makes of another: every tensor byte, value, name and its order.

    Raises:
        CheckpointError: One of them cannot be read.
        MigrationError: The plan does not fit the source.
    """
    from optimstate.plan.apply.checkpoint import apply_plan

    plan = Plan.of(plan)
    path, source = located(path), located(source)
    with opening(path, source):
        actual, origin = open_to_read(path), open_to_read(source)
        expected, _, _ = apply_plan(plan, origin.tree)
        found = difference(expected, actual.tree)
        findings = (fault("against", str(path), f"not what the plan makes of {source}: {found}"),) if found else ()
        tensors = [node for node in nodes(actual.tree) if isinstance(node, LazyTensor)]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return VerifyReport(str(path), findings, (f"{len(tensors)} tensors, {nbytes} bytes against {source}",), ())


# --- the file -------------------------------------------------------------------------------------------------------


def _damaged(document: Document, checked: list[str], progress: Progress | None) -> Iterator[Finding]:
    compared = 0
    for error in damaged(document, progress):
        compared += 1
        if error is not None:
            yield fault("checksum", FilePath(str(error.path or document.path)).name, error.message)
    checked.append(plural(compared, "checksum"))
    for part in _documents(document):
        for line in part.notes:
            yield note("container", part.path.name, line)


def _algorithm(optimizer: Section) -> Algorithm | None:
    state = optimizer.optimizer()
    return algorithm_of({slot for found in state.state.values() for slot in found}, state)


def _is_unknown(scheduler: Section) -> bool:
    return not schedule_of(dict(fields_of(scheduler.node))).NAME


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
        state = set[int]()
        for section in sections:
            if section.kind == "optimizer":
                inside = (node for _, _, slots in section.optimizer().parameters() for node in nodes(slots))
                state.update(id(node) for node in inside)
            elif section.kind != "scheduler":
                where = f"{section.kind} at {section.label}"
                self._weights.update((id(value), f"{where}, {name}") for name, value in section.tensors().items())
        loose = loose_weights(document.tree)
        self._weights |= {id(value): f"weights beside the optimizer, {name}" for name, value in loose.items()}
        self._others = [tensor for key, tensor in unique.items() if key not in state and key not in self._weights]
        self._of_models = [tensor for key, tensor in unique.items() if key in self._weights]
        self._tree = document.tree

    def check(self, progress: Progress | None) -> Iterator[Finding]:
        """Numbers that are not finite: NaN spreads from weights into everything; elsewhere it may be meant."""
        from optimstate.surgery.statistics import is_measurable, statistics

        for tensor in self._of_models:
            numbers = statistics(tensor, progress) if is_measurable(tensor) else None
            if numbers is not None and numbers.nonfinite:
                message = f"{numbers.nonfinite} of {numbers.elements} are NaN or inf"
                yield (fault if numbers.nan else note)("numbers", self._weights[id(tensor)], message)
        odd: dict[int, str] = {}
        for tensor in self._others:
            numbers = statistics(tensor, progress) if is_measurable(tensor) else None
            if numbers is not None and numbers.nonfinite:
                odd[id(tensor)] = f"{numbers.nonfinite} of {numbers.elements} are NaN or inf"
        for path, node in walk(self._tree) if odd else ():
            if id(node) in odd:
                yield note("numbers", format_path(path), odd.pop(id(node)))

    def unseen(self, *, numbers: bool) -> Iterator[str]:
        """What was not checked."""
        if not numbers and self.tensors:
            yield f"the contents of {plural(self.tensors, 'tensor')}: they were not read (--no-numbers)"
        from optimstate.surgery.statistics import can_be_read, is_floating

        lazy = (tensor for tensor in (*self._of_models, *self._others) if tensor.numel and is_floating(tensor))
        packed = Counter(tensor.dtype for tensor in lazy if numbers and not can_be_read(tensor))
        for dtype, count in packed.items():
            yield f"the numbers of {count} times {dtype}: torch does not compute with them"
        records = Counter(
            tensor_kind(node) or f"an object of {node.type.path}"
            for node in self.found
            if is_tensor(node) and isinstance(node, Opaque)
        )
        for kind, count in records.items():
            yield f"{count} times {kind}: only dtypes and shapes are known"
        files = [node for node in self.found if isinstance(node, OpaqueFile)]
        if files:
            yield f"{plural(len(files), 'file')} of other kinds, such as {FilePath(files[0].path).name}"
