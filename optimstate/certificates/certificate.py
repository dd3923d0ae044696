"""The certificate of a run when it stopped, and its differences from another run or a file."""

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

__all__ = ["KEY", "PARTS", "Ancestor", "Certificate", "CertifiedGroup", "refuse"]

KEY = "certificate"
"""The key of a certificate in the entry `optimstate` of an optimizer's state dict."""

FORM = 1
PARTS = frozenset({"weights", "algorithm", "state", "groups", "schedule", "scaler", "update"})
"""The parts that can be compared: names of attributes of `Certificate`."""

Names = Mapping[str, Sequence[str]]

# Keys of a scheduler's state that have a meaning only during a call.
_TRANSIENT = {"_get_lr_called_within_step", "_is_initial", "verbose"}


class CertifiedGroup(Record):
    """A param group.

    Attributes:
        names: The names of its parameters, in order, without the prefixes of wrappers.
        options: The digests of all options, such as `lr` and `weight_decay`.
    """

    names: tuple[str, ...]
    options: Mapping[str, Digest]


class Ancestor(Record):
    """An earlier certificate, from which a run was resumed.

    Attributes:
        certificate: Its digest; empty if the checkpoint had none.
        step: The number of steps that its optimizer had made; None if it is not known.
        plan: The digests of the plans that were applied to it, joined with commas; empty for none.
        torch: The release of torch that wrote it.
    """

    certificate: str
    step: float | None = None
    plan: str = ""
    torch: str = ""


class Certificate(Record):
    """The digests of a run when it stopped.

    Attributes:
        weights: The digest of every parameter and buffer, by name.
        algorithm: The optimizer's class; empty if it is not known.
        groups: The optimizer's param groups, in order.
        state: The digests of the slots of each parameter.
        schedule: The digests of the state of its schedulers.
        scaler: The digests of the state of its gradient scaler.
        update: The digest of every parameter after one more step with reproducible gradients; empty if that was not
            tried.
        versions: The releases of torch and optimstate.
        history: The earlier certificates, the oldest first.
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
        """The certificate of state in files or in memory.

        Args:
            weights: The state of a model.
            state: The state of an optimizer, with names for all parameters.
            schedule: The state of schedulers.
            scaler: The state of a gradient scaler.
        """
        rename = unwrapped(weights or ())
        found = {rename(name): digests(value)[""] for name, value in (weights or {}).items() if _is_tensor(value)}
        made = cls(weights=found, schedule=_of_schedule(schedule), scaler=digests(scaler) if scaler else {})
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
        """Read the plain values that `document` returns.

        Raises:
            CorruptCheckpointError: They are not a certificate, or were changed after they were written.
        """
        try:
            if fields["form"] != FORM:
                raise CorruptCheckpointError(
                    f"{where} has the form {describe(fields['form'])}, and this release reads form {FORM}"
                )
            if other := _without_empty({key: fields[key] for key in fields.keys() - {*cls._fields, "form", "digest"}}):
                raise CorruptCheckpointError(f"{where} has {describe(min(other))}, which this release does not know")
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
                    f"{where} was changed after it was written: its digest does not match its contents",
                    hint="Use the certificate that the run wrote, or certify the run again.",
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
            CorruptCheckpointError: The file is not a certificate, or cannot be read.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CorruptCheckpointError(f"{path}: the certificate cannot be read: {reason}") from None
        return cls.from_fields(fields, str(path))

    def write(self, path: str | PathLike[str]) -> None:
        """Write a JSON file, which appears whole or not at all."""
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")  # every process of a sharded run writes one
        part.write_text(json.dumps(self.document(), indent=1), encoding="utf-8")
        part.replace(target)

    def fields(self) -> dict[str, Any]:
        """The certificate as plain values for JSON."""
        plain = {name: _plain(getattr(self, name)) for name in self._fields}
        return {"form": FORM, **plain}

    def document(self) -> dict[str, Any]:
        """The plain values with their digest, by which a changed certificate is detected."""
        return {**self.fields(), "digest": self.digest}

    @property
    def digest(self) -> str:
        """The digest of the whole certificate, including its history, so that certificates form a chain."""
        text = json.dumps(_without_empty(self.fields()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def step(self) -> float | None:
        """The largest step count of a parameter; None if no state has one."""
        steps = [slots["step"] for slots in self.state.values() if isinstance(slots.get("step"), int | float)]
        return max(map(float, steps)) if steps else None  # type: ignore[arg-type]

    def succeeded(self, plan: str = "") -> tuple[Ancestor, ...]:
        """The history of a run that is resumed from this one, after plans with these digests."""
        return (*self.history, Ancestor(self.digest, self.step, plan, self.versions.get("torch", "")))

    def moved(self, weights: Names, slots: Names) -> Certificate:
        """The part of the certificate that still holds after a plan has moved parameters.

        Args:
            weights: The new names of each weight that was moved unchanged.
            slots: The new names of each parameter whose state was moved unchanged.
        """
        return self._replace(
            weights={new: self.weights[old] for old, names in weights.items() if old in self.weights for new in names},
            state={new: self.state[old] for old, names in slots.items() if old in self.state for new in names},
            groups=(),
            schedule={},
            update={},
        )

    # --- comparing ----------------------------------------------------------------------------------------------------

    def problems(self, found: Certificate, *, parts: Collection[str] = PARTS) -> list[Problem]:
        """The differences between this run and another run, or a file.

        Args:
            found: The certificate of the other.
            parts: The parts that are compared: names of attributes.
        """
        made: list[Problem] = []
        if "weights" in parts:
            made += _differences("weights", self.weights, found.weights, "the model")
        if "algorithm" in parts and self.algorithm != found.algorithm:
            made.append(_problem(f"the optimizer was {self.algorithm} and is {found.algorithm}", "optimizer"))
        if "state" in parts:
            made += _state_differences(self.state, found.state)
        if "groups" in parts:
            made += _group_differences(self.groups, found.groups)
        for part in ("schedule", "scaler"):
            if part in parts:
                made += _value_differences(part, getattr(self, part), getattr(found, part))
        if "update" in parts and self.update and not made:  # other differences would explain this one
            wrong = [name for name, value in self.update.items() if found.update.get(name) != value]
            if wrong:
                message = f"the next update of {few(wrong)} would be another, though everything saved is equal"
                made.append(_problem(message, "update", wrong, "compare the releases of torch and the devices"))
        return made

    def remarks(self, found: Certificate) -> list[str]:
        """Differences that are not wrong: other releases of torch or optimstate."""
        pairs = ((name, self.versions.get(name), found.versions.get(name)) for name in self.versions)
        return [f"certified with {name} {old}, resumed with {new}" for name, old, new in pairs if new and old != new]

    def require(self, found: Certificate) -> None:
        """Raise StateMismatchError, with every problem, if another run is not this one."""
        hint = "Resume from the checkpoint that the certificate was written with, or certify this one again."
        refuse(self.problems(found), hint=hint)


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
    """A value without empty dicts and lists inside it, which distributed checkpoints do not keep."""
    if isinstance(value, Mapping):
        found = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item not in ({}, [])}
    return [_without_empty(item) for item in value] if isinstance(value, list | tuple) else value


def _is_tensor(value: Any) -> bool:
    """Whether an entry of a model's state dict is a tensor, or the record of one."""
    return hasattr(value, "shape") or hasattr(value, "arguments")


def _of_schedule(schedule: Any) -> dict[str, Digest]:
    """The digests of schedulers' state, without the keys that have a meaning only during a call."""
    found = digests(schedule) if schedule else {}
    return {key: value for key, value in found.items() if not _TRANSIENT & set(key.split("."))}


def _problem(message: str, place: str, names: Sequence[str] = (), remedy: str = "") -> Problem:
    return Problem("certificate", message, place, tuple(names), remedy)


def _differences(
    what: str, certified: Mapping[str, Digest], found: Mapping[str, Digest], owner: str
) -> Iterator[Problem]:
    """Names with other contents: lost, new, exchanged or changed."""
    kept = {value for name, value in certified.items() if name in found}  # some files have only one of tied names
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
    """One problem for each kind of change, with all names that it affects."""
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
            yield _problem(f"{few(missing)} had {slot} and no longer has it", "state", missing)
        added = [name for name in theirs if name not in ours]
        if added:
            yield _problem(f"{few(added)} has {slot} and did not have it", "state", added)
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
        yield _problem("the parameters of a group are in another order", "groups")
    for number, (old, new) in enumerate(zip(certified, found, strict=True)):
        yield from _value_differences(f"group {number}", old.options, new.options)


def _value_differences(place: str, certified: Mapping[str, Digest], found: Mapping[str, Digest]) -> Iterator[Problem]:
    if certified and not found:
        yield _problem("was certified and is missing", place)
        return
    if found and not certified:
        yield _problem("was not certified", place)
        return
    for key in dict.fromkeys((*certified, *found)):
        old, new = certified.get(key, "nothing"), found.get(key, "nothing")
        if old != new:
            yield _problem(f"{key} was {old} and is {new}", place)
