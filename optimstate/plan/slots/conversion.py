"""From the state of one optimizer to that of another: what has a meaning in both, and what is lost.

The exponential averages of the gradient and of its square mean the same in the whole Adam family; Adafactor keeps
means of the latter; a momentum buffer of SGD is the average that Muon keeps, but for a factor, and the first average of
Adam is that of Muon. bitsandbytes' optimizers are those of the same name with slots of their own, which `quantized`
codes and decodes. What has no meaning is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optimstate.plan.expressions.evaluate import backend_of, copied, number_of, shape_of
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.slots import quantized
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.algorithms.registry import ALGORITHMS
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.optimizer import Group, OptimizerState, Slots

__all__ = ["TARGETS", "Conversion", "Lost", "option_names", "plan_conversion"]

Convert = Callable[[Slots, Mapping[str, Any]], dict[str, Any]]


class Lost(Record):
    """One line of the report: a slot of the old or new state, what becomes of it, and why.

    Attributes:
        slot: Its name.
        outcome: `exact`, `approximate`, `fresh` or `dropped`.
        reason: Why.
    """

    slot: str
    outcome: str
    reason: str


class Conversion(Record):
    """How the state of one algorithm becomes that of another.

    Attributes:
        source: The algorithm it is.
        target: The one it becomes.
        keeps_betas: Whether decay rates mean the same in both.
        report: What becomes of each slot.
        convert: Makes the new slots of a parameter from the old ones and its group's new options.
        given: Options that the plan sets, which stay as they are.
    """

    source: str
    target: str
    report: tuple[Lost, ...]
    convert: Convert
    keeps_betas: bool = True
    given: frozenset[str] = frozenset()

    def new_slots(self, shape: Shape | None) -> Iterator[Lost]:
        """The lines of slots that a parameter of this shape has afterwards, each of one slot."""
        goal = next((found for found in ALGORITHMS if found.name == self.target), None)
        for line in self.report:
            for slot in line.slot.split(", ") if line.outcome != "dropped" else ():
                if goal is None or shape is None or goal.holds(slot, len(shape)):
                    yield line._replace(slot=slot)

    def apply(self, state: OptimizerState) -> OptimizerState:
        """The converted state; parameters without state have none afterwards either."""
        made: dict[Any, Slots] = {}
        groups = []
        for group in state.groups:
            options = _options(self.target, group.options, keeps_betas=self.keeps_betas, given=self.given)
            for key in group.params:
                slots = state.state.get(key)
                if slots and (found := self.convert(slots, options)):
                    made[key] = found
            order = tuple(options) + tuple(key for key in group.keys if key in ("params", "param_names"))
            groups.append(Group(options, group.params, group.names, order))
        ordered = {key: made[key] for key in state.state if key in made}
        kept = {key: state.state[key] for key in state.orphans()}
        return OptimizerState(tuple(groups), {**ordered, **kept}, state.node)


_BASIC = {"lr": 1e-3, "weight_decay": 0.0, "maximize": False, "foreach": None}
_TRACED = {"capturable": False, "differentiable": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, **_BASIC, **_TRACED, "fused": None}
    | {"decoupled_weight_decay": False},
    "NAdam": {"betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3, **_BASIC, **_TRACED}
    | {"decoupled_weight_decay": False},
    "RAdam": {"betas": (0.9, 0.999), "eps": 1e-8, **_BASIC, **_TRACED, "decoupled_weight_decay": False},
    "Adamax": {"betas": (0.9, 0.999), "eps": 1e-8, **_BASIC, **_TRACED},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "Adafactor": {"beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, **_BASIC},
    "Adafactor (transformers)": {"lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8}
    | {"beta1": None, "weight_decay": 0.0, "scale_parameter": True, "relative_step": True, "warmup_init": False},
    "SGD": {"momentum": 0.9, "dampening": 0.0, "nesterov": False, **_BASIC, "differentiable": False, "fused": None},
    "Muon": {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "eps": 1e-7, "ns_steps": 5}
    | {"ns_coefficients": (3.4445, -4.775, 2.0315), "adjust_lr_fn": None},
}
_CODED = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_CODED_ADAM = {**_CODED, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
_CODED_LION = {**_CODED, "lr": 1e-4, "betas": (0.9, 0.99), "eps": 0.0}
_DEFAULTS |= {f"{name}{bits}bit": _CODED_ADAM for name in ("Adam", "AdamW") for bits in (8, 32)}
_DEFAULTS |= {f"Lion{bits}bit": _CODED_LION for bits in (8, 32)}
_DEFAULTS["AdamW"] = {**_DEFAULTS["Adam"], "decoupled_weight_decay": True}
TARGETS = tuple(_DEFAULTS)
"""The optimizers that there is a conversion to."""
# Keys that schedulers store in groups; kept as they are.
_SCHEDULED = ("initial_lr", "max_lr", "min_lr", "swa_lr", "name")
# The same word for other things: epsilons and decay rates do not carry over between these families.
_OWN = {
    "Adafactor": {"eps"},
    "Adafactor (transformers)": {"eps"},
    "Muon": {"eps"},
    "Lion8bit": {"eps"},
    "Lion32bit": {"eps"},
}


def _options(
    target: str, old: Mapping[str, Any], *, keeps_betas: bool, given: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The options of a group: those both have as they were, the others at the new algorithm's defaults."""
    own = _OWN.get(target, set()) | ({"eps"} if isinstance(old.get("eps"), tuple | list) else set())
    own = (own | {"decoupled_weight_decay"} | (set() if keeps_betas else {"betas"})) - given
    made = {key: old.get(key, value) if key not in own else value for key, value in _DEFAULTS[target].items()}
    return {**made, **{key: old[key] for key in _SCHEDULED if key in old}}


def plan_conversion(
    source: Algorithm | None,
    target: str,
    state: OptimizerState,
    shapes: Mapping[str, Shape | None],
    problems: list[Problem],
    *,
    options: Sequence[Mapping[str, Any]] | None = None,
    given: frozenset[str] = frozenset(),
) -> Conversion | None:
    """How to convert; None, with a problem noted, where it has no meaning, and None where nothing changes.

    Args:
        source: The algorithm whose state it is; None where it was not recognised.
        target: The name of the other.
        state: What is converted, of which nothing is read but the names of slots and options.
        shapes: Of the result's parameters, where known.
        problems: Added to.
        options: Of the groups that are converted; those of `state` by default.
        given: Options that the plan sets, which stay as they are.
    """
    options = [group.options for group in state.groups] if options is None else options
    if target not in _DEFAULTS:
        message = f"optimizer = {target!r}: there is no conversion to it"
        problems.append(Problem("conversion", message, remedy=f"choose one of {', '.join(_DEFAULTS)}"))
        return None
    if source is None:
        message = f"the optimizer was not recognised, so its state cannot become that of {target}"
        problems.append(Problem("conversion", message))
        return None
    name = "Adam" if source.name == "Adam or AdamW" else source.name
    if name == target:
        return None
    goal = target.removesuffix("8bit").removesuffix("32bit")
    if name == "bitsandbytes":
        found = _unpacked(state, goal, packed=goal != target)
    else:
        found = _conversion(name, goal) if name != goal else _unchanged(goal)
    if found is not None and goal != target:
        slots = {slot for found in state.state.values() for slot in quantized.unnested(found)}
        found = _packed(*found, bits=8 if target.endswith("8bit") else 32, old=slots)
    if found is None:
        message = f"the state of {source.name} has no meaning in {target}"
        remedy = 'rename and load the weights, and start the optimizer anew (fresh = "**")'
        problems.append(Problem("conversion", message, remedy=remedy))
        return None
    if target == "Muon" and (other := [key for key, shape in shapes.items() if shape is not None and len(shape) != 2]):
        message = f"Muon takes matrices alone, and {other[0]!r} has the shape {list(shapes[other[0]] or ())}"
        problems.append(Problem("conversion", message, names=tuple(other)))
    report, convert = found
    keeps_betas = goal != "Lion" or name in ("Lion", "bitsandbytes")
    if name in _ADAMS and goal == "Muon" and any(_other_average(group, given) for group in options):
        reason = "an average over the decay rate betas[0], which Muon continues with its momentum"
        report = [("momentum_buffer", "approximate", reason), *report[1:]]
    return Conversion(source.name, target, tuple(Lost(*line) for line in report), convert, keeps_betas, given)


def option_names(target: str) -> tuple[str, ...]:
    """The options that groups of an algorithm have, and those that schedulers add."""
    return (*_DEFAULTS.get(target, ()), *_SCHEDULED) if target in _DEFAULTS else ()


def _other_average(group: Mapping[str, Any], given: frozenset[str]) -> bool:
    momentum = _options("Muon", group, keeps_betas=True, given=given)["momentum"]
    return "betas" not in group or number_of(group["betas"][0]) != number_of(momentum)


Found = tuple[Sequence[tuple[str, str, str]], Convert]
_CODED_SLOTS = {"exp_avg": "state1", "exp_avg_sq": "state2"}


def _unchanged(name: str) -> Found:
    kept = ("exp_avg",) if name == "Lion" else ("step", *_CODED_SLOTS)
    return [(slot, "exact", "") for slot in kept], lambda old, _: dict(old)


def _unpacked(state: OptimizerState, goal: str, *, packed: bool) -> Found | None:
    """From bitsandbytes' slots; to slots of its own for the same moments, codes stay what they are."""
    family = _coded_family(state)
    if family is None:
        return None
    same = goal == family or (family == "AdamW" and goal == "Adam")
    if same and packed:
        return _unchanged(family)[0], lambda old, _: quantized.unnested(old)
    inner = _unchanged(family) if same else _conversion(family, goal)
    if inner is None:
        return None
    report, convert = inner
    if any("qmap2" in quantized.unnested(slots) for slots in state.state.values()):
        zeros = "as its codes say: 0 where it was far below its block's greatest, where first updates can be large"
        report = [
            (*line[:2], "; ".join(filter(None, (line[2], zeros)))) if line[0] == "exp_avg_sq" else line
            for line in report
        ]

    def converting(old: Slots, options: Mapping[str, Any]) -> dict[str, Any]:
        own = quantized.unnested(old)
        made = {slot: quantized.decoded(own, name[-1]) for slot, name in _CODED_SLOTS.items() if name in own}
        step = {} if family == "Lion" else {"step": _scalar_like(made["exp_avg"], float(number_of(own["step"])))}
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


def _packed(report: Sequence[tuple[str, str, str]], convert: Convert, *, bits: int, old: set[str]) -> Found:
    """To bitsandbytes' slots: in codes of 8 bits, or in 32. What an 8-bit optimizer of its own has, stays as it is."""
    lines = []
    stays = bits == 8 and "qmap1" in old
    for slot, outcome, reason in report:
        if bits == 8 and slot in _CODED_SLOTS and outcome != "dropped" and not (stays and outcome == "exact"):
            bound = quantized.error_bound(signed=slot == "exp_avg")
            loss = f"in codes of 8 bits, within {bound:.2%} of the greatest of each {quantized.BLOCK} neighbours"
            lines.append((slot, "approximate", "; ".join(filter(None, (reason, loss)))))
        else:
            lines.append((slot, outcome, reason))
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


_ADAMS = ("Adam", "AdamW", "NAdam", "RAdam")
_SAME = "it means the same in both"


def _conversion(source: str, target: str) -> Found | None:
    if source in _ADAMS and target in _ADAMS:
        return _within_adam(source, target)
    if source in _ADAMS and target == "Adamax":
        report = [
            ("step", "exact", ""),
            ("exp_avg", "exact", _SAME),
            ("exp_inf", "approximate", "the root of the average square stands for the decayed maximum"),
        ]
        return report, lambda old, _: {**_kept(old, "step", "exp_avg"), "exp_inf": _power(old["exp_avg_sq"], 0.5)}
    if source == "Adamax" and target in _ADAMS:
        report = [
            ("step", "exact", ""),
            ("exp_avg", "exact", _SAME),
            ("exp_avg_sq", "approximate", "the square of the decayed maximum stands for the average square"),
        ]
        return report, lambda old, new: _with_product(
            {**_kept(old, "step", "exp_avg"), "exp_avg_sq": _power(old["exp_inf"], 2.0)}, target, new
        )
    if source in _ADAMS and target == "Lion":
        report = [
            ("exp_avg", "approximate", "an average over the decay rate of Adam, which Lion continues with its own"),
            ("exp_avg_sq", "dropped", "Lion has no second moment"),
            ("step", "dropped", "Lion counts no steps"),
        ]
        return report, lambda old, _: _kept(old, "exp_avg")
    if source in _ADAMS and target == "Adafactor":
        report = [
            ("row_var, col_var", "exact", "the means of the average square over columns and rows"),
            ("variance", "exact", "the average square, for vectors"),
            ("step", "exact", "Adafactor's decay rate follows it"),
            ("exp_avg", "dropped", "Adafactor has no first moment"),
            ("exp_avg_sq", "dropped", "Adafactor keeps its means over rows and columns instead, or the variance"),
        ]
        return report, lambda old, _: _factored(old)
    if source in _ADAMS and target == "Adafactor (transformers)":
        report = [
            ("exp_avg_sq_row, exp_avg_sq_col", "exact", "the means of the average square over columns and rows"),
            ("exp_avg_sq", "exact", "of vectors; matrices have its means instead"),
            ("step", "exact", "Adafactor's decay rate follows it"),
            ("RMS", "fresh", "computed anew at every step"),
            ("exp_avg", "dropped", "Adafactor without beta1 has no first moment"),
            ("max_exp_avg_sq", "dropped", "Adafactor has none"),
        ]
        return report, lambda old, _: _factored_as_transformers(old)
    if source == "Adafactor" and target in _ADAMS:
        report = [
            ("exp_avg_sq", "approximate", "rebuilt from its means over rows and columns"),
            ("exp_avg", "fresh", "Adafactor keeps none: zeros"),
            ("step", "exact", ""),
            ("row_var, col_var, variance", "dropped", f"{target} has none: they went into exp_avg_sq"),
        ]
        return report, lambda old, new: _with_product(_unfactored(old), target, new)
    if source in _ADAMS and target == "Muon":
        report = [
            ("momentum_buffer", "exact", "the same average of gradients as exp_avg"),
            ("exp_avg", "exact", "it became momentum_buffer"),
            ("exp_avg_sq", "dropped", "Muon has no second moment"),
            ("step, max_exp_avg_sq", "dropped", "Muon has none"),
        ]
        return report, lambda old, _: {"momentum_buffer": old["exp_avg"]} if "exp_avg" in old else {}
    if source == "Muon" and target in _ADAMS:
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
    if target == "NAdam":
        report.append(("mu_product", "exact", "computed from the step count, betas and momentum_decay"))
    if target not in ("Adam", "AdamW"):
        report.append(("max_exp_avg_sq", "dropped", f"{target} has none"))
    keep = ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if target in ("Adam", "AdamW") else ()))
    return report, lambda old, new: _with_product(_kept(old, *keep), target, new)


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
        made = {"step": like, "mu_product": _scalar_like(like, product), **_kept(made, "exp_avg", "exp_avg_sq")}
    return made


def _scalar_like(like: Any, value: float) -> Any:
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
