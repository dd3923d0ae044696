"""The parts of a checkpoint that is resumed: finding the right ones, with tensors that can be loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, StateMismatchError
from optimstate.formats.checksums import verify_read
from optimstate.formats.registry import open_checkpoint
from optimstate.io.extents import Extent
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.language.plan import Plan
from optimstate.resuming.identity import Identity, identity_of
from optimstate.resuming.records import revived
from optimstate.state.building import from_config, parameters_of
from optimstate.state.flattened import find_flat_state
from optimstate.state.grouping import trainer_of
from optimstate.state.loose import gathered
from optimstate.state.names import unwrapped
from optimstate.state.naming import Candidate, Naming
from optimstate.state.optimizer import OptimizerState
from optimstate.state.pairing import ModelNames, Namer
from optimstate.state.sections import Section, judged
from optimstate.state.unread import unread_state
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import Opaque
from optimstate.tree.unfolding import check_unfolded

__all__ = ["Named", "Parts"]

_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval"}
_SMALL = 1 << 20  # bytes; smaller tensors are not mapped, because systems limit the number of maps
_LONGEST_NAME = 255  # bytes of a folder's name
_AVERAGES = ("ema", "averag", "shadow", "polyak", "teacher", "target", "swa")

Named = tuple[str | None, Any]
"""A live object, preceded by the path that is given for it, or None."""


class Parts:
    """The sections of a checkpoint.

    Args:
        checkpoint: A file or folder, or a mapping that was loaded from one.
        lazily: Whether tensors are not read here, so that each process can read its own part.

    Attributes:
        read: The byte ranges of files that are read.
    """

    def __init__(self, checkpoint: Place | Mapping[str, Any], *, lazily: bool) -> None:
        latest = None if isinstance(checkpoint, Mapping) else _latest(located(checkpoint))
        if latest is not None:
            checkpoint = latest
        self._document = None if isinstance(checkpoint, Mapping) else open_checkpoint(located(checkpoint))
        self.notes = [] if self._document is None else list(self._document.notes)
        if latest is not None:
            self.notes.append(f"its file `latest` says {describe(latest.name)}, which is resumed")
        tree = checkpoint if self._document is None else self._document.tree
        self._lazily = lazily
        self.read: list[Extent] = []
        self._original: dict[int, Any] = {}
        self._keep: list[Any] = [tree]  # keeps nodes alive, because the dicts below use their ids
        self._shadows: dict[int, Any] = {}
        self._live: dict[int, Any] = {}
        self._storages: dict[int, Storage] = {}
        self._tree = self._with_one_model(self._shadow(tree))
        self._judgement = judged(self._tree)
        self._sections = self._judgement.sections
        self._chosen: set[int] = set()

    @property
    def tree(self) -> Any:
        """The checkpoint with lazy tensors in place of those in memory."""
        return self._tree

    def identity(self, plan: Plan) -> Identity | None:
        """What is loaded by a plan; None if the checkpoint was given as a mapping."""
        return None if self._document is None else identity_of(self._document.path, plan)

    def compare(self) -> None:
        """Compare the checksums of everything that was read.

        Raises:
            CorruptCheckpointError: A checksum differs.
        """
        if self._document is not None and self.read:
            verify_read(self._document, self.read, wholly=self._lazily)

    # --- which part is meant ------------------------------------------------------------------------------------------

    def choose(self, kind: str, wanted: Sequence[Named], likeness: Callable[[Section, Any], int]) -> list[Section]:
        """The section for each live object of a kind.

        Args:
            kind: The kind of sections.
            wanted: The live objects.
            likeness: Returns how many names a section and a live object have in common.

        Raises:
            StateMismatchError: There is no section, there are several that could be meant, or fewer than objects.
        """
        chosen = self._choice(kind, wanted, likeness)
        self._chosen.update(map(id, chosen))
        return chosen

    def left(self) -> str:
        """The schedulers and averages for which nothing was chosen."""
        kinds = ("scheduler", "ema")
        return self._labels([s for s in self._sections if s.kind in kinds and id(s) not in self._chosen], none="")

    def _choice(self, kind: str, wanted: Sequence[Named], likeness: Callable[[Section, Any], int]) -> list[Section]:
        found = self.of_kind(kind)
        at_paths = [self._at(path, kind, found) for path, _ in wanted if path is not None]
        if len(at_paths) == len(wanted):
            return at_paths
        if not found:
            unread = unread_state(self._tree, self._judgement) if kind == "optimizer" else None
            also = "" if unread is None else f", and {unread}, of a form that is not known"
            raise StateMismatchError(
                f"the checkpoint has no {kind}; it has {self._labels(self._sections)}{also}",
                hint=f"Give its file, or resume without {kind}=..., which leaves the live one as it is.",
            )
        if kind == "optimizer" and len(found) == 1:  # several optimizers share the parameters of one
            return found * len(wanted)
        if len(found) < len(wanted):
            raise StateMismatchError(
                f"{len(wanted)} objects are given as {kind}, and the checkpoint has {self._labels(found)}"
            )
        if len(found) == len(wanted) == 1:
            return found
        scores = [[likeness(section, live) for section in found] for _, live in wanted]
        chosen = self._by_keys(kind, found) if len(wanted) == 1 else None
        chosen = chosen or _alike(scores, in_order=len(found) == len(wanted))
        if chosen is None:
            example = ", ".join(f'"{section.label}": ...' for section in found[: max(2, len(wanted))])
            raise StateMismatchError(
                f"the checkpoint has several parts that could be the {kind}: {self._labels(found)}",
                hint=f"Choose with {kind}={{{example}}}."
                + (" Or give the path of one of the folders." if self._are_of_several_folders(found) else ""),
            )
        return [found[index] for index in chosen]

    def _are_of_several_folders(self, found: Sequence[Section]) -> bool:
        """Whether sections are in folders of their own, as in an output folder with several checkpoints."""
        tops = [str(section.path[0]) if section.path else "" for section in found]
        document = self._document
        return document is not None and len(set(tops)) == len(tops) and all((document.path / t).is_dir() for t in tops)

    def of_kind(self, kind: str) -> list[Section]:
        """All parts of a kind."""
        found = [section for section in self._sections if section.kind == kind]
        if kind == "ema" and not found:  # a plain dict of weights beside the model's
            return [section for section in self._sections if section.kind == "model" and _is_average(section)]
        return found

    def _by_keys(self, kind: str, found: Sequence[Section]) -> list[int] | None:
        """The index of the only section whose key begins with the kind; for models, of the only one not an average."""
        named = [i for i, section in enumerate(found) if section.path and str(section.path[-1]).startswith(kind)]
        if kind == "model" and len(named) != 1:
            named = [index for index, section in enumerate(found) if not _is_average(section)]
        return named if len(named) == 1 else None

    def _at(self, path: str | None, kind: str, found: Sequence[Section]) -> Section:
        for section in found:
            if path in (section.label, ".".join(map(str, section.path))):
                return section
        called = [section for section in found if section.path and path == str(section.path[-1])]
        if len(called) == 1:
            return called[0]
        raise StateMismatchError(
            f"the checkpoint has no {kind} at {describe(path)}; it has {self._labels(self._sections)}"
        )

    def _labels(self, sections: Sequence[Section], none: str = "no known part") -> str:
        return ", ".join(f"{section.kind} {section.label}" for section in sections) or none

    # --- their contents -----------------------------------------------------------------------------------------------

    def node(self, section: Section) -> Any:
        """A section with tensors that can be loaded."""
        if section.host is None:
            return self._loadable(self._original[id(section.node)])
        flat = find_flat_state(self._original[id(section.host.host)])
        assert flat is not None
        return self._loadable(flat.optimizer if section.kind == "optimizer" else flat.rest)

    def optimizer(self, section: Section) -> OptimizerState:
        """An optimizer's state.

        Raises:
            CorruptCheckpointError: It contradicts itself.
        """
        try:
            if section.host is None and section.positional:
                return self._loaded_state(section.optimizer())
            return OptimizerState.from_node(self.node(section))
        except CorruptCheckpointError as error:
            raise error.within(path=self._document.path if self._document is not None else "") from None

    def beside(self, section: Section) -> Mapping[str, Any]:
        """The metadata that hooks wrote into an optimizer's state dict."""
        found = section.node.get("optimstate") if isinstance(section.node, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def _loaded_state(self, state: OptimizerState) -> OptimizerState:
        return state._replace(
            groups=tuple(group._replace(options=self._loadable(dict(group.options))) for group in state.groups),
            state={key: self._loadable(dict(slots)) for key, slots in state.state.items()},
        )

    def names(self, section: Section, models: Sequence[Any]) -> Naming | None:
        """Names for an optimizer that has none, inferred from the checkpoint's models; None if it has no model.

        Args:
            section: The optimizer.
            models: The live models, whose order is used if they have the same parameters as the checkpoint's.
        """
        sections = [part for part in self._sections if part.kind == "model"]
        if not sections:
            return None
        beside = [ModelNames(part, ordered=self._keeps_order(part)) for part in sections]
        for found in beside:
            for live in models:
                names = list(live.state_dict())
                found.order_like(_parameters(live), list(map(unwrapped(names), names)))
        trainer = trainer_of(self._tree)
        naming = Namer(beside, trainer=trainer).named(section)
        config = None if self._document is None else self._document.path / "config.json"
        if naming.complete or not isinstance(config, Path) or not config.is_file():
            return naming
        try:
            built = parameters_of(lambda: from_config(config.parent))
        except Exception:  # noqa: BLE001  # a custom model, or transformers is not installed
            return naming
        return Namer(beside, built=built, trainer=trainer).named(section)

    def problems_of(self, section: Section, given: Sequence[str]) -> tuple[str, ...]:
        """Why names that are given in the order of an optimizer's groups cannot be right; empty if they can."""
        beside = [ModelNames(part, ordered=False) for part in self._sections if part.kind == "model"]
        return Namer(beside, {section.label: given}, order="optimizer").named(section).problems

    def _keeps_order(self, section: Section) -> bool:
        document = self._document
        for key in section.path if document is not None else ():
            inner = document.parts.get(str(key)) if document is not None else None
            if inner is None:
                break
            document = inner
        return document is None or document.format != "safetensors"

    def scaler(self) -> dict[str, Any]:
        """The state of the gradient scaler; empty if it was disabled.

        Raises:
            StateMismatchError: There is no such state.
        """
        for key, node in _mappings(self._tree):
            if node.keys() >= _SCALER or (not node and "scaler" in str(key)):
                return dict(self._loadable(self._original[id(node)]))
        raise StateMismatchError("the checkpoint has no state of a gradient scaler")

    # --- tensors ------------------------------------------------------------------------------------------------------

    def _shadow(self, node: Any) -> Any:
        """A copy of a tree in which tensors in memory are replaced by lazy ones without elements."""
        from optimstate.installed_torch import torch

        if isinstance(node, torch.Tensor):
            return self._stand_in(node)
        if id(node) in self._shadows:  # shared nodes are copied once
            return self._shadows[id(node)]
        made: Any = node
        if isinstance(node, Mapping):
            made = {key: self._shadow(value) for key, value in node.items()}
        elif type(node) in (list, tuple):
            made = [self._shadow(value) for value in node]
        if made is not node:
            self._shadows[id(node)] = made
        self._original[id(made)] = node
        self._keep.append(made)
        return made

    def _with_one_model(self, tree: Any) -> Any:
        """The tree with loose weights moved to a mapping of their own (see `gathered`)."""
        made = gathered(tree)
        if made is None:
            return tree
        original, weights = self._original[id(tree)], made["model"]
        self._original |= {id(weights): {name: original[name] for name in weights}, id(made): original}
        self._keep.append(made)
        return made

    def _stand_in(self, tensor: Any) -> LazyTensor:
        dtype = str(tensor.dtype).removeprefix("torch.")
        try:
            place, offset = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        except (NotImplementedError, RuntimeError):  # sparse, or of a subclass without a storage
            place, offset = 0, 0
        storage = self._storages.setdefault(place or id(tensor), Storage((), 0))
        made = LazyTensor(storage, dtype, tuple(tensor.shape), offset=int(offset))
        self._keep.append(made)
        self._live[id(made)] = tensor
        return made

    def _loadable(self, node: Any) -> Any:
        check_unfolded(node)  # torch walks shared nodes each time they occur
        return self._live_copy(node)

    def _live_copy(self, node: Any) -> Any:
        if isinstance(node, Opaque):
            return revived(node)
        if isinstance(node, LazyTensor):
            if self._lazily:
                return node
            if id(node) not in self._live:
                tensor = to_torch(node)
                self.read += node.storage.cut(*node.span())
                self._live[id(node)] = tensor.clone() if node.nbytes < _SMALL else tensor
            return self._live[id(node)]
        if isinstance(node, Counter):  # the milestones of a scheduler
            return Counter(node)
        if isinstance(node, Mapping):
            return {key: self._live_copy(value) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(self._live_copy(value) for value in node)
        return node


def _latest(folder: Any) -> Path | None:
    """The checkpoint in a folder that the folder's file `latest` names, as DeepSpeed writes it; else None."""
    if not isinstance(folder, Path) or not (folder / "latest").is_file():
        return None
    with (folder / "latest").open("rb") as file:
        name = file.read(_LONGEST_NAME).decode("utf-8", "replace").strip()
    return folder / name if name and Path(name).name == name and (folder / name).is_dir() else None


def _is_average(section: Section) -> bool:
    return any(word in str(key).lower() for key in section.path for word in _AVERAGES)


def _alike(scores: Sequence[Sequence[int]], *, in_order: bool) -> list[int] | None:
    """The index of the most similar section for each live object; in order if names do not decide."""
    objects, parts = len(scores), len(scores[0])
    if objects > 6 or parts > 8:
        return list(range(objects)) if in_order else None
    totals: dict[tuple[int, ...], int] = {
        order: sum(scores[a][b] for a, b in enumerate(order)) for order in permutations(range(parts), objects)
    }
    best = max(totals.values())
    ways = [order for order, total in totals.items() if total == best]
    plain = tuple(range(objects))
    if in_order and plain in ways:
        return list(plain)
    return list(ways[0]) if len(ways) == 1 and best else None


def _parameters(model: Any) -> list[tuple[Candidate, list[str]]]:
    """The trainable parameters of a live model, in order, each with all its names."""
    every = list(model.named_parameters(remove_duplicate=False))
    rename = unwrapped(name for name, _ in every)
    aliases: dict[int, list[str]] = {}
    for name, parameter in every:
        aliases.setdefault(id(parameter), []).append(rename(name))
    return [
        (Candidate(rename(name), tuple(parameter.shape)), aliases[id(parameter)])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _mappings(node: Any, key: Any = "", seen: set[int] | None = None) -> Iterator[tuple[Any, Mapping[Any, Any]]]:
    seen = set() if seen is None else seen
    if not isinstance(node, Mapping | list) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, Mapping):
        yield key, node
        for inner, value in node.items():
            yield from _mappings(value, inner, seen)
    else:
        for value in node:
            yield from _mappings(value, key, seen)
