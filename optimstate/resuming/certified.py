"""Checks that a resumed run is the one that was certified, and the history of certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

from optimstate.certificates.certificate import Ancestor, Certificate, refuse
from optimstate.errors import CheckpointError, StateMismatchError
from optimstate.plan.expressions.tree import Leaf
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import SectionMoves
from optimstate.problems import Problem
from optimstate.resuming.owners import owner_of
from optimstate.resuming.shards import innermost
from optimstate.state.names import unwrapped
from optimstate.state.optimizer import OptimizerState

__all__ = ["Given", "Part", "certificates_of", "checked", "checked_source", "note_histories"]

Given: TypeAlias = "bool | str | PathLike[str] | Mapping[str, Any] | Certificate | Sequence[Any]"
"""The argument `certificate` of `resume`: True for the checkpoint's own certificates, or one or several others."""


class Part:
    """The part of a checkpoint that was loaded into one live object.

    Attributes:
        live: The model or optimizer.
        source: The checkpoint's weights, or its optimizer's state with names.
        moves: The outcome for each parameter; None if nothing changed.
        embedded: The certificate in the checkpoint's optimizer state, as plain values.
        applied: The digests of plans that were applied to the checkpoint after it was certified.
    """

    def __init__(
        self, live: Any, source: Any, moves: SectionMoves | None, beside: Mapping[str, Any] | None = None
    ) -> None:
        self.live, self.source, self.moves = live, source, moves
        self.embedded = (beside or {}).get("certificate")
        self.applied = tuple(map(str, (beside or {}).get("applied", ())))


def certificates_of(given: Given, optimizers: Sequence[Part]) -> list[Certificate]:
    """The certificates that the argument of `resume` refers to.

    Raises:
        StateMismatchError: There is none.
        CheckpointError: One cannot be read.
    """
    if given is True:
        plans = [plan for part in optimizers for plan in part.applied]
        if plans:
            raise StateMismatchError(
                f"the checkpoint was changed by the plan {plans[0][:12]} after it was certified",
                hint="Resume from the unchanged checkpoint with resume(..., plan=..., certificate=True), or verify the "
                "changed one with `optimstate verify NEW --against OLD --plan PLAN`.",
            )
        found = [Certificate.from_fields(part.embedded) for part in optimizers if part.embedded is not None]
        if not found:
            raise StateMismatchError(
                "the checkpoint has no certificate",
                hint="Register hooks.certify() on the optimizer before saving, or give the path of a certificate.",
            )
        return found
    if isinstance(given, Certificate):
        return [given]
    if isinstance(given, Mapping):
        return [Certificate.from_fields(given)]
    if isinstance(given, str | PathLike):
        return [Certificate.read(given)]
    assert isinstance(given, Sequence)
    return [made for each in given for made in certificates_of(each, optimizers)]


def checked(
    certificates: Sequence[Certificate],
    plan: Plan,
    models: Sequence[Part],
    optimizers: Sequence[Part],
    schedulers: Sequence[Any],
    scaler: Any,
) -> list[str]:
    """Check that live objects are what was certified, except for what the plan changed.

    Returns:
        Remarks on differences that are not wrong, and on parts that were not compared.

    Raises:
        StateMismatchError: They are not what was certified.
    """
    from optimstate.certificates.live import certificate_of

    if len(optimizers) < len(certificates):
        raise StateMismatchError(
            f"{len(certificates)} optimizers were certified, but {len(optimizers)} resumed",
            hint="Give resume() every optimizer that was certified.",
        )
    remarks = []
    if len(certificates) < len(optimizers):
        remarks.append(f"certificate: {len(optimizers) - len(certificates)} optimizers have none, and are not compared")
    for certificate, part in _paired(certificates, optimizers):
        live = owner_of(part.live, [model.live for model in models])
        owner = next((model for model in models if model.live is live), None)
        mine = [each for each in schedulers if innermost(getattr(each, "optimizer", part.live)) is part.live]
        mine = mine or list(schedulers if len(optimizers) == 1 else ())
        found = certificate_of(
            part.live,
            owner.live if owner is not None else None,
            scheduler=mine[0] if len(mine) == 1 else mine or None,
            scaler=scaler if certificate.scaler else None,
        )
        if plan == Plan():
            certificate.require(found)
            _require_kinds(certificate, part, owner)
        else:
            remarks += _checked_with_plan(certificate, found, plan, owner, part)
        remarks += certificate.remarks(found)
    return remarks


def _require_kinds(certificate: Certificate, optimizer: Part, model: Part | None) -> None:
    """Check that the checkpoint's tensors have the certified dtypes, because loading would convert them."""
    kinds: dict[tuple[str, str], str] = {}
    if model is not None:
        rename = unwrapped(model.source)
        kinds.update({(rename(name), ""): _kind(value) for name, value in model.source.items()})
    rows = list(optimizer.source.parameters())
    rename = unwrapped(str(name) for _, name, _ in rows)
    kinds.update({(rename(str(n)), str(s)): _kind(value) for _, n, own in rows for s, value in (own or {}).items()})
    certified = {(name, ""): value for name, value in certificate.weights.items()}
    certified.update({(name, slot): value for name, own in certificate.state.items() for slot, value in own.items()})
    problems = [
        Problem("certificate", f"was {kind} and is {kinds[key]} in the checkpoint", " ".join(key).strip(), (key[0],))
        for key, value in certified.items()
        if isinstance(value, str) and kinds.get(key) and (kind := value.rpartition(" ")[0]) and kind != kinds[key]
    ]
    refuse(problems, "checkpoint", "Resume from the checkpoint that the certificate was written with.")


def _kind(value: Any) -> str:
    """The dtype and shape of a tensor, as in a digest; empty for anything else."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype") or not len(value.shape):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def checked_source(certificates: Sequence[Certificate], models: Sequence[Part], optimizers: Sequence[Part]) -> str:
    """Check that a checkpoint whose optimizers are divided among others is what was certified.

    Args:
        certificates: One for each optimizer that was certified.
        models: The models that were loaded.
        optimizers: The optimizers of the checkpoint.

    Returns:
        A remark on the parts that were not compared.

    Raises:
        StateMismatchError: It is not what was certified.
    """
    if len(certificates) > len(optimizers):
        raise StateMismatchError(
            f"{len(certificates)} optimizers were certified, and the checkpoint has {len(optimizers)}"
        )
    problems: list[Problem] = []
    for certificate, part in _paired(certificates, optimizers):
        names = certificate.weights.keys()
        owner = max(models, key=lambda each: len(names & _plain_names(each.source)), default=None)
        problems += _problems_of_source(certificate, owner, part)
    refuse(problems)
    return (
        "certificate: the checkpoint is as certified; what the [[optimizer]] tables made of it, and schedules, were "
        "not compared"
    )


def _paired(certificates: Sequence[Certificate], optimizers: Sequence[Part]) -> Iterator[tuple[Certificate, Part]]:
    """Each certificate with the optimizer that has most of its names."""
    left = list(optimizers)
    for certificate in certificates:
        part = max(left, key=lambda each: _common(certificate, each))
        left.remove(part)
        yield certificate, part


def _problems_of_source(certificate: Certificate, model: Part | None, optimizer: Part) -> list[Problem]:
    """The differences between a certificate and the checkpoint."""
    source = Certificate.of_parts(model.source if model is not None else None, optimizer.source)
    compared = {"state", "groups"} if model is None else {"weights", "state", "groups"}
    return [problem.at("the checkpoint") for problem in certificate.problems(source, parts=compared)]


def _plain_names(weights: Mapping[str, Any]) -> set[str]:
    rename = unwrapped(weights)
    return {rename(name) for name in weights}


def _checked_with_plan(
    certificate: Certificate, found: Certificate, plan: Plan, model: Part | None, optimizer: Part
) -> list[str]:
    """Check that the checkpoint is what was certified, and that everything that the plan only moves has arrived."""
    problems = _problems_of_source(certificate, model, optimizer)
    weights = _renames(model.moves, certificate.weights) if model is not None else {}
    slots = {} if plan.optimizer or plan.optimizers else _renames(optimizer.moves, certificate.state)
    expected = certificate.moved(weights, slots)
    arrived = found._replace(
        weights={name: value for name, value in found.weights.items() if name in expected.weights},
        state={name: value for name, value in found.state.items() if name in expected.state},
    )
    problems += expected.problems(arrived, parts={"weights", "state"})
    refuse(problems)
    rest = len(found.weights) - len(expected.weights), len(found.state) - len(expected.state)
    return [
        f"certificate: the checkpoint is as certified, and so is all that the plan only moves; {rest[0]} weights, the "
        f"state of {rest[1]} parameters, groups and schedules were not compared"
    ]


def _renames(moves: SectionMoves | None, names: Mapping[str, Any]) -> dict[str, list[str]]:
    """The new names of everything that was moved unchanged."""
    if moves is None:
        return {name: [name] for name in names}
    found: dict[str, list[str]] = {}
    moved = [(move.expression.name, move.target) for move in moves.moves if isinstance(move.expression, Leaf)]
    old, new = unwrapped(source for source, _ in moved), unwrapped(target for _, target in moved)
    for source, target in moved:
        found.setdefault(old(source), []).append(new(target))
    return found


def _common(certificate: Certificate, part: Part) -> int:
    own = {name for group in certificate.groups for name in group.names}
    state = part.source
    names = [str(name) for _, name, _ in state.parameters()] if isinstance(state, OptimizerState) else []
    return len(own & set(map(unwrapped(names), names)))


def note_histories(optimizers: Sequence[Part], plan: Plan, warn: Callable[[str], object]) -> None:
    """Record what each run continues from, for its next certificate."""
    from optimstate.certificates.live import histories

    own = () if plan == Plan() else (plan.digest,)
    for part in optimizers:
        plans = ",".join((*part.applied, *own))
        if part.embedded is not None:
            try:
                histories[part.live] = Certificate.from_fields(part.embedded).succeeded(plans)
            except CheckpointError as error:
                warn(f"certificate: {error.message}")
        elif plans:
            step = Certificate.of_parts(None, _counts(part.source)).step
            histories[part.live] = (Ancestor("", step, plans),)


def _counts(state: OptimizerState) -> OptimizerState:
    """The state with nothing but step counts."""
    return state._replace(state={key: {"step": slots["step"]} for key, slots in state.state.items() if "step" in slots})
