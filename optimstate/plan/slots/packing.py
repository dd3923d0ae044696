"""To and from the slots of bitsandbytes' optimizers, whose 8-bit codes have names of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.plan.expressions.evaluate import number_of
from optimstate.plan.slots import quantized
from optimstate.plan.slots.counterparts import Convert, Found, counterpart, scalar_like
from optimstate.state.optimizer import OptimizerState, Slots

__all__ = ["CODED", "packed_again", "unchanged", "unpacked"]

_CODED_SLOTS = {"exp_avg": "state1", "exp_avg_sq": "state2"}
CODED = {f"{part}{name[-1]}": slot for slot, name in _CODED_SLOTS.items() for part in ("state", "qmap", "absmax")}
"""The moment that each slot of bitsandbytes' codes a part of."""


def unchanged(name: str) -> Found:
    """Slots that optimizers of the same algorithm store alike; they are kept."""
    kept = ("exp_avg",) if name == "Lion" else ("step", *_CODED_SLOTS)
    return [(slot, "exact", "") for slot in kept], lambda old, _: dict(old)


def unpacked(state: OptimizerState, goal: str, *, packed: bool) -> Found | None:
    """From bitsandbytes' slots; codes are kept where the result is bitsandbytes' too, with the same moments."""
    family = _coded_family(state)
    if family is None:
        return None
    same = goal == family or (family == "AdamW" and goal == "Adam")
    if same and packed:
        return unchanged(family)[0], lambda old, _: quantized.unnested(old)
    inner = unchanged(family) if same else counterpart(family, goal)
    if inner is None:
        return None
    report, convert = inner
    if any("qmap2" in quantized.unnested(slots) for slots in state.state.values()):
        zeros = "as its codes say: 0 where it was far below its block's greatest, where first updates can be large"
        report = [
            (*line[:2], "; ".join(filter(None, (line[2], zeros))), *line[3:]) if line[0] == "exp_avg_sq" else line
            for line in report
        ]

    def converting(old: Slots, options: Mapping[str, Any]) -> dict[str, Any]:
        own = quantized.unnested(old)
        made = {slot: quantized.decoded(own, name[-1]) for slot, name in _CODED_SLOTS.items() if name in own}
        step = {} if family == "Lion" else {"step": scalar_like(made["exp_avg"], float(number_of(own["step"])))}
        return convert({**step, **made}, options)

    return report, converting


def _coded_family(state: OptimizerState) -> str | None:
    """Whose moments bitsandbytes' slots hold: Lion's, or those of Adam and AdamW, which keep the same; else None."""
    first: Mapping[str, Any] = next((quantized.unnested(slots) for slots in state.state.values()), {})
    options = state.groups[0].options
    betas = options["betas"]
    if "unorm_vec" in first or len(betas) != 2 or options.get("alpha"):  # LAMB, LARS, AdEMAMix
        return None
    if "state2" in first:
        return "AdamW"
    return "Lion" if all(betas) and not options.get("eps") else None


def packed_again(report: Sequence[tuple[str, ...]], convert: Convert, *, bits: int, old: set[str]) -> Found:
    """To bitsandbytes' slots: in codes of 8 bits, or in 32. What an 8-bit optimizer of its own has, stays as it is."""
    lines: list[tuple[str, ...]] = []
    stays = bits == 8 and "qmap1" in old
    for slot, outcome, reason, *heir in report:
        if bits == 8 and slot in _CODED_SLOTS and outcome != "dropped" and not (stays and outcome == "exact"):
            bound = quantized.error_bound(signed=slot == "exp_avg")
            loss = f"in codes of 8 bits, within {bound:.2%} of the greatest of each {quantized.BLOCK} neighbours"
            lines.append((slot, "approximate", "; ".join(filter(None, (reason, loss)))))
        else:
            lines.append((slot, outcome, reason, *heir))
    if "max_exp_avg_sq" in old:
        lines.append(("max_exp_avg_sq", "dropped", "bitsandbytes has no AMSGrad"))

    def packing(slots: Slots, options: Mapping[str, Any]) -> dict[str, Any]:
        found = convert(slots, options)
        made: dict[str, Any] = {"step": int(number_of(found["step"])) if "step" in found else 0}
        for slot, name in _CODED_SLOTS.items():
            number = name[-1]
            if stays and name in found:
                made.update({key: found[key] for key in (name, f"qmap{number}", f"absmax{number}") if key in found})
            elif name in found or slot in found:
                value = quantized.decoded(found, number) if name in found else found[slot]
                made.update(quantized.coded(value, number, signed=slot == "exp_avg") if bits == 8 else {name: value})
        return quantized.written(made)

    return lines, packing
