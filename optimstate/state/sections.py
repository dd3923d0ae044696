"""Finding the sections of a checkpoint by structure: optimizers, models, schedulers, averaged models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, LimitExceededError, MigrationError, UsageError
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.arrays import is_array, why_no_model
from optimstate.state.flattened import FlatState, find_flat_state
from optimstate.state.judging import Candidate, Verdict, could_be_model, judge
from optimstate.state.loose import loose_weights
from optimstate.state.optimizer import OptimizerState, as_mapping
from optimstate.state.records import is_tensor
from optimstate.tree import MAX_DEPTH, Opaque, OpaqueFile, Path, children, difference, format_path, nodes, walk

__all__ = [
    "KINDS",
    "UNRECOGNISED",
    "Judgement",
    "Kind",
    "Section",
    "find_sections",
    "judged",
    "parameter_labels",
    "section_called",
    "with_hosts",
]

Kind = Literal["optimizer", "model", "scheduler", "ema"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNRECOGNISED = "unrecognised"
"""What a scheduler is called that only its key tells."""


class Section(Record):
    """A part of a checkpoint whose meaning is known.

    Attributes:
        kind: What it is. An `ema` is a `torch.optim.swa_utils.AveragedModel` state: `n_averaged` and `module.*`, one
            that keeps `shadow_params` by position (torch_ema), or the copy of a model that a callback keeps.
        path: Where it stands in the tree.
        node: The mapping, or the pickled object, itself; of flattened optimizer state its nested form, which is not in
            the tree (see `with_hosts`).
        host: The mapping in the tree that it is a part of, where it is only a part.
    """

    kind: Kind
    path: Path
    node: Any
    host: FlatState | None = None

    @property
    def in_tree(self) -> Any:
        """The node of the tree that it is, or is a part of."""
        return self.node if self.host is None else self.host.host

    @property
    def positional(self) -> bool:
        """Whether its parameters are a list in the order of the model, in a form that cannot hold names."""
        fields = _fields(self.node) or {}
        return _is_shadow_list(fields) if self.kind == "ema" else _is_listed_optimizer(fields)

    @property
    def label(self) -> str:
        """The path as people read it."""
        return format_path(self.path)

    def optimizer(self) -> OptimizerState:
        """The section's state; only for optimizers.

        Raises:
            CorruptCheckpointError: It contradicts itself.
        """
        fields = _fields(self.node)
        assert self.kind == "optimizer"
        assert fields is not None
        try:
            return OptimizerState.from_node(_keyed(fields) if _is_listed_optimizer(fields) else fields)
        except CorruptCheckpointError as error:
            raise error.within(part=f"optimizer at {self.label}") from error.__cause__

    def tensors(self) -> dict[str, Any]:
        """Name to tensor, in order; only for models and EMAs. What is not a tensor, or under no name, is left out."""
        if isinstance(self.node, Opaque):
            return dict(_module_tensors(self.node))
        if self.positional:
            return {str(index): value for index, value in enumerate(self.node["shadow_params"])}
        return {name: value for name, value in self.node.items() if is_tensor(value) and isinstance(name, str)}


class Judgement(Record):
    """What a checkpoint was found to consist of.

    Attributes:
        sections: In order.
        others: Mappings of names to tensors that are not models: path to the reason.
    """

    sections: tuple[Section, ...]
    others: Mapping[Path, str]


def find_sections(tree: Any) -> list[Section]:
    """Every section of a checkpoint, in order. Sections do not nest; a node met twice is listed once."""
    return list(judged(tree).sections)


def judged(tree: Any) -> Judgement:
    """Every section of a checkpoint, and what was not taken for one, judged on the whole tree."""
    found: list[Section | Candidate] = []
    others: dict[Path, str] = {}
    for item in _find(tree):
        if isinstance(item, Verdict):
            others[item.candidate.path] = item.reason
        else:
            found += _parts(item) if isinstance(item, Candidate) else [item]
    candidates = [item for item in found if isinstance(item, Candidate)]
    optimizers = [item for item in found if isinstance(item, Section) and item.kind == "optimizer"]
    verdicts = {id(verdict.candidate): verdict for verdict in judge(candidates, map(_state, optimizers))}
    sections: list[Section] = []
    for item in found:
        if isinstance(item, Section):
            sections.append(item)
            continue
        verdict = verdicts[id(item)]
        if verdict.kind is None:
            others[item.path] = verdict.reason
        else:
            sections.append(Section(cast("Kind", verdict.kind), item.path, item.node, item.host))
    return Judgement(tuple(sections), others)


def _state(section: Section) -> OptimizerState:
    try:
        return section.optimizer()
    except CorruptCheckpointError:  # reported where the optimizer itself is asked for
        return OptimizerState((), {})


def _parts(candidate: Candidate) -> list[Section | Candidate]:
    """A mapping of names to tensors as a model and an optimizer, where it holds both."""
    flat = find_flat_state(candidate.node)
    if flat is None or candidate.inside:
        return [candidate]
    model = Candidate(candidate.path, flat.rest, host=flat)
    optimizer = Section("optimizer", candidate.path, flat.optimizer, flat)
    return [model, optimizer] if could_be_model(flat.rest) else [optimizer]


def with_hosts(sections: Sequence[Section], made: Mapping[int, Any], *, alone: bool = False) -> dict[int, Any]:
    """Replacements for nodes of the tree where sections are only parts of their nodes.

    Args:
        sections: Those that were found in the tree.
        made: What stands for each section's node, by the id of the node.
        alone: Leave out parts that are not among the sections.
    """
    result = dict(made)
    there = {id(section.node) for section in sections}
    hosts = {id(section.host): section.host for section in sections if section.host is not None}
    for host in hosts.values():
        parts = (host.rest, host.optimizer)
        if any(id(part) in made or (alone and id(part) not in there) for part in parts):
            rest, optimizer = (result.pop(id(part), part) if not alone or id(part) in there else {} for part in parts)
            result[id(host.host)] = host.joined(rest, optimizer)
    return result


def section_called(name: str, tree: Any, sections: Sequence[Section]) -> Section:
    """The one section of that path, else of that kind, else whatever stands at that path.

    Args:
        name: A kind, or a path as it is shown (`callbacks['EMA']['weights']`) or with dots (`callbacks.EMA.weights`).
        tree: The checkpoint.
        sections: Those that were found in it.

    Raises:
        MigrationError: There is none of that kind, or there are several.
        UsageError: It is neither a kind nor a path in this checkpoint.
    """
    found = [section for section in sections if name in _spellings(section.path)]
    found = found or [section for section in sections if section.kind == name]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{section.kind} at {section.label}" for section in found or sections)
    if found:
        several = Problem("section", f"{len(found)} sections are called {describe(name)}: {there}")
        raise MigrationError([several], hint="Give the path of one.")
    for path, node in walk(tree):
        if (
            name in _spellings(path)
            and isinstance(node, Mapping)
            and any(is_tensor(v) or is_array(v) for v in node.values())
        ):
            return Section("model", path, node)
    problem = f"no section is called {describe(name)}, and there is no mapping of names to tensors at such a path"
    if name not in KINDS:
        raise UsageError.unknown(problem, name, (*KINDS, *(section.label for section in sections)))
    known = f"There are: {there}." if sections else "No section was recognised; `optimstate inspect` shows what is."
    raise MigrationError.of("section", problem, hint=known)


def _spellings(path: Path) -> tuple[str, str]:
    return format_path(path), ".".join(map(str, path))


def _find(tree: Any) -> Iterator[Section | Candidate | Verdict]:
    seen: set[int] = set()
    stack: list[tuple[Path, Any, bool]] = [((), tree, False)]
    while stack:
        path, node, inside = stack.pop()
        if not isinstance(node, Mapping | list | tuple | Opaque) or isinstance(node, OpaqueFile) or id(node) in seen:
            continue
        if is_tensor(node):  # whatever objects its record holds
            continue
        if len(path) > MAX_DEPTH:
            raise LimitExceededError(f"containers nested more than {MAX_DEPTH} deep")
        seen.add(id(node))
        kind = _kind(node) or _kind_by_key(path, node)
        if kind == "model" and isinstance(node, Mapping):
            yield Candidate(path, node, inside)
        elif kind is not None:
            yield Section(kind, path, node)
        elif _lists_no_parameters(node):  # what is below `state` are slots, whoever they belong to
            yield Verdict(Candidate(path, {}), None, "an optimizer whose param groups do not list their parameters")
        elif (reason := why_no_model(path, node)) is not None:
            yield Verdict(Candidate(path, {}), None, reason)
        else:
            if loose_weights(node) and not inside:
                yield Verdict(Candidate(path, {}), None, "weights beside an optimizer: plans move them with it")
            inside = inside or (isinstance(node, Opaque) and as_mapping(node) is None)
            inner = [((*path, key), child, inside) for key, child in children(node)]
            stack.extend(reversed(inner))


def _fields(node: Any) -> Mapping[Any, Any] | None:
    """The entries of a mapping, or the attributes of a pickled object."""
    if isinstance(node, Mapping):
        return node
    if isinstance(node, Opaque) and isinstance(node.state, Mapping):
        return node.state
    return None


def _kind(node: Any) -> Kind | None:
    fields = _fields(node)
    if not fields:
        return None
    if _is_optimizer(fields) or _is_listed_optimizer(fields):
        return "optimizer"
    if _is_scheduler(fields):
        return "scheduler"
    if isinstance(node, Opaque):
        return "model" if "_parameters" in fields and "_modules" in fields and _has_tensors(node) else None
    if _is_shadow_list(fields):
        return "ema"
    if "n_averaged" in fields and could_be_model({key: value for key, value in fields.items() if key != "n_averaged"}):
        return "ema"
    return "model" if could_be_model(fields) else None


def _kind_by_key(path: Path, node: Any) -> Kind | None:
    """The kind of what no structure tells: counters and lists under the key of a scheduler."""
    keys = [key for key in path if not isinstance(key, int)]
    if not isinstance(node, Mapping) or len(keys) > 2 or not keys or not _SCHEDULER.fullmatch(str(keys[-1])):
        return None
    counts = any(type(value) is int for value in node.values())
    plain = all(isinstance(key, str) and not isinstance(value, str) for key, value in node.items())
    return "scheduler" if counts and plain and not any(is_tensor(value) for value in nodes(node)) else None


_SCHEDULER = re.compile(
    r"(lr_?|learning_rate_?|param_)?(sched|scheduler|schedule)s?(_?states?)?(_?dict)?s?(_\d+)?(\.(pt|pth|bin))?",
    re.IGNORECASE,
)


def _is_optimizer(fields: Mapping[Any, Any]) -> bool:
    groups = fields.get("param_groups")
    return (
        as_mapping(fields.get("state")) is not None
        and isinstance(groups, list | tuple)
        and all(isinstance(group, Mapping) and _lists_parameters(group) for group in groups)
    )


def _lists_parameters(group: Mapping[Any, Any]) -> bool:
    """Whether a param group lists its parameters: by key, or as `torch_checkpointing` does by name alone."""
    return isinstance(group.get("params", group.get("param_names")), list | tuple)


def _is_listed_optimizer(fields: Mapping[Any, Any]) -> bool:
    """Fastai's form: `state` lists the slots of each parameter, `hypers` the options of each group."""
    state = fields.get("state")
    return (
        isinstance(state, list)
        and all(isinstance(slots, Mapping) for slots in state)
        and _options_of_groups(fields.get("hypers")) is not None
    )


def _lists_no_parameters(node: Any) -> bool:
    """Whether it is an optimizer's state in an unknown form."""
    fields = _fields(node) or {}
    groups = fields.get("param_groups")
    return (
        as_mapping(fields.get("state")) is not None
        and isinstance(groups, list | tuple)
        and any(isinstance(group, Mapping) for group in groups)
    )


def _options_of_groups(hypers: Any) -> list[Mapping[str, Any]] | None:
    """A list of options, or what fastcore's list `L` holds."""
    if isinstance(hypers, Opaque) and isinstance(hypers.state, Mapping):
        hypers = hypers.state.get("items")
    return hypers if isinstance(hypers, list) and all(isinstance(group, Mapping) for group in hypers) else None


def _keyed(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """A listed optimizer in index form: one group, as the file does not say which parameter is in which.

    The group has the options that all groups have alike.
    """
    groups = _options_of_groups(fields["hypers"]) or [{}]
    alike = {key: value for key, value in groups[0].items() if all(_same(group.get(key), value) for group in groups)}
    state = dict(enumerate(fields["state"]))
    return {"state": state, "param_groups": [{**alike, "params": list(state)}]}


def _same(a: Any, b: Any) -> bool:
    return difference(a, b, aliases=False) is None


def _is_shadow_list(fields: Mapping[Any, Any]) -> bool:
    shadow = fields.get("shadow_params")
    return "decay" in fields and isinstance(shadow, list) and bool(shadow) and all(map(is_tensor, shadow))


def _is_scheduler(fields: Mapping[Any, Any]) -> bool:
    if "_schedulers" in fields or {"last_step", "base_values"} <= fields.keys():  # the latter is mmengine's
        return True
    if {"base_values", "param_group_field"} <= fields.keys():  # timm's
        return True
    if "last_epoch" not in fields:
        return False
    return bool(fields.keys() & {"base_lrs", "_last_lr", "_step_count", "num_bad_epochs"})


def _module_tensors(module: Opaque, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The parameters and buffers of a pickled `nn.Module`, named as `named_parameters` names them."""
    fields = _fields(module) or {}
    for attribute in ("_parameters", "_buffers"):
        for name, value in (as_mapping(fields.get(attribute)) or {}).items():
            if is_tensor(value):
                yield prefix + str(name), value
    for name, child in (as_mapping(fields.get("_modules")) or {}).items():
        if isinstance(child, Opaque) and depth < 100:
            yield from _module_tensors(child, f"{prefix}{name}.", depth + 1)


def _has_tensors(module: Opaque) -> bool:
    return next(_module_tensors(module), None) is not None


def parameter_labels(tree: Any) -> dict[Path, str]:
    """For optimizers with names: the path of each parameter's entry in `state` to that name."""
    labels: dict[Path, str] = {}
    for section in find_sections(tree):
        if section.kind == "optimizer" and isinstance(section.node, Mapping):
            for key, name, _ in section.optimizer().parameters():
                if name is not None and isinstance(key, int):
                    labels[(*section.path, "state", key)] = name
    return labels


def scheduler_name(node: Any) -> str:
    """The class of a pickled scheduler, or a guess from the entries of its state."""
    if isinstance(node, Opaque):
        return node.type.qualname
    for name, marks in _SCHEDULER_MARKS:
        if marks <= node.keys():
            return name
    return "LRScheduler" if _is_scheduler(node) else UNRECOGNISED


_SCHEDULER_MARKS: Sequence[tuple[str, set[str]]] = (
    ("SequentialLR", {"_schedulers", "_milestones"}),
    ("ChainedScheduler", {"_schedulers"}),
    ("ReduceLROnPlateau", {"num_bad_epochs", "best"}),
    ("OneCycleLR", {"total_steps", "_schedule_phases"}),
    ("CyclicLR", {"max_lrs", "total_size"}),
    ("CosineAnnealingWarmRestarts", {"T_0", "T_mult"}),
    ("CosineAnnealingLR", {"T_max", "eta_min"}),
    ("SWALR", {"anneal_epochs", "swa_lrs"}),
    ("SWALR", {"anneal_epochs"}),
    ("MultiStepLR", {"milestones", "gamma"}),
    ("StepLR", {"step_size", "gamma"}),
    ("PolynomialLR", {"total_iters", "power"}),
    ("LinearLR", {"start_factor", "end_factor"}),
    ("ConstantLR", {"factor", "total_iters"}),
    ("ExponentialLR", {"gamma"}),
    ("LambdaLR or MultiplicativeLR", {"lr_lambdas"}),
)
