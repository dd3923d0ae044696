"""Which slots of one algorithm correspond to which of another, as far as they have a meaning there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimstate.plan.expressions.evaluate import backend_of, copied, number_of, shape_of
from optimstate.state.optimizer import Slots

__all__ = ["ADAMS", "Convert", "Found", "counterpart", "scalar_like"]

Convert = Callable[[Slots, Mapping[str, Any]], dict[str, Any]]
Found = tuple[Sequence[tuple[str, ...]], Convert]
ADAMS = ("Adam", "AdamW", "NAdam", "RAdam")
_SAME = "it means the same in both"


def _became(slot: str, outcome: str, other: str) -> tuple[str, str, str, str]:
    """The line of a slot whose content moves to another slot."""
    return slot, outcome, f"it became {other}", other


def counterpart(source: str, target: str) -> Found | None:
    """What becomes of each slot from one algorithm to another, and how; None where it has no meaning there."""
    if source in ADAMS and target in ADAMS:
        return _within_adam(source, target)
    if source in ADAMS and target == "Adamax":
        report = [
            ("step", "exact", ""),
            ("exp_avg", "exact", _SAME),
            ("exp_inf", "approximate", "the root of the average square stands for the decayed maximum"),
            _became("exp_avg_sq", "approximate", "exp_inf"),
        ]
        return report, lambda old, _: {**_kept(old, "step", "exp_avg"), "exp_inf": _power(old["exp_avg_sq"], 0.5)}
    if source == "Adamax" and target in ADAMS:
        report = [
            ("step", "exact", ""),
            ("exp_avg", "exact", _SAME),
            ("exp_avg_sq", "approximate", "the square of the decayed maximum stands for the average square"),
            _became("exp_inf", "approximate", "exp_avg_sq"),
            *_product(target),
        ]
        return report, lambda old, new: _with_product(
            {**_kept(old, "step", "exp_avg"), "exp_avg_sq": _power(old["exp_inf"], 2.0)}, target, new
        )
    if source in ADAMS and target == "Lion":
        report = [
            ("exp_avg", "approximate", "an average over the decay rate of Adam, which Lion continues with its own"),
            ("exp_avg_sq", "dropped", "Lion has no second moment"),
            ("step", "dropped", "Lion counts no steps"),
        ]
        return report, lambda old, _: _kept(old, "exp_avg")
    if source in ADAMS and target == "Adafactor":
        report = [
            ("row_var, col_var", "exact", "the means of the average square over columns and rows"),
            ("variance", "exact", "the average square, for vectors"),
            ("step", "exact", "Adafactor's decay rate follows it"),
            ("exp_avg", "dropped", "Adafactor has no first moment"),
            ("exp_avg_sq", "dropped", "Adafactor keeps its means over rows and columns instead, or the variance"),
        ]
        return report, lambda old, _: _factored(old)
    if source in ADAMS and target == "Adafactor (transformers)":
        report = [
            ("exp_avg_sq_row, exp_avg_sq_col", "exact", "the means of the average square over columns and rows"),
            ("exp_avg_sq", "exact", "of vectors; matrices have its means instead"),
            ("step", "exact", "Adafactor's decay rate follows it"),
            ("RMS", "fresh", "computed anew at every step"),
            ("exp_avg", "dropped", "an average of gradients, and Adafactor with beta1 averages its updates"),
            ("max_exp_avg_sq", "dropped", "Adafactor has none"),
        ]
        return report, lambda old, _: _factored_as_transformers(old)
    if source == "Adafactor" and target in ADAMS:
        report = [
            ("exp_avg_sq", "approximate", "rebuilt from its means over rows and columns"),
            ("exp_avg", "fresh", "Adafactor keeps none: zeros"),
            ("step", "exact", ""),
            ("row_var, col_var, variance", "dropped", f"{target} has none: they went into exp_avg_sq"),
            *_product(target),
        ]
        return report, lambda old, new: _with_product(_unfactored(old), target, new)
    if source in ADAMS and target == "Muon":
        report = [
            ("momentum_buffer", "exact", "the same average of gradients as exp_avg"),
            _became("exp_avg", "exact", "momentum_buffer"),
            ("exp_avg_sq", "dropped", "Muon has no second moment"),
            ("step, max_exp_avg_sq", "dropped", "Muon has none"),
        ]
        return report, lambda old, _: {"momentum_buffer": old["exp_avg"]} if "exp_avg" in old else {}
    if source == "Muon" and target in ADAMS:
        reason = f"{target} needs a second moment beside it, which Muon does not keep: it starts without state"
        return [("momentum_buffer", "dropped", reason)], lambda *_: {}
    if (source, target) in (("SGD", "Muon"), ("Muon", "SGD")):
        report = [("momentum_buffer", "exact", "a sum in SGD and an average in Muon: times 1 - momentum, or over it")]
        return report, lambda old, new: _momentum(old, new, to_average=target == "Muon")
    return None


def _within_adam(source: str, target: str) -> Found:
    report = [("step", "exact", ""), ("exp_avg", "exact", _SAME), ("exp_avg_sq", "exact", _SAME)]
    if source == "NAdam":
        report.append(("mu_product", "dropped", f"{target} has none"))
    report += _product(target)
    if target not in ("Adam", "AdamW"):
        report.append(("max_exp_avg_sq", "dropped", f"{target} has none"))
    keep = ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if target in ("Adam", "AdamW") else ()))
    return report, lambda old, new: _with_product(_kept(old, *keep), target, new)


def _product(target: str) -> list[tuple[str, str, str]]:
    """The line of NAdam's running product."""
    line = ("mu_product", "exact", "computed from the step count, betas and momentum_decay")
    return [line] if target == "NAdam" else []


def _kept(old: Slots, *slots: str) -> dict[str, Any]:
    return {slot: old[slot] for slot in slots if slot in old}


def _power(value: Any, exponent: float) -> Any:
    return backend_of(value).power(value, exponent)


def _with_product(made: dict[str, Any], target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """NAdam's running product of momentum coefficients, as its steps would have computed it."""
    if target == "NAdam":
        beta, decay = options["betas"][0], options["momentum_decay"]
        product = 1.0
        for step in range(1, int(number_of(made["step"])) + 1):
            product *= beta * (1.0 - 0.5 * 0.96 ** (step * decay))
        like = made["step"]
        made = {"step": like, "mu_product": scalar_like(like, product), **_kept(made, "exp_avg", "exp_avg_sq")}
    return made


def scalar_like(like: Any, value: float) -> Any:
    """A number as a tensor of the same kind as another."""
    return backend_of(like).full(like, (), value)


def _factored(old: Slots) -> dict[str, Any]:
    square = old["exp_avg_sq"]
    backend, shape = backend_of(square), shape_of(square) or ()
    if len(shape) < 2:
        return {"step": old["step"], "variance": square}
    means = {slot: backend.mean([square], [dim], ()) for slot, dim in _means(len(shape))}
    return {"step": old["step"], **means}


def _factored_as_transformers(old: Slots) -> dict[str, Any]:
    found = _factored(old)
    made: dict[str, Any] = {"step": int(number_of(found["step"])), "RMS": 0.0}
    if "variance" in found:
        return {**made, "exp_avg_sq": found["variance"]}
    backend, shape = backend_of(found["row_var"]), shape_of(old["exp_avg_sq"]) or ()
    rows, cols = shape[:-1], (*shape[:-2], shape[-1])
    made["exp_avg_sq_row"] = backend.reshape(found["row_var"], rows)
    return {**made, "exp_avg_sq_col": backend.reshape(found["col_var"], cols)}


def _means(rank: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("row_var", rank - 1), ("col_var", rank - 2)


def _unfactored(old: Slots) -> dict[str, Any]:
    square = old.get("variance")
    if square is None:
        row, col = old["row_var"], old["col_var"]
        rows, cols = shape_of(row) or (), shape_of(col) or ()
        square = backend_of(row).outer(row, col, (*rows[:-1], cols[-1]))
    average = backend_of(square).full(square, shape_of(square) or (), 0.0)
    return {"step": old["step"], "exp_avg": average, "exp_avg_sq": square}


def _momentum(old: Slots, options: Mapping[str, Any], *, to_average: bool) -> dict[str, Any]:
    buffer = old.get("momentum_buffer")
    if buffer is None:
        return {}
    factor = 1.0 - float(number_of(options["momentum"]))
    if not factor:
        return {"momentum_buffer": copied(buffer)}
    return {"momentum_buffer": backend_of(buffer).multiply(buffer, factor if to_average else 1.0 / factor)}
