"""Filling a live state dict from a checkpoint by a plan: every process reads the bytes of its own shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, StateMismatchError
from optimstate.formats.checksums import verify_read
from optimstate.formats.dcp.tree import leaves
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Extent
from optimstate.io.location import Place
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.resuming.shards import Reader, notes_on_casts, whole
from optimstate.state.loose import gathered
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

__all__ = ["Filling", "put"]


class Filling:
    """The new values of the items of a live state dict.

    Items have the names that `torch.distributed.checkpoint` gives them: their keys, joined by dots. An optimizer may be
    nested or flattened on either side.

    Args:
        checkpoint: A file or folder in any format.
        plan: What has changed since it was written.

    Attributes:
        notes: Remarks that need attention although nothing is wrong.
        nbytes: Bytes of tensors that this process read.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        MigrationError: The plan does not fit.
    """

    def __init__(self, checkpoint: Place, plan: Plan | str | PathLike[str] | None) -> None:
        self._document = open_checkpoint(checkpoint)
        given, self._new = _without_new(Plan.of(plan).forward(), self._document.tree)
        tree, _, self.notes = apply_plan(given, self._document.tree)
        tree = _by_name(tree)
        self.notes = [*self._document.notes, *self.notes]
        self._values: dict[str, Any] = {}
        for flattened in (True, False):
            found, _ = leaves(tree, flattened=flattened)
            self._values.update((name, value) for name, (_, value) in found.items())
        self._parts: dict[str, list[tuple[torch.Tensor, LazyTensor]]] = {}  # live tensors with their new values
        self._casts: dict[tuple[str, str], list[str]] = {}
        self._read: list[Extent] = []
        self._reader = Reader(self._casts, self._read)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that this process read."""
        return self._reader.nbytes

    def check(
        self, items: Mapping[str, Any], paths: Mapping[str, Sequence[Any]], *, partial: bool = False
    ) -> list[str]:
        """The names of the items that can be filled. The live state is not changed.

        Args:
            items: The live items by name.
            paths: The keys of each item.
            partial: Allow items that the checkpoint does not have.

        Raises:
            StateMismatchError: The checkpoint does not have an item, or has it in another shape.
            MigrationError: A rule declares a parameter new that the live state dict does not have.
            CorruptCheckpointError: Bytes that this process is to read do not match their checksum.
        """
        found = []
        absent = {name: _parameter(paths.get(name, (name,))) for name in items if name not in self._values}
        new = self._declared_new(absent)
        for name, live in items.items():
            if name not in self._values:
                if partial or name in new:
                    continue
                near = sorted(self._values, key=lambda other: (-_common(name, other), other))[:3]
                raise StateMismatchError(
                    f"the checkpoint has no {describe(name)} under this plan; it has {', '.join(map(describe, near))}",
                    hint="Rename it in the plan, or allow a partial load.",
                )
            value, shape = self._values[name], getattr(live, "shape", None)
            if shape is not None and hasattr(live, "dtype"):
                if not isinstance(value, LazyTensor):
                    raise StateMismatchError(
                        f"{describe(name)} is a tensor in the live state, but not in the checkpoint"
                    )
                if tuple(value.shape) != tuple(shape):
                    raise StateMismatchError(
                        f"{describe(name)} has the shape {list(value.shape)} under this plan, and {list(shape)} in the "
                        "live state",
                        hint="Slice, concatenate or resize it in the plan.",
                    )
                self._parts[name] = list(self._cut(name, live, value))
            else:
                self._reader.count(value)
            found.append(name)
        verify_read(self._document, self._read, wholly=True)
        return found

    def _cut(self, name: str, live: Any, value: LazyTensor) -> Iterator[tuple[torch.Tensor, LazyTensor]]:
        """This process's parts of a live tensor, each with the same part of the checkpoint's tensor."""
        shards = getattr(live, "local_shards", None)
        if shards is None:
            yield live.to_local() if hasattr(live, "to_local") else live, self._reader.cut(name, live, value)
            return
        for shard in shards():  # FSDP1's ShardedTensor
            part, metadata = value, shard.metadata
            for dim, (start, size) in enumerate(zip(metadata.shard_offsets, metadata.shard_sizes, strict=True)):
                part = part.narrow(dim, start, size)
            self._reader.count(part)
            yield shard.tensor, part

    def _declared_new(self, absent: Mapping[str, str]) -> set[str]:
        """Those of the items that the checkpoint lacks whose parameters the plan declares new.

        They keep their values in the live state: weights as they were initialised, and slots as torch creates them,
        which `get_optimizer_state_dict` does by a step without gradients.
        """
        parameters = dict.fromkeys(absent.values())
        modules = Modules(parameters)
        new: dict[str, None] = {}
        for rule in self._new:
            templates = tuple(map(modules.reading, rule.sources or rule.targets))
            matched = [name for name in parameters if any(each.match(name) is not None for each in templates)]
            if not matched:
                message = "matches no parameter of the checkpoint, and none that only the live state dict has"
                raise MigrationError.of("unmatched", message, str(rule))
            new.update(dict.fromkeys(matched))
        if new:
            names = ", ".join(map(describe, list(new)[:3])) + (", ..." if len(new) > 3 else "")
            self.notes.append(f"{len(new)} parameters are new and keep their values in the live state: {names}")
        return {name for name, parameter in absent.items() if parameter in new}

    def value(self, name: str) -> Any:
        """The new value of an item that is not a tensor in the live state."""
        return whole(self._values[name])

    def fill(self, name: str) -> None:
        """Read this process's part of a tensor into the live one."""
        from optimstate.installed_torch import torch

        with torch.no_grad():
            for live, part in self._parts[name]:
                live.copy_(to_torch(part.contiguous()))

    def casts(self) -> list[str]:
        """Notes on tensors whose dtype changes."""
        return notes_on_casts(self._casts)


def _without_new(plan: Plan, tree: Any) -> tuple[Plan, list[Rule]]:
    """The plan without its rules that declare parameters new and match nothing in the checkpoint, and those rules."""
    declared = [rule for rule in plan.all_rules() if rule.fresh and not (rule.sources and rule.targets)]
    if not declared:
        return plan, []
    _, migration, _ = apply_plan(plan.with_policy(unused="ignore"), tree)
    idle = {id(rule) for rule, count in migration.counts if not count}
    names: dict[str, None] = {}
    for section in find_sections(gathered(tree) or tree):
        if section.kind == "optimizer":
            names.update(dict.fromkeys(str(name) for _, name, _ in section.optimizer().parameters()))
        elif section.kind != "scheduler":
            names.update(dict.fromkeys(section.tensors()))
    modules = Modules(names)
    known = {
        id(rule)
        for rule in declared
        for each in map(modules.reading, rule.sources or rule.targets)
        if any(each.match(name) is not None for name in names)
    }
    # Names without placeholders count as parameters of the result, whether they name parameters or modules.
    new = [rule for rule in declared if id(rule) in idle or id(rule) not in known]
    kept = [tuple(rule for rule in rules if not any(rule is each for each in new)) for rules in plan.passes]
    return plan._replace(rules=kept[0], stages=tuple(kept[1:])), new


def _parameter(path: Sequence[Any]) -> str:
    """The name of the parameter that an item of a state dict belongs to, be it a weight, a slot or an option."""
    match = _FLAT.fullmatch(str(path[-1]))
    if match is not None:
        return match[1]
    return str(path[-2] if len(path) > 2 and path[-3] == "state" else path[-1])


_FLAT = re.compile(r"(?:state|param_groups)\.(.+)\.[^.]+", re.DOTALL)


def _by_name(node: Any) -> Any:
    """The tree with optimizers keyed by their parameters' names, if they have names."""
    if not isinstance(node, Mapping):
        return node
    if "param_groups" not in node or not isinstance(node.get("state"), Mapping):
        return {key: _by_name(value) for key, value in node.items()}
    state = OptimizerState.from_node(node)
    if not state.is_named:
        return node
    made = state.by_name().to_node()
    # Groups of live optimizers that were built with names have `param_names` too.
    return {**made, "param_groups": [{"param_names": group["params"], **group} for group in made["param_groups"]]}


def put(tree: Any, path: Sequence[Any], value: Any) -> None:
    """Replace the value at a path of nested dicts and lists."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def _common(name: str, other: str) -> int:
    """The number of equal parts at the end of two names."""
    count = 0
    for a, b in zip(reversed(name.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count
