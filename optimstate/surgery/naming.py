"""Name: give anonymous optimizers of a checkpoint their parameters' names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from optimstate.errors import CheckpointError, DestinationError, MigrationError
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.io.extents import Progress
from optimstate.io.output import check_destination
from optimstate.problems import Problem
from optimstate.state.names import wrapper_prefix
from optimstate.state.naming import Candidate, Evidence, Naming, model_candidates, name_parameters
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.surgery.reports import opening, to_json
from optimstate.surgery.text import table
from optimstate.tree import Opaque, replaced

__all__ = ["NameReport", "name"]


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
    names: Sequence[str] | None = None,
    model: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> NameReport:
    """Write a checkpoint whose optimizers have parameter names.

    Args:
        source: A file or folder.
        destination: Where to write, in the same container.
        names: The model's parameter names in the order of `named_parameters()`.
        model: `module:factory`, a callable without arguments that builds the model; it is called on the meta device.
            This runs the code of that module.
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
        candidates, ordered = _candidates(document, sections, names, model)
        found = [(one, name_parameters(one.optimizer(), candidates, ordered=ordered)) for one in optimizers]
        _refuse_open_questions(found)
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


def _candidates(
    document: Document, sections: list[Section], names: Sequence[str] | None, model: str | None
) -> tuple[list[Candidate], bool]:
    """What the model has, and whether it is in the model's order."""
    if model is not None:
        return _built(model), True
    models = [section for section in sections if section.kind == "model"]
    if not models:
        if names is None:
            return [], False
        return [Candidate(given, None) for given in names], True
    # The largest is the model itself; averages and adapters beside it have the same names or fewer.
    tensors = max((section.tensors() for section in models), key=len)
    prefix = wrapper_prefix(tensors)
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if names is not None:
        shapes = {candidate.name: candidate.shape for candidate in model_candidates(tensors)}
        return [Candidate(given, shapes.get(given)) for given in names], True
    section = next(section for section in models if len(section.tensors()) == len(tensors))
    return model_candidates(tensors), _format_of(document, section) != "safetensors"


def _format_of(document: Document, section: Section) -> str:
    """The container that a section was read from."""
    for key in section.path:
        part = document.parts.get(str(key))
        if part is None:
            break
        document = part
    return document.format


def _built(model: str) -> list[Candidate]:
    import torch

    module, _, factory = model.partition(":")
    if not module or not factory:
        raise MigrationError([Problem("setting", "expected module:factory", f"--model {model!r}")])
    try:
        with torch.device("meta"):
            made = getattr(import_module(module), factory)()
    except Exception as error:
        raise MigrationError([Problem("setting", f"{type(error).__name__}: {error}", f"--model {model}")]) from error
    return [Candidate(key, tuple(p.shape)) for key, p in made.named_parameters() if p.requires_grad]


def _refuse_open_questions(found: list[tuple[Section, Naming]]) -> None:
    problems = [
        Problem("name", problem, f"optimizer at {section.label}")
        for section, naming in found
        for problem in naming.problems
    ]
    for section, naming in found:
        twice = [key for key, count in Counter(naming.names).items() if key is not None and count > 1]
        problems += [Problem("name", f"{key} would be named twice", f"optimizer at {section.label}") for key in twice]
    if problems:
        raise MigrationError(
            problems,
            hint="Give the names in the order of named_parameters() with --names FILE (one a line, or a JSON list), "
            "or the model itself with --model module:factory.",
        )


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


def read_names(path: str | Path) -> list[str]:
    """Names from a file: a JSON list, or one a line.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else text.split()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the names cannot be read: {error}", path=path) from error
    if not all(isinstance(item, str) for item in found):
        raise CheckpointError("expected a list of names", path=path)
    return list(found)
