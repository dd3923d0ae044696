"""Name: give anonymous optimizers of a checkpoint their parameters' names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from optimstate.describe import describe
from optimstate.errors import CheckpointError, DestinationError, MigrationError, UsageError
from optimstate.formats.checksums import verified
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.formats.registry import get_format, open_checkpoint
from optimstate.io.destination import check_destination
from optimstate.io.extents import Progress
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.language.plan import Plan
from optimstate.problems import Problem
from optimstate.state.building import from_config, imported, parameters_of
from optimstate.state.grouping import trainer_of
from optimstate.state.naming import Candidate, Evidence, Naming
from optimstate.state.optimizer import OptimizerState
from optimstate.state.pairing import ModelNames, Namer, Order
from optimstate.state.sections import Section, find_sections
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import table
from optimstate.surgery.viewing import viewed
from optimstate.tree import Opaque, replaced

__all__ = ["NameReport", "concluded_names", "name", "read_names"]


class NameReport(VerbReport):
    """The names given.

    Attributes:
        optimizers: For each optimizer its path and, per parameter, name and evidence.
        written: Whether a file was written.
    """

    source: str
    destination: str
    written: bool
    optimizers: Mapping[str, tuple[tuple[str, Evidence], ...]]

    VERB = "name"

    def _lines(self) -> Iterator[str]:
        for path, found in self.optimizers.items():
            yield f"optimizer at {path}"
            rows = [(str(index), given, evidence) for index, (given, evidence) in enumerate(found)]
            yield table(("", "parameter", "evidence"), rows)
        yield f"wrote {self.destination}" if self.written else "dry run: nothing was written"


def name(
    source: Place,
    destination: Place | None,
    *,
    names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    order: Order = "model",
    model: str | None = None,
    hf: str | Path | None = None,
    view: Plan | str | PathLike[str] | None = None,
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
        view: The plan from the layout in which the weights are stored to that of the optimizer, whose names are those
            of its result. The weights are written as they are stored.
        dry_run: Only report.
        force: Replace an existing destination.
        progress: Called with the bytes written since the last call.

    Raises:
        CheckpointError: The source cannot be read, is damaged, or has no optimizer.
        MigrationError: Names are not determined; every reason is listed with what would settle it.
        DestinationError: The destination exists or cannot be written.
    """
    UsageError.refuse_other("order", order, get_args(Order))
    source = located(source)
    if destination is not None and not dry_run:
        destination = located(destination)
        check_destination(destination, [source], force=force)
    with opening(source):
        document = open_checkpoint(source)
        seen = viewed(document, view)
        sections = find_sections(seen.tree)
        optimizers = [section for section in sections if section.kind == "optimizer"]
        if not optimizers:
            raise CheckpointError("no optimizer in it", path=source)
        namer = _namer(seen, sections, _by_path(names, optimizers), order=order, built=_model_of(model, hf))
        found = [(section, namer.named(section)) for section in optimizers]
        _refuse_open_questions(
            found, given=order if names is not None else None, built=model is not None or hf is not None
        )
        if not dry_run:
            if destination is None:
                raise DestinationError("no destination", hint="Give one, or ask for a dry run.")
            rebuilt = {id(section.node): _with_names(section, naming) for section, naming in found}
            tree = replaced(document.tree, rebuilt)
            with verified(document, WriteOptions(progress=progress, replace=force)) as options:
                get_format(document.format).write(tree, located(destination), like=document, options=options)
        listing = {
            section.label: tuple(zip(map(str, naming.names), naming.evidence, strict=True)) for section, naming in found
        }
        return NameReport(str(source), str(destination or ""), not dry_run, listing)


def _namer(
    document: Document,
    sections: Sequence[Section],
    given: Mapping[str, Sequence[str]] | None = None,
    *,
    order: Order = "model",
    built: list[Candidate] | None = None,
) -> Namer:
    models = [
        ModelNames(section, ordered=_format_of(document, section) != "safetensors")
        for section in sections
        if section.kind == "model"
    ]
    return Namer(models, given, order=order, built=built, trainer=trainer_of(document.tree))


def concluded_names(document: Document, sections: Sequence[Section]) -> dict[str, tuple[str, ...] | str]:
    """The names of each optimizer's parameters, by its path, as the weights of the checkpoint determine them.

    Args:
        document: The checkpoint.
        sections: Those that were found in it.

    Returns:
        For each optimizer its names in group order; a sentence where they are not determined.
    """
    namer = _namer(document, sections)
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
    """The given names of each optimizer, by its label."""
    if names is None:
        return {}
    labels = [section.label for section in optimizers]
    if isinstance(names, Mapping):
        if unknown := [path for path in names if path not in labels]:
            raise MigrationError.of(
                "name",
                f"names are given for {describe(unknown[0])}, where there is no optimizer",
                hint=f"There are optimizers at {', '.join(labels)}.",
            )
        return dict(names)
    return dict.fromkeys(labels, names)


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
    try:
        return parameters_of(lambda: imported(model) if model is not None else from_config(Path(str(hf))))
    except (Exception, SystemExit) as error:  # code of the user's own, which must not end this process
        option = f"--model {model}" if model is not None else f"--hf {hf}"
        message = str(error) or type(error).__name__
        raise MigrationError.of("setting", f"{type(error).__name__}: {message}", option) from error


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
        raise MigrationError.of(
            "name",
            "is not a state_dict of torch's form: it has no place for parameter names",
            f"optimizer at {section.label}",
        )
    state: OptimizerState = section.optimizer()
    rest = iter(naming.names)
    groups = []
    for group in state.groups:
        given = tuple(str(next(rest)) for _ in group.params)
        keys = group.keys if "param_names" in group.keys else (*group.keys, "param_names")
        groups.append(group._replace(names=given, keys=keys))
    return state._replace(groups=tuple(groups)).to_node()


def read_names(source: Place, files: Sequence[str]) -> list[str] | dict[str, list[str]]:
    """Names from files given as `FILE` or `PATH=FILE`; several without a path belong to the optimizers in order.

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
            raise MigrationError.of("setting", problem)
        files = [f"{label}={file}" for label, file in zip(labels, files, strict=True)]
    for text in files:
        path, _, file = text.rpartition("=")
        if not path or path in found:
            raise MigrationError.of(
                "setting",
                "nothing says of which optimizer" if not path else f"two files name {path}",
                text,
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
