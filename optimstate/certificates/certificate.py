"""What a run was when it stopped, and in what another run, or a file, is not that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from optimstate.certificates.digests import Digest, digests
from optimstate.describe import describe, few
from optimstate.errors import CorruptCheckpointError, StateMismatchError
from optimstate.problems import Problem
from optimstate.record import Record, field
from optimstate.state.names import unwrapped
from optimstate.state.optimizer import OptimizerState

__all__ = ["KEY", "PARTS", "Ancestor", "Certificate", "CertifiedGroup"]

KEY = "certificate"
"""Where a certificate stands in the entry `optimstate` of an optimizer's state dict."""

FORM = 1
PARTS = frozenset({"weights", "algorithm", "state", "groups", "schedule", "scaler", "update"})
"""What can be compared: names of attributes of `Certificate`."""

Names = Mapping[str, Sequence[str]]

# What a scheduler keeps only while it is inside a call, and which callers set one way or the other.
_TRANSIENT = {"_get_lr_called_within_step", "_is_initial", "verbose"}


class CertifiedGroup(Record):
    """A param group.

    Attributes:
        names: Of its parameters, in order, without what wrappers put before them.
        options: By name: the rate, decay and all others.
    """

    names: tuple[str, ...]
    options: Mapping[str, Digest]


class Ancestor(Record):
    """A certificate from which the run of another one was resumed.

    Attributes:
        certificate: Its digest; empty where the checkpoint had none.
        step: How many steps its optimizer had made; None where that is not told.
        plan: The digests of the plans that were applied after it, joined with commas; empty for none.
        torch: The release that wrote it.
    """

    certificate: str
    step: float | None = None
    plan: str = ""
    torch: str = ""


class Certificate(Record):
    """What a run was when it stopped.

    Attributes:
        weights: The digest of every parameter and buffer by name.
        algorithm: The optimizer's class; empty where it is not told.
        groups: Its param groups, in order.
        state: By parameter, the digest of every slot.
        schedule: What its schedulers keep.
        scaler: What its gradient scaler keeps.
        update: The digest of every parameter after one more step with gradients that anybody can make: how the
            optimizer goes on. Empty where that was not tried.
        versions: Of torch and optimstate.
        history: The certificates before this one, the oldest first.
    """

    weights: Mapping[str, Digest] = field(default_factory=dict)
    algorithm: str = ""
    groups: tuple[CertifiedGroup, ...] = ()
    state: Mapping[str, Mapping[str, Digest]] = field(default_factory=dict)
    schedule: Mapping[str, Digest] = field(default_factory=dict)
    scaler: Mapping[str, Digest] = field(default_factory=dict)
    update: Mapping[str, Digest] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Ancestor, ...] = ()

    @classmethod
    def of_parts(
        cls,
        weights: Mapping[str, Any] | None = None,
        state: OptimizerState | None = None,
        *,
        schedule: Any = None,
        scaler: Any = None,
    ) -> Certificate:
        """The certificate of tensors, in files or live ones.

        Args:
            weights: A model's.
            state: An optimizer's, every parameter named.
            schedule: What schedulers keep.
            scaler: What a gradient scaler keeps.
        """
        rename = unwrapped(weights or ())
        found = {rename(name): digests(value)[""] for name, value in (weights or {}).items() if _is_told(value)}
        made = cls(weights=found, schedule=_kept(schedule), scaler=digests(scaler) if scaler else {})
        if state is None:
            return made
        names = [str(name) for _, name, _ in state.parameters()]
        plain = unwrapped(names)
        groups = tuple(
            CertifiedGroup(tuple(plain(str(name)) for name in group.names or ()), digests(dict(group.options)))
            for group in state.groups
        )
        slots = {plain(str(name)): digests(dict(own or {})) for _, name, own in state.parameters()}
        return made._replace(groups=groups, state=slots)

    @classmethod
    def from_fields(cls, fields: Any, where: str = "the certificate") -> Certificate:
        """From what `document` gives, as JSON has it.

        Raises:
            CorruptCheckpointError: It is something else, or was changed after it was written.
        """
        try:
            if fields["form"] != FORM:
                raise CorruptCheckpointError(
                    f"{where} has the form {describe(fields['form'])}, and this release reads form {FORM}"
                )
            if other := _without_empty({key: fields[key] for key in fields.keys() - {*cls._fields, "form", "digest"}}):
                raise CorruptCheckpointError(f"{where} tells {describe(min(other))}, which this release does not know")
            known = {key: value for key, value in fields.items() if key in cls._fields}
            for name in ("weights", "schedule", "scaler", "update", "versions"):
                known[name] = dict(fields.get(name) or {})
            groups, history = fields.get("groups", ()), fields.get("history", ())
            known["groups"] = tuple(
                CertifiedGroup(**{**group, "names": tuple(group["names"]), "options": dict(group["options"])})
                for group in groups
            )
            known["history"] = tuple(Ancestor(**dict(entry)) for entry in history)
            known["state"] = {name: dict(slots) for name, slots in fields.get("state", {}).items()}
            made = cls(**known)
            if fields["digest"] != made.digest:
                raise CorruptCheckpointError(
                    f"{where} was changed after it was written: its digest is not that of what it says",
                    hint="Take the one that the run wrote, or certify the run anew.",
                )
            return made
        except CorruptCheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpointError(f"{where} is not a certificate: {describe(str(error))}") from None

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Certificate:
        """A certificate from a JSON file.

        Raises:
            CorruptCheckpointError: It is not one, or cannot be read.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CorruptCheckpointError(f"{path}: the certificate cannot be read: {reason}") from None
        return cls.from_fields(fields, str(path))

    def write(self, path: str | PathLike[str]) -> None:
        """Write it as a JSON file, in one piece or not at all."""
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")  # every process of a sharded run writes it
        part.write_text(json.dumps(self.document(), indent=1), encoding="utf-8")
        part.replace(target)

    def fields(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        plain = {name: _plain(getattr(self, name)) for name in self._fields}
        return {"form": FORM, **plain}

    def document(self) -> dict[str, Any]:
        """What is written: plain values and the digest of them, so that an edited certificate is told."""
        return {**self.fields(), "digest": self.digest}

    @property
    def digest(self) -> str:
        """Of the whole, its history included: certificates form a chain."""
        text = json.dumps(_without_empty(self.fields()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def step(self) -> float | None:
        """The most steps that a parameter has made; None where nothing counts them."""
        steps = [slots["step"] for slots in self.state.values() if isinstance(slots.get("step"), int | float)]
        return max(map(float, steps)) if steps else None  # type: ignore[arg-type]

    def succeeded(self, plan: str = "") -> tuple[Ancestor, ...]:
        """The history of a run that was resumed from this one, by plans of these digests."""
        return (*self.history, Ancestor(self.digest, self.step, plan, self.versions.get("torch", "")))

    def moved(self, weights: Names, slots: Names) -> Certificate:
        """What it says of a run in which some parameters have other names and nothing else is known.

        Args:
            weights: The new names of each weight that was moved as it is.
            slots: The new names of each parameter whose state was moved as it is.
        """
        return self._replace(
            weights={new: self.weights[old] for old, names in weights.items() if old in self.weights for new in names},
            state={new: self.state[old] for old, names in slots.items() if old in self.state for new in names},
            groups=(),
            schedule={},
            update={},
        )

    # --- comparing ----------------------------------------------------------------------------------------------------

    def problems(self, found: Certificate, *, told: Collection[str] = PARTS) -> list[Problem]:
        """In what another run, or a file, is not this run.

        Args:
            found: What it is.
            told: The parts that can be compared: names of attributes.
        """
        made: list[Problem] = []
        if "weights" in told:
            made += _differences("weights", self.weights, found.weights, "the model")
        if "algorithm" in told and self.algorithm != found.algorithm:
            made.append(_problem(f"the optimizer was {self.algorithm} and is {found.algorithm}", "optimizer"))
        if "state" in told:
            made += _state_differences(self.state, found.state)
        if "groups" in told:
            made += _group_differences(self.groups, found.groups)
        for part in ("schedule", "scaler"):
            if part in told:
                made += _value_differences(part, getattr(self, part), getattr(found, part))
        if "update" in told and self.update and not made:  # what else differs explains it
            wrong = [name for name, value in self.update.items() if found.update.get(name) != value]
            if wrong:
                message = f"the next update of {few(wrong)} would be another, though everything saved is equal"
                made.append(_problem(message, "update", wrong, "compare the releases of torch and the devices"))
        return made

    def remarks(self, found: Certificate) -> list[str]:
        """What differs without being wrong."""
        pairs = ((name, self.versions.get(name), found.versions.get(name)) for name in self.versions)
        return [f"certified with {name} {old}, resumed with {new}" for name, old, new in pairs if new and old != new]

    def require(self, found: Certificate, *, told: Collection[str] = PARTS) -> None:
        """Raise StateMismatchError, with every problem, if another run is not this one."""
        hint = "Resume from the checkpoint that the certificate was written with, or certify this one anew."
        refuse(self.problems(found, told=told), hint=hint)


def refuse(problems: Sequence[Problem], what: str = "resumed run", hint: str = "") -> None:
    """Raise StateMismatchError with the problems, if there are any: something is not what was certified."""
    if problems:
        message = f"the {what} is not the one that was certified:\n" + "\n".join(map(str, problems))
        raise StateMismatchError(message, hint=hint, problems=problems)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _without_empty(value: Any) -> Any:
    """A value without what is empty in it, which distributed checkpoints do not keep."""
    if isinstance(value, Mapping):
        found = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item not in ({}, [])}
    return [_without_empty(item) for item in value] if isinstance(value, list | tuple) else value


def _is_told(value: Any) -> bool:
    """Whether a weight is a tensor; a state dict may have other entries."""
    return hasattr(value, "shape") or hasattr(value, "arguments")


def _kept(schedule: Any) -> dict[str, Digest]:
    """What schedulers keep, without what only a call needs."""
    found = digests(schedule) if schedule else {}
    return {key: value for key, value in found.items() if not _TRANSIENT & set(key.split("."))}


def _problem(message: str, place: str, names: Sequence[str] = (), remedy: str = "") -> Problem:
    return Problem("certificate", message, place, tuple(names), remedy)


def _differences(
    what: str, certified: Mapping[str, Digest], found: Mapping[str, Digest], owner: str
) -> Iterator[Problem]:
    """Names whose content is another: lost, new, exchanged or changed."""
    kept = {value for name, value in certified.items() if name in found}  # of tied names, some files have one
    lost = [name for name, value in certified.items() if name not in found and value not in kept]
    new = [name for name, value in found.items() if name not in certified and value not in kept]
    if lost:
        yield _problem(f"{owner} has no {few(lost)}, which was certified", what, lost)
    if new:
        yield _problem(f"{owner} has {few(new)}, which was not certified", what, new)
    owners: dict[Digest, str] = {}
    for name, value in certified.items():
        owners.setdefault(value, name)
    changed: list[str] = []
    for name, value in certified.items():
        if name not in found or found[name] == value:
            continue
        other = owners.get(found[name])
        if other is not None and isinstance(value, str):
            yield _problem(f"{name} is what {other} was", what, (name, other), "they were exchanged, or one was copied")
        else:
            changed.append(name)
    yield from _changed(what, changed, certified, found)


def _changed(
    what: str, names: Sequence[str], certified: Mapping[str, Digest], found: Mapping[str, Digest]
) -> Iterator[Problem]:
    """One problem for each way in which names have changed."""
    ways: dict[str, list[str]] = {}
    for name in names:
        old, new = certified[name], found[name]
        kinds = [str(value).rpartition(" ")[0] if isinstance(value, str) else "" for value in (old, new)]
        if kinds[0] != kinds[1]:
            way = f"was {kinds[0] or old} and is {kinds[1] or new}"
        elif isinstance(old, str) and kinds[0]:
            way = "has other values"
        else:
            way = f"was {old} and is {new}"
        ways.setdefault(way, []).append(name)
    for way, members in ways.items():
        yield _problem(f"{few(members)}: {way}" if len(members) > 1 else f"{members[0]} {way}", what, members)


def _state_differences(
    certified: Mapping[str, Mapping[str, Digest]], found: Mapping[str, Mapping[str, Digest]]
) -> Iterator[Problem]:
    lost = [name for name, slots in certified.items() if slots and not found.get(name)]
    if lost:
        yield _problem(f"{few(lost)} had state and has none", "state", lost)
    new = [name for name, slots in found.items() if slots and not certified.get(name)]
    if new:
        yield _problem(f"{few(new)} has state and had none", "state", new)
    both = [name for name in certified if certified[name] and found.get(name)]
    slots = dict.fromkeys(slot for name in both for slot in (*certified[name], *found[name]))
    for slot in slots:
        ours = {name: certified[name][slot] for name in both if slot in certified[name]}
        theirs = {name: found[name][slot] for name in both if slot in found[name]}
        missing = [name for name in ours if name not in theirs]
        if missing:
            yield _problem(f"{few(missing)} had {slot} and does not have it", "state", missing)
        added = [name for name in theirs if name not in ours]
        if added:
            yield _problem(f"{few(added)} has {slot}, which it had not", "state", added)
        common = {name: value for name, value in ours.items() if name in theirs}
        yield from (
            problem.at(slot)
            for problem in _differences("state", common, {name: theirs[name] for name in common}, "the optimizer")
        )


def _group_differences(certified: Sequence[CertifiedGroup], found: Sequence[CertifiedGroup]) -> Iterator[Problem]:
    if [group.names for group in certified] != [group.names for group in found]:
        group_of = {name: number for number, group in enumerate(found) for name in group.names}
        moved = [name for number, group in enumerate(certified) for name in group.names if group_of.get(name) != number]
        if moved or len(certified) != len(found):
            counts = f"there were {len(certified)} and are {len(found)}" if len(certified) != len(found) else ""
            elsewhere = f"{few(moved)} is not in the group that it was in" if moved else ""
            yield _problem("; ".join(filter(None, (counts, elsewhere))), "groups", moved)
            return
        yield _problem("the parameters of a group stand in another order", "groups")
    for number, (old, new) in enumerate(zip(certified, found, strict=True)):
        yield from _value_differences(f"group {number}", old.options, new.options)


def _value_differences(place: str, certified: Mapping[str, Digest], found: Mapping[str, Digest]) -> Iterator[Problem]:
    if certified and not found:
        yield _problem("was certified and is not there", place)
        return
    if found and not certified:
        yield _problem("is there and was not certified", place)
        return
    for key in dict.fromkeys((*certified, *found)):
        old, new = certified.get(key, "nothing"), found.get(key, "nothing")
        if old != new:
            yield _problem(f"{key} was {old} and is {new}", place)
