"""Finding the sections of a checkpoint by structure: optimizers, models, schedulers, averaged models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, LimitExceededError, MigrationError, UsageError
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.arrays import is_array, why_no_model
from optimstate.state.flattened import FlatState, find_flat_state
from optimstate.state.judging import Candidate, Verdict, called_scheduler, could_be_model, judge
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
    "scheduler_name",
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
        kind: Its kind. An `ema` is the state of a `torch.optim.swa_utils.AveragedModel` (`n_averaged` and `module.*`),
            a state that has `shadow_params` by position (torch_ema), or the copy of a model that a callback keeps.
        path: Its path in the tree.
        node: The mapping or pickled object; for flattened optimizer state its nested form, which is not in the tree
            (see `with_hosts`).
        host: The mapping in the tree, if the section is only a part of it; else None.
    """

    kind: Kind
    path: Path
    node: Any
    host: FlatState | None = None

    @property
    def in_tree(self) -> Any:
        """The node of the tree that is this section, or contains it."""
        return self.node if self.host is None else self.host.host

    @property
    def positional(self) -> bool:
        """Whether its parameters are a list in the model's order, without room for names."""
        fields = _fields(self.node) or {}
        return _is_shadow_list(fields) if self.kind == "ema" else _is_listed_optimizer(fields)

    @property
    def label(self) -> str:
        """The path as text."""
        return format_path(self.path)

    def optimizer(self) -> OptimizerState:
        """The optimizer's state; only for sections of that kind.

        Raises:
            CorruptCheckpointError: The state is inconsistent.
        """
        fields = _fields(self.node)
        assert self.kind == "optimizer"
        assert fields is not None
        try:
            return OptimizerState.from_node(_keyed(fields) if _is_listed_optimizer(fields) else fields)
        except CorruptCheckpointError as error:
            raise error.within(part=f"optimizer at {self.label}") from error.__cause__

    def tensors(self) -> dict[str, Any]:
        """The tensors by name, in order, without other values; only for models and EMAs."""
        if isinstance(self.node, Opaque):
            return dict(_module_tensors(self.node))
        if self.positional:
            return {str(index): value for index, value in enumerate(self.node["shadow_params"])}
        return {name: value for name, value in self.node.items() if is_tensor(value) and isinstance(name, str)}


class Judgement(Record):
    """The sections of a checkpoint, and the parts that are none.

    Attributes:
        sections: The sections, in order.
        others: Mappings of names to tensors that are not models: their paths, each with the reason.
    """

    sections: tuple[Section, ...]
    others: Mapping[Path, str]


def find_sections(tree: Any) -> list[Section]:
    """Every section of a checkpoint, in order. Sections do not nest; a node that occurs twice is listed once."""
    return list(judged(tree).sections)


def judged(tree: Any) -> Judgement:
    """Every section of a checkpoint and the mappings that are none, judged on the whole tree."""
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
    except CorruptCheckpointError:  # reported where the optimizer itself is read
        return OptimizerState((), {})


def _parts(candidate: Candidate) -> list[Section | Candidate]:
    """A mapping of names to tensors, split into a model and an optimizer if it holds both."""
    flat = find_flat_state(candidate.node)
    if flat is None or candidate.inside:
        return [candidate]
    model = Candidate(candidate.path, flat.rest, host=flat)
    optimizer = Section("optimizer", candidate.path, flat.optimizer, flat)
    return [model, optimizer] if could_be_model(flat.rest) else [optimizer]


def with_hosts(sections: Sequence[Section], made: Mapping[int, Any], *, alone: bool = False) -> dict[int, Any]:
    """Replacements for nodes of the tree, where sections that are parts of one mapping are joined again.

    Args:
        sections: The sections that were found in the tree.
        made: The replacement of each section's node, by the id of the node.
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
    """The section with a path or of a kind; else the mapping of names to tensors at that path.

    Args:
        name: A kind, or a path as it is shown (`callbacks['EMA']['weights']`) or with dots (`callbacks.EMA.weights`).
        tree: The checkpoint.
        sections: The sections that were found in it.

    Raises:
        MigrationError: There is no section of that kind, or there are several.
        UsageError: `name` is neither a kind nor a path in this checkpoint.
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
        if is_tensor(node):  # its record may hold objects
            continue
        if len(path) > MAX_DEPTH:
            raise LimitExceededError(f"containers nested more than {MAX_DEPTH} deep")
        seen.add(id(node))
        kind = _kind(node) or _kind_by_key(path, node)
        if kind == "model" and isinstance(node, Mapping):
            yield Candidate(path, node, inside)
        elif kind is not None:
            yield Section(kind, path, node)
        elif _lists_no_parameters(node):  # its state holds slots, so it is not searched for models
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
    if not isinstance(node, Mapping) or len(keys) > 2 or not called_scheduler(path):
        return None
    counts = any(type(value) is int for value in node.values())
    plain = all(isinstance(key, str) and not isinstance(value, str) for key, value in node.items())
    return "scheduler" if counts and plain and not any(is_tensor(value) for value in nodes(node)) else None


def _is_optimizer(fields: Mapping[Any, Any]) -> bool:
    groups = _groups_beside_state(fields)
    return groups is not None and all(isinstance(group, Mapping) and _lists_parameters(group) for group in groups)


def _groups_beside_state(fields: Mapping[Any, Any]) -> Sequence[Any] | None:
    """The param groups of a mapping that also has `state`; else None."""
    groups = fields.get("param_groups")
    return groups if as_mapping(fields.get("state")) is not None and isinstance(groups, list | tuple) else None


def _lists_parameters(group: Mapping[Any, Any]) -> bool:
    """Whether a param group lists its parameters: by key, or only by name as `torch_checkpointing` does."""
    return isinstance(group.get("params", group.get("param_names")), list | tuple)


def _is_listed_optimizer(fields: Mapping[Any, Any]) -> bool:
    """Whether this has fastai's form: `state` lists the slots of each parameter, `hypers` the options of each group."""
    state = fields.get("state")
    return (
        isinstance(state, list)
        and all(isinstance(slots, Mapping) for slots in state)
        and _options_of_groups(fields.get("hypers")) is not None
    )


def _lists_no_parameters(node: Any) -> bool:
    """Whether a node is an optimizer's state whose param groups do not list their parameters."""
    return any(isinstance(group, Mapping) for group in _groups_beside_state(_fields(node) or {}) or ())


def _options_of_groups(hypers: Any) -> list[Mapping[str, Any]] | None:
    """The options of each group from a list, or from fastcore's list `L`; None for any other node."""
    if isinstance(hypers, Opaque) and isinstance(hypers.state, Mapping):
        hypers = hypers.state.get("items")
    return hypers if isinstance(hypers, list) and all(isinstance(group, Mapping) for group in hypers) else None


def _keyed(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """A listed optimizer in index form, with one group, because the file does not say which parameter is in which.

    The group has the options that are the same in all groups.
    """
    groups = _options_of_groups(fields["hypers"]) or [{}]
    common = {
        key: value
        for key, value in groups[0].items()
        if all(difference(group.get(key), value, aliases=False) is None for group in groups)
    }
    state = dict(enumerate(fields["state"]))
    return {"state": state, "param_groups": [{**common, "params": list(state)}]}


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
    """For optimizers with names: the name of each parameter, by the path of its entry in `state`."""
    labels: dict[Path, str] = {}
    for section in find_sections(tree):
        if section.kind == "optimizer" and isinstance(section.node, Mapping):
            for key, name, _ in section.optimizer().parameters():
                if name is not None and isinstance(key, int):
                    labels[(*section.path, "state", key)] = name
    return labels


def scheduler_name(node: Any) -> str:
    """The class of a pickled scheduler, or the class that its state's keys suggest."""
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
