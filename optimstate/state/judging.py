"""Which mappings of names to tensors are models, judged on the whole checkpoint.

Metrics, normalizers and the best scores of a callback are mappings of names to tensors too. Each such mapping is a
candidate. The evidence for and against each is scored, and the candidates are judged together.
`docs/checkpoints.md` describes the evidence for users.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from optimstate.describe import describe
from optimstate.record import Record
from optimstate.state.names import wrapper_prefix
from optimstate.state.optimizer import OptimizerState
from optimstate.state.records import is_tensor
from optimstate.tensors.dtypes import INEXACT
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, Path, nodes

__all__ = [
    "LEAVES",
    "MOMENTS",
    "Candidate",
    "Verdict",
    "called_optimizer",
    "called_scheduler",
    "could_be_model",
    "could_be_moments",
    "judge",
    "slot_in",
]

MOMENTS = "by its key and the names and shapes of a model, state of an optimizer whose form is not known"
"""The reason for which a mapping that looks like a copy of a model is not one."""

_SAMPLE = 512  # the number of names that are examined

# Keys below which nothing is a model, whatever it looks like, and keys below which a model is unlikely.
_NEVER_BELOW = {"callbacks", "loops", "hyper_parameters", "hparams", "datamodule_hyper_parameters"}
_SELDOM_BELOW = {"args", "config", "cfg", "metrics", "stats", "rng_state", "rng_states", "history", "results"}

_CALLED_MODEL = re.compile(
    r"(?<![a-z])(model|models|module|net|nets|network|networks|state_dict|params|parameters|weights?|policy|actor|"
    r"critic|generator|discriminator|encoder|decoder|backbone|head|ema|teacher|student|shadow|adapter|lora|classifier|"
    r"embedding|embedder|unet|vae|target)(?![a-z])"
)
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".safetensors", ".safetensors.index.json")
_OPTIMIZER = re.compile(r"(last_)?(opt|optim|optimizers?)(_?states?)?(_dict)?s?", re.IGNORECASE)
_SCHEDULER = re.compile(
    r"(lr_?|learning_rate_?|param_)?(sched|scheduler|schedule)s?(_?states?)?(_?dict)?s?(_\d+)?(\.(pt|pth|bin))?",
    re.IGNORECASE,
)
LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight", "in_proj_bias"}
LEAVES |= {"kernel", "scale", "embedding"}  # of flax
_SLOTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta"}
# What programs call the state that they keep for all parameters, where it has the names and shapes of a model.
_MOMENTS = re.compile(
    r"((adam|adamw|nadam|radam|lion|sgd|rms|rmsprop|opt|optim|optimizer)_?)?(m|v|mu|nu)|"
    r"([a-z]+_)?(moments?|momentums?|momenta|momentum_buffers?|velocity|velocities|exp_avgs?|exp_avg_sqs?|square_avgs?)",
    re.IGNORECASE,
)
_STATISTICS = {"mean", "std", "var", "min", "max", "count", "sum", "median", "q01", "q99"}


class Candidate(Record):
    """A mapping of names to tensors.

    Attributes:
        path: Its path in the tree.
        node: The mapping.
        inside: Whether it belongs to a pickled object.
        host: The mapping in the file, if the candidate is only a part of it; else None.
    """

    path: Path
    node: Mapping[str, Any]
    inside: bool = False
    host: Any = None


class Verdict(Record):
    """The verdict on a candidate.

    Attributes:
        candidate: The candidate.
        kind: `model`, `ema` for the copy of a model that a callback keeps, or None for neither.
        reason: Why it is neither; else empty.
    """

    candidate: Candidate
    kind: str | None
    reason: str = ""


def could_be_model(fields: Mapping[Any, Any]) -> bool:
    """Whether a mapping has names of tensors, at least one of them floating-point, and few other values."""
    count = others = of_modules = dotted = 0
    floating = containers = False
    for name, value in fields.items():
        if not isinstance(name, str):
            return False
        if type(value) is LazyTensor or is_tensor(value):
            count += 1
            dotted += "." in name
            floating = floating or not isinstance(value, LazyTensor) or value.dtype.startswith(INEXACT)
        elif ".param_groups." in f".{name}":
            continue  # of flattened param groups, see `flattened`
        elif not (value is None or name.rpartition(".")[2].startswith("_extra_state")):
            if not _is_carried(name, value):
                if any(is_tensor(node) for node in nodes(value)):
                    return False
                containers = True
            of_modules += "." in name  # by its name the value of a module, which counts less
            others += "." not in name
    by_name = 2 * dotted > count  # else a mapping with containers is a whole checkpoint that has a tensor in it
    if containers and not by_name:
        return False
    return floating and others < (4 if by_name else 1) * count and of_modules <= 4 * count


def _is_carried(name: str, value: Any) -> bool:
    """Whether a value that is not a tensor can be part of a model's state: a number, a text, packed weights."""
    if isinstance(value, Mapping | Opaque):
        dotted = "." in name or isinstance(value, Opaque)
        return dotted and not any(is_tensor(node) for node in nodes(value))
    if isinstance(value, list | tuple):
        return all(is_tensor(item) or not isinstance(item, Mapping | Opaque) for item in value)
    return True


def slot_in(path: Path) -> str | None:
    """The optimizer slot that a key of a tensor's path names; None if no key does."""
    for key in reversed(path):
        if not isinstance(key, str):
            continue
        if key in _SLOTS:
            return key
        if "." in key or "/" in key:
            parts = key.replace("/", ".").split(".")
            if not _SLOTS.isdisjoint(parts):
                return next(part for part in reversed(parts) if part in _SLOTS)
    return None


def called_optimizer(path: Path) -> Path | None:
    """The path up to the first key that is a usual name of an optimizer; None if there is none."""
    for depth, key in enumerate(path, 1):
        if isinstance(key, str) and _OPTIMIZER.fullmatch(key):
            return path[:depth]
    return None


def called_scheduler(path: Path) -> bool:
    """Whether the last key of a path, apart from places in lists, is a usual name of a scheduler."""
    keys = [key for key in path if not isinstance(key, int)]
    return bool(keys) and _SCHEDULER.fullmatch(str(keys[-1])) is not None


def judge(candidates: Sequence[Candidate], optimizers: Iterable[OptimizerState]) -> list[Verdict]:
    """The verdict on each candidate of a checkpoint, in order."""
    if not candidates:
        return []
    states = list(optimizers) if len(candidates) > 1 else []
    evidence = [_Evidence(candidate) for candidate in candidates]
    agreed = [any(_agrees(one.candidate.node, state) for state in states) for one in evidence]
    scores = [one.score + 3 * agrees for one, agrees in zip(evidence, agreed, strict=True)]
    possible = [score for one, score in zip(evidence, scores, strict=True) if not one.never]
    best = max(possible, default=0)
    least = 1 if best < 5 else 5 if any(agreed) else 3
    models = [
        one.candidate
        for one, score in zip(evidence, scores, strict=True)
        if not one.never and score >= min(least, best) and score > 0
    ]
    moments = _moments_among(candidates, models)
    models = [model for model in models if id(model) not in moments]
    shapes: list[dict[str, Any]] = []
    verdicts = []
    for one, score in zip(evidence, scores, strict=True):
        if id(one.candidate) in moments:
            verdicts.append(Verdict(one.candidate, None, MOMENTS))
            continue
        if any(one.candidate.node is model.node for model in models):
            verdicts.append(Verdict(one.candidate, "model"))
            continue
        shapes = shapes or [_shapes(model.node) for model in models]
        if len(one.candidate.node) > 1 and not one.candidate.inside and _shapes(one.candidate.node) in shapes:
            # The names and shapes of a model: a copy of its weights, which must be changed together with it.
            verdicts.append(Verdict(one.candidate, "ema" if one.never else "model"))
            continue
        against = one.never or one.against or ("less like a model than another mapping" if score > 0 else "")
        verdicts.append(Verdict(one.candidate, None, against or "nothing speaks for a model"))
    return verdicts


def could_be_moments(path: Path) -> bool:
    """Whether programs call optimizer state so that they keep for all parameters."""
    return bool(path) and _MOMENTS.fullmatch(str(path[-1])) is not None


def _moments_among(candidates: Sequence[Candidate], models: Sequence[Candidate]) -> set[int]:
    """The candidates that are called moments and have the names and shapes of a model that is called otherwise."""
    called = [one for one in candidates if not one.inside and could_be_moments(one.path)]
    if not called:
        return set()
    shapes = [_shapes(model.node) for model in models if not could_be_moments(model.path)]
    return {id(one) for one in called if len(one.node) > 1 and _shapes(one.node) in shapes}


class _Evidence:
    """The evidence for and against a candidate.

    Attributes:
        never: Why it cannot be a model, whatever else is true; empty if it can. Otherwise there is no score.
        against: The reasons against it, as text.
        score: Points for minus points against.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.score = 0
        self.against = ""
        reasons: list[str] = []
        keys = tuple(map(str, candidate.path))
        self.never = _why_never(keys[:-1], keys[-1:]) or ("inside a pickled object" if candidate.inside else "")
        if self.never:
            return
        for key in sorted(_SELDOM_BELOW.intersection(keys)):
            self.score -= 3
            reasons.append(f"below {describe(key)}")
        for points, reason in (*self._names(), *self._shapes(), *self._key()):
            self.score += points
            if points < 0:
                reasons.append(reason)
        self.against = ", ".join(reasons)

    def _names(self) -> Iterator[tuple[int, str]]:
        names = list(islice((name for name, value in self.candidate.node.items() if is_tensor(value)), _SAMPLE))
        leaves = [name.rpartition(".")[2] for name in names]
        half = len(names) / 2
        paths = sum("/" in name or "\\" in name or name.endswith(_FILES) for name in names)
        if paths > half:
            yield -6, "its keys are paths"
        elif sum("." in name for name in names) > half:
            yield 2, ""
        if sum(leaf in LEAVES for leaf in leaves) >= half:
            yield 3, ""
        if sum(leaf in _SLOTS for leaf in leaves) > half:
            yield -6, "its names are those of an optimizer's state"
        if sum(leaf in _STATISTICS for leaf in leaves) > half:
            yield -3, "its names are those of statistics"

    def _shapes(self) -> Iterator[tuple[int, str]]:
        most = 0
        for value in self.candidate.node.values():
            if is_tensor(value):
                most = max(most, len(value.shape) if isinstance(value, LazyTensor) else 2)
                if most >= 2:
                    break
        if most == 0:
            yield -6, "its tensors are single numbers"
        else:
            yield most, ""

    def _key(self) -> Iterator[tuple[int, str]]:
        key = str(self.candidate.path[-1]) if self.candidate.path else ""
        if not key or key.endswith(_FILES):
            yield 3, ""  # it is a whole file
        if _CALLED_MODEL.search(key.lower()):
            yield 2, ""


def _why_never(above: tuple[str, ...], last: tuple[str, ...]) -> str:
    """Why a mapping at a path cannot be a model, whatever else is true; empty if it can."""
    place, slot, optimizer = _known_above(above)
    place = max(filter(None, (place, *_NEVER_BELOW.intersection(last))), default="")
    if place:
        return f"below {describe(place)}"
    slot = slot_in(last) or slot
    if slot is not None:
        return f"by its key, {describe(slot)} of an optimizer whose form is not known"
    return f"below {describe(optimizer[-1])}, whose form is not known" if optimizer else ""


@lru_cache(maxsize=64)  # a checkpoint may have such a mapping for each parameter
def _known_above(keys: tuple[str, ...]) -> tuple[str, str | None, Path | None]:
    """A key below which nothing is a model, a slot and the path to an optimizer, if the keys name them."""
    return max(_NEVER_BELOW.intersection(keys), default=""), slot_in(keys), called_optimizer(keys)


def _shapes(node: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.shape if isinstance(value, LazyTensor) else None for name, value in node.items() if is_tensor(value)
    }


def _agrees(node: Mapping[str, Any], state: OptimizerState) -> bool:
    """Whether an optimizer's parameters can be the tensors of a mapping, by their names or, without names, shapes."""
    names = [name for _, name, _ in state.parameters() if name is not None]
    if names:
        wrapper = wrapper_prefix(node)
        known = {name.removeprefix(wrapper) for name in node}
        prefix = wrapper_prefix(names)
        return 2 * sum(name.removeprefix(prefix) in known for name in names) > len(names)
    wanted: Counter[tuple[int, ...]] = Counter()
    for _, _, slots in state.parameters():
        shapes = [v.shape for v in (slots or {}).values() if isinstance(v, LazyTensor) and v.shape]
        wanted.update(shapes[:1])
    there = Counter(value.shape for value in node.values() if isinstance(value, LazyTensor))
    return bool(wanted) and not wanted - there
