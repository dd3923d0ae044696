"""Name: give anonymous optimizers of a checkpoint their parameters' names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from optimstate.errors import CheckpointError, DestinationError, MigrationError, UsageError
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.io.extents import Progress
from optimstate.io.output import check_destination
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.names import unwrapped, wrapper_prefix
from optimstate.state.naming import (
    Candidate,
    Evidence,
    Naming,
    model_candidates,
    name_in_order,
    name_parameters,
    trainer_excludes,
)
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.surgery.reports import opening, to_json
from optimstate.surgery.text import table
from optimstate.tree import Opaque, replaced

__all__ = ["NameReport", "concluded_names", "name", "read_names"]

Order = Literal["model", "optimizer"]


@dataclass(frozen=True)
class NameReport:
    """The names given.

    Attributes:
        optimizers: For each optimizer its path and, per parameter, name and evidence.
        written: Whether a file was written.
    """

    source: str
    destination: str
    written: bool
    optimizers: Mapping[str, tuple[tuple[str, Evidence], ...]]

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("name", asdict(self))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for path, found in self.optimizers.items():
            yield f"optimizer at {path}"
            rows = [(str(index), given, evidence) for index, (given, evidence) in enumerate(found)]
            yield table(("", "parameter", "evidence"), rows)
        yield f"wrote {self.destination}" if self.written else "dry run: nothing was written"


def name(
    source: str | Path,
    destination: str | Path | None,
    *,
    names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    order: Order = "model",
    model: str | None = None,
    hf: str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> NameReport:
    """Write a checkpoint whose optimizers have parameter names.

    Args:
        source: A file or folder.
        destination: Where to write, in the same container.
        names: The parameters' names; where there are several optimizers, by the path of each, as `inspect` prints it.
        order: Whether they are in the order of the model's `named_parameters()`, or in that of the optimizer, group by
            group.
        model: `module:factory`, a callable without arguments that builds the model; it is called on the meta device.
            This runs the code of that module.
        hf: The config file of a model of transformers, or its folder: the model is built on the meta device.
        dry_run: Only report.
        force: Replace an existing destination.
        progress: Called with the bytes written since the last call.

    Raises:
        CheckpointError: The source cannot be read, or has no optimizer.
        MigrationError: Names are not determined; every reason is listed with what would settle it.
        DestinationError: The destination exists or cannot be written.
    """
    source = Path(source)
    if destination is not None and not dry_run:
        check_destination(Path(destination), [source], force=force)
    with opening(source):
        document = open_checkpoint(source)
        sections = find_sections(document.tree)
        optimizers = [section for section in sections if section.kind == "optimizer"]
        if not optimizers:
            raise CheckpointError("no optimizer in it", path=source)
        namer = _Namer(document, sections, _by_path(names, optimizers), order, _model_of(model, hf))
        found = [(section, namer.named(section)) for section in optimizers]
        _refuse_open_questions(
            found, given=order if names is not None else None, built=model is not None or hf is not None
        )
        if not dry_run:
            if destination is None:
                raise DestinationError("no destination", hint="Give one, or ask for a dry run.")
            rebuilt = {id(section.node): _with_names(section, naming) for section, naming in found}
            tree = replaced(document.tree, rebuilt)
            get_format(document.format).write(
                tree, Path(destination), like=document, options=WriteOptions(progress=progress)
            )
        listing = {
            section.label: tuple(zip(map(str, naming.names), naming.evidence, strict=True)) for section, naming in found
        }
        return NameReport(str(source), str(destination or ""), not dry_run, listing)


def concluded_names(document: Document, sections: Sequence[Section]) -> dict[str, tuple[str, ...] | str]:
    """The names of each optimizer's parameters, by its path, as the weights of the checkpoint determine them.

    Args:
        document: The checkpoint.
        sections: Those that were found in it.

    Returns:
        For each optimizer its names in group order; a sentence where they are not determined.
    """
    namer = _Namer(document, sections, {}, "model", None)
    found: dict[str, tuple[str, ...] | str] = {}
    for section in sections:
        if section.kind == "optimizer":
            naming = namer.named(section)
            names = tuple(name for name in naming.names if name is not None)
            complete = len(names) == len(naming.names) == len(set(names)) and not naming.problems
            found[section.label] = names if complete else str(next(iter(naming.problems), "several have one name"))
    return found


def _by_path(
    names: Sequence[str] | Mapping[str, Sequence[str]] | None, optimizers: Sequence[Section]
) -> dict[str, Sequence[str]]:
    """The names that are given for each optimizer, by its label."""
    if names is None:
        return {}
    labels = [section.label for section in optimizers]
    if isinstance(names, Mapping):
        if unknown := [path for path in names if path not in labels]:
            raise MigrationError(
                [Problem("name", f"names are given for {unknown[0]!r}, where there is no optimizer")],
                hint=f"There are optimizers at {', '.join(labels)}.",
            )
        return dict(names)
    return dict.fromkeys(labels, names)


class _Namer:
    """Finds for each optimizer the model that it belongs to, and its parameters' names."""

    def __init__(
        self,
        document: Document,
        sections: Sequence[Section],
        given: Mapping[str, Sequence[str]],
        order: Order,
        built: list[Candidate] | None,
    ) -> None:
        self._given, self._order, self._built = given, order, built
        self._by_trainer = "trainer_state.json" in document.parts or (
            isinstance(document.tree, Mapping) and "trainer_state.json" in document.tree
        )
        self._models = [
            _Model(section, _format_of(document, section) != "safetensors")
            for section in sections
            if section.kind == "model"
        ]

    def named(self, section: Section) -> Naming:
        """The names of one optimizer's parameters."""
        state = section.optimizer()
        names = self._given.get(section.label)
        if names is not None:
            return self._as_given(state, names)
        if self._built is not None:
            return self._inferred(state, self._built, ordered=True)
        tried = [(model, self._inferred(state, model.candidates, ordered=model.ordered)) for model in self._models]
        if not tried:
            return name_parameters(state, [], ordered=False)
        return _of_the_right_model(section, tried)

    def _inferred(self, state: OptimizerState, candidates: Sequence[Candidate], *, ordered: bool) -> Naming:
        excluded = trainer_excludes(state, candidates) if self._by_trainer else {}
        found = name_parameters(state, candidates, ordered=ordered, excluded=excluded)
        return found if found.complete or not excluded else name_parameters(state, candidates, ordered=ordered)

    def _as_given(self, state: OptimizerState, names: Sequence[str]) -> Naming:
        best = max(
            self._models, key=lambda model: sum(model.spelled(names).shape(n) is not None for n in names), default=None
        )
        spelling = best.spelled(names) if best is not None else _Spelling({}, {})
        if self._order == "optimizer":
            found = name_in_order(state, names, {given: spelling.shape(given) for given in names})
        else:
            candidates = [Candidate(given, spelling.shape(given)) for given in names]
            found = name_parameters(state, candidates, ordered=True, given=True)
            if not found.complete and self._by_trainer and (excluded := trainer_excludes(state, candidates)):
                found = name_parameters(state, candidates, ordered=True, given=True, excluded=excluded)
        return found._replace(names=tuple(name and spelling.saved(name) for name in found.names))


def _confirmed(state: OptimizerState, names: Sequence[str]) -> Naming:
    """The names that an optimizer has, where those that are given are not others."""
    own = name_parameters(state, [], ordered=False)
    rename = unwrapped(names)
    known = {name: None for given in names for name in (given, rename(given))}
    other = next((name for name in own.names if name not in known), None)
    if other is None:
        return own
    return own._replace(problems=(f"the file calls a parameter {other!r}, which is not among the given names",))


class _Model:
    """A model of the checkpoint, as far as naming needs it."""

    def __init__(self, section: Section, ordered: bool) -> None:
        self.section, self.ordered = section, ordered
        tensors = section.tensors()
        prefix = wrapper_prefix(tensors)
        self.candidates = model_candidates({key.removeprefix(prefix): value for key, value in tensors.items()})
        self._shapes = {candidate.name: candidate.shape for candidate in self.candidates}
        self._plain = {unwrapped([key])(key): key for key in self._shapes}

    def spelled(self, names: Sequence[str]) -> _Spelling:
        """How names that are given are spelled in this model."""
        rename = unwrapped(names)
        places = {given: given if given in self._shapes else self._plain.get(rename(given)) for given in names}
        return _Spelling({given: place for given, place in places.items() if place is not None}, self._shapes)


class _Spelling(Record):
    """Names as they are given, and as the weights beside the optimizer have them: without an adapter's name.

    Attributes:
        places: Given name to the weights' one, where they have it.
        shapes: By the weights' names.
    """

    places: Mapping[str, str]
    shapes: Mapping[str, Any]

    def shape(self, given: str) -> tuple[int, ...] | None:
        """The shape of a parameter, where the weights show it."""
        place = self.places.get(given)
        return self.shapes.get(place) if place is not None else None

    def saved(self, given: str) -> str:
        """The weights' name, so that rules see one parameter in both."""
        return self.places.get(given, given)


def _of_the_right_model(section: Section, tried: Sequence[tuple[_Model, Naming]]) -> Naming:
    """The naming by the model that an optimizer belongs to: whose parameters are used up, or whose key says so."""
    fitting = [(model, naming) for model, naming in tried if naming.complete]
    for choice in ([found for found in fitting if not found[1].unused], fitting):
        distinct = {naming.names: naming for _, naming in choice}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
        if distinct:
            related = max(_kinship(section.path, model.section.path) for model, _ in choice)
            nearest = {n.names: n for m, n in choice if _kinship(section.path, m.section.path) == related}
            if len(nearest) == 1 and related > 0:
                return next(iter(nearest.values()))
            labels = " and ".join(model.section.label for model, _ in choice[:3])
            naming = choice[0][1]
            problem = f"its parameters fit the models at {labels} alike, and nothing says which it belongs to"
            return Naming((None,) * len(naming.names), tuple("unknown" for _ in naming.names), (problem,))
    best = max(tried, key=lambda found: (_kinship(section.path, found[0].section.path), len(found[0].candidates)))
    return best[1]


def _kinship(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much two paths have in common: shared keys, equal places in lists, words that both keys have."""
    score = 0
    for a, b in zip(one, other, strict=False):
        if a == b:
            score += 2
        else:
            words = ({w for w in re.split(r"[^a-z0-9]+", str(key).lower()) if w} for key in (a, b))
            score += len(set.intersection(*words) - {"optimizer", "model", "state", "dict", "optim", "opt", "net"})
    return score


def _format_of(document: Document, section: Section) -> str:
    """The container that a section was read from."""
    for key in section.path:
        part = document.parts.get(str(key))
        if part is None:
            break
        document = part
    return document.format


def _model_of(model: str | None, hf: str | Path | None) -> list[Candidate] | None:
    """The parameters of a model that is built for this, on the meta device."""
    if model is not None and hf is not None:
        raise UsageError("model and hf both say what the model is", hint="Give one of them.")
    if model is None and hf is None:
        return None
    from optimstate.installed_torch import torch

    try:
        with torch.device("meta"):
            made = _imported(model) if model is not None else _from_config(Path(str(hf)))
    except Exception as error:
        option = f"--model {model}" if model is not None else f"--hf {hf}"
        message = str(error) or type(error).__name__
        raise MigrationError([Problem("setting", f"{type(error).__name__}: {message}", option)]) from error
    return [Candidate(key, tuple(p.shape)) for key, p in made.named_parameters() if p.requires_grad]


def _imported(model: str) -> Any:
    module, _, factory = model.partition(":")
    if not module or not factory:
        raise ValueError("expected module:factory")
    return getattr(import_module(module), factory)()


def _from_config(path: Path) -> Any:
    """A model of transformers, by its config alone: no weights, no code of the checkpoint, no network."""
    transformers = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    classes = [getattr(transformers, found, None) for found in config.architectures or ()]
    if len(classes) == 1 and classes[0] is not None:
        return classes[0](config)
    raise ValueError(f"the config names no class of transformers: architectures = {config.architectures!r}")


def _refuse_open_questions(found: list[tuple[Section, Naming]], *, given: Order | None, built: bool) -> None:
    problems = [
        Problem("name", problem, f"optimizer at {section.label}")
        for section, naming in found
        for problem in naming.problems
    ]
    for section, naming in found:
        twice = [key for key, count in Counter(naming.names).items() if key is not None and count > 1]
        problems += [Problem("name", f"{key} would be named twice", f"optimizer at {section.label}") for key in twice]
    if not problems:
        return
    lone = "" if len(found) == 1 else f" Of one optimizer: --names '{found[0][0].label}=FILE'."
    if given == "optimizer":
        hint = "Give a name for every parameter of every param group, in their order."
    elif given == "model":
        hint = "Give the names in the optimizer's own order, group by group: --names FILE --order optimizer."
    elif built:
        hint = "Give the names in the optimizer's own order, group by group, with --names FILE --order optimizer."
    else:
        hint = (
            "Give the names with --names FILE (one a line, or a JSON list), in the order of named_parameters(), or of "
            "the optimizer with --order optimizer; or the model with --model module:factory or --hf FOLDER."
        )
    raise MigrationError(problems, hint=hint + lone)


def _with_names(section: Section, naming: Naming) -> Any:
    if isinstance(section.node, Opaque) or "param_groups" not in section.node:
        raise MigrationError(
            [
                Problem(
                    "name",
                    "is not a state_dict of torch's form: it has no place for parameter names",
                    f"optimizer at {section.label}",
                )
            ]
        )
    state: OptimizerState = section.optimizer()
    rest = iter(naming.names)
    groups = []
    for group in state.groups:
        given = tuple(str(next(rest)) for _ in group.params)
        keys = group.keys if "param_names" in group.keys else (*group.keys, "param_names")
        groups.append(replace(group, names=given, keys=keys))
    return replace(state, groups=tuple(groups)).to_node()


def read_names(source: str | Path, files: Sequence[str]) -> list[str] | dict[str, list[str]]:
    """Names from files that are given as `FILE` or `PATH=FILE`; several without a path are the optimizers' in order.

    Raises:
        CheckpointError: A file cannot be read.
        MigrationError: There are more or fewer files than optimizers, or two for one.
    """
    if len(files) == 1 and (Path(files[0]).exists() or "=" not in files[0]):
        return _read(files[0])
    found: dict[str, list[str]] = {}
    if not any("=" in text for text in files):
        with opening(source):
            labels = [s.label for s in find_sections(open_checkpoint(source).tree) if s.kind == "optimizer"]
        if len(labels) != len(files):
            problem = f"{len(files)} files of names are given for {len(labels)} optimizers"
            raise MigrationError([Problem("setting", problem)])
        files = [f"{label}={file}" for label, file in zip(labels, files, strict=True)]
    for text in files:
        path, _, file = text.rpartition("=")
        if not path or path in found:
            raise MigrationError(
                [Problem("setting", "nothing says of which optimizer" if not path else f"two files name {path}", text)],
                hint="Give each as PATH=FILE, with the path that inspect prints.",
            )
        found[path] = _read(file)
    return found


def _read(path: str | Path) -> list[str]:
    """Names from a file: a JSON list, or one a line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.split()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the names cannot be read: {error}", path=path) from error
    if not all(isinstance(item, str) for item in found):
        raise CheckpointError("expected a list of names", path=path)
    return list(found)
