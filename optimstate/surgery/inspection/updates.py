"""The next step of an optimizer, computed from its state: of each element, and relative to the weight.

For Adam and AdamW: lr * m / (sqrt(v) + eps), with the moments corrected for their start as torch corrects them, and
without weight decay. The next step's gradient is not known: this is the step that the state alone makes.
Source: Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.formats.protocol import Document
from optimstate.record import Record
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.surgery.shown import plain
from optimstate.surgery.slot_counts import algorithm_of
from optimstate.surgery.statistics import Statistics, blocks, is_measurable, of_block
from optimstate.tensors.lazy import LazyTensor

__all__ = ["BINS", "LEAST", "PER_DECADE", "Histogram", "Update", "updates"]

LEAST, PER_DECADE, BINS = -24, 2, 56
"""Histograms count magnitudes in halves of a decade, from 1e-24 to 1e4; smaller and larger ones in the outermost."""

ADAM = frozenset({"Adam", "AdamW", "Adam or AdamW"})


class Histogram(Record):
    """How many elements have which magnitude.

    Attributes:
        counts: `BINS` of them, the first of magnitudes from 10**LEAST.
        zeros: Elements that are zero.
    """

    counts: tuple[int, ...] = (0,) * BINS
    zeros: int = 0

    def __add__(self, other: Histogram) -> Histogram:
        """The statistics of the elements of both together."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(counts, self.zeros + other.zeros)


class Update(Record):
    """One parameter's moments and the step that they make.

    Attributes:
        section: The path of its optimizer.
        key: What its state is keyed by.
        name: Its name, or None.
        histograms: Of `exp_avg`, `exp_avg_sq` and `effective step`.
        step: The statistics of the effective step; None where the algorithm is not Adam's.
        ratio: The norm of the effective step over that of the weight; None where the weight is not in the checkpoint.
    """

    section: str
    key: str
    name: str | None
    histograms: Mapping[str, Histogram]
    step: Statistics | None = None
    ratio: float | None = None


def updates(document: Document) -> Iterator[Update]:
    """Every parameter of every optimizer whose moments are tensors of numbers. Imports torch; in constant memory.

    Args:
        document: A checkpoint that was opened.
    """
    sections = find_sections(document.tree)
    weights: dict[str, Any] = {}
    for section in sections:
        if section.kind == "model":
            weights = section.tensors() | weights
    for section in sections:
        if section.kind == "optimizer":
            yield from _section(section, section.optimizer(), weights)


def _section(section: Section, state: OptimizerState, weights: Mapping[str, Any]) -> Iterator[Update]:
    algorithm = algorithm_of({slot for slots in state.state.values() for slot in slots}, state)
    is_adam = algorithm is not None and algorithm.name in ADAM
    options = {key: group.options for group in state.groups for key in group.params}
    for key, name, slots in state.parameters():
        moments = {slot: value for slot, value in (slots or {}).items() if is_measurable(value) and value.numel > 1}
        if not moments or slots is None:
            continue
        weight = weights.get(name) if name is not None else None
        step = _Step(options[key], slots) if is_adam else None
        yield _update(
            section.label, str(key), name, moments, step if step is not None and step.is_known else None, weight
        )


def _update(
    section: str, key: str, name: str | None, moments: Mapping[str, LazyTensor], step: _Step | None, weight: Any
) -> Update:
    found = {}
    for slot, value in moments.items():
        found[slot] = sum((_histogram(block) for block in blocks(value)), Histogram())
    if step is None:
        return Update(section, key, name, found)
    total, shape = Statistics(), Histogram()
    second = moments.get("max_exp_avg_sq", moments["exp_avg_sq"])
    for m, v in zip(blocks(moments["exp_avg"]), blocks(second), strict=True):
        block = step.of(m, v)
        total, shape = total + of_block(block), shape + _histogram(block)
    ratio = None
    if is_measurable(weight) and weight.shape == moments["exp_avg"].shape and total.norm is not None:
        norm = math.sqrt(sum(float(block.abs().square().sum()) for block in blocks(weight)))
        ratio = total.norm / norm if norm and math.isfinite(norm) else None
    return Update(section, key, name, {**found, "effective step": shape}, total, ratio)


class _Step:
    """Adam's step from a group's options and a parameter's slots."""

    def __init__(self, options: Mapping[Any, Any], slots: Mapping[Any, Any]) -> None:
        lr, betas, eps, step = (
            plain(value) for value in (*map(options.get, ("lr", "betas", "eps")), slots.get("step"))
        )
        moments = [slots.get("exp_avg"), slots.get("exp_avg_sq")]
        self.is_known = (
            all(isinstance(number, int | float) for number in (lr, eps, step))
            and isinstance(betas, list | tuple)
            and len(betas) == 2
            and all(map(is_measurable, moments))
            and moments[0].shape == moments[1].shape  # type: ignore[union-attr]
            and step > 0
        )
        if self.is_known:
            self.lr, self.eps = lr, eps
            self.first, self.second = (1 - beta**step for beta in betas)

    def of(self, m: Any, v: Any) -> Any:
        """The step of a block of elements."""
        if not m.is_complex():
            return self.lr * (m / self.first) / ((v / self.second).sqrt() + self.eps)
        from optimstate.installed_torch import torch

        # Adam takes the two parts of a complex number as two numbers.
        return torch.view_as_complex(self.of(torch.view_as_real(m), torch.view_as_real(v)).contiguous())


def _histogram(block: Any) -> Histogram:
    from optimstate.installed_torch import torch

    size = (block.abs() if block.is_complex() else block).abs()
    some = size[(size > 0) & size.isfinite()]
    top = LEAST + BINS / PER_DECADE
    counts = torch.histc(some.log10().clamp(LEAST, top), bins=BINS, min=LEAST, max=top)
    return Histogram(tuple(map(int, counts.tolist())), block.numel() - int(torch.count_nonzero(block)))
