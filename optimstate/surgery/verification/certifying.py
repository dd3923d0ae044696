"""Certificates of files: whether a checkpoint is what was certified, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimstate.certificates.certificate import KEY, Certificate
from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, MigrationError, StateMismatchError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.apply.stamps import APPLIED, METADATA, STAMP
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.names import unwrapped
from optimstate.state.sections import Section, find_sections
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import plural

__all__ = ["Entry", "Lineage", "certificates_in", "differences", "log"]

_UNSEEN = "the next update, and the releases that computed it: only a live run has them (resume with certificate=...)"


def certificates_in(path: Place) -> list[Certificate]:
    """The certificates in a JSON file, or in a checkpoint that was saved with `hooks.certify()`.

    Raises:
        CorruptCheckpointError: There is none, or it cannot be read.
    """
    path = located(path)
    if isinstance(path, Path) and path.suffix == ".json" and path.is_file():
        return [Certificate.read(path)]
    with opening(path):
        found = [beside[KEY] for beside in _beside(find_sections(open_checkpoint(path).tree)) if KEY in beside]
    if not found:
        raise CorruptCheckpointError(
            f"{path}: there is no certificate in it", hint="Register hooks.certify() on the optimizer before it saves."
        )
    return [Certificate.from_fields(fields, str(path)) for fields in found]


def _beside(sections: Sequence[Section]) -> Iterator[Mapping[str, Any]]:
    """What hooks wrote beside the state of each optimizer."""
    for section in sections:
        found = section.node.get(METADATA) if isinstance(section.node, Mapping) else None
        if section.kind == "optimizer" and isinstance(found, Mapping):
            yield found


def differences(
    sections: Sequence[Section], certificates: Sequence[Certificate]
) -> tuple[list[tuple[str, Problem]], list[str]]:
    """How a checkpoint differs from what was certified.

    Returns:
        Each problem after the part it is in, and what a file does not tell.
    """
    optimizers = [section for section in sections if section.kind == "optimizer"]
    models = [section for section in sections if section.kind == "model"]
    schedulers = [section for section in sections if section.kind == "scheduler"]
    made: list[tuple[str, Problem]] = []
    blind = [_UNSEEN]
    for certificate in certificates:
        if not optimizers:
            made.append(("the checkpoint", Problem("certificate", "it has no optimizer, and one was certified")))
            continue
        own = {name for group in certificate.groups for name in group.names}
        section = max(optimizers, key=lambda each: len(own & set(_names(each))))
        optimizers.remove(section)
        parts = {"state", "groups"}
        try:
            state = _named(section, certificate)
        except (MigrationError, StateMismatchError) as error:
            made.append((f"optimizer at {section.label}", Problem("certificate", error.message)))
            continue
        weights: dict[str, Any] | None = None
        if models:
            model = max(models, key=lambda each: len(certificate.weights.keys() & set(_plain(each.tensors()))))
            weights = model.tensors()
        elif certificate.weights:
            blind.append("the weights that were certified: there is no model beside the optimizer")
        schedule: Any = None
        if certificate.schedule and schedulers:
            nodes = [each.node if isinstance(each.node, Mapping) else each.node.state for each in schedulers]
            schedule = nodes[0] if len(nodes) == 1 else {str(number): node for number, node in enumerate(nodes)}
        elif certificate.schedule:
            blind.append("the schedule that was certified: there is no scheduler beside the optimizer")
        found = Certificate.of_parts(weights, state, schedule=schedule)
        parts |= {"weights"} if weights is not None else set()
        parts |= {"schedule"} if schedule is not None else set()
        label = f"optimizer at {section.label}" if section.label else "optimizer"
        made += [(label, problem) for problem in certificate.problems(found, parts=parts)]
    if optimizers:
        blind += [f"optimizer at {section.label}: it was not certified" for section in optimizers]
    return made, blind


def _plain(names: Mapping[str, Any]) -> list[str]:
    rename = unwrapped(names)
    return [rename(name) for name in names]


def _names(section: Section) -> list[str]:
    names = [str(name) for _, name, _ in section.optimizer().parameters() if name is not None]
    rename = unwrapped(names)
    return [rename(name) for name in names]


def _named(section: Section, certificate: Certificate) -> Any:
    """The state with names: those of the certificate where it has none."""
    state = section.optimizer()
    if state.is_named:
        return state
    return state.named([list(group.names) for group in certificate.groups])


class Entry(Record):
    """A stage in the life of a run.

    Attributes:
        what: `certified`, or `plan` where a plan was applied.
        digest: Of the certificate, or of the plan; empty where the checkpoint of that time was not certified.
        step: How many steps the optimizer had made; None where that is not told.
        torch: The release that wrote it.
    """

    what: str
    digest: str
    step: float | None = None
    torch: str = ""


class Lineage(VerbReport):
    """Where a checkpoint comes from.

    Attributes:
        path: The checkpoint.
        entries: What happened to the run, the oldest first.
    """

    path: str
    entries: tuple[Entry, ...]

    VERB = "log"

    def _json(self) -> dict[str, Any]:
        entries = [entry._asdict() for entry in self.entries]
        return {"path": self.path, "entries": entries}

    def _lines(self) -> Iterator[str]:
        for entry in self.entries:
            step = f"step {entry.step:g}" if entry.step is not None else ""
            facts = [step, f"torch {entry.torch}" if entry.torch else ""]
            digest = entry.digest[:12] or "not certified"
            yield "  ".join(filter(None, [f"{entry.what:9} {digest:13}", *facts])).rstrip()
        if not self.entries:
            yield f"{self.path}: neither a certificate nor a plan is noted in it: where it comes from is unknown"
            return
        certificates = sum(entry.what == "certified" for entry in self.entries)
        plans = len(self.entries) - certificates
        yield f"{self.path}: {plural(certificates, 'certificate')}, {plural(plans, 'plan')}"


def log(path: Place) -> Lineage:
    """The certificates and plans that a checkpoint comes from, as they are noted in it.

    Args:
        path: A checkpoint, or the JSON file of a certificate.

    Raises:
        CheckpointError: It cannot be read.
    """
    path = located(path)
    if isinstance(path, Path) and path.suffix == ".json" and path.is_file():
        return Lineage(str(path), tuple(_entries(Certificate.read(path), ())))
    with opening(path):
        tree = open_checkpoint(path).tree
        found: list[Entry] = []
        for beside in _beside(find_sections(tree)):
            applied = [str(plan) for plan in _listed(beside.get(APPLIED))]
            if KEY in beside:
                own = list(_entries(Certificate.from_fields(beside[KEY], str(path)), applied))
            else:
                own = [Entry("plan", str(plan)) for plan in _listed(beside.get("plans"))]
            before = list(found)
            # A plan may come twice in the life of a run; what two optimizers have in common is told once.
            found += [entry for entry in own if entry not in before]
        known = {entry.digest for entry in found}
        stamps = _listed(tree.get(STAMP)) if isinstance(tree, Mapping) else []
        found += [Entry("plan", str(plan)) for plan in stamps if plan not in known]
    return Lineage(str(path), tuple(found))


def _listed(value: Any) -> list[str]:
    return [item if isinstance(item, str) else describe(item) for item in value] if isinstance(value, list) else []


def _entries(certificate: Certificate, applied: Sequence[str]) -> Iterator[Entry]:
    for ancestor in certificate.history:
        yield Entry("certified", ancestor.certificate, ancestor.step, ancestor.torch)
        yield from (Entry("plan", plan) for plan in filter(None, ancestor.plan.split(",")))
    yield Entry("certified", certificate.digest, certificate.step, certificate.versions.get("torch", ""))
    yield from (Entry("plan", plan) for plan in applied)
