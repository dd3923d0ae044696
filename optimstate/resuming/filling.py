"""Filling a live state dict from a checkpoint by a plan: every process reads the bytes of its own shards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe, few
from optimstate.errors import MigrationError, StateMismatchError
from optimstate.formats.checksums import verify_read
from optimstate.formats.dcp import folder as dcp
from optimstate.formats.dcp.tree import leaves
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Extent
from optimstate.io.location import Location, Place
from optimstate.io.places import open_source
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.resuming.identity import Identity, identity_of
from optimstate.resuming.live_groups import LISTS, LiveOptimizer, flat_name, live_optimizers, saved_optimizer
from optimstate.resuming.new_parameters import started_fresh, without_new
from optimstate.resuming.records import refuse_records, revived_tree
from optimstate.resuming.shards import Reader, notes_on_casts, refuse_lost, whole
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import format_path

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
        self._plan = Plan.of(plan).forward()
        given, self._new = without_new(self._plan.with_policy(hyperparameters="checkpoint"), self._document.tree)
        tree, migration, self.notes = apply_plan(given, self._document.tree)
        self._fresh = started_fresh(migration)
        self._tree = _by_name(tree)
        self.notes = [*self._document.notes, *self.notes]
        self._values: dict[str, Any] = {}
        self._tops: dict[str, Any] = {}
        for flattened in (True, False):
            found, _ = leaves(self._tree, flattened=flattened)
            self._values.update((name, value) for name, (_, value) in found.items())
            self._tops.update((name, path[0]) for name, (path, _) in found.items())
        self._in_files = self._names_in_files()
        self._chosen: dict[str, Any] = {}  # the values of the live items
        self._parts: dict[str, list[tuple[torch.Tensor, LazyTensor]]] = {}  # live tensors with their new values
        self._regrouped: set[tuple[int, int]] = set()  # numbers of param groups in the checkpoint and here
        self._casts: dict[tuple[str, str], list[str]] = {}
        self._read: list[Extent] = []
        self._reader = Reader(self._casts, self._read)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that this process read."""
        return self._reader.nbytes

    def identity(self) -> Identity:
        """What is loaded."""
        return identity_of(self._document.path, self._plan)

    def refuse_another(self, save_id: str | None, names: Collection[str]) -> None:
        """Refuse a checkpoint that is not the one that torch reads.

        Args:
            save_id: The identifier that torch gave to the save, if it did.
            names: The names of its items.

        Raises:
            StateMismatchError: It is another one.
        """
        path = self._document.path
        if save_id is not None:
            files = [path / ".metadata", *path.glob("__*.metadata")] if path.is_dir() else []
            same = any(save_id.encode() in _tail(file) for file in files if file.is_file())
        else:
            same = self._document.format != dcp.NAME or set(names) <= self._document.handle.metadata.numbers.keys()
        if not same:
            raise StateMismatchError(
                f"torch's load() was given another checkpoint than this planner, which was given {path}",
                hint="Give both the same folder, or call optimstate.distributed.fill_state_dict.",
            )

    def _names_in_files(self) -> dict[str, str]:
        """The full names of items in files of a folder by their names in these files, if only one file has them."""
        found: dict[str, list[str]] = {}
        for name, top in self._tops.items():
            if top in self._document.parts:
                found.setdefault(name.removeprefix(f"{top}."), []).append(name)
        return {name: every[0] for name, every in found.items() if len(every) == 1 and name not in self._values}

    def check(
        self, items: Mapping[str, Any], paths: Mapping[str, Sequence[Any]], *, partial: bool = False
    ) -> list[str]:
        """The names of the items that can be filled. The live state is not changed.

        Args:
            items: The live items by name.
            paths: The keys of each item.
            partial: Allow items that the checkpoint does not have.

        Raises:
            StateMismatchError: The checkpoint does not have an item, or has it in another shape or of another kind.
            MigrationError: A rule declares a parameter new that the live state dict does not have, or the options of a
                param group are not determined.
            CorruptCheckpointError: Bytes that this process is to read do not match their checksum.
        """
        optimizers = live_optimizers(items, paths)
        if self._plan.policy.hyperparameters == "live" and not optimizers:
            message = 'hyperparameters = "live" in [policy] needs an optimizer in the live state dict, which has none'
            raise MigrationError.of("unreached", message)
        kept = self._choose(items, paths, optimizers)
        options = {name for optimizer in optimizers for name in optimizer.items}
        absent = {
            name: _parameter(paths.get(name, (name,))) for name in items if name not in self._chosen.keys() | options
        }
        own = (name for optimizer in optimizers for names in optimizer.names for name in names)
        new = self._declared_new([*absent.values(), *own])
        for optimizer in optimizers:
            self._choose_options(optimizer, None if partial else new)
        owners = {
            name: next((owner for each in optimizers if (owner := each.owner(tuple(paths[name]))) is not None), None)
            for name in absent
            if name in paths
        }
        self._note_fresh(owners.values())
        found = []
        for name, live in items.items():
            if name in self._chosen:
                self._check(name, live, self._chosen[name])
                found.append(name)
            elif not (partial or name in kept or absent.get(name) in new or owners.get(name) in self._fresh):
                near = sorted(self._values, key=lambda other: (-_common(name, other), other))[:3]
                raise StateMismatchError(
                    f"the checkpoint has no {describe(name)} under this plan; it has {', '.join(map(describe, near))}",
                    hint="Rename it in the plan, or allow a partial load.",
                )
        self._note_left(items, paths)
        verify_read(self._document, self._read, wholly=True)
        return found

    def _choose(
        self, items: Mapping[str, Any], paths: Mapping[str, Sequence[Any]], optimizers: Sequence[LiveOptimizer]
    ) -> set[str]:
        """Choose the values of all items but options; returns the items that keep their values."""
        kept: set[str] = set()
        options: set[str] = set()
        for optimizer in optimizers:
            options |= optimizer.items.keys()
            live = self._plan.policy.hyperparameters == "live"
            kept.update(name for name, (_, option, _) in optimizer.items.items() if live or option in LISTS)
        for name in items.keys() - options:
            path = tuple(paths.get(name, (name,)))
            for optimizer in optimizers:
                if path[: len(optimizer.path)] == optimizer.path:
                    saved = optimizer.saved_name(name, path)
                    break
            else:
                saved = name
            saved = saved if saved in self._values else self._in_files.get(saved, saved)
            if saved in self._values:
                self._chosen[name] = self._values[saved]
        return kept

    def _choose_options(self, optimizer: LiveOptimizer, new: Collection[str] | None) -> None:
        """Choose the options of an optimizer's groups; `new` are the parameters that may be missing, None for all."""
        live = self._plan.policy.hyperparameters == "live"
        state = saved_optimizer(self._tree, optimizer.path)
        if state is None:
            self._chosen.update({} if live else optimizer.options_by_name(self._values))
            return
        optimizer.refuse_other_names(state)
        where = format_path(optimizer.path) or "the optimizer"
        if not optimizer.is_named:
            self.notes.append(f"{where}: its parameters have no names: their state is given by position, as in torch")
        if live:
            return
        if unknown := optimizer.unknown_options(state):
            names = few(list(map(describe, unknown)))
            self.notes.append(f"{where}: not loaded, because the live param groups do not have these options: {names}")
        given = new if new is not None else [name for names in optimizer.names for name in names]
        self._chosen.update(optimizer.new_options(state, self._plan, given))
        if len(state.groups) != len(optimizer.names):
            self._regrouped.add((len(state.groups), len(optimizer.names)))

    def _check(self, name: str, live: Any, value: Any) -> None:
        """Check that a live item can have a value, and what has to be read for it."""
        shape = getattr(live, "shape", None)
        if shape is not None and hasattr(live, "dtype"):
            if type(value) in (bool, int, float) and prod(shape) == 1:
                refuse_lost(name, value, live.dtype)
                return
            if not isinstance(value, LazyTensor):
                raise StateMismatchError(
                    f"{describe(name)} is a tensor in the live state, and {describe(value)} in the checkpoint",
                    hint="Leave it out of the state dict that is loaded, or make it what the checkpoint has.",
                )
            if tuple(value.shape) != tuple(shape):
                raise StateMismatchError(
                    f"{describe(name)} has the shape {list(value.shape)} under this plan, and {list(shape)} in the "
                    "live state",
                    hint="Slice, concatenate or resize it in the plan.",
                )
            self._parts[name] = list(self._cut(name, live, value))
            return
        if isinstance(value, LazyTensor) and value.numel != 1 and type(live) in (bool, int, float, complex, str):
            raise StateMismatchError(
                f"{describe(name)} is {describe(live)} in the live state, and a tensor of the shape "
                f"{list(value.shape)} in the checkpoint",
                hint="Rename one of them.",
            )
        if type(live) is type(value) is list and (len(value), len(live)) in self._regrouped and self._is_schedule(name):
            raise StateMismatchError(
                f"{describe(name)} has a value for each of {len(value)} param groups in the checkpoint, and the live "
                f"optimizer has {len(live)}",
                hint="Leave the scheduler out, and resume it with optimstate.resume, which rebuilds its lists.",
            )
        self._chosen[name] = value = revived_tree(value)
        refuse_records(describe(name), value, hint=_OF_OBJECTS)
        self._reader.count(value)

    def _is_schedule(self, name: str) -> bool:
        """Whether an item belongs to a scheduler."""
        paths = (".".join(map(str, s.path)) for s in find_sections(self._tree) if s.kind == "scheduler")
        return any(name.startswith(f"{path}.") for path in paths)

    def _note_left(self, items: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> None:
        """Note the tensors of the checkpoint beside those that are loaded, as far as they are not loaded."""
        taken = {id(value) for value in self._chosen.values()}
        tops = {paths.get(name, (name,))[0] for name in items}
        tops |= {self._tops[self._in_files[name]] for name in items if name in self._in_files}
        left = {
            id(value): name
            for name, value in self._values.items()
            if isinstance(value, LazyTensor) and id(value) not in taken and self._tops[name] in tops
        }
        if left:
            names = ", ".join(map(describe, list(left.values())[:3])) + (", ..." if len(left) > 3 else "")
            self.notes.append(
                f"not loaded, because the live state dict does not have them: {len(left)} tensors: {names}"
            )

    def _cut(self, name: str, live: Any, value: LazyTensor) -> Iterator[tuple[torch.Tensor, LazyTensor]]:
        """This process's parts of a live tensor, each with the same part of the checkpoint's tensor."""
        shards = getattr(live, "local_shards", None)
        if shards is None:
            part = self._reader.cut(name, live, value)
            if part.numel or not value.numel:
                yield live.to_local() if hasattr(live, "to_local") else live, part
            return
        self._reader.check_copy(name, live, value)
        for shard in shards():  # FSDP1's ShardedTensor
            part, metadata = value, shard.metadata
            for dim, (start, size) in enumerate(zip(metadata.shard_offsets, metadata.shard_sizes, strict=True)):
                part = part.narrow(dim, start, size)
            refuse_lost(name, part, live.dtype)
            self._reader.count(part)
            yield shard.tensor, part

    def _declared_new(self, live: Iterable[str]) -> Collection[str]:
        """Those of the live parameters that the plan declares new.

        They keep their values in the live state: weights as they were initialised, and slots as torch creates them,
        which `get_optimizer_state_dict` does by a step without gradients.
        """
        parameters = dict.fromkeys(live)
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
        return new.keys()

    def _note_fresh(self, owners: Iterable[str | None]) -> None:
        """Note the parameters whose state the plan starts anew, which keep that of the live state dict."""
        started = list(dict.fromkeys(owner for owner in owners if owner is not None and owner in self._fresh))
        if started:
            names = few(list(map(describe, started)))
            self.notes.append(
                f"start without the state of the checkpoint, and keep that of the live state dict: {names}"
            )

    def value(self, name: str) -> Any:
        """The new value of an item that is not a tensor in the live state."""
        return whole(self._chosen[name])

    def fill(self, name: str, live: Any) -> None:
        """Read this process's part of a tensor into the live one."""
        from optimstate.installed_torch import torch

        with torch.no_grad():
            if name not in self._parts:  # a number
                (live.to_local() if hasattr(live, "to_local") else live).fill_(self._chosen[name])
                return
            for own, part in self._parts[name]:
                own.copy_(to_torch(part.contiguous()))

    def casts(self) -> list[str]:
        """Notes on tensors whose dtype changes."""
        return notes_on_casts(self._casts)


def _tail(file: Location) -> bytes:
    source = open_source(file)
    length = min(source.size, _TAIL)
    return source.read(source.size - length, length)


_TAIL = 1 << 16  # bytes at the end of `.metadata` that contain what torch records about the save


def _parameter(path: Sequence[Any]) -> str:
    """The name of the parameter that an item of a state dict belongs to, be it a weight, a slot or an option."""
    found = flat_name(path[-1])
    if found is not None:
        return found[0]
    return str(path[-2] if len(path) > 2 and path[-3] == "state" else path[-1])


_OF_OBJECTS = (
    "Leave it out of the state dict that is loaded here, and load it with torch.distributed.checkpoint.load without "
    "this planner, which creates objects."
)


def _by_name(node: Any) -> Any:
    """The tree with optimizers keyed by their parameters' names, if they have names."""
    if not isinstance(node, Mapping):
        return node
    if "param_groups" not in node or not isinstance(node.get("state"), Mapping):
        return {key: _by_name(value) for key, value in node.items()}
    state = OptimizerState.from_node(node)
    if not state.is_named:
        return node
    return state.by_name().to_node()


def put(tree: Any, path: Sequence[Any], value: Any) -> None:
    """Replace the value at a path of nested dicts and lists."""
    *outer, last = path
    for key in outer:
        tree = tree[_key(tree, key)]
    tree[_key(tree, last)] = value


def _key(tree: Any, key: Any) -> Any:
    """The key of a dict or list; torch makes text of the keys of dicts."""
    if isinstance(tree, Mapping) and key not in tree:
        return next((other for other in tree if str(other) == key), key)
    return key


def _common(name: str, other: str) -> int:
    """The number of equal parts at the end of two names."""
    count = 0
    for a, b in zip(reversed(name.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count
