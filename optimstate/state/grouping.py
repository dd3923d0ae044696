"""The rules by which known trainers divide parameters among param groups, which exclude groups for each parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from optimstate.state.naming import Candidate
from optimstate.state.optimizer import OptimizerState

__all__ = ["Trainer", "excluded_places", "trainer_of"]

Trainer = Literal["transformers", "timm", "mmengine"]


def trainer_of(tree: Any) -> Trainer | None:
    """The trainer that wrote a checkpoint, if the rule of its param groups is known here."""
    if not isinstance(tree, Mapping):
        return None
    if "trainer_state.json" in tree:
        return "transformers"
    for node in (tree, *tree.values()):
        if not isinstance(node, Mapping):
            continue
        meta = node.get("meta")
        if isinstance(meta, Mapping) and "mmengine_version" in meta:
            return "mmengine"
        if node.keys() >= {"arch", "state_dict", "optimizer", "version"}:
            return "timm"
    return None


def excluded_places(
    trainer: Trainer | None, state: OptimizerState, candidates: Sequence[Candidate]
) -> dict[int, frozenset[int]]:
    """The candidates that a trainer's rule excludes from each param group.

    Args:
        trainer: The trainer; None excludes nothing.
        state: The optimizer.
        candidates: The model's parameters, in the model's order.

    Returns:
        For the number of a group, the indices of candidates that it cannot have.
    """
    if trainer == "transformers":
        return _by_decay(state, candidates)
    if trainer == "mmengine":
        return _one_each(state, candidates)
    if trainer == "timm" and all("lr_scale" in group.options for group in state.groups):
        return _by_layer(state, candidates)
    return _vectors_rest(state, candidates) if trainer == "timm" else {}


# --- the Trainer of transformers --------------------------------------------------------------------------------------

_REST = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _by_decay(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """Two groups, with and without weight decay.

    Biases and norms do not decay; matrices do. For other vectors the rule depends on the module's class, which a name
    does not show, so they are excluded from neither.
    """
    if len(state.groups) != 2 or state.groups[1].options.get("weight_decay") != 0.0:
        return {}
    rest = {i for i, candidate in enumerate(candidates) if _REST.search(candidate.name.lower())}
    decaying = {i for i, c in enumerate(candidates) if i not in rest and c.shape is not None and len(c.shape) > 1}
    return {0: frozenset(rest), 1: frozenset(decaying)}


# --- mmengine ---------------------------------------------------------------------------------------------------------


def _one_each(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """With `paramwise_cfg`, one group for each parameter, in the model's order."""
    count = len(candidates)
    if len(state.groups) != count or any(len(group.params) != 1 for group in state.groups):
        return {}
    return {index: frozenset(range(count)) - {index} for index in range(count)}


# --- timm -------------------------------------------------------------------------------------------------------------


def _vectors_rest(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """Vectors and biases do not decay. A model can exempt other parameters, which is not known here."""
    if not any(_decays(group.options) for group in state.groups) or all(_decays(g.options) for g in state.groups):
        return {}
    vectors = frozenset(i for i, c in enumerate(candidates) if _is_vector(c))
    return {number: vectors for number, group in enumerate(state.groups) if _decays(group.options)}


def _by_layer(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """Layer decay: groups with the same `lr_scale` belong to one layer, and layers are in the order of the model."""
    sizes: dict[float, int] = {}
    for group in state.groups:
        scale = group.options["lr_scale"]
        if not isinstance(scale, int | float):
            return {}
        sizes[scale] = sizes.get(scale, 0) + len(group.params)
    if sum(sizes.values()) != len(candidates):  # some parameters are frozen, in layers that are not known
        return {}
    bounds = list(accumulate((sizes[scale] for scale in sorted(sizes)), initial=0))
    layers = dict(zip(sorted(sizes), map(range, bounds, bounds[1:]), strict=True))
    if not all(any(block <= set(layer) for layer in layers.values()) for block in _blocks(candidates)):
        return {}
    every = frozenset(range(len(candidates)))
    by_decay = _vectors_rest(state, candidates)
    return {
        number: every.difference(layers[group.options["lr_scale"]]) | by_decay.get(number, frozenset())
        for number, group in enumerate(state.groups)
    }


_NUMBERED = re.compile(r"(.*\.\d+)\.")


def _blocks(candidates: Sequence[Candidate]) -> Iterator[set[int]]:
    """The indices of the parameters of each numbered module."""
    found: dict[str, set[int]] = {}
    for index, candidate in enumerate(candidates):
        if block := _NUMBERED.match(candidate.name):
            found.setdefault(block[1], set()).add(index)
    yield from found.values()


def _decays(options: Mapping[str, Any]) -> bool:
    return bool(options.get("weight_decay"))


def _is_vector(candidate: Candidate) -> bool:
    return candidate.name.endswith(".bias") or (candidate.shape is not None and len(candidate.shape) <= 1)
