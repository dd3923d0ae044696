"""How known trainers divide parameters among param groups, which excludes groups for each parameter."""

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
    """Which trainer wrote a checkpoint, if its param groups follow a rule known here."""
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
    """The candidates that a known rule for param groups excludes from each group.

    Args:
        trainer: Whose rule.
        state: The optimizer.
        candidates: The model's parameters, in its order where that counts.
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
    """Two groups, those with and without weight decay.

    Biases and norms do not decay. A module's class, which counts too, does not show in a name, so that of other vectors
    nothing is said; matrices decay.
    """
    if len(state.groups) != 2 or state.groups[1].options.get("weight_decay") != 0.0:
        return {}
    rest = {i for i, candidate in enumerate(candidates) if _REST.search(candidate.name.lower())}
    decaying = {i for i, c in enumerate(candidates) if i not in rest and c.shape is not None and len(c.shape) > 1}
    return {0: frozenset(rest), 1: frozenset(decaying)}


# --- mmengine ---------------------------------------------------------------------------------------------------------


def _one_each(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """With `paramwise_cfg` a group for each parameter, in the model's order."""
    count = len(candidates)
    if len(state.groups) != count or any(len(group.params) != 1 for group in state.groups):
        return {}
    return {place: frozenset(range(count)) - {place} for place in range(count)}


# --- timm -------------------------------------------------------------------------------------------------------------


def _vectors_rest(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """Vectors and biases do not decay; which others a model exempts is not known here."""
    if not any(_decays(group.options) for group in state.groups) or all(_decays(g.options) for g in state.groups):
        return {}
    vectors = frozenset(i for i, c in enumerate(candidates) if _is_vector(c))
    return {number: vectors for number, group in enumerate(state.groups) if _decays(group.options)}


def _by_layer(state: OptimizerState, candidates: Sequence[Candidate]) -> dict[int, frozenset[int]]:
    """Layer decay: groups with the same `lr_scale` are one layer, and layers are in the order of the model."""
    sizes: dict[float, int] = {}
    for group in state.groups:
        scale = group.options["lr_scale"]
        if not isinstance(scale, int | float):
            return {}
        sizes[scale] = sizes.get(scale, 0) + len(group.params)
    if sum(sizes.values()) != len(candidates):  # frozen parameters: which layer lacks them is not known
        return {}
    bounds = list(accumulate((sizes[scale] for scale in sorted(sizes)), initial=0))
    layers = dict(zip(sorted(sizes), map(range, bounds, bounds[1:]), strict=True))
    if any(not _are_of_one_layer(block, layers.values()) for block in _blocks(candidates)):
        return {}
    every = frozenset(range(len(candidates)))
    by_decay = _vectors_rest(state, candidates)
    return {
        number: every.difference(layers[group.options["lr_scale"]]) | by_decay.get(number, frozenset())
        for number, group in enumerate(state.groups)
    }


_NUMBERED = re.compile(r"(.*\.\d+)\.")


def _blocks(candidates: Sequence[Candidate]) -> Iterator[set[int]]:
    """The positions of the parameters of each numbered module."""
    found: dict[str, set[int]] = {}
    for place, candidate in enumerate(candidates):
        if block := _NUMBERED.match(candidate.name):
            found.setdefault(block[1], set()).add(place)
    yield from found.values()


def _are_of_one_layer(block: set[int], layers: Any) -> bool:
    return any(block <= set(layer) for layer in layers)


def _decays(options: Mapping[str, Any]) -> bool:
    return bool(options.get("weight_decay"))


def _is_vector(candidate: Candidate) -> bool:
    return candidate.name.endswith(".bias") or (candidate.shape is not None and len(candidate.shape) <= 1)
